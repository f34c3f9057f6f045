// The kernels compiled for: avx512.
#define MOERT_ISA isa_avx512
#include "kernel_body.h"

namespace moert {

extern const Kernel kAvx512Kernel = {
    "avx512",
    [] { return bool(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")); },
    isa_avx512::nested_matmul,
    isa_avx512::nested_dequantise,
    isa_avx512::bf16_matmul,
    isa_avx512::search_codes,
};

}  // namespace moert
