// Tests of what a kernel computes between the products of a decode step, and of raw weights.
#pragma once

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "check.h"
#include "kernel.h"
#include "packed_matrix.h"

namespace moert {

inline void test_raw(const Kernel& kernel) {
  where = std::string(kernel.name) + ", raw weights";
  for (RawType type : {RawType::kBf16, RawType::kHalf, RawType::kFloat})
    for (int64_t cols : {1, 16, 45, 200})
      for (int64_t tokens : {1, 3, 4, 6}) {
        const int64_t rows = 7, x_stride = cols + 2, out_stride = rows + 1, size = type == RawType::kFloat ? 4 : 2;
        Memory<uint8_t> w = memory<uint8_t>(rows * cols * size);
        std::vector<double> values(rows * cols);
        for (int64_t i = 0; i < rows * cols; i++) {
          const float v = normal();
          uint32_t bits;
          std::memcpy(&bits, &v, 4);
          const uint32_t high = bits & 0xffff0000u;
          const uint16_t half = uint16_t(0x2c00 + generator() % 0x1000 + (generator() % 2 << 15)), bf16 = high >> 16;
          float kept;
          std::memcpy(&kept, &high, 4);
          values[i] = type == RawType::kFloat ? v : type == RawType::kBf16 ? kept : half_value(half);
          if (type == RawType::kFloat) std::memcpy(&w[4 * i], &v, 4);
          if (type != RawType::kFloat) std::memcpy(&w[2 * i], type == RawType::kBf16 ? &bf16 : &half, 2);
        }
        std::vector<float> x(tokens * x_stride), out(tokens * out_stride, 7.0f);
        for (float& v : x) v = normal();
        kernel.raw_matmul(w.get(), type, cols, x.data(), tokens, x_stride, out.data(), out_stride, 1, rows);
        for (int64_t t = 0; t < tokens; t++) {
          CHECK(out[t * out_stride] == 7.0f && out[t * out_stride + rows] == 7.0f);
          for (int64_t n = 1; n < rows; n++) {
            double sum = 0, weight = 0;
            for (int64_t k = 0; k < cols; k++) {
              const double product = values[n * cols + k] * x[t * x_stride + k];
              sum += product, weight += std::fabs(product);
            }
            CHECK(std::fabs(out[t * out_stride + n] - sum) <= 4e-6 * weight);
          }
        }
      }
}

inline void test_rms_norm(const Kernel& kernel) {
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

inline void test_attention(const Kernel& kernel) {
  for (bool bytes : {false, true})
    for (int d : {16, 48, 256})
      for (int64_t end : {1, 7, 70}) {
        where = std::string(kernel.name) + ", attention, d " + std::to_string(d);
        const int64_t start = end / 3, capacity = end + 2, count = end - start;
        const int shared = 3, kv_heads = 2;
        Memory<uint8_t> cache[2];
        std::vector<double> values[2];
        std::vector<float> scales[2];
        for (int which = 0; which < 2; which++) {
          cache[which] = memory<uint8_t>(kv_heads * capacity * d * (bytes ? 1 : 2));
          for (int64_t i = 0; i < kv_heads * capacity; i++) scales[which].push_back(bytes ? 0.01f + 0.001f * (i % 5) : 1);
          for (int64_t i = 0; i < kv_heads * capacity * d; i++) {
            const int8_t byte = int8_t(generator() % 255 - 127);
            const uint16_t half = uint16_t(0x2c00 + generator() % 0x1000 + (generator() % 2 << 15));
            if (bytes) std::memcpy(&cache[which][i], &byte, 1);
            if (!bytes) std::memcpy(&cache[which][2 * i], &half, 2);
            values[which].push_back((bytes ? byte : half_value(half)) * scales[which][i / d]);
          }
        }
        std::vector<float> q(kv_heads * shared * d), out(q.size()), scores(kv_heads * shared * count);
        for (float& v : q) v = normal() / 4;
        const Attention a{q.data(),
                          cache[0].get(),
                          cache[1].get(),
                          bytes ? scales[0].data() : nullptr,
                          bytes ? scales[1].data() : nullptr,
                          capacity,
                          start,
                          end,
                          shared,
                          d,
                          scores.data(),
                          out.data()};
        for (int64_t j = 0; j < kv_heads; j++) kernel.attend(a, j);
        for (int h = 0; h < kv_heads * shared; h++) {
          std::vector<double> weight(count), want(d);
          double peak = -INFINITY, total = 0, largest = 0;
          for (int64_t s = 0; s < count; s++) {
            for (int i = 0; i < d; i++)
              weight[s] += q[h * d + i] * values[0][(h / shared * capacity + start + s) * d + i];
            peak = std::max(peak, weight[s]);
          }
          for (double& w : weight) total += w = std::exp(w - peak);
          for (int i = 0; i < d; i++) {
            for (int64_t s = 0; s < count; s++)
              want[i] += weight[s] / total * values[1][(h / shared * capacity + start + s) * d + i];
            largest = std::max(largest, std::fabs(want[i]));
          }
          for (int i = 0; i < d; i++) CHECK(std::fabs(out[h * d + i] - want[i]) <= 1e-4 * largest);
        }
      }
}

}  // namespace moert
