// Arm NEON with dotprod, and i8mm for many tokens where the processor has it: a tile as four quarters of 4 rows.
// Both instructions are used in their signed form, so that one unpacking serves both: codes of up to 7 bits are signed
// as they are, codes of 8 bits have their top bit flipped, which takes 128 away and is put right at the end of a group.
#define MOERT_ISA isa_neon
#include <arm_neon.h>
#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include "kernel_body.h"
#include "choose_body.h"

// What makes a function of the instructions, where the compiler can do that for a single function.
#if defined(__clang__) && __clang_major__ >= 16
#define MOERT_I8MM __attribute__((target("i8mm")))
#elif !defined(__clang__) && __GNUC__ >= 10
#define MOERT_I8MM __attribute__((target("+i8mm")))
#endif

namespace moert {
namespace MOERT_ISA {

constexpr int kQuarters = 4;         // of a tile
constexpr int kPanelColumns = 512;   // 8 KiB of codes: with the inputs of a few tokens it stays in the first cache
constexpr int kTokens = 8;           // that use one load of a panel
constexpr int kMaxLevels = 127;      // above, codes do not fit in a signed byte

// The bits that a plane of Bits bits adds to the codes of 4 rows for 32 columns; the top bit of a code is flipped.
template <int Bits>
inline void add_plane(const uint8_t* chunks, int plane_shift, uint8x16_t codes[8]) {
  constexpr int kQuads = 8 / Bits;  // in the 64 bytes of a chunk
  const uint8x16_t mask = vdupq_n_u8(uint8_t(((1 << Bits) - 1) << plane_shift));
  constexpr uint8_t kTopBits = Bits == 8 ? 0x80 : Bits == 4 ? 0x88 : Bits == 2 ? 0xAA : 0xFF;
  const uint8x16_t top = vdupq_n_u8(plane_shift + Bits == 8 ? kTopBits : 0);
  for (int chunk = 0; chunk < Bits; chunk++) {
    const uint8x16_t bits = veorq_u8(vld1q_u8(chunks + 64 * chunk), top);
    int8x16_t shift = vdupq_n_s8(int8_t(plane_shift));  // left; to the right below 0
    for (int k = 0; k < kQuads; k++) {
      uint8x16_t& place = codes[chunk * kQuads + k];
      place = vbslq_u8(mask, vshlq_u8(bits, shift), place);
      shift = vsubq_s8(shift, vdupq_n_s8(Bits));
    }
  }
}

// Adds the levels of a plane of Bits bits to those of 4 rows for 32 columns. last: the chunk before the first.
template <int Bits>
inline void add_levels(const uint8_t* chunks, uint8x16_t last, const uint8_t* table, uint8x16_t codes[8]) {
  constexpr int kQuads = 8 / Bits, kWindow = Bits == 2 ? 6 : 4;
  const uint8x16x4_t levels = {{vld1q_u8(table), vld1q_u8(table + 16), vld1q_u8(table + 32), vld1q_u8(table + 48)}};
  const uint8x16_t mask = vdupq_n_u8((1 << kWindow) - 1);
  for (int chunk = 0; chunk < Bits; chunk++) {
    const uint8x16_t now = vld1q_u8(chunks + 64 * chunk), mixed = vsliq_n_u8(vshrq_n_u8(last, 4), now, 4);
    int8x16_t shift = vdupq_n_s8(kWindow - Bits - 4);  // left; to the right below 0
    for (int k = 0; k < kQuads; k++) {
      const bool above = Bits * (k + 1) >= kWindow;  // the window lies in this byte alone
      const int8x16_t by = above ? vaddq_s8(shift, vdupq_n_s8(4)) : shift;
      const uint8x16_t windows = vandq_u8(vshlq_u8(above ? now : mixed, by), mask);
      uint8x16_t& place = codes[chunk * kQuads + k];
      place = vaddq_u8(place, Bits == 2 ? vqtbl4q_u8(levels, windows) : vqtbl1q_u8(levels.val[0], windows));
      shift = vsubq_s8(shift, vdupq_n_s8(Bits));
    }
    last = now;
  }
}

// As unpack32.
inline void unpack_trellis32(const NestedMatrix& w, int64_t tile, int64_t group, int block, int quarter,
                             uint8x16_t codes[8]) {
  for (int i = 0; i < 8; i++) codes[i] = vdupq_n_u8(kTrellisBias);
  for (int p = 0; p < w.num_planes; p++) {
    const Plane& plane = w.planes[p];
    const uint8_t* chunk = plane.data + (tile * w.groups + group) * plane.stride + 64 * plane.bits * block;
    uint8x16_t last = vld1q_u8((block == 0 ? w.chunk_before(chunk, plane, group == 0) : chunk - 64) + 16 * quarter);
    if (block == 0 && group == 0) {
      const uint32x4_t lanes = vreinterpretq_u32_u8(last);
      last = vreinterpretq_u8_u32(vsliq_n_u32(vshrq_n_u32(lanes, 24), lanes, 8));
    }
    if (plane.bits == 2)
      add_levels<2>(chunk + 16 * quarter, last, w.tables + 64 * p, codes);
    else
      add_levels<1>(chunk + 16 * quarter, last, w.tables + 64 * p, codes);
  }
}

// Codes of 4 rows for the 32 columns of `block` of a group: codes[i] holds columns 4 * i ... 4 * i + 3, minus 128 if
// they are of 8 bits or of the trellis code.
inline void unpack32(const NestedMatrix& w, int64_t tile, int64_t group, int block, int quarter, uint8x16_t codes[8]) {
  if (w.tables != nullptr) return unpack_trellis32(w, tile, group, block, quarter, codes);
  const int64_t cell = tile * w.groups + group;
  for (int i = 0; i < 8; i++) codes[i] = vdupq_n_u8(0);
  for (int p = 0; p < w.num_planes; p++) {
    const Plane& plane = w.planes[p];
    const uint8_t* chunks = plane.data + cell * plane.stride + 64 * plane.bits * block + 16 * quarter;
    switch (plane.bits) {
      case 8: add_plane<8>(chunks, plane.shift, codes); break;
      case 4: add_plane<4>(chunks, plane.shift, codes); break;
      case 2: add_plane<2>(chunks, plane.shift, codes); break;
      default: add_plane<1>(chunks, plane.shift, codes);
    }
  }
}

inline float32x4_t load_scales(const NestedMatrix& w, int64_t tile, int64_t group, int quarter) {
  return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(w.scales_of(tile, group) + 8 * quarter)));
}

