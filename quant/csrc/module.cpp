// The Python module moert.quant._native. Pointers come as integers (Tensor.data_ptr()): shapes are checked in
// quant/matmul.py. The interpreter's lock is released while computing.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "calibrate.h"
#include "trellis.h"
#include "compute.h"
#include "expert_table.h"
#include "interpreter_lock.h"
#include "kernel.h"
#include "kernel_timer.h"
#include "products.h"
#include "thread_pool.h"

namespace nb = nanobind;

namespace moert {
namespace {

std::vector<const Kernel*> supported_kernels() {
  std::vector<const Kernel*> all = {
#if defined(MOERT_WITH_AMX)
      &kAmxKernel,
#endif
#if defined(MOERT_WITH_AVX512)
      &kAvx512Kernel,
#endif
#if defined(MOERT_WITH_AVX2)
      &kAvx2Kernel,
#endif
#if defined(MOERT_WITH_NEON)
      &kNeonKernel,
#endif
      &kGenericKernel};
  std::vector<const Kernel*> result;
  for (const Kernel* kernel : all)
    if (kernel->supported()) result.push_back(kernel);
  return result;
}

// The widest, until set_kernel chooses another. Who computes takes it once, so that a step has one kernel throughout.
std::atomic<const Kernel*> active{nullptr};

std::atomic<int64_t> kernel_nanoseconds{0};

// Never destroyed: joining threads at exit could wait for the interpreter's lock.
ThreadPool& pool() {
  static ThreadPool* instance = new ThreadPool(1);
  return *instance;
}

Products& products() {
  static Products* instance = new Products(pool());
  return *instance;
}

std::mutex& products_lock() {
  static std::mutex* instance = new std::mutex;
  return *instance;
}

const ComputeTable compute_table = {
    ComputeTable::kVersion,
    sizeof(Matrix),
    [] { return active.load(); },
    &products_lock(),
    &kernel_nanoseconds,
    [](const Kernel& kernel, const Matrix* const* matrices, int count, const float* x, int64_t tokens, int64_t x_stride,
       int64_t cols, float* const* outs) {
      products().linear(kernel, matrices, count, x, tokens, x_stride, cols, outs);
    },
    [](int64_t count, int64_t grain, void (*body)(const void*, int64_t, int64_t), const void* data) {
      pool().parallel_for(count, grain, [body, data](int64_t first, int64_t last) { body(data, first, last); });
    },
};

// Times the block, which runs without the interpreter's lock.
struct Computing {
  const KernelTimer timer{kernel_nanoseconds};
  const WithoutInterpreter without;
  const Kernel& kernel = *active.load();
};

// The same, and nobody else computes products meanwhile. The locks are given up in the opposite order: a thread that
// waits for the interpreter holds up nobody.
struct ComputingProducts : Computing {
  const std::lock_guard<std::mutex> lock{products_lock()};
};

template <class V>
V* at(uintptr_t address) {
  return reinterpret_cast<V*>(address);
}

void set_matrix(Matrix* self, const std::vector<PlaneTuple>& planes, uintptr_t scales, int64_t rows, int64_t groups,
                int group_size, uintptr_t tables) {
  new (self) Matrix{nested_matrix(planes, scales, rows, groups, group_size, tables)};
}

void set_raw_matrix(Matrix* self, uintptr_t weights, const std::string& dtype, int64_t rows) {
  const RawType type = dtype == "bfloat16"  ? RawType::kBf16
                       : dtype == "float16" ? RawType::kHalf
                       : dtype == "float32" ? RawType::kFloat
                                            : throw std::invalid_argument("no kernel for " + dtype);
  NestedMatrix m{};
  m.rows = rows;
  m.tiles = (rows + kTileRows - 1) / kTileRows;
  new (self) Matrix{m, at<const void>(weights), type};
}

void linear(const std::vector<const Matrix*>& matrices, uintptr_t x, int64_t tokens, int64_t x_stride, int64_t cols,
            const std::vector<uintptr_t>& outs) {
  if (matrices.empty() || outs.size() != matrices.size())
    throw std::invalid_argument("one output for each matrix is needed");
  check_alike(matrices);
  std::vector<float*> places;
  for (uintptr_t out : outs) places.push_back(at<float>(out));
  const ComputingProducts computing;
  products().linear(computing.kernel, matrices.data(), int(matrices.size()), at<const float>(x), tokens, x_stride, cols,
                    places.data());
}

void experts(const std::vector<const ExpertMatrices*>& list, const std::vector<int64_t>& counts, uintptr_t tokens_of,
             uintptr_t x, int64_t tokens, int64_t hidden, int64_t inner, uintptr_t out) {
  if (list.empty() || counts.size() != list.size()) throw std::invalid_argument("one count for each expert is needed");
  std::vector<ExpertMatrices> copies;
  for (const ExpertMatrices* expert : list) copies.push_back(*expert);
  const ComputingProducts computing;
  products().experts(computing.kernel, copies, counts, at<const int64_t>(tokens_of), at<const float>(x), tokens, hidden, inner,
                     at<float>(out));
}

bool table_add(ExpertTable& table, int layer, const std::vector<int>& experts, const std::vector<int>& slices,
               const std::vector<float>& weights, uintptr_t x, uintptr_t out) {
  if (weights.size() != experts.size()) throw std::invalid_argument("one weight for each expert is needed");
  const std::vector<ExpertMatrices> found = table.find(layer, experts, slices);
  if (found.empty()) return false;
  const ComputingProducts computing;
  products().add_experts(computing.kernel, found, weights.data(), at<const float>(x), at<float>(out));
  return true;
}

void table_compute(ExpertTable& table, int layer, const std::vector<int>& experts, const std::vector<int>& slices,
                   const std::vector<int64_t>& counts, uintptr_t tokens_of, uintptr_t x, int64_t tokens, uintptr_t out) {
  if (counts.size() != experts.size()) throw std::invalid_argument("one count for each expert is needed");
  const std::vector<ExpertMatrices> found = table.find(layer, experts, slices);
  if (found.empty()) throw std::invalid_argument("an expert is not in the table");
  const ComputingProducts computing;
  products().experts(computing.kernel, found, counts, at<const int64_t>(tokens_of), at<const float>(x), tokens,
                     found.front().down.rows, found.front().gate.rows, at<float>(out));
}

// A single token: the result of experts[i] goes to row rows[i] of parts.
void table_compute_one(ExpertTable& table, int layer, const std::vector<int>& experts, const std::vector<int>& slices,
                       const std::vector<int64_t>& rows, uintptr_t x, uintptr_t parts) {
  if (rows.size() != experts.size()) throw std::invalid_argument("one row for each expert is needed");
  const std::vector<ExpertMatrices> found = table.find(layer, experts, slices);
  if (found.empty()) throw std::invalid_argument("an expert is not in the table");
  const ComputingProducts computing;
  products().scatter_experts(computing.kernel, found, rows.data(), at<const float>(x), at<float>(parts));
}

void dequantise(const Matrix& matrix, int64_t cols, uintptr_t out, int64_t out_stride, int64_t first_row,
                int64_t last_row) {
  const NestedMatrix& m = matrix.nested;
  if (matrix.raw != nullptr || first_row % kTileRows != 0 || first_row < 0 || last_row > m.rows || first_row >= last_row)
    throw std::invalid_argument("bad range of rows");
  const Computing computing;
  const int64_t tile = first_row / kTileRows, tiles = (last_row - first_row + kTileRows - 1) / kTileRows;
  NestedMatrix part = m;
  part.rows = last_row;
  float* origin = at<float>(out) - first_row * out_stride;
  pool().parallel_for(tiles, 8, [&](int64_t first, int64_t last) {
    computing.kernel.nested_dequantise(part, cols, origin, out_stride, tile + first, tile + last);
  });
}

void search_codes(uintptr_t w, int64_t num_groups, int group_size, const std::vector<int>& widths,
                  const std::vector<float>& clips, uintptr_t codes, uintptr_t scales) {
  if (widths.empty() || widths.size() > 8 || group_size % 16 != 0 || group_size > 128)
    throw std::invalid_argument("bad widths or group size");
  const Search search{widths.data(), int(widths.size()), clips.data(), int(clips.size()), group_size, num_groups};
  const Computing computing;
  pool().parallel_for(num_groups, 256, [&](int64_t first, int64_t last) {
    computing.kernel.search_codes(search, at<const float>(w), at<uint8_t>(codes), at<uint16_t>(scales), first, last);
  });
}

Nesting nesting(const std::vector<int>& widths, const std::vector<float>& weights, int group_size, int64_t rows,
                int64_t stride) {
  if (widths.empty() || widths.size() > 8 || weights.size() != widths.size() || group_size > 128)
    throw std::invalid_argument("bad widths or group size");
  return Nesting{widths.data(), weights.data(), int(widths.size()), group_size, rows, stride};
}

// On the calling thread: conversion gives every core an expert of its own.
void fit_scales_at(const std::vector<int>& widths, const std::vector<float>& weights, int group_size, int64_t rows,
                   int64_t stride, uintptr_t targets, uintptr_t column_weights, uintptr_t scales) {
  const Nesting n = nesting(widths, weights, group_size, rows, stride);
  const Computing computing;
  fit_scales(n, at<const float>(targets), at<const float>(column_weights), at<float>(scales));
}

void choose_codes_at(const std::vector<int>& widths, const std::vector<float>& weights, int group_size, int64_t rows,
                     uintptr_t targets, uintptr_t before, uintptr_t coupling, uintptr_t scales, uintptr_t codes,
                     int64_t code_stride, uintptr_t moved) {
  const Nesting n = nesting(widths, weights, group_size, rows, group_size);
  const Computing computing;
  choose_codes(n, at<const float>(targets), at<const float>(before), at<const float>(coupling),
               at<const float>(scales), at<uint8_t>(codes), code_stride, at<float>(moved));
}

void choose_trellis_at(int bits, int columns, int kept, int64_t rows, int64_t stride, uintptr_t table, uintptr_t weights,
                       uintptr_t coupling, uintptr_t scales, uintptr_t targets, uintptr_t ahead_targets, float near,
                       float far, float weight, uintptr_t starts, uintptr_t ends, uintptr_t codes, int64_t code_stride,
                       uintptr_t left, uintptr_t ahead_left) {
  if ((bits != 1 && bits != 2) || kept < 1 || columns < kept || columns > kMostColumns)
    throw std::invalid_argument("no trellis of these bits or columns");
  const TrellisBlock block{bits,
                           columns,
                           kept,
                           rows,
                           stride,
                           at<const float>(table),
                           at<const float>(weights),
                           at<const float>(coupling),
                           at<const float>(scales)};
  const LookAhead ahead{at<const float>(ahead_targets), near, far, weight};
  const Computing computing;
  computing.kernel.choose_trellis(block, at<const float>(targets), ahead, at<uint8_t>(starts), at<uint8_t>(ends),
                                  at<uint8_t>(codes), code_stride, at<float>(left), at<float>(ahead_left));
}

}  // namespace
}  // namespace moert

