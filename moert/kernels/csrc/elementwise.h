// What a forward pass does with many tokens between the products, split over the threads.
#pragma once

#include <cstdint>

#include "compute.h"
#include "step_kernel.h"

namespace moert {

// out [rows][size] = x [rows][size], each row over its root mean square, times weight [size].
void rms_norm_rows(const ComputeTable& compute, const float* x, const float* weight, int64_t rows,
                   int64_t size, float eps, float* out);

// out [heads][tokens][d] = x [tokens][heads][d] with the pairs (i, i + d / 2) turned by the angles of cos and sin
// [tokens][d / 2].
void rotate_heads(const ComputeTable& compute, const float* x, int64_t tokens, int64_t heads, int64_t d, const float* cos,
                  const float* sin, float* out);

// out [tokens][size] = sum over k of weights [tokens][top_k] times the rows of parts that `rows` [tokens][top_k] names
// (-1: none), and more [tokens][size] unless that is null; summed in double, so that the order does not show.
void combine(const ComputeTable& compute, const float* parts, const int64_t* rows, const float* weights, int64_t tokens,
             int64_t top_k, int64_t size, const double* more, float* out);

}  // namespace moert
