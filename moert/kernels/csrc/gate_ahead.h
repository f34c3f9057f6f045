// Routers of later layers, applied to the hidden state of an earlier one.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "compute.h"

namespace moert {

// Each router [experts][hidden] has the weights of its norm folded in, so that all see the same input: x over its root
// mean square. It does not own their memory.
class GateAheadRouters {
 public:
  // Throws std::invalid_argument where the routers cannot share an input, or one has fewer experts than are to be named.
  GateAheadRouters(const std::vector<const Matrix*>& routers, int64_t hidden, float eps, int64_t count);

  // For each router the `count` likeliest experts, the likeliest first, and their softmax over all. Under the lock of the
  // products.
  std::vector<std::pair<std::vector<int64_t>, std::vector<float>>> choose(const ComputeTable& compute, const float* x);

 private:
  std::vector<Matrix> routers_;
  std::vector<float> ones_;
  float eps_;
  int64_t count_;
  Buffer normed_, logits_;
};

}  // namespace moert
