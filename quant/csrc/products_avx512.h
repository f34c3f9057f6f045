// Products with AVX-512 and VNNI: 16 rows of a tile in the 16 lanes of a register, four columns in the bytes of a lane.
#pragma once

#include "kernel_avx512.h"
#include "trellis_avx512.h"

namespace moert {
namespace MOERT_ISA {

template <class Planes>
constexpr bool uses_offset(int offset) {
  for (int quad = 0; quad < 8; quad++)
    if (Planes::offset(quad) == offset) return true;
  return false;
}

// Few tokens: the weights are unpacked on the way and used for T tokens at once.
template <class Planes, int T>
void few_tokens(const NestedMatrix& w, const Activations& x, float* out, int64_t out_stride, int64_t first,
                int64_t last) {
  for (int64_t tile = first; tile < last; tile++) {
    __m512 total[T];
    for (int t = 0; t < T; t++) total[t] = _mm512_setzero_ps();
    for (int64_t group = 0; group < w.groups; group++) {
      if (tile + 1 < last) Planes::prefetch(w, tile + 1, group);
      __m512i dot[T][2][8] = {};  // at most four are in use: by the offset of the codes, and two where all have one
      for (int block = 0; block < w.group_size / 32; block++) {
        __m512i codes[8];
        Planes::template unpack<false>(w, tile, group, block, codes);
        const int8_t* columns = x.q + x.at(0, group) * w.group_size + 32 * block;
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++)
#pragma GCC unroll 4
          for (int t = 0; t < T; t++) {
            __m512i& sum = dot[t][i & 1][Planes::offset(i)];
            sum = _mm512_dpbusd_epi32(sum, codes[i], four_columns(columns + t * w.group_size + 4 * i));
          }
      }
      const __m512 scale = load_scales(w, tile, group);
#pragma GCC unroll 4
      for (int t = 0; t < T; t++) {
        __m512i whole = _mm512_add_epi32(dot[t][0][0], dot[t][1][0]);
#pragma GCC unroll 8
        for (int offset = 1; offset < 8; offset++) {
          if (!uses_offset<Planes>(offset)) continue;
          const __m512i both = _mm512_add_epi32(dot[t][0][offset], dot[t][1][offset]);
          whole = _mm512_add_epi32(whole, _mm512_srai_epi32(both, offset));
        }
        total[t] = add_group(total[t], whole, scale, w, x, t, group);
      }
    }
    const __mmask16 mask = row_mask(w, tile);
    for (int t = 0; t < T; t++) _mm512_mask_storeu_ps(out + t * out_stride + tile * kTileRows, mask, total[t]);
  }
}

// Groups [begin, end) of N tiles, unpacked in panels one after the other, times all tokens, added to out. Doubled codes:
// a group begins with minus the midpoints, so that its end has no integers left to add.
template <bool Doubled, int N>
void add_panels(const NestedMatrix& w, const Activations& x, int64_t tile, int64_t begin, int64_t end,
                const uint8_t* panels, float* out, int64_t out_stride) {
  constexpr int kTokens = 8;
  const int64_t panel_size = (end - begin) * w.group_size * kTileRows;
  __mmask16 mask[N];
  for (int n = 0; n < N; n++) mask[n] = row_mask(w, tile + n);
  for (int64_t start = 0; start < x.tokens; start += kTokens) {
    const int count = x.tokens - start < kTokens ? int(x.tokens - start) : kTokens;
    float* place = out + start * out_stride + tile * kTileRows;
    __m512 total[kTokens][N];
    for (int t = 0; t < kTokens; t++)
      for (int n = 0; n < N; n++)
        total[t][n] = begin && t < count ? _mm512_maskz_loadu_ps(mask[n], place + t * out_stride + n * kTileRows)
                                         : _mm512_setzero_ps();
    for (int64_t group = begin; group < end; group++) {
      const uint8_t* codes = panels + (group - begin) * w.group_size * kTileRows;
      const int8_t* q[kTokens];  // tokens beyond the last compute the last again; nothing is stored for them
      int64_t at[kTokens];
      __m512i dot[kTokens][N];
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; t++) {
        at[t] = x.at(start + (t < count ? t : count - 1), group);
        q[t] = x.q + at[t] * w.group_size;
#pragma GCC unroll 2
        for (int n = 0; n < N; n++) dot[t][n] = _mm512_set1_epi32(Doubled ? -w.levels * x.sums[at[t]] : 0);
      }
      for (int quad = 0; quad < w.group_size / 4; quad++) {
        __m512i c[N];
#pragma GCC unroll 2
        for (int n = 0; n < N; n++) c[n] = _mm512_load_si512(codes + n * panel_size + 64 * quad);
#pragma GCC unroll 8
        for (int t = 0; t < kTokens; t++) {
          const __m512i columns = four_columns(q[t] + 4 * quad);
#pragma GCC unroll 2
          for (int n = 0; n < N; n++) dot[t][n] = _mm512_dpbusd_epi32(dot[t][n], c[n], columns);
        }
      }
#pragma GCC unroll 2
      for (int n = 0; n < N; n++) {
        const __m512 scale = load_scales(w, tile + n, group);
#pragma GCC unroll 8
        for (int t = 0; t < kTokens; t++) {
          __m512i whole = dot[t][n];
          if (!Doubled)
            whole = _mm512_sub_epi32(_mm512_slli_epi32(whole, 1), _mm512_set1_epi32(w.levels * x.sums[at[t]]));
          const __m512 factor = _mm512_mul_ps(scale, _mm512_set1_ps(x.scales[at[t]]));
          total[t][n] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole), factor, total[t][n]);
        }
      }
    }
    for (int t = 0; t < count; t++)
      for (int n = 0; n < N; n++)
        _mm512_mask_storeu_ps(place + t * out_stride + n * kTileRows, mask[n], total[t][n]);
  }
}

