// The Python module moert.quant._native. Pointers come as integers (Tensor.data_ptr()): shapes are checked in
// quant/matmul.py. The interpreter's lock is released while computing.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "ahead.h"
#include "bind_reader.h"
#include "busy.h"
#include "calibrate.h"
#include "expert_table.h"
#include "layer_step.h"
#include "kernel.h"
#include "products.h"
#include "rows.h"
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

// Written at import and by set_kernel, which quant/dispatch.py calls from the main thread only.
const Kernel* active = nullptr;

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

template <class V>
V* at(uintptr_t address) {
  return reinterpret_cast<V*>(address);
}

void set_matrix(Matrix* self, const std::vector<PlaneTuple>& planes, uintptr_t scales, int64_t rows, int64_t groups,
                int group_size) {
  new (self) Matrix{nested_matrix(planes, scales, rows, groups, group_size)};
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

// Throws where nested matrices differ in how they want their inputs rounded.
void check_alike(const std::vector<const Matrix*>& matrices) {
  const Matrix* first = nullptr;
  for (const Matrix* m : matrices) {
    if (m->raw != nullptr) continue;
    if (first != nullptr &&
        (m->nested.groups != first->nested.groups || m->nested.group_size != first->nested.group_size))
      throw std::invalid_argument("the matrices differ in their inputs");
    first = m;
  }
}

void linear(const std::vector<const Matrix*>& matrices, uintptr_t x, int64_t tokens, int64_t x_stride, int64_t cols,
            const std::vector<uintptr_t>& outs) {
  if (matrices.empty() || outs.size() != matrices.size())
    throw std::invalid_argument("one output for each matrix is needed");
  check_alike(matrices);
  std::vector<float*> places;
  for (uintptr_t out : outs) places.push_back(at<float>(out));
  const Busy busy;
  nb::gil_scoped_release release;
  std::lock_guard<std::mutex> lock(products_lock());
  products().linear(*active, matrices.data(), int(matrices.size()), at<const float>(x), tokens, x_stride, cols,
                    places.data());
}

void experts(const std::vector<const ExpertMatrices*>& list, const std::vector<int64_t>& counts, uintptr_t tokens_of,
             uintptr_t x, int64_t tokens, int64_t hidden, int64_t inner, uintptr_t out) {
  if (list.empty() || counts.size() != list.size()) throw std::invalid_argument("one count for each expert is needed");
  std::vector<ExpertMatrices> copies;
  for (const ExpertMatrices* expert : list) copies.push_back(*expert);
  const Busy busy;
  nb::gil_scoped_release release;
  std::lock_guard<std::mutex> lock(products_lock());
  products().experts(*active, copies, counts, at<const int64_t>(tokens_of), at<const float>(x), tokens, hidden, inner,
                     at<float>(out));
}

bool table_add(ExpertTable& table, int layer, const std::vector<int>& experts, const std::vector<int>& slices,
               const std::vector<float>& weights, uintptr_t x, uintptr_t out) {
  if (weights.size() != experts.size()) throw std::invalid_argument("one weight for each expert is needed");
  const std::vector<ExpertMatrices>* found = table.find(layer, experts, slices);
  if (found == nullptr) return false;
  const Busy busy;
  nb::gil_scoped_release release;
  std::lock_guard<std::mutex> lock(products_lock());
  products().add_experts(*active, *found, weights.data(), at<const float>(x), at<float>(out));
  return true;
}

void table_compute(ExpertTable& table, int layer, const std::vector<int>& experts, const std::vector<int>& slices,
                   const std::vector<int64_t>& counts, uintptr_t tokens_of, uintptr_t x, int64_t tokens, uintptr_t out) {
  if (counts.size() != experts.size()) throw std::invalid_argument("one count for each expert is needed");
  const std::vector<ExpertMatrices>* found = table.find(layer, experts, slices);
  if (found == nullptr) throw std::invalid_argument("an expert is not in the table");
  const Busy busy;
  nb::gil_scoped_release release;
  std::lock_guard<std::mutex> lock(products_lock());
  products().experts(*active, *found, counts, at<const int64_t>(tokens_of), at<const float>(x), tokens,
                     found->front().down.rows, found->front().gate.rows, at<float>(out));
}

// A single token: the result of experts[i] goes to row rows[i] of parts.
void table_compute_one(ExpertTable& table, int layer, const std::vector<int>& experts, const std::vector<int>& slices,
                       const std::vector<int64_t>& rows, uintptr_t x, uintptr_t parts) {
  if (rows.size() != experts.size()) throw std::invalid_argument("one row for each expert is needed");
  const std::vector<ExpertMatrices>* found = table.find(layer, experts, slices);
  if (found == nullptr) throw std::invalid_argument("an expert is not in the table");
  const Busy busy;
  nb::gil_scoped_release release;
  std::lock_guard<std::mutex> lock(products_lock());
  products().scatter_experts(*active, *found, rows.data(), at<const float>(x), at<float>(parts));
}

// out [size] += sum over i of weights[i] * row rows[i] of parts, in their order.
void add_rows(const std::vector<int64_t>& rows, const std::vector<float>& weights, uintptr_t parts, int64_t size,
              uintptr_t more, uintptr_t out) {
  if (rows.size() != weights.size()) throw std::invalid_argument("one weight for each row is needed");
  std::vector<const float*> terms;
  for (int64_t row : rows) terms.push_back(at<const float>(parts) + row * size);
  add_weighted(terms.data(), weights.data(), int64_t(rows.size()), size, at<float>(out), at<const double>(more));
}

void dequantise(const Matrix& matrix, int64_t cols, uintptr_t out, int64_t out_stride, int64_t first_row,
                int64_t last_row) {
  const NestedMatrix& m = matrix.nested;
  if (matrix.raw != nullptr || first_row % kTileRows != 0 || first_row < 0 || last_row > m.rows || first_row >= last_row)
    throw std::invalid_argument("bad range of rows");
  const Busy busy;
  nb::gil_scoped_release release;
  const int64_t tile = first_row / kTileRows, tiles = (last_row - first_row + kTileRows - 1) / kTileRows;
  NestedMatrix part = m;
  part.rows = last_row;
  float* origin = at<float>(out) - first_row * out_stride;
  pool().parallel_for(tiles, 8, [&](int64_t first, int64_t last) {
    active->nested_dequantise(part, cols, origin, out_stride, tile + first, tile + last);
  });
}

void search_codes(uintptr_t w, int64_t num_groups, int group_size, const std::vector<int>& widths,
                  const std::vector<float>& clips, uintptr_t codes, uintptr_t scales) {
  if (widths.empty() || widths.size() > 8 || group_size % 16 != 0 || group_size > 128)
    throw std::invalid_argument("bad widths or group size");
  const Search search{widths.data(), int(widths.size()), clips.data(), int(clips.size()), group_size, num_groups};
  const Busy busy;
  nb::gil_scoped_release release;
  pool().parallel_for(num_groups, 256, [&](int64_t first, int64_t last) {
    active->search_codes(search, at<const float>(w), at<uint8_t>(codes), at<uint16_t>(scales), first, last);
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
  const Busy busy;
  nb::gil_scoped_release release;
  fit_scales(n, at<const float>(targets), at<const float>(column_weights), at<float>(scales));
}

void choose_codes_at(const std::vector<int>& widths, const std::vector<float>& weights, int group_size, int64_t rows,
                     uintptr_t targets, uintptr_t before, uintptr_t coupling, uintptr_t scales, uintptr_t codes,
                     int64_t code_stride, uintptr_t moved) {
  const Nesting n = nesting(widths, weights, group_size, rows, group_size);
  const Busy busy;
  nb::gil_scoped_release release;
  choose_codes(n, at<const float>(targets), at<const float>(before), at<const float>(coupling),
               at<const float>(scales), at<uint8_t>(codes), code_stride, at<float>(moved));
}

LayerStep& step() {
  static LayerStep* instance = new LayerStep(pool(), products());
  return *instance;
}

// (weights, bias or 0)
using Projection = std::tuple<const Matrix*, uintptr_t>;

void set_layer(Layer* self, int64_t hidden, int head_dim, std::tuple<uintptr_t, uintptr_t> norms, float eps,
               const std::tuple<Projection, Projection, Projection, Projection>& qkvo, const std::string& qk_norm,
               std::tuple<uintptr_t, uintptr_t> qk_norms, float clip, const Matrix* router, int64_t top_k,
               bool normalise) {
  auto [q, q_bias] = std::get<0>(qkvo);
  auto [k, k_bias] = std::get<1>(qkvo);
  auto [v, v_bias] = std::get<2>(qkvo);
  auto [o, o_bias] = std::get<3>(qkvo);
  check_alike({q, k, v});
  const int heads = int(q->rows() / head_dim), kv_heads = int(k->rows() / head_dim);
  if (head_dim % 16 != 0 || head_dim > 256 || kv_heads < 1 || heads % kv_heads != 0 || o->rows() != hidden)
    throw std::invalid_argument("bad shape of attention");
  if (router != nullptr && (top_k < 1 || top_k > router->rows())) throw std::invalid_argument("bad top_k");
  const QkNorm kind = qk_norm == "head" ? QkNorm::kHead : qk_norm == "full" ? QkNorm::kFull : QkNorm::kNone;
  new (self) Layer{hidden,
                   heads,
                   kv_heads,
                   head_dim,
                   at<const float>(std::get<0>(norms)),
                   at<const float>(std::get<1>(norms)),
                   eps,
                   *q,
                   *k,
                   *v,
                   *o,
                   at<const float>(q_bias),
                   at<const float>(k_bias),
                   at<const float>(v_bias),
                   at<const float>(o_bias),
                   kind,
                   at<const float>(std::get<0>(qk_norms)),
                   at<const float>(std::get<1>(qk_norms)),
                   clip,
                   router != nullptr ? *router : Matrix{},
                   top_k,
                   normalise};
}

void run_step(const Layer& layer, const Runs& runs, uintptr_t bonus, uintptr_t x, uintptr_t normed, int64_t* indices,
              float* weights) {
  const Busy busy;
  nb::gil_scoped_release release;
  std::lock_guard<std::mutex> lock(products_lock());
  step().run(*active, layer, runs, at<const float>(bonus), at<float>(x), at<float>(normed), indices, weights);
}

void layer_steps(const Layer& layer, const Parts& parts, uintptr_t bonus, uintptr_t x, uintptr_t normed,
                 uintptr_t indices, uintptr_t weights) {
  std::vector<Run> runs;
  int64_t tokens = 0;
  for (auto [cache, place] : parts) runs.push_back({cache, place, tokens}), tokens += place->tokens;
  run_step(layer, {runs.data(), int64_t(runs.size()), tokens}, bonus, x, normed, at<int64_t>(indices),
           at<float>(weights));
}

using Choice = std::pair<std::vector<int64_t>, std::vector<float>>;

// One token.
Choice layer_step(const Layer& layer, const LayerCache& cache, const Place& place, uintptr_t bonus, uintptr_t x,
                  uintptr_t normed) {
  if (place.tokens != 1) throw std::invalid_argument("not a single token");
  const size_t chosen = layer.router.rows() != 0 ? layer.top_k : 0;
  Choice choice{std::vector<int64_t>(chosen), std::vector<float>(chosen)};
  const Run run{&cache, &place, 0};
  run_step(layer, {&run, 1, 1}, bonus, x, normed, choice.first.data(), choice.second.data());
  return choice;
}

}  // namespace
}  // namespace moert

NB_MODULE(_native, m) {
  using namespace moert;
  active = supported_kernels().front();
  m.doc() = "Kernels for nested-bit products, and threads that read slices.";
  nb::set_leak_warnings(false);  // what lives until the interpreter ends is no leak
  bind_reader(m);
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
  m.def("add_rows", &add_rows);
  nb::class_<Layer>(m, "Layer", "A layer but its experts; it does not own the memory.")
      .def("__init__", &set_layer, nb::arg("hidden"), nb::arg("head_dim"), nb::arg("norms"), nb::arg("eps"),
           nb::arg("qkvo"), nb::arg("qk_norm"), nb::arg("qk_norms"), nb::arg("clip"), nb::arg("router").none(),
           nb::arg("top_k"), nb::arg("normalise"));
  nb::class_<LayerCache>(m, "LayerCache", "Keys and values of a layer; it does not own the memory.")
      .def("__init__", [](LayerCache* self, uintptr_t keys, uintptr_t values, int bits, uintptr_t key_scales,
                          uintptr_t value_scales, int64_t capacity) {
        const CacheType type = bits == 8 ? CacheType::kByte : bits == 16 ? CacheType::kHalf : CacheType::kFloat;
        if (capacity % 16 != 0) throw std::invalid_argument("the capacity is not a multiple of 16");
        new (self) LayerCache{at<void>(keys),        at<void>(values),        type,
                              at<float>(key_scales), at<float>(value_scales), capacity};
      });
  nb::class_<Place>(m, "Place", "Where tokens stand; it does not own the memory.")
      .def("__init__", [](Place* self, uintptr_t cos, uintptr_t sin, int64_t tokens, int64_t position, int64_t window) {
        new (self) Place{at<const float>(cos), at<const float>(sin), tokens, position, window};
      });
  bind_ahead(m, [](const std::function<void(const Kernel&, Products&)>& body) {
    const Busy busy;
    nb::gil_scoped_release release;
    std::lock_guard<std::mutex> lock(products_lock());
    body(*active, products());
  });
  m.def("layer_step", &layer_step);
  m.def("layer_steps", &layer_steps);
  m.def("rms_norm", [](uintptr_t x, uintptr_t weight, int64_t rows, int64_t size, float eps, uintptr_t out) {
    const Busy busy;
    nb::gil_scoped_release release;
    rms_norm_rows(*active, pool(), at<const float>(x), at<const float>(weight), rows, size, eps, at<float>(out));
  });
  m.def("rotate", [](uintptr_t x, int64_t tokens, int64_t heads, int64_t d, uintptr_t cos, uintptr_t sin, uintptr_t out) {
    const Busy busy;
    nb::gil_scoped_release release;
    rotate_heads(pool(), at<const float>(x), tokens, heads, d, at<const float>(cos), at<const float>(sin),
                 at<float>(out));
  });
  m.def("combine", [](uintptr_t parts, uintptr_t rows, uintptr_t weights, int64_t tokens, int64_t top_k, int64_t size,
                      uintptr_t more, uintptr_t out) {
    const Busy busy;
    nb::gil_scoped_release release;
    combine(pool(), at<const float>(parts), at<const int64_t>(rows), at<const float>(weights), tokens, top_k, size,
            at<const double>(more), at<float>(out));
  });
  m.def("dequantise", &dequantise);
  m.def("search_codes", &search_codes);
  m.def("fit_scales", &fit_scales_at);
  m.def("choose_codes", &choose_codes_at);
  m.def("busy_seconds", [] { return std::chrono::duration<double>(Busy::total).count(); });
  m.def("set_num_threads", [](int n) {
    if (n < 1) throw std::invalid_argument("at least one thread is needed");
    nb::gil_scoped_release release;
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
