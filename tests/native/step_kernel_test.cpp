// Tests of what every instruction set computes between the products of a step, without Python, so that they can run under
// sanitizers and emulators. Expected values are computed in double. Usage: step_kernel_test KERNEL...: the kernels to test
// besides the portable one. Exit code 1 where something is wrong.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "check.h"
#include "packed_matrix.h"
#include "step_kernel.h"

using namespace moert;

namespace {

void test_rms_norm(const StepKernel& kernel) {
  where = std::string(kernel.name) + ", norm";
  for (int64_t size : {1, 15, 16, 100, 2048})
    for (float scale : {1e-3f, 1.0f, 1e6f}) {
      std::vector<float> x(size), weight(size), out(size);
      double square = 0;
      for (int64_t i = 0; i < size; i++) x[i] = normal() * scale, weight[i] = normal(), square += double(x[i]) * x[i];
      kernel.rms_norm(x.data(), weight.data(), size, 1e-6f, out.data());
      const double factor = 1 / std::sqrt(square / double(size) + 1e-6);
      for (int64_t i = 0; i < size; i++)
        CHECK(std::fabs(out[i] - x[i] * factor * weight[i]) <= 1e-5 * std::fabs(x[i] * factor * weight[i]) + 1e-9);
      kernel.rms_norm(x.data(), weight.data(), size, 1e-6f, x.data());  // in place
      CHECK(x == out);
    }
}

void test_attention(const StepKernel& kernel) {
  for (CacheType type : {CacheType::kHalf, CacheType::kFloat, CacheType::kByte})
    for (int d : {16, 48, 256})
      for (int64_t end : {1, 7, 70, 150})
        for (int64_t window : {5, 1000}) {
          where = std::string(kernel.name) + ", attention, d " + std::to_string(d);
          const int64_t tokens = (end + 2) / 3, position = end - tokens, capacity = (end + 15) / 16 * 16;
          const int shared = 3, kv_heads = 2, heads = shared * kv_heads, size = type == CacheType::kFloat ? 4 : type == CacheType::kHalf ? 2 : 1;
          Memory<uint8_t> cache[2];
          std::vector<double> values[2];  // [kv_heads][capacity][d]
          std::vector<float> scales[2];
          for (int which = 0; which < 2; which++) {
            cache[which] = memory<uint8_t>(kv_heads * capacity * d * size);
            for (int64_t i = 0; i < kv_heads * capacity; i++)
              scales[which].push_back(type == CacheType::kByte ? 0.01f + 0.001f * (i % 5) : 1);
            for (int64_t i = 0; i < kv_heads * capacity * d; i++) {
              const int64_t row = i / d, block = row / 16;
              const int64_t at = which == 1 ? i : (block * d + i % d) * 16 + row % 16;
              const int8_t byte = int8_t(generator() % 255 - 127);
              const uint16_t half = uint16_t(0x2c00 + generator() % 0x1000 + (generator() % 2 << 15));
              const float number = normal();
              if (type == CacheType::kByte) std::memcpy(&cache[which][at], &byte, 1);
              if (type == CacheType::kHalf) std::memcpy(&cache[which][2 * at], &half, 2);
              if (type == CacheType::kFloat) std::memcpy(&cache[which][4 * at], &number, 4);
              const double value = type == CacheType::kByte ? byte : type == CacheType::kHalf ? half_value(half) : number;
              values[which].push_back(value * scales[which][row]);
            }
          }
          std::vector<float> q(tokens * heads * d), out(q.size());
          for (float& v : q) v = normal() / 4;
          const bool scaled = type == CacheType::kByte;
          const Attention a{q.data(),
                            cache[0].get(),
                            cache[1].get(),
                            type,
                            scaled ? scales[0].data() : nullptr,
                            scaled ? scales[1].data() : nullptr,
                            capacity,
                            position,
                            window,
                            heads,
                            kv_heads,
                            d,
                            out.data()};
          for (int64_t j = 0; j < kv_heads; j++) kernel.attend(a, j, 0, tokens);
          for (int64_t row = 0; row < tokens * heads; row++) {
            const int64_t last = position + row / heads + 1, first = std::max<int64_t>(last - window, 0);
            const int64_t kv = row % heads / shared * capacity;
            std::vector<double> weight(last - first), want(d);
            double peak = -INFINITY, total = 0, largest = 0;
            for (int64_t s = first; s < last; s++) {
              for (int i = 0; i < d; i++) weight[s - first] += q[row * d + i] * values[0][(kv + s) * d + i];
              peak = std::max(peak, weight[s - first]);
            }
            for (double& w : weight) total += w = std::exp(w - peak);
            for (int i = 0; i < d; i++) {
              for (int64_t s = first; s < last; s++) want[i] += weight[s - first] / total * values[1][(kv + s) * d + i];
              largest = std::max(largest, std::fabs(want[i]));
            }
            for (int i = 0; i < d; i++) CHECK(std::fabs(out[row * d + i] - want[i]) <= 1e-4 * largest);
          }
          // What a token does not see does not reach it, whatever it is.
          if (type == CacheType::kFloat && tokens > 1) {
            const float bad = NAN;
            std::memcpy(&cache[1][4 * (end - 1) * d], &bad, 4);
            std::vector<float> before = out;
            kernel.attend(a, 0, 0, tokens - 1);
            CHECK(std::memcmp(before.data(), out.data(), (tokens - 1) * heads * d * sizeof(float)) == 0);
            kernel.attend(a, 0, tokens - 1, tokens);
            CHECK(std::isnan(out[(tokens - 1) * heads * d]));
          }
        }
}

void test_rounding(const StepKernel& kernel) {
  where = std::string(kernel.name) + ", rounding for a cache";
  std::vector<float> x(256);
  std::vector<uint16_t> halves(256);
  std::vector<int8_t> bytes(256);
  for (float scale : {1e-7f, 1e-3f, 1.0f, 1e3f, 1e5f})
    for (int64_t count : {16, 48, 256}) {
      float peak = 0;
      for (float& v : x) v = normal() * scale;
      for (int64_t i = 0; i < count; i++) peak = std::max(peak, std::fabs(x[i]));
      kernel.to_halves(x.data(), count, halves.data());
      for (int64_t i = 0; i < count; i++) {
        const double size = std::fabs(x[i]);
        if (size >= 65520) CHECK((halves[i] & 0x7fff) == 0x7c00);
        if (size < 65504) CHECK(std::fabs(half_value(halves[i]) - x[i]) <= std::max(size / 2048, 0x1p-25));
      }
      const float got = kernel.to_bytes(x.data(), count, bytes.data());
      for (int64_t i = 0; i < count; i++) CHECK(std::fabs(bytes[i] * got - x[i]) <= 0.501f * peak / 127);
    }
  x[3] = INFINITY;
  CHECK(std::isnan(kernel.to_bytes(x.data(), 16, bytes.data())));
  x[3] = NAN;
  CHECK(std::isnan(kernel.to_bytes(x.data(), 16, bytes.data())));
  kernel.to_halves(x.data(), 16, halves.data());
  CHECK((halves[3] & 0x7c00) == 0x7c00 && (halves[3] & 0x3ff) != 0);
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<const StepKernel*> all = {&kGenericStep};
  for (int i = 1; i < argc; i++) {
    const std::string name = argv[i];
#if defined(MOERT_WITH_AVX2)
    if (name == "avx2") all.push_back(&kAvx2Step);
#endif
#if defined(MOERT_WITH_AVX512)
    if (name == "avx512") all.push_back(&kAvx512Step);
#endif
#if defined(MOERT_WITH_NEON)
    if (name == "neon") all.push_back(&kNeonStep);
#endif
  }
  std::string tested;
  for (const StepKernel* kernel : all) {
    tested += std::string(" ") + kernel->name;
    generator.seed(1);
    test_rms_norm(*kernel);
    test_attention(*kernel);
    test_rounding(*kernel);
  }
  std::printf("tested:%s\n%lld checks, %lld failures\n", tested.c_str(), (long long)checks, (long long)failures);
  return failures != 0;
}
