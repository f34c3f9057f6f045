// Attention of one token. Part of kernel_body.h.
namespace moert {
namespace MOERT_ISA {

// Cached numbers as floats: halves, or bytes to be scaled by the caller.
inline f32x16 cached(const uint16_t* p) { return load_half(p); }
inline f32x16 cached(const int8_t* p) {
  typedef int8_t i8x16 __attribute__((vector_size(16)));
  return __builtin_convertvector(load<i8x16>(p), f32x16);
}

template <class Number>
void attend_to(const Attention& a, int64_t kv_head) {
  const int64_t count = a.end - a.start, before = kv_head * a.capacity + a.start;
  const int parts = a.head_dim / 16;
  const Number* keys = static_cast<const Number*>(a.keys) + before * a.head_dim;
  const Number* values = static_cast<const Number*>(a.values) + before * a.head_dim;
  const int64_t first = kv_head * a.heads_per_kv, last = first + a.heads_per_kv;
  for (int64_t s = 0; s < count; s++) {  // each key is converted once for all its query heads
    f32x16 key[16];
    const float scale = a.key_scales ? a.key_scales[before + s] : 1;
    for (int i = 0; i < parts; i++) key[i] = cached(keys + s * a.head_dim + 16 * i) * scale;
    for (int64_t h = first; h < last; h++) {
      f32x16 sum = {};
      for (int i = 0; i < parts; i++) sum += key[i] * load<f32x16>(a.q + h * a.head_dim + 16 * i);
      a.scores[h * count + s] = sum_lanes(sum);
    }
  }
  for (int64_t h = first; h < last; h++) {
    float* scores = a.scores + h * count;
    float peak = scores[0], total = 0;
    for (int64_t s = 1; s < count; s++) peak = scores[s] > peak ? scores[s] : peak;
    for (int64_t s = 0; s < count; s += 16) {
      const size_t bytes = (count - s < 16 ? count - s : 16) * sizeof(float);
      f32x16 part = {};
      part = part - 1e30f;
      std::memcpy(&part, scores + s, bytes);
      part = exponential(part - peak);
      std::memcpy(scores + s, &part, bytes);
      for (size_t lane = 0; lane < bytes / sizeof(float); lane++) total += part[lane];
    }
    for (int64_t s = 0; s < count; s++) scores[s] /= total;
  }
  for (int64_t h = first; h < last; h++) std::memset(a.out + h * a.head_dim, 0, a.head_dim * sizeof(float));
  constexpr int64_t kSpan = 32;  // positions whose values are converted once and stay in the first cache
  alignas(64) float block[kSpan * 256];
  for (int64_t begin = 0; begin < count; begin += kSpan) {
    const int64_t end = begin + kSpan < count ? begin + kSpan : count;
    for (int64_t s = begin; s < end; s++) {
      const float scale = a.value_scales ? a.value_scales[before + s] : 1;
      for (int i = 0; i < a.head_dim; i += 16) {
        const f32x16 part = cached(values + s * a.head_dim + i) * scale;
        std::memcpy(block + (s - begin) * a.head_dim + i, &part, sizeof(part));
      }
    }
    for (int64_t h = first; h < last; h++) {
      float* out = a.out + h * a.head_dim;
      for (int i = 0; i < parts; i++) {
        f32x16 sum = load<f32x16>(out + 16 * i);
        for (int64_t s = begin; s < end; s++)
          sum += a.scores[h * count + s] * load<f32x16>(block + (s - begin) * a.head_dim + 16 * i);
        std::memcpy(out + 16 * i, &sum, sizeof(sum));
      }
    }
  }
}

void attend(const Attention& a, int64_t kv_head) {
  if (a.key_scales)
    attend_to<int8_t>(a, kv_head);
  else
    attend_to<uint16_t>(a, kv_head);
}

}  // namespace MOERT_ISA
}  // namespace moert
