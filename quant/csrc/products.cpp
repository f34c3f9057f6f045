#include "products.h"

#include <algorithm>
#include <cstring>

#include "weighted_sum.h"

namespace moert {

namespace {
constexpr int64_t kTokenBlock = 16;  // AMX reads whole blocks of tokens: so much is read beyond the last
constexpr int64_t kTileGrain = 8;  // tiles that a thread takes at a time: the first of them is not asked for ahead
}  // namespace

void Inputs::reserve(const NestedMatrix& like, int64_t tokens) {
  groups_ = like.groups, size_ = like.group_size, rotated_ = like.tables != nullptr;
  q_ = q_buffer_.get<int8_t>((tokens * groups_ + kTokenBlock) * size_);
  scales_ = scale_buffer_.get<float>(tokens * groups_ + kTokenBlock);
  sums_ = sum_buffer_.get<int32_t>(tokens * groups_ + kTokenBlock);
}

Activations Inputs::of(int64_t first, int64_t tokens) const {
  const int64_t start = first * groups_;
  return {q_ + start * size_, scales_ + start, sums_ + start, tokens, tokens};
}

void Inputs::put(const Kernel& kernel, int64_t first, int64_t tokens, int64_t token, const float* row, int64_t cols) {
  const int64_t start = first * groups_ + token;
  if (tokens == 1)
    return kernel.quantise(row, cols, groups_, int(size_), rotated_, q_ + start * size_, scales_ + start,
                           sums_ + start);
  for (int64_t group = 0; group < groups_; group++) {
    const int64_t at = start + group * tokens, column = group * size_;
    kernel.quantise(row + column, cols - column, 1, int(size_), rotated_, q_ + at * size_, scales_ + at, sums_ + at);
  }
}

void Inputs::copy(int64_t first, int64_t tokens, int64_t token, const Inputs& from, int64_t from_tokens,
                  int64_t from_token) {
  for (int64_t group = 0; group < groups_; group++) {
    const int64_t at = first * groups_ + group * tokens + token, source = group * from_tokens + from_token;
    std::memcpy(q_ + at * size_, from.q_ + source * size_, size_);
    scales_[at] = from.scales_[source];
    sums_[at] = from.sums_[source];
  }
}

void Products::round(const Kernel& kernel, const NestedMatrix& like, const float* x, int64_t tokens, int64_t x_stride,
                     int64_t cols) {
  inputs_.reserve(like, tokens);
  pool_.parallel_for(tokens, std::max<int64_t>(1, 8192 / cols), [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; t++) inputs_.put(kernel, 0, tokens, t, x + t * x_stride, cols);
  });
}

// Rows [first, last) of tiles for many tokens, in memory of this thread where they lie side by side: [tokens][rows of
// these tiles]. Written to their places one by one, which are often a power of two apart, they would push each other
// out of the cache.
static float* product_aside(const Kernel& kernel, const NestedMatrix& m, const Activations& in, int64_t first, int64_t last,
                     Buffer& memory) {
  const int64_t width = (last - first) * kTileRows;
  float* aside = memory.get<float>(in.tokens * width);
  kernel.nested_matmul(m, in, aside - first * kTileRows, width, first, last);
  return aside;
}

static void put_rows(const float* aside, int64_t tokens, int64_t first, int64_t last, int64_t rows, float* out) {
  const int64_t width = (last - first) * kTileRows, count = std::min(last * kTileRows, rows) - first * kTileRows;
  for (int64_t t = 0; t < tokens; t++)
    std::memcpy(out + t * rows + first * kTileRows, aside + t * width, count * sizeof(float));
}

// out [tokens][rows of m] gets tiles [first, last).
static void product(const Kernel& kernel, const NestedMatrix& m, const Activations& in, int64_t first, int64_t last,
             float* out) {
  static thread_local Buffer memory;
  if (in.tokens < kTokenBlock) return kernel.nested_matmul(m, in, out, m.rows, first, last);
  put_rows(product_aside(kernel, m, in, first, last, memory), in.tokens, first, last, m.rows, out);
}

static void gated_product(const Kernel& kernel, const ExpertMatrices& expert, const Activations& in, int64_t first,
                   int64_t last, float* gate, float* up) {
  static thread_local Buffer gate_memory, up_memory;
  const int64_t rows = expert.gate.rows;
  if (in.tokens >= kTokenBlock) {
    float* gates = product_aside(kernel, expert.gate, in, first, last, gate_memory);
    const float* ups = product_aside(kernel, expert.up, in, first, last, up_memory);
    kernel.silu_product(gates, ups, in.tokens * (last - first) * kTileRows);
    return put_rows(gates, in.tokens, first, last, rows, gate);
  }
  kernel.nested_matmul(expert.gate, in, gate, rows, first, last);
  kernel.nested_matmul(expert.up, in, up, rows, first, last);
  const int64_t from = first * kTileRows, count = std::min(last * kTileRows, rows) - from;
  for (int64_t t = 0; t < in.tokens; t++) kernel.silu_product(gate + t * rows + from, up + t * rows + from, count);
}

