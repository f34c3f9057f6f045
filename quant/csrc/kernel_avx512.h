// What the AVX-512 and AMX kernels share: unpacking of codes and the end of a group.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "kernel.h"
#include "planes.h"

namespace moert {
namespace MOERT_ISA {

constexpr int kPanelColumns = 1024;  // 16 KiB of codes: with the inputs of a few tokens it stays in the first cache

typedef uint32_t u32x16 __attribute__((vector_size(64)));

// Their codes. One may be left some bits above the bottom of its byte, where its first plane has it: that saves most
// shifts, of which a processor does half as many as of other operations, and the sums are shifted instead.
template <int... Bits>
struct FixedPlanes : PlaneList<Bits...> {
  using PlaneList<Bits...>::kCount, PlaneList<Bits...>::bits, PlaneList<Bits...>::shift;

  // How far above the bottom of its byte the code of columns 4 * quad ... is left.
  static constexpr int offset(int quad) {
    const int natural = bits(0) * (quad % (8 / bits(0))) - shift(0);
    return natural > 0 ? natural : 0;
  }

  // Codes of 16 rows (lanes) for the 32 columns of `block` of a group: codes[i] holds columns 4 * i ... 4 * i + 3.
  template <bool AtBottom>
  static inline __attribute__((always_inline)) void unpack(const NestedMatrix& w, int64_t tile, int64_t group,
                                                           int block, __m512i codes[8]) {
    const int64_t cell = tile * w.groups + group;
    const uint8_t* chunks[kCount];
    for (int p = 0; p < kCount; p++) chunks[p] = PlaneList<Bits...>::chunk(w, cell, block, p);
#pragma GCC unroll 8
    for (int quad = 0; quad < 8; quad++) {
      const int bottom = AtBottom ? 0 : offset(quad);
      u32x16 code = {};
#pragma GCC unroll 8
      for (int p = 0; p < kCount; p++) {
        const int per_chunk = 8 / bits(p), up = bottom + shift(p) - bits(p) * (quad % per_chunk);
        u32x16 word = u32x16(_mm512_loadu_si512(chunks[p] + 64 * (quad / per_chunk)));
        word = up > 0 ? word << up : up < 0 ? word >> -up : word;
        if (bits(p) < 8) word &= 0x01010101u * ((1u << bits(p)) - 1) << (bottom + shift(p));
        code |= word;
      }
      codes[quad] = __m512i(code);
    }
  }
};

inline __m512i select(uint32_t mask, u32x16 yes, u32x16 no) {
  return _mm512_ternarylogic_epi32(_mm512_set1_epi32(int(mask)), __m512i(yes), __m512i(no), 0xca);
}

// 4 bits as the default store has them: the planes are interleaved for all 32 columns at once, until a byte holds the
// codes of quads i and i + 4. That takes half the operations of gathering the bits of each code.
template <>
struct FixedPlanes<2, 1, 1> : PlaneList<2, 1, 1> {
  static constexpr int offset(int quad) { return quad & 4; }

  template <bool AtBottom>
  static inline __attribute__((always_inline)) void unpack(const NestedMatrix& w, int64_t tile, int64_t group,
                                                           int block, __m512i codes[8]) {
    const int64_t cell = tile * w.groups + group;
    const u32x16 top = u32x16(_mm512_loadu_si512(chunk(w, cell, block, 0)));
    const u32x16 rest = u32x16(_mm512_loadu_si512(chunk(w, cell, block, 0) + 64));
    const u32x16 middle = u32x16(_mm512_loadu_si512(chunk(w, cell, block, 1)));
    const u32x16 bottom = u32x16(_mm512_loadu_si512(chunk(w, cell, block, 2)));
    // Two bits each, from bit 0 on: the low bits of quads 0, 2, 4, 6 and 1, 3, 5, 7; the high ones of 0, 1, 4, 5 and
    // 2, 3, 6, 7.
    const u32x16 even = u32x16(select(0xaaaaaaaau, middle << 1, bottom));
    const u32x16 odd = u32x16(select(0xaaaaaaaau, middle, bottom >> 1));
    const u32x16 first = u32x16(select(0x0f0f0f0fu, top, rest << 4));
    const u32x16 second = u32x16(select(0x0f0f0f0fu, top >> 4, rest));
    const u32x16 pairs[4] = {
        u32x16(select(0xccccccccu, first << 2, even)),
        u32x16(select(0xccccccccu, first, odd)),
        u32x16(select(0xccccccccu, second << 2, even >> 2)),
        u32x16(select(0xccccccccu, second, odd >> 2)),
    };
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      codes[i] = __m512i(pairs[i] & 0x0f0f0f0fu);
      codes[i + 4] = __m512i(AtBottom ? pairs[i] >> 4 & 0x0f0f0f0fu : pairs[i] & 0xf0f0f0f0u);
    }
  }
};

// The same for any planes, slower.
struct AnyPlanes {
  static constexpr int offset(int) { return 0; }
  static void prefetch(const NestedMatrix& w, int64_t tile, int64_t group) { moert::prefetch(w, tile, group); }

