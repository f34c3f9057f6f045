// What the AVX-512 and AMX kernels share: unpacking of codes and the end of a group.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "kernel.h"

namespace moert {
namespace MOERT_ISA {

constexpr int kPanelColumns = 1024;  // 16 KiB of codes: with the inputs of a few tokens it stays in the first cache

// The bits that a plane of Bits bits adds to the codes of 32 columns.
template <int Bits>
inline void add_plane(const uint8_t* chunks, int shift, __m512i codes[8]) {
  constexpr int kQuads = 8 / Bits;  // in 64 bytes
  if (Bits == 8) {  // the only plane there is
    for (int i = 0; i < 8; i++) codes[i] = _mm512_loadu_si512(chunks + 64 * i);
    return;
  }
  // Rotating a lane brings the wanted bits of all four bytes to their place in the code; the mask drops the others.
  const __m512i left = _mm512_set1_epi32(shift), mask = _mm512_set1_epi32(int(0x01010101u * ((1u << Bits) - 1) << shift));
  __m512i bits[Bits];
  for (int chunk = 0; chunk < Bits; chunk++)
    bits[chunk] = _mm512_rolv_epi32(_mm512_loadu_si512(chunks + 64 * chunk), left);
  for (int k = 0; k < kQuads; k++)
    for (int chunk = 0; chunk < Bits; chunk++) {
      __m512i& place = codes[chunk * kQuads + k];
      place = _mm512_ternarylogic_epi32(place, bits[chunk], mask, 0xF8);  // place | (bits & mask)
      bits[chunk] = _mm512_ror_epi32(bits[chunk], Bits);
    }
}

// Codes of 16 rows (lanes) for the 32 columns of `block` of a group: codes[i] holds columns 4 * i ... 4 * i + 3.
inline void unpack32(const NestedMatrix& w, int64_t cell, int block, __m512i codes[8]) {
  for (int i = 0; i < 8; i++) codes[i] = _mm512_setzero_si512();
  for (int p = 0; p < w.num_planes; p++) {
    const Plane& plane = w.planes[p];
    const uint8_t* chunks = plane.data + cell * plane.stride + 64 * plane.bits * block;
    switch (plane.bits) {
      case 8: add_plane<8>(chunks, plane.shift, codes); break;
      case 4: add_plane<4>(chunks, plane.shift, codes); break;
      case 2: add_plane<2>(chunks, plane.shift, codes); break;
      default: add_plane<1>(chunks, plane.shift, codes);
    }
  }
}

// Groups [begin, end) of a tile, unpacked: 64 bytes for each four columns, 16 rows of four.
inline void unpack_panel(const NestedMatrix& w, int64_t tile, int64_t begin, int64_t end, uint8_t* panel) {
  for (int64_t group = begin; group < end; group++)
    for (int block = 0; block < w.group_size / 32; block++) {
      __m512i codes[8];
      unpack32(w, tile * w.groups + group, block, codes);
      for (int i = 0; i < 8; i++, panel += 64) _mm512_store_si512(panel, codes[i]);
    }
}

inline __m512i four_columns(const int8_t* q) {
  int32_t v;
  std::memcpy(&v, q, 4);
  return _mm512_set1_epi32(v);
}

inline __m512 load_scales(const NestedMatrix& w, int64_t cell) {
  const void* place = w.scales + cell * kTileRows * 2;
  return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(place)));
}

// total + (2 * dot - levels * sum) * (scale * input scale), the end of a group for one token.
inline __m512 add_group(__m512 total, __m512i dot, __m512 scale, const NestedMatrix& w, const Activations& x,
                        int64_t token, int64_t group) {
  const int64_t at = token * x.groups + group;
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
