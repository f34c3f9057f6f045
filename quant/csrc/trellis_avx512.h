// Planes of the trellis code for the AVX-512 and AMX kernels, in the place of those of kernel_avx512.h.
#pragma once

#include "kernel_avx512.h"

namespace moert {
namespace MOERT_ISA {

// The levels of a plane of Bits bits.
template <int Bits>
struct Levels {
#if defined(__AVX512VBMI__)
  // Tables are repeated to 64 levels: what bits lie above a shorter window does not matter.
  explicit Levels(const uint8_t* table) : all(_mm512_loadu_si512(table)) {}
  __m512i operator[](__m512i windows) const { return _mm512_permutexvar_epi8(windows, all); }
  __m512i all;
#else
  static constexpr int kParts = Bits == 2 ? 4 : 1;
  explicit Levels(const uint8_t* table) {
    for (int i = 0; i < kParts; i++)
      part[i] = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table + 16 * i)));
  }
  __m512i operator[](__m512i windows) const {
    const __m512i low = _mm512_and_si512(windows, _mm512_set1_epi8(0x0f));
    const __m512i first = _mm512_shuffle_epi8(part[0], low);
    if constexpr (kParts == 1) {
      return first;
    } else {
      const __mmask64 second = _mm512_test_epi8_mask(windows, _mm512_set1_epi8(0x10));
      const __mmask64 upper = _mm512_test_epi8_mask(windows, _mm512_set1_epi8(0x20));
      const __m512i half = _mm512_mask_shuffle_epi8(first, second, part[1], low);
      const __m512i other = _mm512_mask_shuffle_epi8(_mm512_shuffle_epi8(part[2], low), second, part[3], low);
      return _mm512_mask_blend_epi8(upper, half, other);
    }
  }
  __m512i part[kParts];
#endif
};

// Adds the levels of a plane to those of the 32 columns of a block, or begins with them.
template <int Bits>
inline __attribute__((always_inline)) void add_levels(const NestedMatrix& w, int plane, int64_t tile, int64_t group,
                                                      int block, bool begin, __m512i codes[8]) {
  constexpr int kQuads = 8 / Bits, kWindow = Bits == 2 ? 6 : 4;
  const Plane& p = w.planes[plane];
  const uint8_t* chunk = p.data + (tile * w.groups + group) * p.stride + 64 * Bits * block;
  const uint8_t* before = block == 0 ? w.chunk_before(chunk, p, group == 0) : chunk - 64;
  const Levels<Bits> levels(w.tables + 64 * plane);
  u32x16 last = u32x16(_mm512_loadu_si512(before));
  if (block == 0 && group == 0) last = u32x16(_mm512_rol_epi32(__m512i(last), 8));
#pragma GCC unroll 2
  for (int c = 0; c < Bits; c++) {
    const u32x16 now = u32x16(_mm512_loadu_si512(chunk + 64 * c));
    const u32x16 mixed = u32x16(select(0xf0f0f0f0u, now << 4, last >> 4));  // the codes on both sides of the border
#pragma GCC unroll 8
    for (int i = 0; i < kQuads; i++) {
      const int bottom = Bits * (i + 1) + 8 - kWindow;  // of the window in the 16 bits of both bytes
      const __m512i level = levels[__m512i(bottom < 8 ? mixed >> (bottom - 4) : now >> (bottom - 8))];
      __m512i& code = codes[kQuads * c + i];
      code = begin ? level : _mm512_add_epi8(code, level);
    }
    last = now;
  }
}

template <int... Bits>
struct TrellisPlanes : PlaneList<Bits...> {
  static constexpr int offset(int) { return 0; }

  template <bool AtBottom>
  static inline __attribute__((always_inline)) void unpack(const NestedMatrix& w, int64_t tile, int64_t group,
                                                           int block, __m512i codes[8]) {
    int plane = 0;
    (..., (add_levels<Bits>(w, plane, tile, group, block, plane == 0, codes), plane++));
  }
};

// The same for any planes, slower.
struct AnyTrellisPlanes : AnyPlanes {
  template <bool AtBottom>
  static void unpack(const NestedMatrix& w, int64_t tile, int64_t group, int block, __m512i codes[8]) {
    for (int p = 0; p < w.num_planes; p++)
      if (w.planes[p].bits == 2)
        add_levels<2>(w, p, tile, group, block, p == 0, codes);
      else
        add_levels<1>(w, p, tile, group, block, p == 0, codes);
  }
};

}  // namespace MOERT_ISA
}  // namespace moert
