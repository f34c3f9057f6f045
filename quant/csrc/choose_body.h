// Codes of the trellis code, as trellis.h says; compiled once for each instruction set.
// No include guard on purpose: MOERT_ISA names the namespace.
#include <cmath>
#include <utility>

#include "trellis.h"

namespace moert {
namespace MOERT_ISA {

constexpr int kWays = 16;  // lanes of a vector

inline f32x16 permute(f32x16 v, i32x16 places) {
#if defined(__clang__)
  f32x16 result;
  for (int lane = 0; lane < kWays; lane++) result[lane] = v[places[lane]];
  return result;
#else
  return __builtin_shuffle(v, places);
#endif
}

// Lanes are the states that a survivor can be in after a column: 16 of codes of 2 bits, 8 of 1 bit, there for two rows.
template <int Bits>
struct Lanes {
  static constexpr int kStates = Bits == 2 ? 16 : 8, kRows = kWays / kStates, kChoices = 1 << Bits;
  static constexpr int kKept = kStates / kChoices;  // states that the older codes of a state can make

  // The lane of the state before that of `lane`, where `oldest` is the code that has left the window since.
  static int before(int lane, int oldest) {
    const int state = lane % kStates;
    return lane - state + (state % kKept * kChoices + oldest);
  }
};

// The survivor of every lane: its cost so far and the targets of the columns to come, which its errors have moved.
struct Survivors {
  f32x16 cost, targets[kMostColumns], ahead[kMostColumns];
};

template <int Bits, bool Ahead>
inline void choose_rows(const TrellisBlock& block, const float* targets, const LookAhead& look, uint8_t* starts,
                        uint8_t* ends, uint8_t* codes, int64_t code_stride, float* left, float* ahead_left, int64_t first) {
  using L = Lanes<Bits>;
  const int columns = block.columns;
  Survivors buffers[2];
  Survivors *now = &buffers[0], *next = &buffers[1];
  i32x16 oldest[kMostColumns];
  f32x16 error[kMostColumns], ahead_error[kMostColumns], level[L::kChoices], scale;
  i32x16 places[L::kChoices];
  int64_t row_of[kWays];
  for (int lane = 0; lane < kWays; lane++) {
    const int64_t row = first + lane / L::kStates;
    row_of[lane] = row < block.rows ? row : block.rows - 1;  // beyond the last: the last again, and not kept
    scale[lane] = block.scales[row_of[lane]];
    const uint8_t start = starts[row_of[lane]];
    now->cost[lane] = start == kAnyState || start == lane % L::kStates ? 0 : 1e30f;
    for (int x = 0; x < L::kChoices; x++) {
      places[x][lane] = L::before(lane, x);
      level[x][lane] = block.table[lane % L::kStates * L::kChoices + x];
    }
  }
  for (int x = 0; x < L::kChoices; x++) level[x] *= scale;
  for (int k = 0; k < columns; k++)
    for (int lane = 0; lane < kWays; lane++) {
      now->targets[k][lane] = targets[row_of[lane] * block.stride + k];
      if (Ahead) now->ahead[k][lane] = look.targets[row_of[lane] * block.stride + k];
    }
  const f32x16 near = scale * look.near, far = scale * look.far, middle = (near + far) * 0.5f;
  for (int j = 0; j < columns; j++) {
    f32x16 least = all(INFINITY), kept = {}, kept_ahead = {};
    i32x16 place = places[0], choice = {};
    for (int x = 0; x < L::kChoices; x++) {
      const f32x16 rest = permute(now->targets[j], places[x]) - level[x];
      f32x16 harm = rest * rest, rest_ahead = {};
      if (Ahead) {
        rest_ahead = permute(now->ahead[j], places[x]) - level[x];
        const f32x16 size = rest_ahead < 0 ? -rest_ahead : rest_ahead;
        const f32x16 beyond = size < middle ? size - near : size - far;
        rest_ahead = rest_ahead < 0 ? -beyond : beyond;
        harm += look.weight * (rest_ahead * rest_ahead);
      }
      const f32x16 cost = permute(now->cost, places[x]) + block.weights[j] * harm;
      const i32x16 better = cost < least;
      least = better ? cost : least;
      kept = better ? rest : kept;
      if (Ahead) kept_ahead = better ? rest_ahead : kept_ahead;
      place = better ? places[x] : place;
      choice = better ? i32x16{} + x : choice;
    }
    next->cost = least;
    oldest[j] = choice;
    error[j] = kept;
    if (Ahead) ahead_error[j] = kept_ahead;
    const float* coupling = block.coupling + j * columns;
    for (int k = j + 1; k < columns; k++) {
      next->targets[k] = permute(now->targets[k], place) - kept * coupling[k];
      if (Ahead) next->ahead[k] = permute(now->ahead[k], place) - kept_ahead * coupling[k];
    }
    std::swap(now, next);
  }
  for (int r = 0; r < L::kRows && first + r < block.rows; r++) {
    const int64_t row = first + r;
    int lane = r * L::kStates;
    for (int s = 1; s < L::kStates; s++)
      if (now->cost[r * L::kStates + s] < now->cost[lane]) lane = r * L::kStates + s;
    if (ends[row] != kAnyState) lane = r * L::kStates + ends[row];
    for (int j = columns - 1; j >= 0; j--) {
      if (j == block.kept - 1) ends[row] = uint8_t(lane % L::kStates);
      if (j < block.kept) {
        codes[row * code_stride + j] = uint8_t(lane % L::kStates / L::kKept);
        left[row * block.kept + j] = error[j][lane];
        if (Ahead) ahead_left[row * block.kept + j] = ahead_error[j][lane];
      }
      lane = L::before(lane, oldest[j][lane]);
    }
    starts[row] = uint8_t(lane % L::kStates);
  }
}

template <int Bits, bool Ahead>
inline void choose(const TrellisBlock& block, const float* targets, const LookAhead& look, uint8_t* starts,
                   uint8_t* ends, uint8_t* codes, int64_t code_stride, float* left, float* ahead_left) {
  for (int64_t row = 0; row < block.rows; row += Lanes<Bits>::kRows)
    choose_rows<Bits, Ahead>(block, targets, look, starts, ends, codes, code_stride, left, ahead_left, row);
}

void choose_trellis(const TrellisBlock& block, const float* targets, const LookAhead& look, uint8_t* starts,
                    uint8_t* ends, uint8_t* codes, int64_t code_stride, float* left, float* ahead_left) {
  if (block.bits == 2 && look.targets)
    choose<2, true>(block, targets, look, starts, ends, codes, code_stride, left, ahead_left);
  else if (block.bits == 2)
    choose<2, false>(block, targets, look, starts, ends, codes, code_stride, left, ahead_left);
  else if (look.targets)
    choose<1, true>(block, targets, look, starts, ends, codes, code_stride, left, ahead_left);
  else
    choose<1, false>(block, targets, look, starts, ends, codes, code_stride, left, ahead_left);
}

}  // namespace MOERT_ISA
}  // namespace moert
