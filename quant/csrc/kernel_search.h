// The search of codes and scales. Part of kernel_body.h.
namespace moert {
namespace MOERT_ISA {

inline float half_to_float(uint16_t h) { return bits_as<float>(uint32_t(h & 0x7fffu) << 13) * 0x1p112f; }

// Round to nearest even; for 0 <= v <= 65504 (the caller has checked the weights).
inline uint16_t float_to_half(float v) {
  const uint32_t bits = bits_as<uint32_t>(v * 0x1p-112f);  // subnormal halves become subnormal floats
  return uint16_t((bits + 0xfffu + (bits >> 13 & 1u)) >> 13);
}

void search_codes(const Search& s, const float* w, uint8_t* codes, uint16_t* scales, int64_t first, int64_t last) {
  typedef uint8_t u8x16 __attribute__((vector_size(16)));
  const int parts = s.group_size / 16, top = s.widths[s.num_widths - 1];
  for (int64_t group = first; group < last; group++) {
    f32x16 value[8], peaks = all(1e-30f);
    for (int i = 0; i < parts; i++) {
      value[i] = load<f32x16>(w + group * s.group_size + 16 * i);
      const f32x16 size = absolute(value[i]);
      peaks = where_less(peaks, size, size, peaks);
    }
    const float peak = largest_lane(peaks);
    float best = INFINITY;
    for (int c = 0; c < s.num_clips; c++) {
      const float half_range = float(1 << (top - 1)), inverse = half_range / (peak * s.clips[c]);
      i32x16 code[8];
      for (int i = 0; i < parts; i++) {
        // Shifted to be positive first, so that truncation is floor.
        f32x16 position = value[i] * inverse + half_range;
        position = where_less(all(0), position, position, all(0));
        position = where_less(position, all(2 * half_range - 1), position, all(2 * half_range - 1));
        code[i] = __builtin_convertvector(position, i32x16);
      }
      float cost = 0;
      uint16_t fitted[8];
      for (int b = 0; b < s.num_widths; b++) {
        const int drop = top - s.widths[b];
        const float middle = float((1 << s.widths[b]) - 1) / 2;
        f32x16 level[8], product = {}, square = {}, error = {};
        for (int i = 0; i < parts; i++) {
          level[i] = __builtin_convertvector(code[i] >> drop, f32x16) - middle;
          product += value[i] * level[i];
          square += level[i] * level[i];
        }
        fitted[b] = float_to_half(std::fabs(sum_lanes(product) / sum_lanes(square)));
        const float scale = half_to_float(fitted[b]);
        for (int i = 0; i < parts; i++) {
          const f32x16 rest = value[i] - scale * level[i];
          error += rest * rest;
        }
        cost += sum_lanes(error) * float(int64_t(1) << (2 * s.widths[b]));
      }
      if (!(cost < best)) continue;
      best = cost;
      for (int i = 0; i < parts; i++) {
        const u8x16 narrow = __builtin_convertvector(code[i], u8x16);
        std::memcpy(codes + group * s.group_size + 16 * i, &narrow, sizeof(narrow));
      }
      for (int b = 0; b < s.num_widths; b++) scales[b * s.num_groups + group] = fitted[b];
    }
  }
}

}  // namespace MOERT_ISA
}  // namespace moert
