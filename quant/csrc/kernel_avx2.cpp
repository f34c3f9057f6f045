// AVX2: a tile as two halves of 8 rows.
#define MOERT_ISA isa_avx2
#include "kernel_body.h"
#include "choose_body.h"
#include "planes_avx2.h"

namespace moert {
namespace MOERT_ISA {

constexpr int kPanelColumns = 512;

template <class Planes>
struct IsSigned : std::false_type {};
template <int... Bits>
struct IsSigned<TrellisPlanes<Bits...>> : std::true_type {};
template <>
struct IsSigned<AnyTrellisPlanes> : std::true_type {};

// Products of pairs of columns, in 16 bits. Levels are signed: the inputs take over their signs.
template <class Planes>
inline __m256i multiply(__m256i codes, __m256i columns) {
  if constexpr (IsSigned<Planes>::value)
    return _mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_sign_epi8(columns, codes));
  else
    return _mm256_maddubs_epi16(codes, columns);
}

// Products of pairs of columns are summed in 16 bits: how many quads of codes fit. Codes of 8 bits do not fit at all and
// are taken in two parts, low and high nibble.
template <class Planes>
struct Sums {
  static constexpr int kParts = Planes::kWidth == 8 ? 2 : 1;
  static constexpr int kBits = Planes::kWidth == 8 ? 4 : Planes::kWidth;
  static constexpr int kQuads = kBits <= 4 ? 8 : kBits == 5 ? 4 : kBits == 6 ? 2 : 1;
};
static_assert(8 * 2 * 127 * 15 <= 32767 && 4 * 2 * 127 * 31 <= 32767 && 2 * 2 * 127 * 63 <= 32767 && 2 * 127 * 127 <= 32767);

inline __m256i four_columns(const int8_t* q) {
  int32_t v;
  std::memcpy(&v, q, 4);
  return _mm256_set1_epi32(v);
}

// The sums of pairs, widened to 32 bits and doubled (the end of a group wants them so), of high nibbles times 16.
inline __m256i widen(__m256i pairs, int part) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(part ? 32 : 2)); }

// Splits codes into the parts whose products fit.
template <class Planes>
inline void split(__m256i codes, __m256i* parts) {
  if (Sums<Planes>::kParts == 1) {
    parts[0] = codes;
    return;
  }
  parts[0] = _mm256_and_si256(codes, every(0x0f0f0f0fu));
  parts[1] = _mm256_and_si256(_mm256_srli_epi32(codes, 4), every(0x0f0f0f0fu));
}

// Adds the dot products of 32 columns of a half tile with T tokens to dot[t].
template <class Planes, int T>
inline void add_products(const __m256i codes[8], const int8_t* const* q, __m256i* dot) {
  constexpr int kParts = Sums<Planes>::kParts, kQuads = Sums<Planes>::kQuads;
#pragma GCC unroll 8
  for (int begin = 0; begin < 8; begin += kQuads) {
    __m256i sum[T][kParts];
#pragma GCC unroll 8
    for (int i = begin; i < begin + kQuads; i++) {
      __m256i parts[kParts];
      split<Planes>(codes[i], parts);
      for (int t = 0; t < T; t++)
        for (int part = 0; part < kParts; part++) {
          const __m256i product = multiply<Planes>(parts[part], four_columns(q[t] + 4 * i));
          sum[t][part] = i == begin ? product : _mm256_add_epi16(sum[t][part], product);
        }
    }
    for (int t = 0; t < T; t++)
      for (int part = 0; part < kParts; part++) dot[t] = _mm256_add_epi32(dot[t], widen(sum[t][part], part));
  }
}

// What twice the dot product of a group is added to: minus the codes' midpoints. Levels have none.
template <class Planes>
inline __m256i middle(const NestedMatrix& w, const Activations& x, int64_t token, int64_t group) {
  if (IsSigned<Planes>::value) return _mm256_setzero_si256();
  return _mm256_set1_epi32(-int(unsigned(w.levels) * unsigned(x.sums[x.at(token, group)])));
}

