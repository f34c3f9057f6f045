#include "gate_ahead.h"

#include <stdexcept>

#include "layer_step.h"
#include "step_kernel.h"

namespace moert {

GateAheadRouters::GateAheadRouters(const std::vector<const Matrix*>& routers, int64_t hidden, float eps, int64_t count)
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

std::vector<std::pair<std::vector<int64_t>, std::vector<float>>> GateAheadRouters::choose(const ComputeTable& compute,
                                                                                          const float* x) {
  const Kernel& kernel = *compute.kernel();
  const int64_t hidden = int64_t(ones_.size());
  int64_t rows = 0;
  for (const Matrix& router : routers_) rows += router.rows();
  float *normed = normed_.get<float>(hidden), *logits = logits_.get<float>(rows);
  step_kernel_for(kernel.name).rms_norm(x, ones_.data(), hidden, eps_, normed);
  std::vector<const Matrix*> matrices;
  std::vector<float*> outs;
  for (const Matrix& router : routers_) {
    matrices.push_back(&router);
    outs.push_back(logits);
    logits += router.rows();
  }
  compute.linear(kernel, matrices.data(), int(matrices.size()), normed, 1, hidden, hidden, outs.data());
  std::vector<std::pair<std::vector<int64_t>, std::vector<float>>> choices;
  for (size_t i = 0; i < routers_.size(); i++) {
    auto& [experts, weights] = choices.emplace_back(std::vector<int64_t>(count_), std::vector<float>(count_));
    route(outs[i], outs[i], routers_[i].rows(), count_, false, experts.data(), weights.data());
  }
  return choices;
}

}  // namespace moert
