#define MOERT_ISA isa_avx512
#include "step_body.h"

namespace moert {

extern const StepKernel kAvx512Step = isa_avx512::step_kernel("avx512");

}  // namespace moert