// Many tokens: panels of two tiles are unpacked once, then used for eight tokens at a time.
template <class Planes, bool Doubled>
void many_tokens(const NestedMatrix& w, const Activations& x, float* out, int64_t out_stride, int64_t first,
                 int64_t last) {
  constexpr Form form = Doubled ? Form::kDoubled : Form::kCodes;
  constexpr int kColumns = kPanelColumns / 2;
  alignas(64) static thread_local uint8_t panels[2 * kColumns * kTileRows];
  const int64_t panel_groups = kColumns / w.group_size;
  for (int64_t tile = first; tile < last; tile += 2) {
    const bool both = tile + 1 < last;
    for (int64_t begin = 0; begin < w.groups; begin += panel_groups) {
      const int64_t end = begin + panel_groups < w.groups ? begin + panel_groups : w.groups;
      unpack_panel<Planes, form>(w, tile, begin, end, both, panels);
      if (both)
        unpack_panel<Planes, form>(w, tile + 1, begin, end, tile + 2 < last,
                                   panels + (end - begin) * w.group_size * kTileRows);
      if (both)
        add_panels<Doubled, 2>(w, x, tile, begin, end, panels, out, out_stride);
      else
        add_panels<Doubled, 1>(w, x, tile, begin, end, panels, out, out_stride);
    }
  }
}

template <class Planes>
void matmul(const NestedMatrix& w, const Activations& x, float* out, int64_t out_stride, int64_t first, int64_t last) {
  switch (x.tokens) {
    case 1: return few_tokens<Planes, 1>(w, x, out, out_stride, first, last);
    case 2: return few_tokens<Planes, 2>(w, x, out, out_stride, first, last);
    case 3: return few_tokens<Planes, 3>(w, x, out, out_stride, first, last);
    case 4: return few_tokens<Planes, 4>(w, x, out, out_stride, first, last);
    default: break;
  }
  if (w.levels < 128) return many_tokens<Planes, true>(w, x, out, out_stride, first, last);
  many_tokens<Planes, false>(w, x, out, out_stride, first, last);
}

inline void trellis_matmul(const NestedMatrix& w, const Activations& x, float* out, int64_t out_stride, int64_t first,
                           int64_t last) {
  with_trellis_planes<TrellisPlanes, AnyTrellisPlanes>(
      w, [&](auto planes) { matmul<decltype(planes)>(w, x, out, out_stride, first, last); });
}

}  // namespace MOERT_ISA
}  // namespace moert
