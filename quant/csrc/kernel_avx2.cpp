// The kernels compiled for: avx2.
#define MOERT_ISA isa_avx2
#include "kernel_body.h"

namespace moert {

extern const Kernel kAvx2Kernel = {
    "avx2",
    [] { return bool(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")); },
    isa_avx2::nested_matmul,
    isa_avx2::nested_dequantise,
    isa_avx2::bf16_matmul,
    isa_avx2::search_codes,
};

}  // namespace moert
