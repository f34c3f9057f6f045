// Tests of products with raw weights.
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

}  // namespace moert
