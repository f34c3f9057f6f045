// The parts of a decode step between the products, for one token.
#pragma once

#include <cstdint>

#include "kernel.h"
#include "products.h"

namespace moert {

struct AttentionStep {
  float *q, *k;           // [heads][head_dim], [kv_heads][head_dim]; changed in place
  const float* v;         // [kv_heads][head_dim]
  const float *q_norm, *k_norm;  // [head_dim] each, or null
  float eps;
  const float *cos, *sin;  // [head_dim / 2]
  void *keys, *values;  // cache of the layer, as Attention has it
  float *key_scales, *value_scales;
  int64_t capacity, position, start;
  int heads, kv_heads, head_dim;
  float* out;  // [heads][head_dim]
};

// Norms and rotates q and k, writes k and v at `position`, attends to positions start ... position.
void attention_step(const Kernel& kernel, ThreadPool& pool, Buffer& scratch, const AttentionStep& step);

// The top_k largest of logits [count]: indices, largest first (of equals the one that comes first), and their softmax
// over all logits, divided by the sum over the chosen ones if `normalise`.
void route(const float* logits, int64_t count, int64_t top_k, bool normalise, int64_t* indices, float* weights);

}  // namespace moert
