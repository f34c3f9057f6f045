// Products with nested-bit planes and with bf16 rows: the interface that every instruction set implements.
//
// Contract: pointers are to memory that the caller owns and keeps alive; codes start on 64 bytes; nothing is allocated;
// a range [first, last) of tiles or rows may be computed by any thread, and the result does not depend on the split.
// Arithmetic: weights are w = s * (c - (2^b - 1) / 2) as quant/format.py defines them; inputs, products and sums are
// float32. Sums run over the columns of a group in ascending order, then over groups in ascending order.
#pragma once

#include <cstddef>
#include <cstdint>

namespace moert {

constexpr int kTileRows = 16;
constexpr int kMaxPlanes = 8;

struct Plane {
  const uint8_t* data;  // first byte of this plane in tile 0, group 0
  size_t stride;        // bytes from one (tile, group) to the next
  int bits;             // 2 or 1
  int shift;            // place of its lowest bit in the code
};

struct NestedMatrix {
  Plane planes[kMaxPlanes];
  int num_planes;
  const uint8_t* scales;  // fp16 [tiles][groups][16]
  int64_t tiles, groups, rows;
  int group_size;
  float midpoint;
};

// Rounding with a search of the clipping range, as quant/nested.py describes it.
struct Search {
  const int* widths;  // ascending
  int num_widths;
  const float* clips;
  int num_clips;
  int group_size;
  int64_t num_groups;
};

struct Kernel {
  const char* name;
  bool (*supported)();
  // out[t * out_stride + n] = sum_k w[n, k] * x[t * x_stride + k], for the rows n of tiles [first, last).
  // x holds groups * group_size values per token, the padded ones 0.
  void (*nested_matmul)(const NestedMatrix& w, const float* x, int64_t tokens, int64_t x_stride, float* out,
                        int64_t out_stride, int64_t first, int64_t last);
  // out[n * out_stride + k] = w[n, k] for the rows of tiles [first, last) and k < cols.
  void (*nested_dequantise)(const NestedMatrix& w, int64_t cols, float* out, int64_t out_stride, int64_t first,
                            int64_t last);
  // The same product with bf16 rows [rows, cols], rows [first, last).
  void (*bf16_matmul)(const uint16_t* w, int64_t cols, const float* x, int64_t tokens, int64_t x_stride, float* out,
                      int64_t out_stride, int64_t first, int64_t last);
  // Codes [num_groups][group_size] of the largest width and fp16 scales [num_widths][num_groups] of the groups
  // [first, last) of w [num_groups][group_size].
  void (*search_codes)(const Search& search, const float* w, uint8_t* codes, uint16_t* scales, int64_t first,
                       int64_t last);
};

extern const Kernel kGenericKernel;
#if defined(__x86_64__)
extern const Kernel kAvx2Kernel;
extern const Kernel kAvx512Kernel;
#endif

}  // namespace moert
