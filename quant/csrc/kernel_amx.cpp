// AMX int8 for many tokens: an unpacked group of a tile is the right operand of a tile product as it stands.
// Few tokens, and everything else, as AVX-512.
#include <sys/syscall.h>
#include <unistd.h>

#define MOERT_ISA isa_amx
#include "kernel_avx512.h"

namespace moert {
namespace MOERT_ISA {

constexpr int kBlock = 16;   // tokens of one tile product
constexpr int kBlocks = 4;   // token blocks that use one load of the weights
constexpr int kMinTokens = 8;  // below, most rows of a product would be padding

struct TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t column_bytes[16];
  uint8_t rows[16];
};

// Tiles 0-3: results [16 tokens][16 rows] int32. 4: weights [k / 4][16 rows][4]. 5: inputs [16 tokens][k].
void configure(int k) {
  TileConfig config = {};
  config.palette = 1;
  for (int i = 0; i < kBlocks; i++) config.rows[i] = kBlock, config.column_bytes[i] = 64;
  config.rows[4] = uint8_t(k / 4), config.column_bytes[4] = 64;
  config.rows[5] = kBlock, config.column_bytes[5] = uint16_t(k);
  _tile_loadconfig(&config);
}

template <class Planes>
void many_tokens(const NestedMatrix& w, const Activations& x, float* out, int64_t out_stride, int64_t first,
                 int64_t last) {
  alignas(64) static thread_local uint8_t panel[kPanelColumns * kTileRows];
  alignas(64) int32_t dots[kBlocks][kBlock][kTileRows];
  const int k = w.group_size < 64 ? w.group_size : 64;  // columns of one tile product
  const int64_t q_stride = x.groups * w.group_size, panel_groups = kPanelColumns / w.group_size;
  configure(k);
  for (int64_t tile = first; tile < last; tile++) {
    const __mmask16 mask = row_mask(w, tile);
    for (int64_t begin = 0; begin < w.groups; begin += panel_groups) {
      const int64_t end = begin + panel_groups < w.groups ? begin + panel_groups : w.groups;
      unpack_panel<Planes>(w, tile, begin, end, tile + 1 < last, panel);
      for (int64_t start = 0; start < x.tokens; start += kBlock * kBlocks) {
        // The inputs may be read up to a block of 16 tokens beyond the last.
        const int64_t left = x.tokens - start < kBlock * kBlocks ? x.tokens - start : kBlock * kBlocks;
        const int blocks = int((left + kBlock - 1) / kBlock);
        for (int64_t group = begin; group < end; group++) {
          _tile_zero(0);
          _tile_zero(1);
          _tile_zero(2);
          _tile_zero(3);
          for (int column = 0; column < w.group_size; column += k) {
            _tile_loadd(4, panel + ((group - begin) * w.group_size + column) * kTileRows, 64);
            const int8_t* q = x.q + start * q_stride + group * w.group_size + column;
            _tile_loadd(5, q, q_stride);
            _tile_dpbsud(0, 5, 4);
            if (blocks > 1) {
              _tile_loadd(5, q + kBlock * q_stride, q_stride);
              _tile_dpbsud(1, 5, 4);
            }
            if (blocks > 2) {
              _tile_loadd(5, q + 2 * kBlock * q_stride, q_stride);
              _tile_dpbsud(2, 5, 4);
            }
            if (blocks > 3) {
              _tile_loadd(5, q + 3 * kBlock * q_stride, q_stride);
              _tile_dpbsud(3, 5, 4);
            }
          }
          _tile_stored(0, dots[0], 64);
          if (blocks > 1) _tile_stored(1, dots[1], 64);
          if (blocks > 2) _tile_stored(2, dots[2], 64);
          if (blocks > 3) _tile_stored(3, dots[3], 64);
          const __m512 scale = load_scales(w, tile * w.groups + group);
          for (int64_t t = 0; t < left; t++) {
            float* place = out + (start + t) * out_stride + tile * kTileRows;
            const __m512 total = group ? _mm512_maskz_loadu_ps(mask, place) : _mm512_setzero_ps();
            const __m512i dot = _mm512_load_si512(dots[t / kBlock][t % kBlock]);
            _mm512_mask_storeu_ps(place, mask, add_group(total, dot, scale, w, x, start + t, group));
          }
        }
      }
    }
  }
  _tile_release();
}

void nested_matmul(const NestedMatrix& w, const Activations& x, float* out, int64_t out_stride, int64_t first,
                   int64_t last) {
  if (x.tokens < kMinTokens) return kAvx512Kernel.nested_matmul(w, x, out, out_stride, first, last);
  with_planes(w, [&](auto planes) { many_tokens<decltype(planes)>(w, x, out, out_stride, first, last); });
}

bool supported() {
  if (!kAvx512Kernel.supported() || !__builtin_cpu_supports("amx-int8")) return false;
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
    [](const float* x, int64_t cols, int64_t groups, int group_size, int8_t* q, float* scales, int32_t* sums) {
      kAvx512Kernel.quantise(x, cols, groups, group_size, q, scales, sums);
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
    [](const float* x, const float* weight, int64_t count, float eps, float* out) {
      kAvx512Kernel.rms_norm(x, weight, count, eps, out);
    },
    [](const Attention& a, int64_t kv_head) { kAvx512Kernel.attend(a, kv_head); },
    [](const Search& search, const float* w, uint8_t* codes, uint16_t* scales, int64_t first, int64_t last) {
      kAvx512Kernel.search_codes(search, w, codes, scales, first, last);
    },
};

}  // namespace moert