// total + (2 * dot - levels * sum) * (scale * input scale), the end of a group for one token and 4 rows. A dot product
// of flipped codes lacks 128 times the sum.
inline float32x4_t add_group(float32x4_t total, int32x4_t dot, float32x4_t scale, const NestedMatrix& w,
                             const Activations& x, int64_t token, int64_t group) {
  const int64_t at = x.at(token, group);
  const int32_t missing = w.levels > kMaxLevels ? 256 : 0;
  const int32x4_t centred = vaddq_s32(vaddq_s32(dot, dot), vdupq_n_s32((missing - w.levels) * x.sums[at]));
  return vfmaq_f32(total, vcvtq_f32_s32(centred), vmulq_n_f32(scale, x.scales[at]));
}

// Four rows of the result of one token. Rows beyond the last are not there.
inline float32x4_t load_rows(const float* place, int64_t rows) {
  if (rows >= 4) return vld1q_f32(place);
  float some[4] = {};
  if (rows > 0) std::memcpy(some, place, rows * sizeof(float));
  return vld1q_f32(some);
}

inline void store_rows(float* place, int64_t rows, float32x4_t total) {
  if (rows >= 4) return vst1q_f32(place, total);
  float some[4];
  vst1q_f32(some, total);
  if (rows > 0) std::memcpy(place, some, rows * sizeof(float));
}

