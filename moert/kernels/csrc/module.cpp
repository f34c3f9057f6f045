// The Python module moert.kernels._native. Pointers come as integers (Tensor.data_ptr()): shapes are checked in the Python
// files beside it. Threads, products and the kernel in use are those of moert.quant._native.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>

#include "compute.h"
#include "elementwise.h"
#include "gate_ahead.h"
#include "interpreter_lock.h"
#include "kernel_timer.h"
#include "layer_step.h"
#include "step_kernel.h"
#include "weighted_sum.h"

namespace nb = nanobind;

namespace moert {

// AMX has nothing to add here.
const StepKernel& step_kernel_for(const char* name) {
#if defined(MOERT_WITH_AVX512)
  if (std::strcmp(name, "avx512") == 0 || std::strcmp(name, "amx") == 0) return kAvx512Step;
#endif
#if defined(MOERT_WITH_AVX2)
  if (std::strcmp(name, "avx2") == 0) return kAvx2Step;
#endif
#if defined(MOERT_WITH_NEON)
  if (std::strcmp(name, "neon") == 0) return kNeonStep;
#endif
  (void)name;
  return kGenericStep;
}

namespace {

const ComputeTable* compute = nullptr;  // set at import

// As in quant/csrc/module.cpp.
struct Computing {
  const KernelTimer timer{*compute->kernel_nanoseconds};
  const WithoutInterpreter without;
};

struct ComputingProducts : Computing {
  const std::lock_guard<std::mutex> lock{*compute->products_lock};
};

LayerStep& step() {
  static LayerStep* instance = new LayerStep(*compute);
  return *instance;
}

template <class V>
V* at(uintptr_t address) {
  return reinterpret_cast<V*>(address);
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
  const ComputingProducts computing;
  step().run(*compute->kernel(), layer, runs, at<const float>(bonus), at<float>(x), at<float>(normed), indices, weights);
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

// out [size] += sum over i of weights[i] * row rows[i] of parts, in their order.
void add_rows(const std::vector<int64_t>& rows, const std::vector<float>& weights, uintptr_t parts, int64_t size,
              uintptr_t more, uintptr_t out) {
  if (rows.size() != weights.size()) throw std::invalid_argument("one weight for each row is needed");
  std::vector<const float*> terms;
  for (int64_t row : rows) terms.push_back(at<const float>(parts) + row * size);
  add_weighted(terms.data(), weights.data(), int64_t(rows.size()), size, at<float>(out), at<const double>(more));
}

}  // namespace
}  // namespace moert

NB_MODULE(_native, m) {
  using namespace moert;
  const nb::object table = nb::module_::import_("moert.quant._native").attr("compute");
  compute = static_cast<const ComputeTable*>(nb::cast<nb::capsule>(table).data(kComputeCapsule));
  if (!compute->fits()) throw nb::import_error("moert.quant._native is of another build: install moert again");
  m.doc() = "Steps of a decoder layer between and around the products.";
  nb::set_leak_warnings(false);  // what lives until the interpreter ends is no leak
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
  nb::class_<GateAheadRouters>(m, "GateAheadRouters", "Routers of later layers; it does not own the memory.")
      .def(nb::init<const std::vector<const Matrix*>&, int64_t, float, int64_t>())
      .def("choose", [](GateAheadRouters& self, uintptr_t x) {
        const ComputingProducts computing;
        return self.choose(*compute, at<const float>(x));
      });
  m.def("layer_step", &layer_step);
  m.def("layer_steps", &layer_steps);
  m.def("add_rows", &add_rows);
  m.def("rms_norm", [](uintptr_t x, uintptr_t weight, int64_t rows, int64_t size, float eps, uintptr_t out) {
    const Computing computing;
    rms_norm_rows(*compute, at<const float>(x), at<const float>(weight), rows, size, eps, at<float>(out));
  });
  m.def("rotate", [](uintptr_t x, int64_t tokens, int64_t heads, int64_t d, uintptr_t cos, uintptr_t sin, uintptr_t out) {
    const Computing computing;
    rotate_heads(*compute, at<const float>(x), tokens, heads, d, at<const float>(cos), at<const float>(sin),
                 at<float>(out));
  });
  m.def("combine", [](uintptr_t parts, uintptr_t rows, uintptr_t weights, int64_t tokens, int64_t top_k, int64_t size,
                      uintptr_t more, uintptr_t out) {
    const Computing computing;
    combine(*compute, at<const float>(parts), at<const int64_t>(rows), at<const float>(weights), tokens, top_k, size,
            at<const double>(more), at<float>(out));
  });
}
