// What a layer does with some tokens before its experts.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "compute.h"
#include "step_kernel.h"

namespace moert {

enum class QkNorm { kNone, kHead, kFull };  // of each head, or of all of q and all of k

// What a layer has besides its experts. Biases may be null; a head's size is a multiple of 16, at most 256.
struct Layer {
  int64_t hidden;
  int heads, kv_heads, head_dim;
  const float *input_norm, *output_norm;  // before attention and behind it
  float eps;
  Matrix q, k, v, o;
  const float *q_bias, *k_bias, *v_bias, *o_bias;
  QkNorm qk_norm;
  const float *q_norm, *k_norm;
  float clip;      // of q, k and v; infinite where there is none
  Matrix router;   // without rows in a layer that has none
  int64_t top_k;
  bool normalise;
};

// Keys and values of the layer, as Attention has them.
struct LayerCache {
  void *keys, *values;
  CacheType type;
  float *key_scales, *value_scales;
  int64_t capacity;
};

// Where the tokens stand: the first at `position`; each sees `window` positions, its own the last of them.
struct Place {
  const float *cos, *sin;  // [tokens][head_dim / 2]
  int64_t tokens, position, window;
};

// Tokens of one sequence, one after the other; the first of them is token `first` of all.
struct Run {
  const LayerCache* cache;
  const Place* at;
  int64_t first;
};

// Runs of several sequences, each with its cache, `tokens` in all.
struct Runs {
  const Run* begin;
  int64_t count, tokens;

  const Run& of(int64_t token) const;
};
using Parts = std::vector<std::pair<const LayerCache*, const Place*>>;

class LayerStep {
 public:
  explicit LayerStep(const ComputeTable& compute) : compute_(compute) {}

  // x [tokens][hidden] gets attention added to it; normed [tokens][hidden] is what the experts see; indices and weights
  // [tokens][top_k] are what the router makes of it. Keys and values are written to the caches. What becomes of a token
  // does not depend on the tokens beside it. Under the lock of the products. Throws std::invalid_argument where a place lies beyond its cache.
  // bonus [experts], or null: see `favour`.
  void run(const Kernel& products_kernel, const Layer& layer, const Runs& runs, const float* bonus, float* x, float* normed,
           int64_t* indices, float* weights);

 private:
  // Norms, clips and rotates q and k of a token in place, and writes its key and value.
  void prepare(const StepKernel& kernel, const Layer& layer, const Run& run, int64_t token, float* q, float* k, float* v);
  void attend(const StepKernel& kernel, const Layer& layer, const Runs& runs, const float* q, float* out);
  // Calls body(token) for all, spread over the threads where there is work of `size` numbers for each.
  template <class Body>
  void for_tokens(int64_t tokens, int64_t size, const Body& body);

  const ComputeTable& compute_;
  Buffer q_, k_, v_, attended_, logits_, units_;
};

// The top_k largest of favoured [count]: indices, those with the largest logits first (of equals the one that comes
// first), and their softmax over all logits, divided by the sum over the chosen ones if `normalise`.
void route(const float* logits, const float* favoured, int64_t count, int64_t top_k, bool normalise, int64_t* indices,
           float* weights);

// Cache-conditional routing: favoured [count] are the logits, and for each so many times their range on top as `bonus`
// says; infinite for the largest.
void favour(const float* logits, const float* bonus, int64_t count, float* favoured);

}  // namespace moert
