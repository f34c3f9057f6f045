// AVX2: a tile as two halves of 8 rows. Products of bytes are summed in 16 bits, so codes are taken as nibbles: 8 products
// of a nibble (at most 15 * 127 * 2 for a pair of columns) fit before they are widened.
#define MOERT_ISA isa_avx2
#include <immintrin.h>

#include "kernel_body.h"

namespace moert {
namespace MOERT_ISA {

constexpr int kPanelColumns = 512;

// The bits that a plane of Bits bits adds to the codes of 8 rows for 32 columns.
template <int Bits>
inline void add_plane(const uint8_t* chunks, int shift, __m256i codes[8]) {
  constexpr int kQuads = 8 / Bits;  // in 64 bytes
  const __m256i mask = _mm256_set1_epi32(int(0x01010101u * ((1u << Bits) - 1))), left = _mm256_set1_epi32(shift);
  for (int chunk = 0; chunk < Bits; chunk++) {
    __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(chunks + 64 * chunk));
    for (int k = 0; k < kQuads; k++) {
      __m256i& place = codes[chunk * kQuads + k];
      place = Bits == 8 ? bits : _mm256_or_si256(place, _mm256_sllv_epi32(_mm256_and_si256(bits, mask), left));
      bits = _mm256_srli_epi32(bits, Bits);
    }
  }
}

// Codes of 8 rows for the 32 columns of `block`; half 0 or 1 of the tile.
inline void unpack32(const NestedMatrix& w, int64_t cell, int block, int half, __m256i codes[8]) {
  for (int i = 0; i < 8; i++) codes[i] = _mm256_setzero_si256();
  for (int p = 0; p < w.num_planes; p++) {
    const Plane& plane = w.planes[p];
    const uint8_t* chunks = plane.data + cell * plane.stride + 64 * plane.bits * block + 32 * half;
    switch (plane.bits) {
      case 8: add_plane<8>(chunks, plane.shift, codes); break;
      case 4: add_plane<4>(chunks, plane.shift, codes); break;
      case 2: add_plane<2>(chunks, plane.shift, codes); break;
      default: add_plane<1>(chunks, plane.shift, codes);
    }
  }
}

inline __m256i four_columns(const int8_t* q) {
  int32_t v;
  std::memcpy(&v, q, 4);
  return _mm256_set1_epi32(v);
}

inline __m256i widen(__m256i pairs) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }

// Dot products of 32 columns of 8 rows with T tokens, added to dot[t]. Wide: codes of more than 4 bits.
template <int T, bool Wide>
inline void dot32(const __m256i* codes, const int8_t* const* q, __m256i* dot) {
  const __m256i nibble = _mm256_set1_epi8(0x0f);
  for (int t = 0; t < T; t++) {
    __m256i low = _mm256_setzero_si256(), high = _mm256_setzero_si256();
    for (int i = 0; i < 8; i++) {
      const __m256i x = four_columns(q[t] + 4 * i);
      if (Wide) {
        const __m256i upper = _mm256_and_si256(_mm256_srli_epi16(codes[i], 4), nibble);
        low = _mm256_add_epi16(low, _mm256_maddubs_epi16(_mm256_and_si256(codes[i], nibble), x));
        high = _mm256_add_epi16(high, _mm256_maddubs_epi16(upper, x));
      } else {
        low = _mm256_add_epi16(low, _mm256_maddubs_epi16(codes[i], x));
      }
    }
    dot[t] = _mm256_add_epi32(dot[t], widen(low));
    if (Wide) dot[t] = _mm256_add_epi32(dot[t], _mm256_slli_epi32(widen(high), 4));
  }
}

