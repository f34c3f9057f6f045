// Portable: what the compiler makes of the plain arithmetic on any processor.
#define MOERT_ISA isa_generic
#include "kernel_body.h"
#include "choose_body.h"

namespace moert {
namespace MOERT_ISA {

void nested_matmul(const NestedMatrix& w, const Activations& x, float* out, int64_t out_stride, int64_t first,
                   int64_t last) {
  for (int64_t tile = first; tile < last; tile++) {
    const int64_t row = tile * kTileRows;
    const int64_t rows = w.rows - row < kTileRows ? w.rows - row : kTileRows;
    for (int64_t group = 0; group < w.groups; group++) {
      const int64_t cell = tile * w.groups + group;
      u32x16 codes[32];  // a group has at most 128 columns
      for (int quad = 0; quad < w.group_size / 4; quad++) codes[quad] = codes_of(w, cell, quad);
      const f32x16 scale = load_half(w.scales_of(tile, group));
      for (int64_t t = 0; t < x.tokens; t++) {
        const int8_t* q = x.q + x.at(t, group) * w.group_size;
        i32x16 dot = {};
        for (int quad = 0; quad < w.group_size / 4; quad++)
          for (int byte = 0; byte < 4; byte++)
            dot += bits_as<i32x16>(codes[quad] >> (8 * byte) & 0xffu) * int32_t(q[4 * quad + byte]);
        const int64_t at = x.at(t, group);
        f32x16 total = {};
        if (group) std::memcpy(&total, out + t * out_stride + row, rows * sizeof(float));
        total += __builtin_convertvector(2 * dot - w.levels * x.sums[at], f32x16) * (scale * x.scales[at]);
        std::memcpy(out + t * out_stride + row, &total, rows * sizeof(float));
      }
    }
  }
}

}  // namespace MOERT_ISA

extern const Kernel kGenericKernel = {
    "generic",
    [] { return true; },
    isa_generic::quantise,
    isa_generic::nested_matmul,
    isa_generic::nested_dequantise,
    isa_generic::raw_matmul,
    isa_generic::silu_product,
    isa_generic::search_codes,
    isa_generic::choose_trellis,
};

}  // namespace moert
