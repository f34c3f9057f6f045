// The Python module moert.quant._native. Pointers come as integers (Tensor.data_ptr()): shapes are checked in
// quant/matmul.py. The interpreter's lock is released while computing.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "kernel.h"
#include "thread_pool.h"

namespace nb = nanobind;

namespace moert {
namespace {

std::vector<const Kernel*> supported_kernels() {
  std::vector<const Kernel*> all = {
#if defined(__x86_64__)
      &kAvx512Kernel, &kAvx2Kernel,
#endif
      &kGenericKernel};
  std::vector<const Kernel*> result;
  for (const Kernel* kernel : all)
    if (kernel->supported()) result.push_back(kernel);
  return result;
}

// Written once at import and by the two setters, which quant/matmul.py calls from the main thread only.
const Kernel* active = supported_kernels().front();

ThreadPool& pool() {
  static ThreadPool* instance = new ThreadPool(1);  // never destroyed: joining at exit could wait for the lock
  return *instance;
}

// planes: (address, stride, bits, shift) from the most significant.
using PlaneTuple = std::tuple<uintptr_t, size_t, int, int>;

NestedMatrix nested_matrix(const std::vector<PlaneTuple>& planes, uintptr_t scales, int64_t rows, int64_t groups,
                           int group_size, float midpoint) {
  if (planes.empty() || planes.size() > size_t(kMaxPlanes)) throw std::invalid_argument("1 to 8 planes are needed");
  if (group_size != 32 && group_size != 64 && group_size != 128) throw std::invalid_argument("bad group size");
  NestedMatrix m{};
  m.num_planes = int(planes.size());
  for (size_t i = 0; i < planes.size(); i++) {
    auto [address, stride, bits, shift] = planes[i];
    m.planes[i] = Plane{reinterpret_cast<const uint8_t*>(address), stride, bits, shift};
  }
  m.scales = reinterpret_cast<const uint8_t*>(scales);
  m.rows = rows;
  m.tiles = (rows + kTileRows - 1) / kTileRows;
  m.groups = groups;
  m.group_size = group_size;
  m.midpoint = midpoint;
  return m;
}

void nested_matmul(const std::vector<PlaneTuple>& planes, uintptr_t scales, int64_t rows, int64_t groups,
                   int group_size, float midpoint, uintptr_t x, int64_t tokens, int64_t x_stride, uintptr_t out,
                   int64_t out_stride) {
  const NestedMatrix m = nested_matrix(planes, scales, rows, groups, group_size, midpoint);
  const Kernel* kernel = active;
  nb::gil_scoped_release release;
  pool().parallel_for(m.tiles, [&](int64_t first, int64_t last) {
    kernel->nested_matmul(m, reinterpret_cast<const float*>(x), tokens, x_stride, reinterpret_cast<float*>(out),
                          out_stride, first, last);
  });
}

void nested_dequantise(const std::vector<PlaneTuple>& planes, uintptr_t scales, int64_t rows, int64_t groups,
                       int group_size, float midpoint, int64_t cols, uintptr_t out, int64_t out_stride,
                       int64_t first_row, int64_t last_row) {
  if (first_row % kTileRows != 0 || first_row < 0 || last_row > rows || first_row >= last_row)
    throw std::invalid_argument("bad range of rows");
  const NestedMatrix m = nested_matrix(planes, scales, rows, groups, group_size, midpoint);
  const Kernel* kernel = active;
  nb::gil_scoped_release release;
  const int64_t tile = first_row / kTileRows, tiles = (last_row - first_row + kTileRows - 1) / kTileRows;
  NestedMatrix part = m;
  part.rows = last_row;
  float* origin = reinterpret_cast<float*>(out) - first_row * out_stride;
  pool().parallel_for(tiles, [&](int64_t first, int64_t last) {
    kernel->nested_dequantise(part, cols, origin, out_stride, tile + first, tile + last);
  });
}

void bf16_matmul(uintptr_t w, int64_t rows, int64_t cols, uintptr_t x, int64_t tokens, int64_t x_stride, uintptr_t out,
                 int64_t out_stride) {
  const Kernel* kernel = active;
  nb::gil_scoped_release release;
  pool().parallel_for(rows, [&](int64_t first, int64_t last) {
    kernel->bf16_matmul(reinterpret_cast<const uint16_t*>(w), cols, reinterpret_cast<const float*>(x), tokens, x_stride,
                        reinterpret_cast<float*>(out), out_stride, first, last);
  });
}

void search_codes(uintptr_t w, int64_t num_groups, int group_size, const std::vector<int>& widths,
                  const std::vector<float>& clips, uintptr_t codes, uintptr_t scales) {
  if (widths.empty() || widths.size() > 8 || group_size % 16 != 0 || group_size > 128)
    throw std::invalid_argument("bad widths or group size");
  const Search search{widths.data(), int(widths.size()), clips.data(), int(clips.size()), group_size, num_groups};
  const Kernel* kernel = active;
  nb::gil_scoped_release release;
  pool().parallel_for(num_groups, [&](int64_t first, int64_t last) {
    kernel->search_codes(search, reinterpret_cast<const float*>(w), reinterpret_cast<uint8_t*>(codes),
                         reinterpret_cast<uint16_t*>(scales), first, last);
  });
}

}  // namespace
}  // namespace moert

NB_MODULE(_native, m) {
  using namespace moert;
  m.doc() = "Kernels for nested-bit products.";
  m.def("nested_matmul", &nested_matmul);
  m.def("nested_dequantise", &nested_dequantise);
  m.def("bf16_matmul", &bf16_matmul);
  m.def("search_codes", &search_codes);
  m.def("set_num_threads", [](int n) {
    if (n < 1) throw std::invalid_argument("at least one thread is needed");
    nb::gil_scoped_release release;
    pool().resize(n);
  });
  m.def("num_threads", [] { return pool().size(); });
  m.def("kernel_names", [] {
    std::vector<std::string> names;
    for (const Kernel* kernel : supported_kernels()) names.emplace_back(kernel->name);
    return names;
  });
  m.def("kernel_name", [] { return std::string(active->name); });
  m.def("set_kernel", [](const std::string& name) {
    for (const Kernel* kernel : supported_kernels())
      if (name == kernel->name) {
        active = kernel;
        return;
      }
    throw std::invalid_argument("no such kernel on this processor: " + name);
  });
}