// The end of a group for T tokens and 16 rows, dot[t] and dot[T + t] being its halves.
template <int T>
inline void add_group(const NestedMatrix& w, const Activations& x, int64_t cell, int64_t start, int count,
                      int64_t group, const __m256i* dot, __m256* total) {
  alignas(64) float scale[kTileRows];
  const f32x16 scales = load_half(w.scales + cell * kTileRows * 2);
  std::memcpy(scale, &scales, sizeof(scale));
  for (int t = 0; t < count; t++) {
    const int64_t at = x.at(start + t, group);
    const __m256i centre = _mm256_set1_epi32(w.levels * x.sums[at]);
    for (int half = 0; half < 2; half++) {
      const __m256i centred = _mm256_sub_epi32(_mm256_slli_epi32(dot[half * T + t], 1), centre);
      const __m256 factor = _mm256_mul_ps(_mm256_load_ps(scale + 8 * half), _mm256_set1_ps(x.scales[at]));
      total[half * T + t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(centred), factor, total[half * T + t]);
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

template <int T, bool Wide>
void few_tokens(const NestedMatrix& w, const Activations& x, float* out, int64_t out_stride, int64_t first,
                int64_t last) {
  for (int64_t tile = first; tile < last; tile++) {
    __m256 total[2 * T] = {};
    for (int64_t group = 0; group < w.groups; group++) {
      const int64_t cell = tile * w.groups + group;
      if (tile + 1 < last) prefetch(w, cell + w.groups);
      __m256i dot[2 * T] = {};
      for (int block = 0; block < w.group_size / 32; block++) {
        const int8_t* q[T];
        for (int t = 0; t < T; t++) q[t] = x.q + x.at(t, group) * w.group_size + 32 * block;
        for (int half = 0; half < 2; half++) {
          __m256i codes[8];
          unpack32(w, cell, block, half, codes);
          dot32<T, Wide>(codes, q, dot + half * T);
        }
      }
      add_group<T>(w, x, cell, 0, T, group, dot, total);
    }
    store_rows<T>(w, tile, T, total, out, out_stride);
  }
}

template <bool Wide>
void many_tokens(const NestedMatrix& w, const Activations& x, float* out, int64_t out_stride, int64_t first,
                 int64_t last) {
  constexpr int T = 4;
  alignas(64) static thread_local __m256i panel[kPanelColumns / 4 * 2];
  const int64_t panel_groups = kPanelColumns / w.group_size;
  for (int64_t tile = first; tile < last; tile++) {
    const int64_t rows_left = w.rows - tile * kTileRows, rows = rows_left < kTileRows ? rows_left : kTileRows;
    for (int64_t begin = 0; begin < w.groups; begin += panel_groups) {
      const int64_t end = begin + panel_groups < w.groups ? begin + panel_groups : w.groups;
      const int blocks = w.group_size / 32;
      for (int64_t group = begin; group < end; group++) {
        if (tile + 1 < last) prefetch(w, (tile + 1) * w.groups + group);
        for (int part = 0; part < 2 * blocks; part++)
          unpack32(w, tile * w.groups + group, part / 2, part % 2, panel + ((group - begin) * blocks * 2 + part) * 8);
      }
      for (int64_t start = 0; start < x.tokens; start += T) {
        const int count = x.tokens - start < T ? int(x.tokens - start) : T;
        float* place = out + start * out_stride;
        __m256 total[2 * T] = {};
        for (int t = 0; begin && t < count; t++) {
          float both[kTileRows] = {};
          std::memcpy(both, place + t * out_stride + tile * kTileRows, rows * sizeof(float));
          total[t] = _mm256_loadu_ps(both), total[T + t] = _mm256_loadu_ps(both + 8);
        }
        for (int64_t group = begin; group < end; group++) {
          __m256i dot[2 * T] = {};
          for (int block = 0; block < blocks; block++) {
            const int8_t* q[T];
            for (int t = 0; t < T; t++)
              q[t] = x.q + x.at(start + (t < count ? t : count - 1), group) * w.group_size + 32 * block;
            const __m256i* codes = panel + ((group - begin) * blocks + block) * 16;
            dot32<T, Wide>(codes, q, dot);
            dot32<T, Wide>(codes + 8, q, dot + T);
          }
          add_group<T>(w, x, tile * w.groups + group, start, count, group, dot, total);
        }
        store_rows<T>(w, tile, count, total, place, out_stride);
      }
    }
  }
}

template <bool Wide>
void matmul(const NestedMatrix& w, const Activations& x, float* out, int64_t out_stride, int64_t first, int64_t last) {
  if (x.tokens == 1) return few_tokens<1, Wide>(w, x, out, out_stride, first, last);
  if (x.tokens == 2) return few_tokens<2, Wide>(w, x, out, out_stride, first, last);
  many_tokens<Wide>(w, x, out, out_stride, first, last);
}

void nested_matmul(const NestedMatrix& w, const Activations& x, float* out, int64_t out_stride, int64_t first,
                   int64_t last) {
  if (w.levels > 15)
    matmul<true>(w, x, out, out_stride, first, last);
  else
    matmul<false>(w, x, out, out_stride, first, last);
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
    isa_avx2::rms_norm,
    isa_avx2::attend,
    isa_avx2::to_halves,
    isa_avx2::to_bytes,
    isa_avx2::search_codes,
};

}  // namespace moert
