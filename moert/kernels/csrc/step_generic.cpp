#define MOERT_ISA isa_generic
#include "step_body.h"

namespace moert {

extern const StepKernel kGenericStep = isa_generic::step_kernel("generic");

}  // namespace moert
