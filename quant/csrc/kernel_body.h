// The kernels, written once with compiler vectors; each kernel_*.cpp compiles them for one instruction set.
// No include guard on purpose: MOERT_ISA names the namespace.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "kernel.h"

namespace moert {
namespace MOERT_ISA {

typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef float f32x16 __attribute__((vector_size(64)));

template <class V>
inline V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

template <class To, class From>
inline To bits_as(From v) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To r;
  std::memcpy(&r, &v, sizeof(To));
  return r;
}

// 16 halves as floats, exactly.
inline f32x16 load_half(const void* p) {
#if defined(__AVX512F__)
  return bits_as<f32x16>(_mm512_cvtph_ps(load<__m256i>(p)));
#elif defined(__F16C__)
  const __m256 parts[2] = {_mm256_cvtph_ps(load<__m128i>(p)),
                           _mm256_cvtph_ps(load<__m128i>(static_cast<const uint8_t*>(p) + 16))};
  return load<f32x16>(parts);
#else
  typedef uint16_t u16x16 __attribute__((vector_size(32)));
  const u32x16 h = __builtin_convertvector(load<u16x16>(p), u32x16);
  const u32x16 special = bits_as<u32x16>((h & 0x7c00u) == 0x7c00u) & 0x7f800000u;  // infinity and NaN
  const f32x16 magnitude = bits_as<f32x16>((h & 0x7fffu) << 13) * 0x1p112f;
  return bits_as<f32x16>(bits_as<u32x16>(magnitude) | special | (h & 0x8000u) << 16);
#endif
}

// Codes of 16 rows for columns 4 * quad ... 4 * quad + 3 of a group, one byte each in the lane of its row.
inline u32x16 codes_of(const NestedMatrix& w, int64_t cell, int quad) {
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

#if defined(__AVX512F__)
constexpr int kRegister = 64;
#elif defined(__AVX2__)
constexpr int kRegister = 32;
#else
constexpr int kRegister = 16;
#endif

// a < b ? yes : no in every lane; `no` where one is NaN. In parts as long as a register, because gcc takes comparisons
// of longer vectors apart into single lanes.
inline f32x16 where_less(f32x16 a, f32x16 b, f32x16 yes, f32x16 no) {
  typedef float Part __attribute__((vector_size(kRegister)));
  struct Parts {
    Part part[64 / kRegister];
  };
  const Parts left = bits_as<Parts>(a), right = bits_as<Parts>(b), first = bits_as<Parts>(yes);
  Parts result = bits_as<Parts>(no);
  for (int i = 0; i < 64 / kRegister; i++)
    result.part[i] = left.part[i] < right.part[i] ? first.part[i] : result.part[i];
  return bits_as<f32x16>(result);
}

// What `join` makes of all lanes, as a tree: a loop over the lanes takes longer than the arithmetic before it.
template <class Lane, class V, class Join>
inline Lane over_lanes(V v, Join join) {
  typedef Lane Eight __attribute__((vector_size(8 * sizeof(Lane))));
  typedef Lane Four __attribute__((vector_size(4 * sizeof(Lane))));
  Eight halves[2];
  std::memcpy(halves, &v, sizeof(v));
  const Eight eight = join(halves[0], halves[1]);
  Four quarters[2];
  std::memcpy(quarters, &eight, sizeof(eight));
  const Four four = join(quarters[0], quarters[1]);
  return join(join(four[0], four[1]), join(four[2], four[3]));
}

inline float sum_lanes(f32x16 v) {
  return over_lanes<float>(v, [](auto a, auto b) { return a + b; });
}
inline int32_t sum_lanes(i32x16 v) {
  return over_lanes<int32_t>(v, [](auto a, auto b) { return a + b; });
}
inline float largest_lane(f32x16 v) {
  return over_lanes<float>(v, [](auto a, auto b) { return a > b ? a : b; });
}

// The first `count` (at most 16) floats at p; the other lanes are 0. A copy of a length not known at compile time is a
// call, which takes longer than the arithmetic.
inline f32x16 load_some(const float* p, int64_t count) {
  if (count >= 16) return load<f32x16>(p);
  f32x16 v = {};
  std::memcpy(&v, p, count * sizeof(float));
  return v;
}

inline f32x16 absolute(f32x16 v) { return bits_as<f32x16>(bits_as<u32x16>(v) & 0x7fffffffu); }

inline f32x16 all(float v) { return f32x16{} + v; }

// Rounds to the nearest whole number, ties to even, for |v| < 2^22.
inline f32x16 round_even(f32x16 v) { return (v + 12582912.0f) - 12582912.0f; }

// Rounds 16 * count numbers to bytes; adds up the bytes and, in `poison`, NaN where a number is not finite. Returns the
// scale.
inline float round_bytes(const f32x16* part, int count, int8_t* q, i32x16& sum, f32x16& poison) {
  typedef int8_t i8x16 __attribute__((vector_size(16)));
  f32x16 peaks = {};
  for (int i = 0; i < count; i++) {
    poison += part[i] * 0.0f;
    const f32x16 size = absolute(part[i]);
    peaks = where_less(peaks, size, size, peaks);
  }
  const float peak = largest_lane(peaks);
  const float inverse = peak > 1e-36f ? 127 / peak : 0;  // 127 / 1e-37 is infinite
  for (int i = 0; i < count; i++) {
    // NaN has no whole number; 0 keeps the sums within bounds.
    f32x16 product = part[i] * inverse;
    // Rounded to float32 here: fused with the addition in round_even, ties would fall differently where there is FMA.
    asm volatile("" : "+m"(product));
    const f32x16 nearest = round_even(product);
    const i32x16 whole = __builtin_convertvector(where_less(nearest, all(128), nearest, all(0)), i32x16);
    sum += whole;
    const i8x16 narrow = __builtin_convertvector(whole, i8x16);
    std::memcpy(q + 16 * i, &narrow, sizeof(narrow));
  }
  return peak / 127;
}

void quantise(const float* x, int64_t cols, int64_t groups, int group_size, int8_t* q, float* scales, int32_t* sums) {
  for (int64_t group = 0; group < groups; group++) {
    f32x16 part[8] = {}, poison = {};
    i32x16 sum = {};
    const int64_t start = group * group_size;
    for (int i = 0; i < group_size / 16 && start + 16 * i < cols; i++)
      part[i] = load_some(x + start + 16 * i, cols - start - 16 * i);
    const float scale = round_bytes(part, group_size / 16, q + start, sum, poison);
    scales[group] = scale / 2 + sum_lanes(poison);
    sums[group] = sum_lanes(sum);
  }
}

float to_bytes(const float* x, int64_t count, int8_t* out) {
  f32x16 part[16], poison = {};
  i32x16 sum = {};
  for (int i = 0; i < count / 16; i++) part[i] = load<f32x16>(x + 16 * i);
  return round_bytes(part, int(count / 16), out, sum, poison) + sum_lanes(poison);
}

void to_halves(const float* x, int64_t count, uint16_t* out) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= count; i += 16) {
    const __m256i halves = _mm512_cvtps_ph(_mm512_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT);
    std::memcpy(out + i, &halves, sizeof(halves));
  }
#elif defined(__F16C__)
  for (; i + 8 <= count; i += 8) {
    const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT);
    std::memcpy(out + i, &halves, sizeof(halves));
  }
