// Memory that grows.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>

namespace moert {

// 64-byte aligned memory that grows and never shrinks; what was in it is lost when it grows.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }

  template <class V>
  V* get(size_t count) {
    return static_cast<V*>(grow(count * sizeof(V)));
  }

 private:
  void* grow(size_t bytes) {
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

  void* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace moert