// The end of a group for T tokens and 16 rows, dot[t] and dot[T + t] being its halves.
template <int T>
inline void add_group(const NestedMatrix& w, const Activations& x, int64_t tile, int64_t start, int count,
                      int64_t group, const __m256i* dot, __m256* total) {
  const uint8_t* place = w.scales_of(tile, group);
  const __m256 scale[2] = {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(place))),
                           _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(place + 16)))};
#pragma GCC unroll 4
  for (int t = 0; t < T; t++) {
    const __m256 input = _mm256_broadcast_ss(x.scales + x.at(start + (t < count ? t : count - 1), group));
    for (int half = 0; half < 2; half++) {
      const __m256 factor = _mm256_mul_ps(scale[half], input);
      total[half * T + t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot[half * T + t]), factor, total[half * T + t]);
    }
  }
}

template <int T>
inline void store_rows(const NestedMatrix& w, int64_t tile, int count, const __m256* total, float* out,
                       int64_t out_stride) {
  const int64_t left = w.rows - tile * kTileRows, rows = left < kTileRows ? left : kTileRows;
  for (int t = 0; t < count; t++) {
    float both[kTileRows];
    _mm256_storeu_ps(both, total[t]);
    _mm256_storeu_ps(both + 8, total[T + t]);
    std::memcpy(out + t * out_stride + tile * kTileRows, both, rows * sizeof(float));
  }
}

template <class Planes, int T>
void few_tokens(const NestedMatrix& w, const Activations& x, float* out, int64_t out_stride, int64_t first,
                int64_t last) {
  for (int64_t tile = first; tile < last; tile++) {
    __m256 total[2 * T] = {};
    for (int64_t group = 0; group < w.groups; group++) {
      if (tile + 1 < last) Planes::prefetch(w, tile + 1, group);
      __m256i dot[2 * T];
      for (int t = 0; t < T; t++) dot[t] = dot[T + t] = middle<Planes>(w, x, t, group);
      for (int block = 0; block < w.group_size / 32; block++) {
        const int8_t* q[T];
        for (int t = 0; t < T; t++) q[t] = x.q + x.at(t, group) * w.group_size + 32 * block;
        for (int half = 0; half < 2; half++) {
          __m256i codes[8];
          Planes::unpack(w, tile, group, block, half, codes);
          add_products<Planes, T>(codes, q, dot + half * T);
        }
      }
      add_group<T>(w, x, tile, 0, T, group, dot, total);
    }
    store_rows<T>(w, tile, T, total, out, out_stride);
  }
}

// A tile's groups [begin, end), unpacked and split: for each block of 32 columns and each of its quads the parts of one
// half, then those of the other.
template <class Planes>
inline void unpack_panel(const NestedMatrix& w, int64_t tile, int64_t begin, int64_t end, bool ahead, __m256i* panel) {
  constexpr int kParts = Sums<Planes>::kParts;
  for (int64_t group = begin; group < end; group++) {
    if (ahead) Planes::prefetch(w, tile + 1, group);
    for (int block = 0; block < w.group_size / 32; block++, panel += 16 * kParts)
      for (int half = 0; half < 2; half++) {
        __m256i codes[8];
        Planes::unpack(w, tile, group, block, half, codes);
        for (int i = 0; i < 8; i++) split<Planes>(codes[i], panel + (2 * i + half) * kParts);
      }
  }
}