inline int8x16_t as_signed(uint8x16_t codes) { return vreinterpretq_s8_u8(codes); }

// Four columns of 4 rows for T tokens; quad: which four of the 16 columns that x[t] holds.
template <int Quad, int T>
inline void dot_quad(int32x4_t* dot, int stride, uint8x16_t codes, const int8x16_t* x) {
  for (int t = 0; t < T; t++) dot[t * stride] = vdotq_laneq_s32(dot[t * stride], as_signed(codes), x[t], Quad);
}

// Few tokens: the weights are unpacked on the way and used for T tokens at once.
template <int T>
void few_tokens(const NestedMatrix& w, const Activations& x, float* out, int64_t out_stride, int64_t first,
                int64_t last) {
  for (int64_t tile = first; tile < last; tile++) {
    float32x4_t total[kQuarters][T];
    for (int quarter = 0; quarter < kQuarters; quarter++)
      for (int t = 0; t < T; t++) total[quarter][t] = vdupq_n_f32(0);
    for (int64_t group = 0; group < w.groups; group++) {
      if (tile + 1 < last) prefetch(w, tile + 1, group);
      const int8_t* q = x.q + x.at(0, group) * w.group_size;
      for (int quarter = 0; quarter < kQuarters; quarter++) {
        int32x4_t dot[T][2];  // two, so that the sums do not wait for each other
        for (int t = 0; t < T; t++) dot[t][0] = dot[t][1] = vdupq_n_s32(0);
        for (int block = 0; block < w.group_size / 32; block++) {
          uint8x16_t codes[8];
          unpack32(w, tile, group, block, quarter, codes);
          for (int half = 0; half < 2; half++) {
            int8x16_t columns[T];
            for (int t = 0; t < T; t++) columns[t] = vld1q_s8(q + t * w.group_size + 32 * block + 16 * half);
            dot_quad<0, T>(&dot[0][0], 2, codes[4 * half], columns);
            dot_quad<1, T>(&dot[0][1], 2, codes[4 * half + 1], columns);
            dot_quad<2, T>(&dot[0][0], 2, codes[4 * half + 2], columns);
            dot_quad<3, T>(&dot[0][1], 2, codes[4 * half + 3], columns);
          }
        }
        const float32x4_t scale = load_scales(w, tile, group, quarter);
        for (int t = 0; t < T; t++)
          total[quarter][t] = add_group(total[quarter][t], vaddq_s32(dot[t][0], dot[t][1]), scale, w, x, t, group);
      }
    }
    for (int quarter = 0; quarter < kQuarters; quarter++) {
      const int64_t row = tile * kTileRows + 4 * quarter;
      for (int t = 0; t < T; t++) store_rows(out + t * out_stride + row, w.rows - row, total[quarter][t]);
    }
  }
}

// A panel holds for each quarter of a group 32 bytes for each 8 columns: 4 rows of the first four columns, then of the
// second; or, for matrix products, 2 rows of all eight, then the other 2.
inline void unpack_panel(const NestedMatrix& w, int64_t tile, int64_t begin, int64_t end, bool pairs, uint8_t* panel) {
  for (int64_t group = begin; group < end; group++)
    for (int quarter = 0; quarter < kQuarters; quarter++)
      for (int block = 0; block < w.group_size / 32; block++) {
        uint8x16_t codes[8];
        unpack32(w, tile, group, block, quarter, codes);
        for (int i = 0; i < 8; i += 2, panel += 32) {
          const uint32x4_t one = vreinterpretq_u32_u8(codes[i]), two = vreinterpretq_u32_u8(codes[i + 1]);
          vst1q_u8(panel, pairs ? vreinterpretq_u8_u32(vzip1q_u32(one, two)) : codes[i]);
          vst1q_u8(panel + 16, pairs ? vreinterpretq_u8_u32(vzip2q_u32(one, two)) : codes[i + 1]);
        }
      }
}

