// AVX-512 with VNNI.
#define MOERT_ISA isa_avx512
#include "kernel_body.h"
#include "choose_body.h"
#include "products_avx512.h"

namespace moert {
namespace MOERT_ISA {

void nested_matmul(const NestedMatrix& w, const Activations& x, float* out, int64_t out_stride, int64_t first,
                   int64_t last) {
  if (w.tables != nullptr) {
    static const bool vbmi = __builtin_cpu_supports("avx512vbmi");
    return (vbmi ? trellis_matmul_vbmi : trellis_matmul_avx512)(w, x, out, out_stride, first, last);
  }
  with_planes<FixedPlanes, AnyPlanes>(
      w, [&](auto planes) { matmul<decltype(planes)>(w, x, out, out_stride, first, last); });
}

bool supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
}

}  // namespace MOERT_ISA

void trellis_matmul_avx512(const NestedMatrix& w, const Activations& x, float* out, int64_t out_stride, int64_t first,
                           int64_t last) {
  isa_avx512::trellis_matmul(w, x, out, out_stride, first, last);
}

extern const Kernel kAvx512Kernel = {
    "avx512",
    isa_avx512::supported,
    isa_avx512::quantise,
    isa_avx512::nested_matmul,
    isa_avx512::nested_dequantise,
    isa_avx512::raw_matmul,
    isa_avx512::silu_product,
    isa_avx512::search_codes,
    isa_avx512::choose_trellis,
};

}  // namespace moert
