// AMX int8 for many tokens: an unpacked group of a tile is the right operand of a tile product as it stands.
// Few tokens, and everything else, as AVX-512.
//
// Codes c of up to 7 bits are unpacked as 2 * c - (2^b - 1), which fits a signed byte: the product is then all that the
// end of a group wants of integers.
#include <sys/syscall.h>
#include <unistd.h>

#define MOERT_ISA isa_amx
#include "kernel_avx512.h"
#include "trellis_avx512.h"

namespace moert {
namespace MOERT_ISA {

constexpr int kBlock = 16;     // tokens of one tile product
constexpr int kMinTokens = 8;  // below, most rows of a product would be padding

struct TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t column_bytes[16];
  uint8_t rows[16];
};

// Tiles 0 and 1: results [16 tokens][16 rows] int32. 2: weights [k / 4][16 rows][4]. 3: inputs [16 tokens][k].
void configure(int k) {
  TileConfig config = {};
  config.palette = 1;
  config.rows[0] = config.rows[1] = kBlock, config.column_bytes[0] = config.column_bytes[1] = 64;
  config.rows[2] = uint8_t(k / 4), config.column_bytes[2] = 64;
  config.rows[3] = kBlock, config.column_bytes[3] = uint16_t(k);
  _tile_loadconfig(&config);
}

template <bool Signed>
inline void multiply(bool second, const uint8_t* panel, const int8_t* q, int group_size, int32_t dots[][kTileRows]) {
  const int k = group_size < 64 ? group_size : 64;
  if (second)
    _tile_zero(1);
  else
    _tile_zero(0);
  for (int column = 0; column < group_size; column += k) {
    _tile_loadd(2, panel + column * kTileRows, 64);
    _tile_loadd(3, q + column, group_size);
    if (Signed && second)
      _tile_dpbssd(1, 3, 2);
    else if (Signed)
      _tile_dpbssd(0, 3, 2);
    else if (second)
      _tile_dpbsud(1, 3, 2);
    else
      _tile_dpbsud(0, 3, 2);
  }
  if (second)
    _tile_stored(1, dots, 64);
  else
    _tile_stored(0, dots, 64);
}

// Groups [begin, end) of a tile, unpacked in `panel`, times a block of tokens, added to total. The product of the next
// group is under way while one is scaled.
template <bool Signed>
inline void add_panel(const NestedMatrix& w, const Activations& x, int64_t tile, int64_t begin, int64_t end,
                      int64_t start, const uint8_t* panel, __m512 total[kBlock]) {
  alignas(64) int32_t dots[2][kBlock][kTileRows];
  const int size = w.group_size;
  multiply<Signed>(false, panel, x.q + x.at(start, begin) * size, size, dots[0]);
  for (int64_t group = begin; group < end; group++) {
    const int now = (group - begin) & 1;
    if (group + 1 < end) {
      panel += size * kTileRows;
      multiply<Signed>(!now, panel, x.q + x.at(start, group + 1) * size, size, dots[!now]);
    }
    const __m512 scale = load_scales(w, tile, group);
    const int64_t at = x.at(start, group);
#pragma GCC unroll 16
    for (int t = 0; t < kBlock; t++) {
      __m512i dot = _mm512_load_si512(dots[now][t]);
      if (!Signed) {  // unsigned: the sums beyond the last token are anything, and their product may overflow
        const int middle = int(unsigned(w.levels) * unsigned(x.sums[at + t]));
        dot = _mm512_sub_epi32(_mm512_slli_epi32(dot, 1), _mm512_set1_epi32(middle));
      }
      const __m512 factor = _mm512_mul_ps(scale, _mm512_set1_ps(x.scales[at + t]));
      total[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), factor, total[t]);
    }
  }
}