// Dot products of one group of 8 rows (two quarters of a panel) with the columns that q[t] point to.
using GroupDots = void (*)(const uint8_t* panel, const int8_t* const* q, int group_size, int32x4_t dots[kTokens][2]);

void group_dots(const uint8_t* panel, const int8_t* const* q, int group_size, int32x4_t dots[kTokens][2]) {
  int32x4_t dot[kTokens][2];
  for (int t = 0; t < kTokens; t++) dot[t][0] = dot[t][1] = vdupq_n_s32(0);
  for (int k = 0; k < group_size; k += 16) {
    int8x16_t x[kTokens];
    for (int t = 0; t < kTokens; t++) x[t] = vld1q_s8(q[t] + k);
    for (int quarter = 0; quarter < 2; quarter++) {
      const uint8_t* codes = panel + (group_size * quarter + k) * 4;
      dot_quad<0, kTokens>(&dot[0][quarter], 2, vld1q_u8(codes), x);
      dot_quad<1, kTokens>(&dot[0][quarter], 2, vld1q_u8(codes + 16), x);
      dot_quad<2, kTokens>(&dot[0][quarter], 2, vld1q_u8(codes + 32), x);
      dot_quad<3, kTokens>(&dot[0][quarter], 2, vld1q_u8(codes + 48), x);
    }
  }
  std::memcpy(dots, dot, sizeof(dot));
}

#if defined(MOERT_I8MM)
// The same with products of [2 tokens, 8] and [8, 2 rows]: twice as many multiplications per instruction.
MOERT_I8MM void group_dots_i8mm(const uint8_t* panel, const int8_t* const* q, int group_size, int32x4_t dots[kTokens][2]) {
  int32x4_t dot[kTokens / 2][4];  // [2 tokens][2 rows] each
  for (int t = 0; t < kTokens / 2; t++)
    for (int pair = 0; pair < 4; pair++) dot[t][pair] = vdupq_n_s32(0);
  for (int k = 0; k < group_size; k += 16) {
    int8x16_t x[kTokens / 2][2];  // 8 columns of two tokens
    for (int t = 0; t < kTokens / 2; t++) {
      const int64x2_t one = vreinterpretq_s64_s8(vld1q_s8(q[2 * t] + k));
      const int64x2_t two = vreinterpretq_s64_s8(vld1q_s8(q[2 * t + 1] + k));
      x[t][0] = vreinterpretq_s8_s64(vzip1q_s64(one, two));
      x[t][1] = vreinterpretq_s8_s64(vzip2q_s64(one, two));
    }
    for (int pair = 0; pair < 4; pair++)
      for (int part = 0; part < 2; part++) {
        const uint8_t* place = panel + (group_size * (pair / 2) + k + 8 * part) * 4 + 16 * (pair % 2);
        const int8x16_t codes = as_signed(vld1q_u8(place));
        for (int t = 0; t < kTokens / 2; t++) dot[t][pair] = vmmlaq_s32(dot[t][pair], x[t][part], codes);
      }
  }
  for (int t = 0; t < kTokens / 2; t++)
    for (int quarter = 0; quarter < 2; quarter++) {
      const int64x2_t low = vreinterpretq_s64_s32(dot[t][2 * quarter]);
      const int64x2_t high = vreinterpretq_s64_s32(dot[t][2 * quarter + 1]);
      dots[2 * t][quarter] = vreinterpretq_s32_s64(vzip1q_s64(low, high));
      dots[2 * t + 1][quarter] = vreinterpretq_s32_s64(vzip2q_s64(low, high));
    }
}
#else  // never called
constexpr GroupDots group_dots_i8mm = group_dots;
#endif

