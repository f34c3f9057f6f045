#pragma once

#include <nanobind/nanobind.h>

namespace moert {

// Adds the classes Reader and Job to the module.
void bind_reader(nanobind::module_& m);

}  // namespace moert
