// What a kernel does between the products of a step, written once with compiler vectors; each step_*.cpp compiles it
// for one instruction set. No include guard on purpose: MOERT_ISA names the namespace.
#include "kernel_vectors.h"
#include "step_kernel.h"

#include "step_attention.h"

namespace moert {
namespace MOERT_ISA {

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

void rms_norm(const float* x, const float* weight, int64_t count, float eps, float* out) {
  f32x16 square = {};
  for (int64_t i = 0; i < count; i += 16) {
    const f32x16 part = load_some(x + i, count - i);
    square += part * part;
  }
  const float factor = 1 / std::sqrt(sum_lanes(square) / float(count) + eps);
  for (int64_t i = 0; i < count; i++) out[i] = x[i] * factor * weight[i];
}

constexpr StepKernel step_kernel(const char* name) { return {name, rms_norm, attend, to_halves, to_bytes}; }

}  // namespace MOERT_ISA
}  // namespace moert
