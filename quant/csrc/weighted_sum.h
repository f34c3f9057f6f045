// The weighted sum of some vectors.
#pragma once

#include <cstdint>

namespace moert {

// out [size] += sum over i of weights[i] * terms[i], and more unless that is null; summed in double, so that the order
// does not show.
inline void add_weighted(const float* const* terms, const float* weights, int64_t count, int64_t size, float* out,
                         const double* more = nullptr) {
  for (int64_t i = 0; i < size; i++) {
    double sum = more == nullptr ? 0.0 : more[i];
    for (int64_t e = 0; e < count; e++) sum += double(weights[e]) * double(terms[e][i]);
    out[i] += float(sum);
  }
}

}  // namespace moert
