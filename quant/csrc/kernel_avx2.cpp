// AVX2: a tile as two halves of 8 rows.
#define MOERT_ISA isa_avx2
#include "kernel_body.h"
#include "planes.h"

namespace moert {
namespace MOERT_ISA {

constexpr int kPanelColumns = 512;

inline __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline __m256i every(uint32_t mask) { return _mm256_set1_epi32(int(mask)); }

// Codes of 8 rows (lanes), half 0 or 1 of a tile, for the 32 columns of `block` of a group: codes[i] holds columns
// 4 * i ... 4 * i + 3.
template <int... Bits>
struct FixedPlanes : PlaneList<Bits...> {
  using PlaneList<Bits...>::kCount, PlaneList<Bits...>::bits, PlaneList<Bits...>::shift;

  static inline __attribute__((always_inline)) void unpack(const NestedMatrix& w, int64_t tile, int64_t group,
                                                           int block, int half, __m256i codes[8]) {
    const int64_t cell = tile * w.groups + group;
    const uint8_t* chunks[kCount];
    for (int p = 0; p < kCount; p++) chunks[p] = PlaneList<Bits...>::chunk(w, cell, block, p) + 32 * half;
#pragma GCC unroll 8
    for (int quad = 0; quad < 8; quad++) {
      __m256i code = _mm256_setzero_si256();
#pragma GCC unroll 8
      for (int p = 0; p < kCount; p++) {
        const int per_chunk = 8 / bits(p), up = shift(p) - bits(p) * (quad % per_chunk);
        __m256i word = load256(chunks[p] + 64 * (quad / per_chunk));
        word = up > 0 ? _mm256_slli_epi32(word, up) : up < 0 ? _mm256_srli_epi32(word, -up) : word;
        if (bits(p) < 8) word = _mm256_and_si256(word, every(0x01010101u * ((1u << bits(p)) - 1) << shift(p)));
        code = p == 0 ? word : _mm256_or_si256(code, word);
      }
      codes[quad] = code;
    }
  }
};

inline __m256i select(uint32_t mask, __m256i yes, __m256i no) {
  return _mm256_or_si256(_mm256_and_si256(yes, every(mask)), _mm256_andnot_si256(every(mask), no));
}

// The 4 bits of the default store: planes are interleaved until a byte holds the codes of quads i and i + 4, as in
// kernel_avx512.h.
template <>
struct FixedPlanes<2, 1, 1> : PlaneList<2, 1, 1> {
  static inline __attribute__((always_inline)) void unpack(const NestedMatrix& w, int64_t tile, int64_t group,
                                                           int block, int half, __m256i codes[8]) {
    const int64_t cell = tile * w.groups + group;
    const __m256i top = load256(chunk(w, cell, block, 0) + 32 * half);
    const __m256i rest = load256(chunk(w, cell, block, 0) + 32 * half + 64);
    const __m256i middle = load256(chunk(w, cell, block, 1) + 32 * half);
    const __m256i bottom = load256(chunk(w, cell, block, 2) + 32 * half);
    const __m256i even = select(0xaaaaaaaau, _mm256_add_epi8(middle, middle), bottom);
    const __m256i odd = select(0xaaaaaaaau, middle, _mm256_srli_epi32(bottom, 1));
    const __m256i first = select(0x0f0f0f0fu, top, _mm256_slli_epi32(rest, 4));
    const __m256i second = select(0x0f0f0f0fu, _mm256_srli_epi32(top, 4), rest);
    const __m256i pairs[4] = {
        select(0xccccccccu, _mm256_slli_epi32(first, 2), even),
        select(0xccccccccu, first, odd),
        select(0xccccccccu, _mm256_slli_epi32(second, 2), _mm256_srli_epi32(even, 2)),
        select(0xccccccccu, second, _mm256_srli_epi32(odd, 2)),
    };
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      codes[i] = _mm256_and_si256(pairs[i], every(0x0f0f0f0fu));
      codes[i + 4] = _mm256_and_si256(_mm256_srli_epi32(pairs[i], 4), every(0x0f0f0f0fu));
    }
  }
};

// The same for any planes, slower; their codes may have 8 bits.
struct AnyPlanes {
  static constexpr int kWidth = 8;
  static void prefetch(const NestedMatrix& w, int64_t tile, int64_t group) { moert::prefetch(w, tile, group); }

  static void unpack(const NestedMatrix& w, int64_t tile, int64_t group, int block, int half, __m256i codes[8]) {
    const int64_t cell = tile * w.groups + group;
    for (int quad = 0; quad < 8; quad++) {
      __m256i code = _mm256_setzero_si256();
      for (int p = 0; p < w.num_planes; p++) {
        const Plane& plane = w.planes[p];
        const int per_chunk = 8 / plane.bits;
        const uint8_t* chunks = plane.data + cell * plane.stride + 64 * plane.bits * block + 32 * half;
        const __m256i word = _mm256_srli_epi32(load256(chunks + 64 * (quad / per_chunk)), plane.bits * (quad % per_chunk));
        const __m256i bits = _mm256_and_si256(word, every(0x01010101u * ((1u << plane.bits) - 1)));
        code = _mm256_or_si256(code, _mm256_slli_epi32(bits, plane.shift));
      }
      codes[quad] = code;
    }
  }
};

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
          const __m256i product = _mm256_maddubs_epi16(parts[part], four_columns(q[t] + 4 * i));
          sum[t][part] = i == begin ? product : _mm256_add_epi16(sum[t][part], product);
        }
    }
    for (int t = 0; t < T; t++)
      for (int part = 0; part < kParts; part++) dot[t] = _mm256_add_epi32(dot[t], widen(sum[t][part], part));
  }
}

// What twice the dot product of a group is added to: minus the codes' midpoints.
inline __m256i middle(const NestedMatrix& w, const Activations& x, int64_t token, int64_t group) {
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
      for (int t = 0; t < T; t++) dot[t] = dot[T + t] = middle(w, x, t, group);
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
            dot[t] = dot[T + t] = middle(w, x, token, group);
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
                    const __m256i product = _mm256_maddubs_epi16(codes[half * kParts + part], columns);
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
  with_planes<FixedPlanes, AnyPlanes>(w, [&](auto planes) {
    using Planes = decltype(planes);
    switch (x.tokens) {
      case 1: return few_tokens<Planes, 1>(w, x, out, out_stride, first, last);
      case 2: return few_tokens<Planes, 2>(w, x, out, out_stride, first, last);
      default: return many_tokens<Planes>(w, x, out, out_stride, first, last);
    }
  });
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
};

}  // namespace moert