  template <bool AtBottom>
  static void unpack(const NestedMatrix& w, int64_t tile, int64_t group, int block, __m512i codes[8]) {
    const int64_t cell = tile * w.groups + group;
    for (int quad = 0; quad < 8; quad++) {
      u32x16 code = {};
      for (int p = 0; p < w.num_planes; p++) {
        const Plane& plane = w.planes[p];
        const int per_chunk = 8 / plane.bits;
        const uint8_t* chunks = plane.data + cell * plane.stride + 64 * plane.bits * block;
        const u32x16 word = u32x16(_mm512_loadu_si512(chunks + 64 * (quad / per_chunk)));
        const uint32_t mask = 0x01010101u * ((1u << plane.bits) - 1);
        code |= ((word >> (plane.bits * (quad % per_chunk))) & mask) << plane.shift;
      }
      codes[quad] = __m512i(code);
    }
  }
};

// How a panel holds codes c of b bits: as they are, as 2 * c, or as the weights 2 * c - (2^b - 1). The latter want b < 8.
enum class Form { kCodes, kDoubled, kWeights };

// Groups [begin, end) of a tile, unpacked: 64 bytes for each four columns, 16 rows of four.
template <class Planes, Form form>
inline void unpack_panel(const NestedMatrix& w, int64_t tile, int64_t begin, int64_t end, bool ahead, uint8_t* panel) {
  const __m512i middle = _mm512_set1_epi8(char(w.levels));
  for (int64_t group = begin; group < end; group++) {
    if (ahead) Planes::prefetch(w, tile + 1, group);
    for (int block = 0; block < w.group_size / 32; block++) {
      __m512i codes[8];
      Planes::template unpack<true>(w, tile, group, block, codes);
      for (int i = 0; i < 8; i++, panel += 64) {
        if (form != Form::kCodes) codes[i] = _mm512_add_epi8(codes[i], codes[i]);
        if (form == Form::kWeights) codes[i] = _mm512_sub_epi8(codes[i], middle);
        _mm512_store_si512(panel, codes[i]);
      }
    }
  }
}

inline __m512i four_columns(const int8_t* q) {
  int32_t v;
  std::memcpy(&v, q, 4);
  return _mm512_set1_epi32(v);
}

inline __m512 load_scales(const NestedMatrix& w, int64_t tile, int64_t group) {
  const void* place = w.scales_of(tile, group);
  return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(place)));
}

// total + (2 * dot - levels * sum) * (scale * input scale), the end of a group for one token.
inline __m512 add_group(__m512 total, __m512i dot, __m512 scale, const NestedMatrix& w, const Activations& x,
                        int64_t token, int64_t group) {
  const int64_t at = x.at(token, group);
  const __m512i centred = _mm512_sub_epi32(_mm512_slli_epi32(dot, 1), _mm512_set1_epi32(w.levels * x.sums[at]));
  const __m512 factor = _mm512_mul_ps(scale, _mm512_set1_ps(x.scales[at]));
  return _mm512_fmadd_ps(_mm512_cvtepi32_ps(centred), factor, total);
}

inline __mmask16 row_mask(const NestedMatrix& w, int64_t tile) {
  const int64_t rows = w.rows - tile * kTileRows;
  return rows >= kTileRows ? __mmask16(0xFFFF) : __mmask16((1u << rows) - 1);
}

}  // namespace MOERT_ISA
}  // namespace moert