void Products::linear(const Kernel& kernel, const Matrix* const* matrices, int count, const float* x, int64_t tokens,
                      int64_t x_stride, int64_t cols, float* const* outs) {
  int64_t total = 0;
  const NestedMatrix* nested = nullptr;
  for (int i = 0; i < count; i++) {
    if (matrices[i]->raw == nullptr) nested = &matrices[i]->nested;
    total += matrices[i]->nested.tiles;
  }
  if (nested != nullptr) round(kernel, *nested, x, tokens, x_stride, cols);
  const Activations in = nested != nullptr ? inputs_.of(0, tokens) : Activations{};
  // A small matrix is worth the other threads too where it is raw: a router reads 16 bits for each weight.
  const int64_t grain = std::max<int64_t>(1, std::min(kTileGrain, total / 8));
  pool_.parallel_for(total, grain, [&](int64_t first, int64_t last) {
    int64_t begin = 0;
    for (int i = 0; i < count; begin += matrices[i++]->nested.tiles) {
      const Matrix& m = *matrices[i];
      const int64_t from = std::max(first - begin, int64_t(0)), to = std::min(last - begin, m.nested.tiles);
      if (from >= to) continue;
      if (m.raw == nullptr)
        product(kernel, m.nested, in, from, to, outs[i]);
      else
        kernel.raw_matmul(m.raw, m.type, cols, x, tokens, x_stride, outs[i], m.rows(), from * kTileRows,
                          std::min(to * kTileRows, m.rows()));
    }
  });
}

void Products::experts(const Kernel& kernel, const std::vector<ExpertMatrices>& experts,
                       const std::vector<int64_t>& counts, const int64_t* tokens_of, const float* x, int64_t tokens,
                       int64_t hidden, int64_t inner, float* out) {
  const int64_t num = int64_t(experts.size());
  std::vector<int64_t> starts(num + 1, 0);
  for (int64_t e = 0; e < num; e++) starts[e + 1] = starts[e] + counts[e];
  const int64_t rows = starts[num];
  const NestedMatrix &first_gate = experts[0].gate, &first_down = experts[0].down;

  // Inputs of each expert, side by side. A single token is the input of all.
  round(kernel, first_gate, x, tokens, hidden, hidden);
  const bool shared = tokens == 1;
  if (!shared) {
    gathered_.reserve(first_gate, rows);
    pool_.parallel_for(num, 1, [&](int64_t first, int64_t last) {
      for (int64_t e = first; e < last; e++)
        for (int64_t t = 0; t < counts[e]; t++)
          gathered_.copy(starts[e], counts[e], t, inputs_, tokens, tokens_of[starts[e] + t]);
    });
  }

  const int64_t gate_tiles = first_gate.tiles, down_tiles = first_down.tiles;
  const int64_t grain = kTileGrain;
  float* gate = gate_.get<float>(rows * inner);
  float* up = up_.get<float>(rows * inner);
  pool_.parallel_for(num * gate_tiles, grain, [&](int64_t first, int64_t last) {
    for (int64_t unit = first; unit < last;) {
      const int64_t e = unit / gate_tiles, tile = unit % gate_tiles;
      const int64_t end = std::min(tile + last - unit, gate_tiles);
      const Activations in = shared ? inputs_.of(0, 1) : gathered_.of(starts[e], counts[e]);
      gated_product(kernel, experts[e], in, tile, end, gate + starts[e] * inner, up + starts[e] * inner);
      unit += end - tile;
    }
  });

  hidden_.reserve(first_down, rows);
  pool_.parallel_for(num, shared ? num : 1, [&](int64_t first, int64_t last) {
    for (int64_t e = first; e < last; e++)
      for (int64_t t = 0; t < counts[e]; t++)
        hidden_.put(kernel, starts[e], counts[e], t, gate + (starts[e] + t) * inner, inner);
  });
  pool_.parallel_for(num * down_tiles, grain, [&](int64_t first, int64_t last) {
    for (int64_t unit = first; unit < last;) {
      const int64_t e = unit / down_tiles, tile = unit % down_tiles;
      const int64_t end = std::min(tile + last - unit, down_tiles);
      const Activations in = hidden_.of(starts[e], counts[e]);
      product(kernel, experts[e].down, in, tile, end, out + starts[e] * hidden);
      unit += end - tile;
    }
  });
}

void Products::scatter_experts(const Kernel& kernel, const std::vector<ExpertMatrices>& experts, const int64_t* rows,
                               const float* x, float* out) {
  const int64_t num = int64_t(experts.size()), inner = experts[0].gate.rows, hidden = experts[0].down.rows;
  float* parts = parts_.get<float>(num * hidden);
  this->experts(kernel, experts, std::vector<int64_t>(num, 1), nullptr, x, 1, hidden, inner, parts);
  for (int64_t e = 0; e < num; e++) std::copy_n(parts + e * hidden, hidden, out + rows[e] * hidden);
}

void Products::add_experts(const Kernel& kernel, const std::vector<ExpertMatrices>& experts, const float* weights,
                           const float* x, float* out) {
  const int64_t num = int64_t(experts.size()), inner = experts[0].gate.rows, hidden = experts[0].down.rows;
  float* parts = parts_.get<float>(num * hidden);
  this->experts(kernel, experts, std::vector<int64_t>(num, 1), nullptr, x, 1, hidden, inner, parts);
  std::vector<const float*> terms;
  for (int64_t e = 0; e < num; e++) terms.push_back(parts + e * hidden);
  add_weighted(terms.data(), weights, num, hidden, out);
}

}  // namespace moert
