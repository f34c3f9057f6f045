#include "elementwise.h"

#include <algorithm>
#include <vector>

namespace moert {

namespace {
constexpr int64_t kGrain = 1 << 14;  // numbers that are worth another thread

int64_t grain_for(int64_t size) { return size < kGrain ? kGrain / size : 1; }
}  // namespace

void rms_norm_rows(const ComputeTable& compute, const float* x, const float* weight, int64_t rows,
                   int64_t size, float eps, float* out) {
  const StepKernel& kernel = step_kernel_for(compute.kernel()->name);
  compute.split(rows, grain_for(size), [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; r++) kernel.rms_norm(x + r * size, weight, size, eps, out + r * size);
  });
}

void rotate_heads(const ComputeTable& compute, const float* x, int64_t tokens, int64_t heads, int64_t d, const float* cos,
                  const float* sin, float* out) {
  const int64_t half = d / 2;
  compute.split(tokens, grain_for(heads * d), [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; t++)
      for (int64_t h = 0; h < heads; h++) {
        const float *in = x + (t * heads + h) * d, *c = cos + t * half, *s = sin + t * half;
        float* to = out + (h * tokens + t) * d;
        for (int64_t i = 0; i < half; i++) {
          to[i] = in[i] * c[i] - in[i + half] * s[i];
          to[i + half] = in[i + half] * c[i] + in[i] * s[i];
        }
      }
  });
}

void combine(const ComputeTable& compute, const float* parts, const int64_t* rows, const float* weights, int64_t tokens,
             int64_t top_k, int64_t size, const double* more, float* out) {
  compute.split(tokens, grain_for(top_k * size), [&](int64_t first, int64_t last) {
    std::vector<double> sums(size);
    for (int64_t t = first; t < last; t++) {
      if (more == nullptr) {
        std::fill(sums.begin(), sums.end(), 0.0);
      } else {
        std::copy(more + t * size, more + (t + 1) * size, sums.begin());
      }
      for (int64_t k = 0; k < top_k; k++) {
        const int64_t row = rows[t * top_k + k];
        if (row < 0) continue;
        const float* part = parts + row * size;
        const double weight = weights[t * top_k + k];
        for (int64_t i = 0; i < size; i++) sums[i] += weight * double(part[i]);
      }
      for (int64_t i = 0; i < size; i++) out[t * size + i] = float(sums[i]);
    }
  });
}

}  // namespace moert
