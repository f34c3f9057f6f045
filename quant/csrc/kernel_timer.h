// How long the kernels have computed.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

namespace moert {

// Adds the time from here to the end of the block to a number of nanoseconds.
class KernelTimer {
 public:
  explicit KernelTimer(std::atomic<int64_t>& total) : total_(total) {}
  KernelTimer(const KernelTimer&) = delete;
  KernelTimer& operator=(const KernelTimer&) = delete;
  ~KernelTimer() {
    using std::chrono::nanoseconds, std::chrono::duration_cast;
    const nanoseconds taken = duration_cast<nanoseconds>(std::chrono::steady_clock::now() - begun_);
    total_.fetch_add(taken.count(), std::memory_order_relaxed);
  }

 private:
  std::atomic<int64_t>& total_;
  const std::chrono::steady_clock::time_point begun_ = std::chrono::steady_clock::now();
};

}  // namespace moert
