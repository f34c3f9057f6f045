#define MOERT_ISA isa_avx2
#include "step_body.h"

namespace moert {

extern const StepKernel kAvx2Step = isa_avx2::step_kernel("avx2");

}  // namespace moert