template <class Planes>
void many_tokens(const NestedMatrix& w, const Activations& x, float* out, int64_t out_stride, int64_t first,
                 int64_t last) {
  // Sums of T tokens, two halves and all parts: eight registers of sixteen.
  constexpr int kParts = Sums<Planes>::kParts, kQuads = Sums<Planes>::kQuads, T = 4 / kParts;
  alignas(64) static thread_local __m256i panel[kPanelColumns / 4 * 4];
  const int64_t panel_groups = kPanelColumns / w.group_size;
  const int blocks = w.group_size / 32;
  for (int64_t tile = first; tile < last; tile++) {
    const int64_t rows_left = w.rows - tile * kTileRows, rows = rows_left < kTileRows ? rows_left : kTileRows;
    for (int64_t begin = 0; begin < w.groups; begin += panel_groups) {
      const int64_t end = begin + panel_groups < w.groups ? begin + panel_groups : w.groups;
      unpack_panel<Planes>(w, tile, begin, end, tile + 1 < last, panel);
      for (int64_t start = 0; start < x.tokens; start += T) {
        const int count = x.tokens - start < T ? int(x.tokens - start) : T;
        float* place = out + start * out_stride;
        __m256 total[2 * T] = {};
        for (int t = 0; begin && t < count; t++) {
          float both[kTileRows] = {};
          std::memcpy(both, place + t * out_stride + tile * kTileRows, rows * sizeof(float));
          total[t] = _mm256_loadu_ps(both), total[T + t] = _mm256_loadu_ps(both + 8);
        }
        const __m256i* codes = panel;
        for (int64_t group = begin; group < end; group++) {
          const int8_t* q[T];  // tokens beyond the last compute the last again; nothing is stored for them
          __m256i dot[2 * T];
          for (int t = 0; t < T; t++) {
            const int64_t token = start + (t < count ? t : count - 1);
            q[t] = x.q + x.at(token, group) * w.group_size;
            dot[t] = dot[T + t] = middle<Planes>(w, x, token, group);
          }
          for (int quads = 0; quads < 8 * blocks; quads += kQuads) {
            __m256i sum[2][T][kParts];
#pragma GCC unroll 8
            for (int i = 0; i < kQuads; i++, codes += 2 * kParts)
#pragma GCC unroll 4
              for (int t = 0; t < T; t++) {
                const __m256i columns = four_columns(q[t] + 4 * (quads + i));
#pragma GCC unroll 2
                for (int half = 0; half < 2; half++)
#pragma GCC unroll 2
                  for (int part = 0; part < kParts; part++) {
                    const __m256i product = multiply<Planes>(codes[half * kParts + part], columns);
                    __m256i& place = sum[half][t][part];
                    place = i == 0 ? product : _mm256_add_epi16(place, product);
                  }
              }
#pragma GCC unroll 4
            for (int t = 0; t < T; t++)
              for (int half = 0; half < 2; half++)
                for (int part = 0; part < kParts; part++)
                  dot[half * T + t] = _mm256_add_epi32(dot[half * T + t], widen(sum[half][t][part], part));
          }
          add_group<T>(w, x, tile, start, count, group, dot, total);
        }
        store_rows<T>(w, tile, count, total, place, out_stride);
      }
    }
  }
}

void nested_matmul(const NestedMatrix& w, const Activations& x, float* out, int64_t out_stride, int64_t first,
                   int64_t last) {
  const auto product = [&](auto planes) {
    using Planes = decltype(planes);
    switch (x.tokens) {
      case 1: return few_tokens<Planes, 1>(w, x, out, out_stride, first, last);
      case 2: return few_tokens<Planes, 2>(w, x, out, out_stride, first, last);
      default: return many_tokens<Planes>(w, x, out, out_stride, first, last);
    }
  };
  if (w.tables != nullptr) return with_trellis_planes<TrellisPlanes, AnyTrellisPlanes>(w, product);
  with_planes<FixedPlanes, AnyPlanes>(w, product);
}

}  // namespace MOERT_ISA

extern const Kernel kAvx2Kernel = {
    "avx2",
    [] { return bool(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")); },
    isa_avx2::quantise,
    isa_avx2::nested_matmul,
    isa_avx2::nested_dequantise,
    isa_avx2::raw_matmul,
    isa_avx2::silu_product,
    isa_avx2::search_codes,
    isa_avx2::choose_trellis,
};

}  // namespace moert