// Many tokens: a panel of a tile is unpacked once, then used for eight tokens and 8 rows at a time.
void many_tokens(const NestedMatrix& w, const Activations& x, float* out, int64_t out_stride, int64_t first,
                 int64_t last, bool pairs) {
  alignas(64) static thread_local uint8_t panel[kPanelColumns * kTileRows];
  const GroupDots dots_of = pairs ? group_dots_i8mm : group_dots;
  const int64_t panel_groups = kPanelColumns / w.group_size;
  for (int64_t tile = first; tile < last; tile++)
    for (int64_t begin = 0; begin < w.groups; begin += panel_groups) {
      const int64_t end = begin + panel_groups < w.groups ? begin + panel_groups : w.groups;
      unpack_panel(w, tile, begin, end, pairs, panel);
      for (int64_t start = 0; start < x.tokens; start += kTokens) {
        const int count = x.tokens - start < kTokens ? int(x.tokens - start) : kTokens;
        for (int half = 0; half < 2; half++) {
          const int64_t row = tile * kTileRows + 8 * half, rows = w.rows - row;
          float* place = out + start * out_stride + row;
          float32x4_t total[kTokens][2];
          for (int t = 0; t < count; t++)
            for (int i = 0; i < 2; i++)
              total[t][i] = begin ? load_rows(place + t * out_stride + 4 * i, rows - 4 * i) : vdupq_n_f32(0);
          for (int64_t group = begin; group < end; group++) {
            const int8_t* q[kTokens];  // tokens beyond the last compute the last again; nothing is stored for them
            for (int t = 0; t < kTokens; t++)
              q[t] = x.q + x.at(start + (t < count ? t : count - 1), group) * w.group_size;
            int32x4_t dots[kTokens][2];
            dots_of(panel + ((group - begin) * 2 + half) * w.group_size * 8, q, w.group_size, dots);
            for (int i = 0; i < 2; i++) {
              const float32x4_t scale = load_scales(w, tile, group, 2 * half + i);
              for (int t = 0; t < count; t++)
                total[t][i] = add_group(total[t][i], dots[t][i], scale, w, x, start + t, group);
            }
          }
          for (int t = 0; t < count; t++)
            for (int i = 0; i < 2; i++) store_rows(place + t * out_stride + 4 * i, rows - 4 * i, total[t][i]);
        }
      }
    }
}

enum class Feature { dotprod, i8mm };

bool has(Feature feature) {
#if defined(__linux__)
  constexpr unsigned long kDotprod = 1ul << 20, kI8mm = 1ul << 13;  // HWCAP_ASIMDDP, HWCAP2_I8MM
  return feature == Feature::dotprod ? getauxval(AT_HWCAP) & kDotprod : getauxval(AT_HWCAP2) & kI8mm;
#elif defined(__APPLE__)
  int value = 0;
  size_t size = sizeof(value);
  const char* name = feature == Feature::dotprod ? "hw.optional.arm.FEAT_DotProd" : "hw.optional.arm.FEAT_I8MM";
  return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
#else
  return false;
#endif
}

void nested_matmul(const NestedMatrix& w, const Activations& x, float* out, int64_t out_stride, int64_t first,
                   int64_t last) {
#if defined(MOERT_I8MM)
  static const bool i8mm = has(Feature::i8mm);
#else
  constexpr bool i8mm = false;
#endif
  switch (x.tokens) {
    case 1: return few_tokens<1>(w, x, out, out_stride, first, last);
    case 2: return few_tokens<2>(w, x, out, out_stride, first, last);
    case 3: return few_tokens<3>(w, x, out, out_stride, first, last);
    case 4: return few_tokens<4>(w, x, out, out_stride, first, last);
    default: return many_tokens(w, x, out, out_stride, first, last, i8mm);
  }
}

}  // namespace MOERT_ISA

extern const Kernel kNeonKernel = {
    "neon",
    [] { return isa_neon::has(isa_neon::Feature::dotprod); },
    isa_neon::quantise,
    isa_neon::nested_matmul,
    isa_neon::nested_dequantise,
    isa_neon::raw_matmul,
    isa_neon::silu_product,
    isa_neon::search_codes,
    isa_neon::choose_trellis,
};

}  // namespace moert
