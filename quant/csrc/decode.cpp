#include "decode.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace moert {

namespace {

// Round to nearest even; beyond the largest half: infinity, which attention turns into NaN rather than a wrong number.
uint16_t to_half(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000u);
  const float size = std::fabs(v);
  if (!(size < 65520.0f)) return sign | (size == size ? 0x7c00u : 0x7e00u);
  const float scaled = size * 0x1p-112f;  // subnormal halves become subnormal floats
  std::memcpy(&bits, &scaled, 4);
  return sign | uint16_t((bits + 0xfffu + (bits >> 13 & 1u)) >> 13);
}

void norm_and_rotate(float* x, int heads, int d, const float* norm, float eps, const float* cos, const float* sin,
                     float scale) {
  for (int h = 0; h < heads; h++, x += d) {
    if (norm != nullptr) {
      float square = 0;
      for (int i = 0; i < d; i++) square += x[i] * x[i];
      const float factor = 1 / std::sqrt(square / float(d) + eps);
      for (int i = 0; i < d; i++) x[i] *= factor * norm[i];
    }
    for (int i = 0; i < d / 2; i++) {
      const float first = x[i], second = x[i + d / 2];
      x[i] = (first * cos[i] - second * sin[i]) * scale;
      x[i + d / 2] = (second * cos[i] + first * sin[i]) * scale;
    }
  }
}

// One vector of d floats to position `at` of a cache.
void store(const float* x, int d, int64_t at, void* cache, float* scales) {
  if (scales == nullptr) {
    uint16_t* place = static_cast<uint16_t*>(cache) + at * d;
    for (int i = 0; i < d; i++) place[i] = to_half(x[i]);
    return;
  }
  float peak = 0, poison = 0;
  for (int i = 0; i < d; i++) peak = std::max(peak, std::fabs(x[i])), poison += x[i] * 0;
  const float inverse = peak > 0 ? 127 / peak : 0;
  int8_t* place = static_cast<int8_t*>(cache) + at * d;
  for (int i = 0; i < d; i++) place[i] = poison == 0 ? int8_t(std::nearbyint(x[i] * inverse)) : 0;
  scales[at] = peak / 127 + poison;  // NaN where a number is not finite
}

}  // namespace

void attention_step(const Kernel& kernel, ThreadPool& pool, Buffer& scratch, const AttentionStep& s) {
  const int d = s.head_dim;
  norm_and_rotate(s.q, s.heads, d, s.q_norm, s.eps, s.cos, s.sin, 1 / std::sqrt(float(d)));
  norm_and_rotate(s.k, s.kv_heads, d, s.k_norm, s.eps, s.cos, s.sin, 1);
  for (int h = 0; h < s.kv_heads; h++) {
    store(s.k + h * d, d, h * s.capacity + s.position, s.keys, s.key_scales);
    store(s.v + h * d, d, h * s.capacity + s.position, s.values, s.value_scales);
  }
  const int64_t count = s.position + 1 - s.start;
  const Attention attention{s.q,        s.keys,  s.values,       s.key_scales,           s.value_scales,
                            s.capacity, s.start, s.position + 1, s.heads / s.kv_heads,   d,
                            scratch.get<float>(s.heads * count), s.out};
  // A short context is done before another thread wakes.
  const int64_t grain = count * d < 4096 ? s.kv_heads : 1;
  pool.parallel_for(s.kv_heads, grain, [&](int64_t first, int64_t last) {
    for (int64_t h = first; h < last; h++) kernel.attend(attention, h);
  });
}

void route(const float* logits, int64_t count, int64_t top_k, bool normalise, int64_t* indices, float* weights) {
  int64_t chosen = 0;
  for (int64_t i = 0; i < count; i++) {  // insertion into a short sorted list
    if (chosen == top_k && !(logits[i] > logits[indices[chosen - 1]])) continue;
    int64_t place = chosen < top_k ? chosen++ : chosen - 1;
    for (; place > 0 && logits[i] > logits[indices[place - 1]]; place--) indices[place] = indices[place - 1];
    indices[place] = i;
  }
  const float peak = logits[indices[0]];
  float all = 0, some = 0;
  for (int64_t i = 0; i < count; i++) all += std::exp(logits[i] - peak);
  for (int64_t i = 0; i < top_k; i++) some += weights[i] = std::exp(logits[indices[i]] - peak);
  for (int64_t i = 0; i < top_k; i++) weights[i] /= normalise ? some : all;
}

}  // namespace moert
