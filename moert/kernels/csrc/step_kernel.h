// What every instruction set implements of a step, besides the products. The contract is that of kernel.h.
#pragma once

#include <cstdint>

namespace moert {

enum class CacheType { kHalf, kFloat, kByte };

// Attention of some tokens, one after the other, over cached keys and values of one layer, their own among them. Keys
// of 16 positions lie side by side: [kv_heads][capacity / 16][head_dim][16]. Values: [kv_heads][capacity][head_dim].
struct Attention {
  const float* q;  // [tokens][heads][head_dim], rotated and scaled
  const void *keys, *values;
  CacheType type;
  const float *key_scales, *value_scales;  // of bytes: [kv_heads][capacity]
  int64_t capacity;                        // a multiple of 16
  int64_t position, window;                // of the first token; how many positions each sees, its own the last
  int heads, kv_heads, head_dim;           // head_dim is a multiple of 16, at most 256
  float* out;                              // [tokens][heads][head_dim]
};

struct StepKernel {
  const char* name;  // that of the products' kernel beside which it is used
  // out[i] = x[i] / sqrt(mean of squares + eps) * weight[i]; out may be x.
  void (*rms_norm)(const float* x, const float* weight, int64_t count, float eps, float* out);
  // out of tokens [first, last), of the query heads that share key/value head `kv_head`.
  void (*attend)(const Attention& a, int64_t kv_head, int64_t first, int64_t last);
  // Rounds x [count] to halves; beyond the largest: infinity.
  void (*to_halves)(const float* x, int64_t count, uint16_t* out);
  // Rounds x [count] to bytes and returns their scale, NaN where x is not finite. A multiple of 16, at most 256.
  float (*to_bytes)(const float* x, int64_t count, int8_t* out);
};

extern const StepKernel kGenericStep;
extern const StepKernel kAvx2Step;
extern const StepKernel kAvx512Step;
extern const StepKernel kNeonStep;

// That for the products' kernel of this name.
const StepKernel& step_kernel_for(const char* name);

}  // namespace moert
