#include "thread_pool.h"

#include <algorithm>

namespace moert {

namespace {
constexpr int kSpins = 10000;  // 0.1 to 0.4 ms: longer than Python takes between two calls of one decode step

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}
}  // namespace

void ThreadPool::resize(int threads) {
  std::lock_guard<std::mutex> caller(callers_);
  stop();
  stopping_ = false;
  size_ = threads;
  for (int i = 1; i < threads; i++) workers_.emplace_back(&ThreadPool::work, this, generation_.load());
}

void ThreadPool::stop() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
    generation_++;
  }
  wake_.notify_all();
  for (auto& worker : workers_) worker.join();
  workers_.clear();
}

void ThreadPool::run_parts() {
  int64_t first = next_.load();
  while (first < count_) {
    // Half of an equal share of what is left: long parts at first, short ones at the end, where threads wait.
    const int64_t left = count_ - first, share = left / (2 * size_) / grain_ * grain_;
    const int64_t part = std::min(left, std::max(grain_, share));
    if (!next_.compare_exchange_weak(first, first + part)) continue;
    (*body_)(first, first + part);
    first = next_.load();
  }
}

void ThreadPool::work(uint64_t seen) {
  while (true) {
    for (int spin = 0; spin < kSpins && generation_.load(std::memory_order_acquire) == seen; spin++) pause();
    {
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [&] { return generation_.load() != seen; });
      seen = generation_.load();
      if (stopping_) return;
    }
    run_parts();
    if (pending_.fetch_sub(1) == 1) {
      std::lock_guard<std::mutex> lock(mutex_);
      done_.notify_one();
    }
  }
}

void ThreadPool::parallel_for(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  if (size_ == 1 || count <= grain) {
    if (count > 0) body(0, count);
    return;
  }
  std::lock_guard<std::mutex> caller(callers_);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    count_ = count;
    grain_ = grain;
    next_ = 0;
    body_ = &body;
    pending_ = int(workers_.size());
    generation_++;
  }
  wake_.notify_all();
  run_parts();
  for (int spin = 0; spin < kSpins && pending_.load(std::memory_order_acquire) > 0; spin++) pause();
  std::unique_lock<std::mutex> lock(mutex_);
  done_.wait(lock, [&] { return pending_.load() == 0; });
}

}  // namespace moert
