// Unpacking of codes and levels with AVX2.
#pragma once

#include "planes.h"

namespace moert {
namespace MOERT_ISA {

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

// The levels of a plane of Bits bits.
template <int Bits>
struct Levels {
  static constexpr int kParts = Bits == 2 ? 4 : 1;
  explicit Levels(const uint8_t* table) {
    for (int i = 0; i < kParts; i++)
      part[i] = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table + 16 * i)));
  }
  __m256i operator[](__m256i windows) const {
    const __m256i low = _mm256_and_si256(windows, every(0x0f0f0f0fu));
    if constexpr (kParts == 1) {
      return _mm256_shuffle_epi8(part[0], low);
    } else {  // the bits above choose, from the top of a byte
      const __m256i second = _mm256_slli_epi32(windows, 3), upper = _mm256_slli_epi32(windows, 2);
      const __m256i half =
          _mm256_blendv_epi8(_mm256_shuffle_epi8(part[0], low), _mm256_shuffle_epi8(part[1], low), second);
      const __m256i other =
          _mm256_blendv_epi8(_mm256_shuffle_epi8(part[2], low), _mm256_shuffle_epi8(part[3], low), second);
      return _mm256_blendv_epi8(half, other, upper);
    }
  }
  __m256i part[kParts];
};

// Takes away what the first table adds: levels are signed here.
inline void begin_levels(__m256i codes[8]) {
  for (int i = 0; i < 8; i++) codes[i] = _mm256_set1_epi8(char(-kTrellisBias));
}

// Adds the levels of a plane to those of 8 rows and the 32 columns of a block.
template <int Bits>
inline __attribute__((always_inline)) void add_levels(const NestedMatrix& w, int plane, int64_t tile, int64_t group,
                                                      int block, int half, __m256i codes[8]) {
  constexpr int kQuads = 8 / Bits, kWindow = Bits == 2 ? 6 : 4;
  const Plane& p = w.planes[plane];
  const uint8_t* chunk = p.data + (tile * w.groups + group) * p.stride + 64 * Bits * block;
  const uint8_t* before = block == 0 ? w.chunk_before(chunk, p, group == 0) : chunk - 64;
  const Levels<Bits> levels(w.tables + 64 * plane);
  __m256i last = load256(before + 32 * half);
  if (block == 0 && group == 0) last = _mm256_or_si256(_mm256_slli_epi32(last, 8), _mm256_srli_epi32(last, 24));
#pragma GCC unroll 2
  for (int c = 0; c < Bits; c++) {
    const __m256i now = load256(chunk + 64 * c + 32 * half);
    const __m256i mixed = select(0xf0f0f0f0u, _mm256_slli_epi32(now, 4), _mm256_srli_epi32(last, 4));
#pragma GCC unroll 8
    for (int i = 0; i < kQuads; i++) {
      const int bottom = Bits * (i + 1) + 8 - kWindow;  // of the window in the 16 bits of both bytes
      const __m256i windows = bottom < 8 ? _mm256_srli_epi32(mixed, bottom - 4) : _mm256_srli_epi32(now, bottom - 8);
      __m256i& code = codes[kQuads * c + i];
      code = _mm256_add_epi8(code, levels[windows]);
    }
    last = now;
  }
}

template <int... Bits>
struct TrellisPlanes : PlaneList<Bits...> {
  static constexpr int kWidth = 7;  // levels and inputs of up to 127

  static inline __attribute__((always_inline)) void unpack(const NestedMatrix& w, int64_t tile, int64_t group,
                                                           int block, int half, __m256i codes[8]) {
    int plane = 0;
    begin_levels(codes);
    (..., add_levels<Bits>(w, plane++, tile, group, block, half, codes));
  }
};

// The same for any planes, slower.
struct AnyTrellisPlanes : AnyPlanes {
  static constexpr int kWidth = 7;

  static void unpack(const NestedMatrix& w, int64_t tile, int64_t group, int block, int half, __m256i codes[8]) {
    begin_levels(codes);
    for (int p = 0; p < w.num_planes; p++)
      if (w.planes[p].bits == 2)
        add_levels<2>(w, p, tile, group, block, half, codes);
      else
        add_levels<1>(w, p, tile, group, block, half, codes);
  }
};

}  // namespace MOERT_ISA
}  // namespace moert
