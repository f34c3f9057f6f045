// What moert.quant._native lends to other compiled modules of this package: the threads, the products and the kernel in
// use, of which a process has one. A table of C functions, handed over in a capsule when such a module is imported, so
// that neither links against the other.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>

#include "products.h"

namespace moert {

constexpr const char* kComputeCapsule = "moert.quant._native.compute";

struct ComputeTable {
  uint32_t version;           // of this table; changes with anything in it
  uint32_t matrix_bytes;      // sizeof(Matrix): modules of two builds do not meet
  const Kernel* (*kernel)();  // in use; to be asked for once in a step
  std::mutex* products_lock;  // held from the first to the last call that a step makes
  std::atomic<int64_t>* kernel_nanoseconds;
  // As Products::linear.
  void (*linear)(const Kernel& kernel, const Matrix* const* matrices, int count, const float* x, int64_t tokens,
                 int64_t x_stride, int64_t cols, float* const* outs);
  void (*parallel_for)(int64_t count, int64_t grain, void (*body)(const void*, int64_t, int64_t), const void* data);

  static constexpr uint32_t kVersion = 1;
  bool fits() const { return version == kVersion && matrix_bytes == sizeof(Matrix); }

  // As ThreadPool::parallel_for.
  template <class Body>
  void split(int64_t count, int64_t grain, const Body& body) const {
    parallel_for(
        count, grain, [](const void* data, int64_t first, int64_t last) { (*static_cast<const Body*>(data))(first, last); },
        &body);
  }
};

}  // namespace moert
