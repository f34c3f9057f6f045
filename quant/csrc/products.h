// Products and expert networks over several matrices, split over the threads of a pool.
//
// Everything is float32 at the outside; inputs are made int8 once per call. Buffers are kept between calls, so a decode
// step allocates nothing once they have grown. Calls must come from one thread at a time.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <vector>

#include "buffer.h"
#include "kernel.h"
#include "thread_pool.h"

namespace moert {

// Nested-bit weights, or raw ones, row-major.
struct Matrix {
  NestedMatrix nested{};
  const void* raw = nullptr;
  RawType type = RawType::kFloat;
  int64_t rows() const { return nested.rows; }
};

struct ExpertMatrices {
  NestedMatrix gate, up, down;
};

// Inputs of products: blocks of tokens one after the other, each as Activations has it.
class Inputs {
 public:
  void reserve(const NestedMatrix& like, int64_t tokens);  // for products with matrices like this one
  // The block of `tokens` tokens behind the first `first`.
  Activations of(int64_t first, int64_t tokens) const;
  // Rounds row [cols] to int8 and makes it token `token` of that block; columns beyond `cols` become 0.
  void put(const Kernel& kernel, int64_t first, int64_t tokens, int64_t token, const float* row, int64_t cols);
  // The same with a token of the first block of other inputs.
  void copy(int64_t first, int64_t tokens, int64_t token, const Inputs& from, int64_t from_tokens, int64_t from_token);

 private:
  Buffer q_buffer_, scale_buffer_, sum_buffer_;
  int8_t* q_ = nullptr;
  float* scales_ = nullptr;
  int32_t* sums_ = nullptr;
  int64_t groups_ = 0, size_ = 0;
  bool rotated_ = false;
};

// Throws std::invalid_argument where nested matrices differ in how they want their inputs rounded.
inline void check_alike(const std::vector<const Matrix*>& matrices) {
  const Matrix* first = nullptr;
  for (const Matrix* m : matrices) {
    if (m->raw != nullptr) continue;
    if (first != nullptr &&
        (m->nested.groups != first->nested.groups || m->nested.group_size != first->nested.group_size ||
         !m->nested.tables != !first->nested.tables))
      throw std::invalid_argument("the matrices differ in their inputs");
    first = m;
  }
}

class Products {
 public:
  explicit Products(ThreadPool& pool) : pool_(pool) {}

  // outs[i] [tokens][rows of matrix i] = x [tokens][x_stride] times each of `count` matrices; all have `cols` columns,
  // those that are nested the same group size.
  void linear(const Kernel& kernel, const Matrix* const* matrices, int count, const float* x, int64_t tokens,
              int64_t x_stride, int64_t cols, float* const* outs);

  // out: for expert e, counts[e] rows [hidden], one expert after the other: down(silu(gate(x)) * up(x)) of the tokens
  // tokens_of[...] of x [tokens][hidden], in the same order.
  void experts(const Kernel& kernel, const std::vector<ExpertMatrices>& experts, const std::vector<int64_t>& counts,
               const int64_t* tokens_of, const float* x, int64_t tokens, int64_t hidden, int64_t inner, float* out);

  // The same for a single token x [hidden]: expert e goes to row rows[e] of out [...][hidden].
  void scatter_experts(const Kernel& kernel, const std::vector<ExpertMatrices>& experts, const int64_t* rows,
                       const float* x, float* out);

  // out [hidden] += sum over e of weights[e] * expert e of a single token x [hidden], in their order.
  void add_experts(const Kernel& kernel, const std::vector<ExpertMatrices>& experts, const float* weights,
                   const float* x, float* out);

 private:
  void round(const Kernel& kernel, const NestedMatrix& like, const float* x, int64_t tokens, int64_t x_stride,
             int64_t cols);

  ThreadPool& pool_;
  Inputs inputs_, gathered_, hidden_;
  Buffer gate_, up_, parts_;
};

}  // namespace moert