NB_MODULE(_native, m) {
  using namespace moert;
  active = supported_kernels().front();
  m.doc() = "Kernels for nested-bit products.";
  nb::set_leak_warnings(false);  // what lives until the interpreter ends is no leak
  nb::class_<Matrix>(m, "Matrix", "Nested-bit weights at one width, or raw weights; it does not own the memory.")
      .def("__init__", &set_matrix)
      .def("__init__", &set_raw_matrix);
  nb::class_<ExpertMatrices>(m, "Expert", "Gate, up and down of one expert.")
      .def("__init__",
           [](ExpertMatrices* self, const Matrix& gate, const Matrix& up, const Matrix& down) {
             new (self) ExpertMatrices{gate.nested, up.nested, down.nested};
           });
  m.def("linear", &linear);
  m.def("experts", &experts);
  nb::class_<ExpertTable>(m, "ExpertTable", "Experts by layer, expert and number of slices.")
      .def(nb::init<std::vector<std::vector<PlacedMatrix>>, uintptr_t>())
      .def("put", &ExpertTable::put)
      .def("keep", &ExpertTable::keep)
      .def("held", &ExpertTable::held)
      .def("missing", &ExpertTable::missing)
      .def("add", &table_add)
      .def("compute", &table_compute)
      .def("compute_one", &table_compute_one);
  m.def("dequantise", &dequantise);
  m.def("search_codes", &search_codes);
  m.def("fit_scales", &fit_scales_at);
  m.def("choose_codes", &choose_codes_at);
  m.def("choose_trellis", &choose_trellis_at);
  m.def("kernel_seconds", [] { return 1e-9 * double(kernel_nanoseconds.load()); });
  m.attr("compute") = nb::capsule(&compute_table, kComputeCapsule);
  m.def("set_num_threads", [](int n) {
    if (n < 1) throw std::invalid_argument("at least one thread is needed");
    const WithoutInterpreter without;
    pool().resize(n);
  });
  m.def("kernel_names", [] {
    std::vector<std::string> names;
    for (const Kernel* kernel : supported_kernels()) names.emplace_back(kernel->name);
    return names;
  });
  m.def("set_kernel", [](const std::string& name) {
    for (const Kernel* kernel : supported_kernels())
      if (name == kernel->name) {
        active = kernel;
        return;
      }
    throw std::invalid_argument("no such kernel on this processor: " + name);
  });
}
