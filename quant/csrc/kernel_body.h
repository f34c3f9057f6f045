// The kernels, written once with compiler vectors; each kernel_*.cpp compiles them for one instruction set.
// No include guard on purpose: MOERT_ISA names the namespace.
#include "kernel.h"
#include "kernel_vectors.h"
#include "trellis_body.h"

namespace moert {
namespace MOERT_ISA {

// Codes of 16 rows for columns 4 * quad ... 4 * quad + 3 of a group, one byte each in the lane of its row.
inline u32x16 codes_of(const NestedMatrix& w, int64_t cell, int quad) {
  if (w.tables != nullptr) return trellis_codes(w, cell, quad);
  u32x16 codes = {};
  for (int p = 0; p < w.num_planes; p++) {
    const Plane& plane = w.planes[p];
    const uint8_t* base = plane.data + cell * plane.stride;
    const int quads = 8 / plane.bits;  // in 64 bytes
    const u32x16 word = load<u32x16>(base + 64 * (quad / quads));
    codes |= ((word >> (plane.bits * (quad % quads))) & 0x01010101u * ((1u << plane.bits) - 1)) << plane.shift;
  }
  return codes;
}

inline f32x16 column(u32x16 codes, int byte) {
  return __builtin_convertvector(bits_as<i32x16>((codes >> (8 * byte)) & 0xffu), f32x16);
}

void quantise(const float* x, int64_t cols, int64_t groups, int group_size, bool rotated, int8_t* q, float* scales,
              int32_t* sums) {
  for (int64_t group = 0; group < groups; group++) {
    f32x16 part[8] = {}, poison = {};
    i32x16 sum = {};
    const int64_t start = group * group_size;
    for (int i = 0; i < group_size / 16 && start + 16 * i < cols; i++)
      part[i] = load_some(x + start + 16 * i, cols - start - 16 * i);
    if (rotated) rotate(part, group_size);
    const float scale = round_bytes(part, group_size / 16, q + start, sum, poison);
    scales[group] = scale / 2 + sum_lanes(poison);
    sums[group] = sum_lanes(sum);
  }
}

void nested_dequantise(const NestedMatrix& w, int64_t cols, float* out, int64_t out_stride, int64_t first,
                       int64_t last) {
  for (int64_t tile = first; tile < last; tile++) {
    const int64_t row = tile * kTileRows;
    const int64_t rows = w.rows - row < kTileRows ? w.rows - row : kTileRows;
    for (int64_t group = 0; group < w.groups; group++) {
      const int64_t cell = tile * w.groups + group;
      const f32x16 scale = load_half(w.scales_of(tile, group));
      f32x16 block[128];  // a column of 16 rows each
      for (int quad = 0; quad < w.group_size / 4; quad++) {
        const u32x16 codes = codes_of(w, cell, quad);
        for (int byte = 0; byte < 4; byte++) block[4 * quad + byte] = (column(codes, byte) - w.midpoint) * scale;
      }
      if (w.tables != nullptr) rotate_columns(block, w.group_size);
      const int64_t start = group * w.group_size;
      const int64_t count = cols - start < w.group_size ? cols - start : w.group_size;
      for (int64_t r = 0; r < rows; r++)
        for (int64_t k = 0; k < count; k++) out[(row + r) * out_stride + start + k] = block[k][r];
    }
  }
}

inline f32x16 silu(f32x16 v) { return v / (exponential(-v) + 1.0f); }

void silu_product(float* gate, const float* up, int64_t count) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    const f32x16 product = silu(load<f32x16>(gate + i)) * load<f32x16>(up + i);
    std::memcpy(gate + i, &product, sizeof(product));
  }
  if (i < count) {
    const f32x16 product = silu(load_some(gate + i, count - i)) * load_some(up + i, count - i);
    std::memcpy(gate + i, &product, (count - i) * sizeof(float));
  }
}

// Sixteen raw weights as floats, exactly.
struct Bf16 {
  uint16_t bits;
};
inline f32x16 sixteen(const Bf16* p) {
  typedef uint16_t u16x16 __attribute__((vector_size(32)));
  return bits_as<f32x16>(__builtin_convertvector(load<u16x16>(p), u32x16) << 16);
}
inline f32x16 sixteen(const Half* p) { return load_half(p); }
inline f32x16 sixteen(const float* p) { return load<f32x16>(p); }

template <int T, class Weight>
void raw_tokens(const Weight* w, int64_t cols, const float* x, int64_t x_stride, float* out, int64_t out_stride,
                int64_t first, int64_t last) {
  for (int64_t n = first; n < last; n++) {
    const Weight* row = w + n * cols;
    f32x16 sum[T] = {};
    int64_t k = 0;
    for (; k + 16 <= cols; k += 16) {
      const f32x16 v = sixteen(row + k);
      for (int t = 0; t < T; t++) sum[t] += v * load<f32x16>(x + t * x_stride + k);
    }
    if (k < cols) {
      Weight rest[16] = {};
      std::memcpy(rest, row + k, (cols - k) * sizeof(Weight));
      const f32x16 v = sixteen(rest);
      for (int t = 0; t < T; t++) sum[t] += v * load_some(x + t * x_stride + k, cols - k);
    }
    for (int t = 0; t < T; t++) out[t * out_stride + n] = sum_lanes(sum[t]);
  }
}

// The same sums for a single token: four rows at a time, each a stream of its own.
template <class Weight>
int64_t raw_rows(const Weight* w, int64_t cols, const float* x, float* out, int64_t first, int64_t last) {
  constexpr int kRows = 4;
  int64_t n = first;
  for (; cols % 16 == 0 && n + kRows <= last; n += kRows) {
    f32x16 sum[kRows] = {};
    for (int64_t k = 0; k < cols; k += 16)
#pragma GCC unroll 4
      for (int r = 0; r < kRows; r++) sum[r] += sixteen(w + (n + r) * cols + k) * load<f32x16>(x + k);
    for (int r = 0; r < kRows; r++) out[n + r] = sum_lanes(sum[r]);
  }
  return n;
}

template <class Weight>
void raw_matmul(const Weight* w, int64_t cols, const float* x, int64_t tokens, int64_t x_stride, float* out,
                int64_t out_stride, int64_t first, int64_t last) {
  if (tokens == 1) first = raw_rows(w, cols, x, out, first, last);
  int64_t t = 0;
  for (; t + 4 <= tokens; t += 4)
    raw_tokens<4>(w, cols, x + t * x_stride, x_stride, out + t * out_stride, out_stride, first, last);
  for (; t < tokens; t++)
    raw_tokens<1>(w, cols, x + t * x_stride, x_stride, out + t * out_stride, out_stride, first, last);
}

void raw_matmul(const void* w, RawType type, int64_t cols, const float* x, int64_t tokens, int64_t x_stride, float* out,
                int64_t out_stride, int64_t first, int64_t last) {
  switch (type) {
    case RawType::kBf16:
      return raw_matmul(static_cast<const Bf16*>(w), cols, x, tokens, x_stride, out, out_stride, first, last);
    case RawType::kHalf:
      return raw_matmul(static_cast<const Half*>(w), cols, x, tokens, x_stride, out, out_stride, first, last);
    case RawType::kFloat:
      return raw_matmul(static_cast<const float*>(w), cols, x, tokens, x_stride, out, out_stride, first, last);
  }
}

}  // namespace MOERT_ISA
}  // namespace moert

#include "kernel_search.h"
