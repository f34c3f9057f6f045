// The interface that every instruction set implements.
//
// Contract: pointers are to memory that the caller owns and keeps alive; codes start on 64 bytes; nothing is allocated;
// a range [first, last) of tiles, rows or groups may be computed by any thread, and the result does not depend on the
// split. Arithmetic of products: weights are w = s * (c - (2^b - 1) / 2) as quant/format.py defines them; inputs are
// int8 per group, x = t * q; the dot product of codes and q over a group is exact in int32 (at most 128 * 255 * 127),
//     y = sum over groups of (2 * dot - (2^b - 1) * sum(q)) * (s * t / 2)
// in float32, groups in ascending order. One token or many, the sums are the same.
// Of the trellis code the byte in the place of c is the sum over planes of tables[64 * plane + window] modulo 256, where
// the window of a weight is its bits in the plane, at the top, and those of the weights before it in the ring of its row
// (quant/trellis.py).
#pragma once

#include <cstddef>
#include <cstdint>

#include "trellis.h"

namespace moert {

constexpr int kTileRows = 16;
constexpr int kMaxPlanes = 8;
constexpr int kTrellisBias = 128;  // added to a level, so that it is an unsigned byte like a code

struct Plane {
  const uint8_t* data;  // first byte of this plane in tile 0, group 0
  size_t stride;        // bytes from one (tile, group) to the next
  int bits;             // 8, 4, 2 or 1
  int shift;            // place of its lowest bit in the code
};

struct NestedMatrix {
  Plane planes[kMaxPlanes];
  int num_planes;
  const uint8_t* scales;  // fp16 [tiles][groups][16]
  int64_t tiles, groups, rows;
  int group_size;
  float midpoint;
  int levels;  // 2^b - 1, twice the midpoint; of the trellis code 2 * kTrellisBias
  const uint8_t* tables;  // of the trellis code, as kernel_tables of quant/trellis.py has them: 64 bytes for each plane
  int scale_groups;  // scales of a row: one for each group, or of the trellis code a single one

  // The scales of 16 rows for a cell (one group of one tile).
  const uint8_t* scales_of(int64_t tile, int64_t group) const {
    return scales + (tile * scale_groups + (scale_groups == 1 ? 0 : group)) * kTileRows * 2;
  }
  // The 64 bytes of a plane before those at `chunk`, which begin a group. Before the first group of a tile is the last
  // one: there the byte before each is the next lower one of the lane, and before the lowest the highest.
  const uint8_t* chunk_before(const uint8_t* chunk, const Plane& plane, bool first_group) const {
    const size_t stride = plane.stride;
    return (first_group ? chunk + (groups - 1) * stride : chunk - stride) + 2 * group_size * plane.bits - 64;
  }
};

// Asks for the bytes of a cell (one group of one tile). A tile's planes and scales are short streams, a few pages each,
// which hardware has hardly recognised when they end. So while a tile is computed the next one is asked for, if it is in
// the same range: products with one token run 1.1 (8 bits) to 1.5 times (2 + 1 + 1 bits) as fast.
inline void prefetch(const NestedMatrix& w, int64_t tile, int64_t group) {
  const int64_t cell = tile * w.groups + group;
  for (int p = 0; p < w.num_planes; p++)
    for (int line = 0; line < w.group_size * w.planes[p].bits / 32; line++)
      __builtin_prefetch(w.planes[p].data + cell * w.planes[p].stride + 64 * line, 0, 2);
  __builtin_prefetch(w.scales_of(tile, group), 0, 2);
}

enum class RawType { kBf16, kHalf, kFloat };

// Rounding with a search of the clipping range, as quant/nested.py describes it.
struct Search {
  const int* widths;  // ascending
  int num_widths;
  const float* clips;
  int num_clips;
  int group_size;
  int64_t num_groups;
};

// Inputs of a product: for each group of columns and each token group_size int8 with a scale and a sum. The tokens of a
// group lie side by side, because rows that are a power of two apart fall into few lines of the first cache.
struct Activations {
  const int8_t* q;      // [groups][stride tokens][group_size], on 64 bytes
  const float* scales;  // [groups][stride]: half the scale, so that y needs no factor
  const int32_t* sums;  // [groups][stride]
  int64_t tokens, stride;

  int64_t at(int64_t token, int64_t group) const { return group * stride + token; }
};

struct Kernel {
  const char* name;
  bool (*supported)();
  // x [cols] -> one token of Activations; columns beyond `cols` are 0. Of the trellis code every group is `rotated`
  // first, as quant/trellis.py does it, to the bit.
  void (*quantise)(const float* x, int64_t cols, int64_t groups, int group_size, bool rotated, int8_t* q, float* scales,
                   int32_t* sums);
  // out[t * out_stride + n] = y for the rows n of tiles [first, last).
  void (*nested_matmul)(const NestedMatrix& w, const Activations& x, float* out, int64_t out_stride, int64_t first,
                        int64_t last);
  // out[n * out_stride + k] = w[n, k] for the rows of tiles [first, last) and k < cols.
  void (*nested_dequantise)(const NestedMatrix& w, int64_t cols, float* out, int64_t out_stride, int64_t first,
                            int64_t last);
  // out[t * out_stride + n] = sum_k w[n, k] * x[t * x_stride + k] in float32, for raw rows [first, last) of `cols`.
  void (*raw_matmul)(const void* w, RawType type, int64_t cols, const float* x, int64_t tokens, int64_t x_stride,
                     float* out, int64_t out_stride, int64_t first, int64_t last);
  // gate[i] = silu(gate[i]) * up[i].
  void (*silu_product)(float* gate, const float* up, int64_t count);
  // Codes [num_groups][group_size] of the largest width and fp16 scales [num_widths][num_groups] of the groups
  // [first, last) of w [num_groups][group_size].
  void (*search_codes)(const Search& search, const float* w, uint8_t* codes, uint16_t* scales, int64_t first,
                       int64_t last);
  ChooseTrellis* choose_trellis;
};

// Products of the trellis code by the AVX-512 kernel, on processors with VBMI and on all.
void trellis_matmul_vbmi(const NestedMatrix& w, const Activations& x, float* out, int64_t out_stride, int64_t first,
                         int64_t last);
void trellis_matmul_avx512(const NestedMatrix& w, const Activations& x, float* out, int64_t out_stride, int64_t first,
                           int64_t last);

extern const Kernel kGenericKernel;
extern const Kernel kAvx2Kernel;
extern const Kernel kAvx512Kernel;
extern const Kernel kAmxKernel;
extern const Kernel kNeonKernel;

}  // namespace moert
