#include "layer_step.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

namespace moert {

namespace {

constexpr int64_t kGrain = 1 << 14;  // numbers that are worth another thread

void add(float* x, const float* y, int64_t count) {
  for (int64_t i = 0; i < count; i++) x[i] += y[i];
}

void finish(float* x, int64_t count, const float* bias, const float* full_norm, float eps, float clip,
            const StepKernel& kernel) {
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

// Writes a vector of d numbers, rounded to those of a cache, `stride` apart from `place` on.
template <class Number>
void spread(const Number* x, int d, int64_t place, int64_t stride, void* cache) {
  Number* to = static_cast<Number*>(cache) + place;
  for (int i = 0; i < d; i++) to[i * stride] = x[i];
}

void store(const StepKernel& kernel, const float* x, int d, const LayerCache& cache, int64_t place, int64_t stride,
           void* numbers, float* scales, int64_t row) {
  union {
    uint16_t halves[256];
    int8_t bytes[256];
  } rounded;
  switch (cache.type) {
    case CacheType::kFloat: return spread(x, d, place, stride, numbers);
    case CacheType::kHalf: kernel.to_halves(x, d, rounded.halves); return spread(rounded.halves, d, place, stride, numbers);
    case CacheType::kByte: scales[row] = kernel.to_bytes(x, d, rounded.bytes); spread(rounded.bytes, d, place, stride, numbers);
  }
}

}  // namespace

template <class Body>
void LayerStep::for_tokens(int64_t tokens, int64_t size, const Body& body) {
  compute_.split(tokens, std::max<int64_t>(1, kGrain / size), [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; t++) body(t);
  });
}

const Run& Runs::of(int64_t token) const {
  return *(std::upper_bound(begin, begin + count, token, [](int64_t t, const Run& run) { return t < run.first; }) - 1);
}

static void check(const Runs& runs) {
  for (const Run* run = runs.begin; run < runs.begin + runs.count; run++) {
    const Place& at = *run->at;
    if (at.tokens < 1 || at.position < 0 || at.window < 1 || at.position + at.tokens > run->cache->capacity)
      throw std::invalid_argument("bad position");
  }
}

void LayerStep::prepare(const StepKernel& kernel, const Layer& layer, const Run& run, int64_t token, float* q, float* k,
                        float* v) {
  const LayerCache& cache = *run.cache;
  const Place& at = *run.at;
  const int d = layer.head_dim, heads = layer.heads, kv_heads = layer.kv_heads;
  const bool full = layer.qk_norm == QkNorm::kFull;
  finish(q, int64_t(heads) * d, layer.q_bias, full ? layer.q_norm : nullptr, layer.eps, layer.clip, kernel);
  finish(k, int64_t(kv_heads) * d, layer.k_bias, full ? layer.k_norm : nullptr, layer.eps, layer.clip, kernel);
  finish(v, int64_t(kv_heads) * d, layer.v_bias, nullptr, layer.eps, layer.clip, kernel);
  if (layer.qk_norm == QkNorm::kHead) {
    for (int h = 0; h < heads; h++) kernel.rms_norm(q + h * d, layer.q_norm, d, layer.eps, q + h * d);
    for (int h = 0; h < kv_heads; h++) kernel.rms_norm(k + h * d, layer.k_norm, d, layer.eps, k + h * d);
  }
  const int64_t nth = token - run.first, position = at.position + nth;
  const float *cos = at.cos + nth * d / 2, *sin = at.sin + nth * d / 2;
  rotate(q, heads, d, cos, sin, 1 / std::sqrt(float(d)));
  rotate(k, kv_heads, d, cos, sin, 1);
  for (int h = 0; h < kv_heads; h++) {
    const int64_t row = h * cache.capacity + position, block = h * cache.capacity + position / 16 * 16;
    store(kernel, k + h * d, d, cache, block * d + position % 16, 16, cache.keys, cache.key_scales, row);
    store(kernel, v + h * d, d, cache, row * d, 1, cache.values, cache.value_scales, row);
  }
}

static Attention attention_of(const Layer& layer, const Run& run, const float* q, float* out) {
  const LayerCache& cache = *run.cache;
  const bool scaled = cache.type == CacheType::kByte;
  const int64_t first = run.first * layer.heads * layer.head_dim;
  return {q + first,
          cache.keys,
          cache.values,
          cache.type,
          scaled ? cache.key_scales : nullptr,
          scaled ? cache.value_scales : nullptr,
          cache.capacity,
          run.at->position,
          run.at->window,
          layer.heads,
          layer.kv_heads,
          layer.head_dim,
          out + first};
}

void LayerStep::attend(const StepKernel& kernel, const Layer& layer, const Runs& runs, const float* q, float* out) {
  // 32 rows of a key/value head at a time. A short context is done before another thread wakes.
  const int64_t heads = layer.kv_heads, step = std::max<int64_t>(1, 32 / (layer.heads / heads));
  int64_t* starts = units_.get<int64_t>(runs.count + 1);  // of the units of each run
  int64_t work = starts[0] = 0;
  for (int64_t i = 0; i < runs.count; i++) {
    const Place& at = *runs.begin[i].at;
    work += std::min(at.position + at.tokens, at.window) * layer.head_dim * at.tokens;
    starts[i + 1] = starts[i] + (at.tokens + step - 1) / step * heads;
  }
  const int64_t units = starts[runs.count];
  compute_.split(units, work < 4096 ? units : 1, [&](int64_t first, int64_t last) {
    for (int64_t unit = first; unit < last; unit++) {
      const int64_t i = std::upper_bound(starts, starts + runs.count, unit) - starts - 1, nth = unit - starts[i];
      const Run& run = runs.begin[i];
      const int64_t token = nth / heads * step;
      kernel.attend(attention_of(layer, run, q, out), nth % heads, token, std::min(token + step, run.at->tokens));
    }
  });
}

void LayerStep::run(const Kernel& products_kernel, const Layer& layer, const Runs& runs, const float* bonus, float* x,
                    float* normed, int64_t* indices, float* weights) {
  check(runs);
  const StepKernel& kernel = step_kernel_for(products_kernel.name);
  const int64_t D = layer.hidden, T = runs.tokens, Q = layer.q.rows(), K = layer.k.rows(), E = layer.router.rows();
  float *q = q_.get<float>(T * Q), *k = k_.get<float>(T * K), *v = v_.get<float>(T * K);
  float* attended = attended_.get<float>(T * Q);
  for_tokens(T, D, [&](int64_t t) { kernel.rms_norm(x + t * D, layer.input_norm, D, layer.eps, normed + t * D); });
  const Matrix* qkv[] = {&layer.q, &layer.k, &layer.v};
  float* const outs[] = {q, k, v};
  compute_.linear(products_kernel, qkv, 3, normed, T, D, D, outs);
  for_tokens(T, Q, [&](int64_t t) { prepare(kernel, layer, runs.of(t), t, q + t * Q, k + t * K, v + t * K); });
  attend(kernel, layer, runs, q, attended);
  const Matrix* o[] = {&layer.o};
  compute_.linear(products_kernel, o, 1, attended, T, Q, Q, &normed);
  for_tokens(T, D, [&](int64_t t) {
    add(x + t * D, normed + t * D, D);
    if (layer.o_bias != nullptr) add(x + t * D, layer.o_bias, D);
    kernel.rms_norm(x + t * D, layer.output_norm, D, layer.eps, normed + t * D);
  });
  if (E == 0) return;
  float* logits = logits_.get<float>(2 * T * E);
  const Matrix* router[] = {&layer.router};
  compute_.linear(products_kernel, router, 1, normed, T, D, D, &logits);
  for_tokens(T, 64 * E, [&](int64_t t) {
    float *own = logits + t * E, *favoured = bonus != nullptr ? logits + (T + t) * E : own;
    if (bonus != nullptr) favour(own, bonus, E, favoured);
    route(own, favoured, E, layer.top_k, layer.normalise, indices + t * layer.top_k, weights + t * layer.top_k);
  });
}

void favour(const float* logits, const float* bonus, int64_t count, float* favoured) {
  const auto [low, high] = std::minmax_element(logits, logits + count);
  const float range = *high - *low;
  for (int64_t i = 0; i < count; i++) favoured[i] = logits[i] == *high ? INFINITY : logits[i] + bonus[i] * range;
}

// Puts i into `indices`, the first `chosen` numbers in descending order of their scores.
static void place(const float* scores, int64_t i, int64_t chosen, int64_t* indices) {
  for (; chosen > 0 && scores[i] > scores[indices[chosen - 1]]; chosen--) indices[chosen] = indices[chosen - 1];
  indices[chosen] = i;
}

void route(const float* logits, const float* favoured, int64_t count, int64_t top_k, bool normalise, int64_t* indices,
           float* weights) {
  int64_t chosen = 0;
  for (int64_t i = 0; i < count; i++) {
    if (chosen == top_k && !(favoured[i] > favoured[indices[chosen - 1]])) continue;
    place(favoured, i, chosen < top_k ? chosen++ : chosen - 1, indices);
  }
  if (favoured != logits)
    for (int64_t i = 1; i < top_k; i++) place(logits, indices[i], i, indices);
  const float peak = logits[indices[0]];
  float all = 0, some = 0;
  for (int64_t i = 0; i < count; i++) all += std::exp(logits[i] - peak);
  for (int64_t i = 0; i < top_k; i++) some += weights[i] = std::exp(logits[indices[i]] - peak);
  for (int64_t i = 0; i < top_k; i++) weights[i] /= normalise ? some : all;
}

}  // namespace moert
