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

void add(float* x, const float* y, int64_t count) {
  for (int64_t i = 0; i < count; i++) x[i] += y[i];
}

void prepare(float* x, int64_t count, const float* bias, const float* full_norm, float eps, float clip,
             const Kernel& kernel) {
  if (bias != nullptr) add(x, bias, count);
  if (full_norm != nullptr) kernel.rms_norm(x, full_norm, count, eps, x);
  if (clip < INFINITY)
    for (int64_t i = 0; i < count; i++) x[i] = std::min(std::max(x[i], -clip), clip);
}

void rotate(float* x, int heads, int d, const float* cos, const float* sin, float scale) {
  for (int h = 0; h < heads; h++, x += d)
    for (int i = 0; i < d / 2; i++) {
      const float first = x[i], second = x[i + d / 2];
      x[i] = (first * cos[i] - second * sin[i]) * scale;
      x[i + d / 2] = (second * cos[i] + first * sin[i]) * scale;
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

void DecodeStep::attention(const Kernel& kernel, const Layer& layer, const LayerCache& cache, const Place& at,
                           float* q, float* k, float* v, float* out) {
  const int d = layer.head_dim, heads = layer.heads, kv_heads = layer.kv_heads;
  const bool full = layer.qk_norm == QkNorm::kFull;
  prepare(q, int64_t(heads) * d, layer.q_bias, full ? layer.q_norm : nullptr, layer.eps, layer.clip, kernel);
  prepare(k, int64_t(kv_heads) * d, layer.k_bias, full ? layer.k_norm : nullptr, layer.eps, layer.clip, kernel);
  prepare(v, int64_t(kv_heads) * d, layer.v_bias, nullptr, layer.eps, layer.clip, kernel);
  if (layer.qk_norm == QkNorm::kHead) {
    for (int h = 0; h < heads; h++) kernel.rms_norm(q + h * d, layer.q_norm, d, layer.eps, q + h * d);
    for (int h = 0; h < kv_heads; h++) kernel.rms_norm(k + h * d, layer.k_norm, d, layer.eps, k + h * d);
  }
  rotate(q, heads, d, at.cos, at.sin, 1 / std::sqrt(float(d)));
  rotate(k, kv_heads, d, at.cos, at.sin, 1);
  for (int h = 0; h < kv_heads; h++) {
    store(k + h * d, d, h * cache.capacity + at.position, cache.keys, cache.key_scales);
    store(v + h * d, d, h * cache.capacity + at.position, cache.values, cache.value_scales);
  }
  const int64_t count = at.position + 1 - at.start;
  const Attention attention{q,
                            cache.keys,
                            cache.values,
                            cache.key_scales,
                            cache.value_scales,
                            cache.capacity,
                            at.start,
                            at.position + 1,
                            heads / kv_heads,
                            d,
                            scores_.get<float>(heads * count),
                            out};
  // A short context is done before another thread wakes.
  const int64_t grain = count * d < 4096 ? kv_heads : 1;
  pool_.parallel_for(kv_heads, grain, [&](int64_t first, int64_t last) {
    for (int64_t h = first; h < last; h++) kernel.attend(attention, h);
  });
}

void DecodeStep::run(const Kernel& kernel, const Layer& layer, const LayerCache& cache, const Place& at, float* x,
                     float* normed, int64_t* indices, float* weights) {
  const int64_t D = layer.hidden;
  float *q = q_.get<float>(layer.q.rows()), *k = k_.get<float>(layer.k.rows()), *v = v_.get<float>(layer.v.rows());
  float* attended = attended_.get<float>(layer.q.rows());
  kernel.rms_norm(x, layer.input_norm, D, layer.eps, normed);
  const Matrix* qkv[] = {&layer.q, &layer.k, &layer.v};
  float* const outs[] = {q, k, v};
  products_.linear(kernel, qkv, 3, normed, 1, D, D, outs);
  attention(kernel, layer, cache, at, q, k, v, attended);
  const Matrix* o[] = {&layer.o};
  products_.linear(kernel, o, 1, attended, 1, layer.q.rows(), layer.q.rows(), &normed);
  add(x, normed, D);
  if (layer.o_bias != nullptr) add(x, layer.o_bias, D);
  kernel.rms_norm(x, layer.output_norm, D, layer.eps, normed);
  if (layer.router.rows() == 0) return;
  float* logits = logits_.get<float>(layer.router.rows());
  const Matrix* router[] = {&layer.router};
  products_.linear(kernel, router, 1, normed, 1, D, D, &logits);
  route(logits, layer.router.rows(), layer.top_k, layer.normalise, indices, weights);
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
