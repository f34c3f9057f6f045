// The kernels compiled for: generic.
#define MOERT_ISA isa_generic
#include "kernel_body.h"

namespace moert {

extern const Kernel kGenericKernel = {
    "generic",
    [] { return bool(true); },
    isa_generic::nested_matmul,
    isa_generic::nested_dequantise,
    isa_generic::bf16_matmul,
    isa_generic::search_codes,
};

}  // namespace moert
