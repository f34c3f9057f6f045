// The trellis code for processors of AVX-512 that look up 64 bytes at once.
#define MOERT_ISA isa_vbmi
#include "products_avx512.h"

namespace moert {

void trellis_matmul_vbmi(const NestedMatrix& w, const Activations& x, float* out, int64_t out_stride, int64_t first,
                         int64_t last) {
  isa_vbmi::trellis_matmul(w, x, out, out_stride, first, last);
}

}  // namespace moert
