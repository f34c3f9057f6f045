// Routers of later layers, applied to the hidden state of an earlier one.
#pragma once

#include <nanobind/nanobind.h>

#include <functional>

#include "products.h"

namespace moert {

// Calls its argument with the kernel in use, while no other call computes and the interpreter's lock is released.
using Compute = void (*)(const std::function<void(const Kernel&, Products&)>& body);

// Adds the class Ahead to the module.
void bind_ahead(nanobind::module_& m, Compute compute);

}  // namespace moert
