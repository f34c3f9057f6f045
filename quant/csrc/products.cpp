#include "products.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

namespace moert {

namespace {
constexpr int64_t kTokenBlock = 16;  // AMX reads whole blocks of tokens: so much is read beyond the last
constexpr int64_t kTileGrain = 8;  // tiles that a thread takes at a time: the first of them is not asked for ahead
}  // namespace

Buffer::~Buffer() { std::free(data_); }

void* Buffer::grow(size_t bytes) {
  if (bytes > size_) {
    std::free(data_);
    size_ = (bytes + bytes / 4 + 63) / 64 * 64;
    data_ = std::aligned_alloc(64, size_);
    if (data_ == nullptr) {
      size_ = 0;
      throw std::bad_alloc();
    }
  }
  return data_;
}

void Products::quantise(const Kernel& kernel, const NestedMatrix& like, const float* x, int64_t tokens,
                        int64_t x_stride, int64_t cols, Inputs& to) {
  const int64_t groups = like.groups, width = groups * like.group_size;
  int8_t* q = to.q.get<int8_t>((tokens + kTokenBlock) * width);
  float* scales = to.scales.get<float>(tokens * groups);
  int32_t* sums = to.sums.get<int32_t>(tokens * groups);
  pool_.parallel_for(tokens, std::max<int64_t>(1, 8192 / width), [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; t++)
      kernel.quantise(x + t * x_stride, cols, groups, like.group_size, q + t * width, scales + t * groups,
                      sums + t * groups);
  });
  to.view = Activations{q, scales, sums, tokens, groups};
}

void Products::linear(const Kernel& kernel, const Matrix* const* matrices, int count, const float* x, int64_t tokens,
                      int64_t x_stride, int64_t cols, float* const* outs) {
  int64_t total = 0;
  const NestedMatrix* nested = nullptr;
  for (int i = 0; i < count; i++) {
    if (matrices[i]->raw == nullptr) nested = &matrices[i]->nested;
    total += matrices[i]->nested.tiles;
  }
  if (nested != nullptr) quantise(kernel, *nested, x, tokens, x_stride, cols, inputs_);
  pool_.parallel_for(total, kTileGrain, [&](int64_t first, int64_t last) {
    int64_t begin = 0;
    for (int i = 0; i < count; begin += matrices[i++]->nested.tiles) {
      const Matrix& m = *matrices[i];
      const int64_t from = std::max(first - begin, int64_t(0)), to = std::min(last - begin, m.nested.tiles);
      if (from >= to) continue;
      if (m.raw == nullptr)
        kernel.nested_matmul(m.nested, inputs_.view, outs[i], m.rows(), from, to);
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
  const NestedMatrix& first_gate = experts[0].gate;
  const int64_t groups = first_gate.groups, width = groups * first_gate.group_size;

  // Inputs of each expert, side by side. A single token is the input of all.
  quantise(kernel, first_gate, x, tokens, hidden, hidden, inputs_);
  const bool shared = tokens == 1;
  if (!shared) {
    int8_t* q = gathered_.q.get<int8_t>((rows + kTokenBlock) * width);
    float* scales = gathered_.scales.get<float>(rows * groups);
    int32_t* sums = gathered_.sums.get<int32_t>(rows * groups);
    pool_.parallel_for(rows, 64, [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; r++) {
        const int64_t t = tokens_of[r];
        std::memcpy(q + r * width, inputs_.view.q + t * width, width);
        std::memcpy(scales + r * groups, inputs_.view.scales + t * groups, groups * sizeof(float));
        std::memcpy(sums + r * groups, inputs_.view.sums + t * groups, groups * sizeof(int32_t));
      }
    });
    gathered_.view = Activations{q, scales, sums, rows, groups};
  }

  const int64_t gate_tiles = first_gate.tiles, down_tiles = experts[0].down.tiles;
  const int64_t grain = tokens == 1 ? kTileGrain : 1;
  float* gate = gate_.get<float>(rows * inner);
  float* up = up_.get<float>(rows * inner);
  pool_.parallel_for(num * gate_tiles, grain, [&](int64_t first, int64_t last) {
    for (int64_t unit = first; unit < last;) {
      const int64_t e = unit / gate_tiles, tile = unit % gate_tiles;
      const int64_t end = std::min(tile + last - unit, gate_tiles);
      Activations in = shared ? inputs_.view : gathered_.view;
      if (!shared)
        in = Activations{in.q + starts[e] * width, in.scales + starts[e] * groups, in.sums + starts[e] * groups,
                         counts[e], groups};
      kernel.nested_matmul(experts[e].gate, in, gate + starts[e] * inner, inner, tile, end);
      kernel.nested_matmul(experts[e].up, in, up + starts[e] * inner, inner, tile, end);
      const int64_t from = tile * kTileRows, count = std::min(end * kTileRows, inner) - from;
      for (int64_t r = starts[e]; r < starts[e + 1]; r++)
        kernel.silu_product(gate + r * inner + from, up + r * inner + from, count);
      unit += end - tile;
    }
  });

  quantise(kernel, experts[0].down, gate, rows, inner, inner, hidden_);
  const int64_t inner_groups = experts[0].down.groups, inner_width = inner_groups * experts[0].down.group_size;
  pool_.parallel_for(num * down_tiles, grain, [&](int64_t first, int64_t last) {
    for (int64_t unit = first; unit < last;) {
      const int64_t e = unit / down_tiles, tile = unit % down_tiles;
      const int64_t end = std::min(tile + last - unit, down_tiles);
      const Activations& all = hidden_.view;
      const Activations in{all.q + starts[e] * inner_width, all.scales + starts[e] * inner_groups,
                           all.sums + starts[e] * inner_groups, counts[e], inner_groups};
      kernel.nested_matmul(experts[e].down, in, out + starts[e] * hidden, hidden, tile, end);
      unit += end - tile;
    }
  });
}

}  // namespace moert