#endif
  for (; i < count; i++) {
    uint32_t bits = bits_as<uint32_t>(x[i]);
    const uint16_t sign = uint16_t(bits >> 16 & 0x8000u);
    const float size = std::fabs(x[i]);
    if (!(size < 65520.0f)) {
      out[i] = sign | (size == size ? 0x7c00u : 0x7e00u);
      continue;
    }
    bits = bits_as<uint32_t>(size * 0x1p-112f);  // subnormal halves become subnormal floats
    out[i] = sign | uint16_t((bits + 0xfffu + (bits >> 13 & 1u)) >> 13);
  }
}

void nested_dequantise(const NestedMatrix& w, int64_t cols, float* out, int64_t out_stride, int64_t first,
                       int64_t last) {
  for (int64_t tile = first; tile < last; tile++) {
    const int64_t row = tile * kTileRows;
    const int64_t rows = w.rows - row < kTileRows ? w.rows - row : kTileRows;
    for (int64_t group = 0; group < w.groups; group++) {
      const int64_t cell = tile * w.groups + group;
      const f32x16 scale = load_half(w.scales + cell * kTileRows * 2);
      float block[128][kTileRows];
      for (int quad = 0; quad < w.group_size / 4; quad++) {
        const u32x16 codes = codes_of(w, cell, quad);
        for (int byte = 0; byte < 4; byte++) {
          const f32x16 v = (column(codes, byte) - w.midpoint) * scale;
          std::memcpy(block[4 * quad + byte], &v, sizeof(v));
        }
      }
      const int64_t start = group * w.group_size;
      const int64_t count = cols - start < w.group_size ? cols - start : w.group_size;
      for (int64_t r = 0; r < rows; r++)
        for (int64_t k = 0; k < count; k++) out[(row + r) * out_stride + start + k] = block[k][r];
    }
  }
}

// e^x to about 2 units in the last place, for x from -87 (below: as there) to 87.
inline f32x16 exponential_below(f32x16 x) {
  x = where_less(x, all(-87), all(-87), x);
  const f32x16 n = round_even(x * 1.44269504f);
  const f32x16 r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // x - n * ln 2, in two steps
  f32x16 p = r * 1.98412698e-4f + 1.38888889e-3f;  // Taylor: |r| is at most ln 2 / 2
  p = p * r + 8.33333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 1.66666667e-1f;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  return p * bits_as<f32x16>((__builtin_convertvector(n, i32x16) + 127) << 23);
}

// The same, beyond 87 as there.
inline f32x16 exponential(f32x16 x) { return exponential_below(where_less(all(87), x, all(87), x)); }

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
struct Half {
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

void rms_norm(const float* x, const float* weight, int64_t count, float eps, float* out) {
  f32x16 square = {};
  for (int64_t i = 0; i < count; i += 16) {
    const f32x16 part = load_some(x + i, count - i);
    square += part * part;
  }
  const float factor = 1 / std::sqrt(sum_lanes(square) / float(count) + eps);
  for (int64_t i = 0; i < count; i++) out[i] = x[i] * factor * weight[i];
}

}  // namespace MOERT_ISA
}  // namespace moert

#include "kernel_attention.h"
#include "kernel_search.h"
