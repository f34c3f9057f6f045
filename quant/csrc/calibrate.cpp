#include "calibrate.h"

#include <cmath>
#include <cstring>

// One loop over 16 rows is what the compiler turns into vector instructions, for several processors where it can.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define MOERT_CLONES __attribute__((target_clones("arch=skylake-avx512", "avx2,fma", "default"), flatten))
#else
#define MOERT_CLONES
#endif

namespace moert {
namespace {

constexpr int kLanes = 16, kMaxWidths = 8, kMaxGroup = 128, kRounds = 3;
constexpr float kClips[] = {1.0f, 0.93f, 0.86f, 0.79f, 0.72f, 0.65f, 0.58f, 0.5f, 0.42f};

struct alignas(64) Lanes {
  float v[kLanes];
};
struct alignas(64) Codes {
  int v[kLanes];
};

inline int limit(int c, int least, int most) { return c < least ? least : c > most ? most : c; }

// Nearest code of `width` bits. In float first: a huge quotient has no int.
inline int nearest(float target, float inverse, int width) {
  const float half = float(1 << (width - 1)), most = 2 * half - 1;
  float place = target * inverse + half;
  place = place > 0 ? place : 0;
  return int(place < most ? place : most);
}

// The codes of 16 rows in one column: of the nearest one of the largest width and the nearest ones to it that have the
// prefixes around the best of each smaller width, the one whose weighted error over all widths is least.
inline void best_codes(const Nesting& n, const Lanes* target, const Lanes* scale, const Lanes* inverse, Codes& best) {
  const int widths = n.num_widths, top = n.widths[widths - 1];
  Codes wide;
  Lanes least;
  for (int r = 0; r < kLanes; r++) {
    wide.v[r] = nearest(target[widths - 1].v[r], inverse[widths - 1].v[r], top);
    least.v[r] = INFINITY;
    best.v[r] = 0;
  }
  for (int b = 0; b < widths; b++) {
    const int shift = top - n.widths[b], most = (1 << n.widths[b]) - 1;
    for (int step = b + 1 < widths ? -1 : 0; step <= (b + 1 < widths ? 1 : 0); step++) {
      Codes code;
      Lanes cost{};
      for (int r = 0; r < kLanes; r++) {
        const int prefix = limit(nearest(target[b].v[r], inverse[b].v[r], n.widths[b]) + step, 0, most) << shift;
        code.v[r] = limit(wide.v[r], prefix, prefix + (1 << shift) - 1);
      }
      for (int i = 0; i < widths; i++) {
        const int drop = top - n.widths[i];
        const float middle = float((1 << n.widths[i]) - 1) / 2, weight = n.weights[i];
        for (int r = 0; r < kLanes; r++) {
          const float rest = target[i].v[r] - scale[i].v[r] * (float(code.v[r] >> drop) - middle);
          cost.v[r] += weight * rest * rest;
        }
      }
      for (int r = 0; r < kLanes; r++) {
        const bool better = cost.v[r] < least.v[r];
        least.v[r] = better ? cost.v[r] : least.v[r];
        best.v[r] = better ? code.v[r] : best.v[r];
      }
    }
  }
}

// Rows beyond the last repeat it.
void gather(const Nesting& n, const float* from, int64_t tile, Lanes* to) {
  for (int r = 0; r < kLanes; r++) {
    const int64_t row = tile * kLanes + r < n.rows ? tile * kLanes + r : n.rows - 1;
    for (int k = 0; k < n.group_size; k++) to[k].v[r] = from[row * n.stride + k];
  }
}

// Least-squares scales of given codes, and the weighted error that they leave.
inline void fit(const Nesting& n, const Lanes (*target)[kMaxGroup], const float* column_weights, const Codes* codes,
                Lanes* scale, Lanes& cost) {
  const int top = n.widths[n.num_widths - 1];
  cost = Lanes{};
  for (int b = 0; b < n.num_widths; b++) {
    const int drop = top - n.widths[b];
    const float middle = float((1 << n.widths[b]) - 1) / 2;
    Lanes product{}, square{}, energy{};
    for (int k = 0; k < n.group_size; k++)
      for (int r = 0; r < kLanes; r++) {
        const float level = float(codes[k].v[r] >> drop) - middle, t = target[b][k].v[r];
        product.v[r] += column_weights[k] * t * level;
        square.v[r] += column_weights[k] * level * level;
        energy.v[r] += column_weights[k] * t * t;
      }
    for (int r = 0; r < kLanes; r++) {
      const float s = product.v[r] / square.v[r];
      scale[b].v[r] = s > 1e-30f ? s : 1e-30f;
      cost.v[r] += n.weights[b] * (energy.v[r] - s * product.v[r]);
    }
  }
}

inline void keep_better(const Nesting& n, const Lanes& cost, const Lanes* scale, Lanes& least, Lanes* best) {
  for (int b = 0; b < n.num_widths; b++)
    for (int r = 0; r < kLanes; r++) best[b].v[r] = cost.v[r] < least.v[r] ? scale[b].v[r] : best[b].v[r];
  for (int r = 0; r < kLanes; r++) least.v[r] = cost.v[r] < least.v[r] ? cost.v[r] : least.v[r];
}

inline void invert(const Nesting& n, const Lanes* scale, Lanes* inverse) {
  for (int b = 0; b < n.num_widths; b++)
    for (int r = 0; r < kLanes; r++) inverse[b].v[r] = 1 / scale[b].v[r];
}

}  // namespace

MOERT_CLONES
void fit_scales(const Nesting& n, const float* targets, const float* column_weights, float* scales) {
  const int widths = n.num_widths, top = n.widths[widths - 1];
  Lanes target[kMaxWidths][kMaxGroup], scale[kMaxWidths], best[kMaxWidths], inverse[kMaxWidths];
  Codes codes[kMaxGroup];
  for (int64_t tile = 0; tile * kLanes < n.rows; tile++) {
    for (int b = 0; b < widths; b++) gather(n, targets + b * n.rows * n.stride, tile, target[b]);
    Lanes least, cost, peak;
    for (int r = 0; r < kLanes; r++) least.v[r] = INFINITY, peak.v[r] = 1e-30f;
    for (int k = 0; k < n.group_size; k++)
      for (int r = 0; r < kLanes; r++) {
        const float size = std::fabs(target[widths - 1][k].v[r]);
        peak.v[r] = size > peak.v[r] ? size : peak.v[r];
      }
    for (const float clip : kClips) {
      for (int k = 0; k < n.group_size; k++)
        for (int r = 0; r < kLanes; r++)
          codes[k].v[r] =
              nearest(target[widths - 1][k].v[r], float(1 << (top - 1)) / (peak.v[r] * clip), top);
      fit(n, target, column_weights, codes, scale, cost);
      keep_better(n, cost, scale, least, best);
    }
    for (int round = 0; round < kRounds; round++) {
      invert(n, best, inverse);
      for (int k = 0; k < n.group_size; k++) {
        Lanes column[kMaxWidths];
        for (int b = 0; b < widths; b++) column[b] = target[b][k];
        best_codes(n, column, best, inverse, codes[k]);
      }
      fit(n, target, column_weights, codes, scale, cost);
      keep_better(n, cost, scale, least, best);
    }
    for (int b = 0; b < widths; b++)
      for (int r = 0; r < kLanes && tile * kLanes + r < n.rows; r++)
        scales[b * n.rows + tile * kLanes + r] = best[b].v[r];
  }
}

MOERT_CLONES
void choose_codes(const Nesting& n, const float* targets, const float* before, const float* coupling,
                  const float* scales, uint8_t* codes, int64_t code_stride, float* moved) {
  const int widths = n.num_widths, top = n.widths[widths - 1], columns = n.group_size;
  Lanes target[kMaxWidths][kMaxGroup], now[kMaxWidths][kMaxGroup], scale[kMaxWidths], inverse[kMaxWidths];
  for (int64_t tile = 0; tile * kLanes < n.rows; tile++) {
    const int rows = n.rows - tile * kLanes < kLanes ? int(n.rows - tile * kLanes) : kLanes;
    for (int b = 0; b < widths; b++) {
      gather(n, targets + b * n.rows * n.stride, tile, target[b]);
      if (before) gather(n, before + b * n.rows * n.stride, tile, now[b]);
      for (int r = 0; r < kLanes; r++)
        scale[b].v[r] = scales[b * n.rows + tile * kLanes + (r < rows ? r : rows - 1)];
    }
    invert(n, scale, inverse);
    for (int j = 0; j < columns; j++) {
      Lanes column[kMaxWidths];
      Codes code;
      for (int b = 0; b < widths; b++) column[b] = target[b][j];
      best_codes(n, column, scale, inverse, code);
      for (int r = 0; r < rows; r++) codes[(tile * kLanes + r) * code_stride + j] = uint8_t(code.v[r]);
      const float* row = coupling + j * columns;
      for (int b = 0; b < widths; b++) {
        const int drop = top - n.widths[b];
        const float middle = float((1 << n.widths[b]) - 1) / 2;
        Lanes move;
        for (int r = 0; r < kLanes; r++)
          move.v[r] = scale[b].v[r] * (float(code.v[r] >> drop) - middle) - (before ? now[b][j] : column[b]).v[r];
        for (int k = before ? 0 : j + 1; k < columns; k++)
          for (int r = 0; r < kLanes; r++) target[b][k].v[r] -= move.v[r] * row[k];
        for (int r = 0; r < rows; r++) moved[(b * n.rows + tile * kLanes + r) * columns + j] = move.v[r];
      }
    }
  }
}

}  // namespace moert