template <class Planes, bool Signed>
void many_tokens(const NestedMatrix& w, const Activations& x, float* out, int64_t out_stride, int64_t first,
                 int64_t last) {
  alignas(64) static thread_local uint8_t panel[kPanelColumns * kTileRows];
  const int64_t panel_groups = kPanelColumns / w.group_size;
  configure(w.group_size < 64 ? w.group_size : 64);
  for (int64_t tile = first; tile < last; tile++) {
    const __mmask16 mask = row_mask(w, tile);
    for (int64_t begin = 0; begin < w.groups; begin += panel_groups) {
      const int64_t end = begin + panel_groups < w.groups ? begin + panel_groups : w.groups;
      unpack_panel<Planes, Signed ? Form::kWeights : Form::kCodes>(w, tile, begin, end, tile + 1 < last, panel);
      // Up to a block beyond the last token may be read.
      for (int64_t start = 0; start < x.tokens; start += kBlock) {
        const int64_t count = x.tokens - start < kBlock ? x.tokens - start : kBlock;
        float* place = out + start * out_stride + tile * kTileRows;
        __m512 total[kBlock];
#pragma GCC unroll 16
        for (int t = 0; t < kBlock; t++)
          total[t] = begin && t < count ? _mm512_maskz_loadu_ps(mask, place + t * out_stride) : _mm512_setzero_ps();
        add_panel<Signed>(w, x, tile, begin, end, start, panel, total);
#pragma GCC unroll 16
        for (int t = 0; t < kBlock; t++)
          if (t < count) _mm512_mask_storeu_ps(place + t * out_stride, mask, total[t]);
      }
    }
  }
  _tile_release();
}

void nested_matmul(const NestedMatrix& w, const Activations& x, float* out, int64_t out_stride, int64_t first,
                   int64_t last) {
  if (x.tokens < kMinTokens) return kAvx512Kernel.nested_matmul(w, x, out, out_stride, first, last);
  const auto product = [&](auto planes) {
    if (w.levels < 128)
      many_tokens<decltype(planes), true>(w, x, out, out_stride, first, last);
    else
      many_tokens<decltype(planes), false>(w, x, out, out_stride, first, last);
  };
  if (w.tables != nullptr) return with_trellis_planes<TrellisPlanes, AnyTrellisPlanes>(w, product);
  with_planes<FixedPlanes, AnyPlanes>(w, product);
}

bool supported() {
  if (!kAvx512Kernel.supported() || !__builtin_cpu_supports("avx512vbmi") ||
      !__builtin_cpu_supports("amx-int8"))
    return false;
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // without it the first tile instruction is SIGILL
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace MOERT_ISA

extern const Kernel kAmxKernel = {
    "amx",
    isa_amx::supported,
    [](const float* x, int64_t cols, int64_t groups, int group_size, bool rotated, int8_t* q, float* scales,
       int32_t* sums) {
      kAvx512Kernel.quantise(x, cols, groups, group_size, rotated, q, scales, sums);
    },
    isa_amx::nested_matmul,
    [](const NestedMatrix& w, int64_t cols, float* out, int64_t out_stride, int64_t first, int64_t last) {
      kAvx512Kernel.nested_dequantise(w, cols, out, out_stride, first, last);
    },
    [](const void* w, RawType type, int64_t cols, const float* x, int64_t tokens, int64_t x_stride, float* out,
       int64_t out_stride, int64_t first, int64_t last) {
      kAvx512Kernel.raw_matmul(w, type, cols, x, tokens, x_stride, out, out_stride, first, last);
    },
    [](float* gate, const float* up, int64_t count) { kAvx512Kernel.silu_product(gate, up, count); },
    [](const Search& search, const float* w, uint8_t* codes, uint16_t* scales, int64_t first, int64_t last) {
      kAvx512Kernel.search_codes(search, w, codes, scales, first, last);
    },
    [](const TrellisBlock& block, const float* targets, const LookAhead& ahead, uint8_t* starts, uint8_t* ends,
       uint8_t* codes, int64_t code_stride, float* left, float* ahead_left) {
      kAvx512Kernel.choose_trellis(block, targets, ahead, starts, ends, codes, code_stride, left, ahead_left);
    },
};

}  // namespace moert
