#define MOERT_ISA isa_neon
#include "step_body.h"

namespace moert {

extern const StepKernel kNeonStep = isa_neon::step_kernel("neon");

}  // namespace moert
