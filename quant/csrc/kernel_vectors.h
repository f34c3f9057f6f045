// Compiler vectors of 16 numbers, and what a kernel does with them; compiled once for each instruction set.
// No include guard on purpose: MOERT_ISA names the namespace. Everything is inline, so that the objects of two modules
// can meet in one program.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

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

// The bits of a half, so that overloads tell it from other numbers.
struct Half {
  uint16_t bits;
};

}  // namespace MOERT_ISA
}  // namespace moert
