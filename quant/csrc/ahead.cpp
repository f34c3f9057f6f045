#include "ahead.h"

#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <utility>
#include <vector>

#include "layer_step.h"

namespace nb = nanobind;

namespace moert {
namespace {

using Choice = std::pair<std::vector<int64_t>, std::vector<float>>;

// Each router [experts][hidden] has the weights of its norm folded in, so that all see the same input: x over its root
// mean square. They do not own the memory.
class Ahead {
 public:
  Ahead(const std::vector<const Matrix*>& routers, int64_t hidden, float eps, int64_t count)
      : ones_(hidden, 1.0f), eps_(eps), count_(count) {
    for (const Matrix* router : routers) {
      if (router->raw != nullptr || router->nested.groups != routers[0]->nested.groups ||
          router->nested.group_size != routers[0]->nested.group_size ||
          hidden > router->nested.groups * router->nested.group_size)
        throw std::invalid_argument("the routers differ in their inputs");
      if (count < 1 || count > router->rows()) throw std::invalid_argument("bad number of experts");
      routers_.push_back(*router);
    }
  }

  // For each router the `count` likeliest experts, the likeliest first, and their softmax over all.
  std::vector<Choice> choose(const Kernel& kernel, Products& products, const float* x) {
    const int64_t hidden = int64_t(ones_.size());
    int64_t rows = 0;
    for (const Matrix& router : routers_) rows += router.rows();
    float *normed = normed_.get<float>(hidden), *logits = logits_.get<float>(rows);
    kernel.rms_norm(x, ones_.data(), hidden, eps_, normed);
    std::vector<const Matrix*> matrices;
    std::vector<float*> outs;
    for (const Matrix& router : routers_) {
      matrices.push_back(&router);
      outs.push_back(logits);
      logits += router.rows();
    }
    products.linear(kernel, matrices.data(), int(matrices.size()), normed, 1, hidden, hidden, outs.data());
    std::vector<Choice> choices;
    for (size_t i = 0; i < routers_.size(); i++) {
      Choice& choice = choices.emplace_back(std::vector<int64_t>(count_), std::vector<float>(count_));
      route(outs[i], outs[i], routers_[i].rows(), count_, false, choice.first.data(), choice.second.data());
    }
    return choices;
  }

 private:
  std::vector<Matrix> routers_;
  std::vector<float> ones_;
  float eps_;
  int64_t count_;
  Buffer normed_, logits_;
};

}  // namespace

void bind_ahead(nb::module_& m, Compute compute) {
  nb::class_<Ahead>(m, "Ahead", "Routers of later layers; it does not own the memory.")
      .def(nb::init<const std::vector<const Matrix*>&, int64_t, float, int64_t>())
      .def("choose", [compute](Ahead& self, uintptr_t x) {
        std::vector<Choice> choices;
        compute([&](const Kernel& kernel, Products& products) {
          choices = self.choose(kernel, products, reinterpret_cast<const float*>(x));
        });
        return choices;
      });
}

}  // namespace moert
