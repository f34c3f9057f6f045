// A pool of threads that split a range. Workers spin briefly, then sleep: a busy third thread would slow the others.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace moert {

class ThreadPool {
 public:
  explicit ThreadPool(int threads) { resize(threads); }
  ~ThreadPool() { stop(); }
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return size_; }
  void resize(int threads);
  // Calls body(first, last) on parts of [0, count) of at least `grain`, and returns when all have ended. Threads take the
  // next part when they are done with one, so that a thread that was held up does not hold up the rest.
  // Calls from several threads are taken one after the other; a pool of one is no pool: each computes by itself.
  void parallel_for(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& body);

 private:
  void work(uint64_t seen);
  void run_parts();
  void stop();

  std::vector<std::thread> workers_;
  std::mutex callers_, mutex_;
  std::condition_variable wake_, done_;
  std::atomic<uint64_t> generation_{0};
  std::atomic<int> pending_{0}, size_{1};
  bool stopping_ = false;
  std::atomic<int64_t> next_{0};
  int64_t count_ = 0, grain_ = 1;
  const std::function<void(int64_t, int64_t)>* body_ = nullptr;
};

}  // namespace moert
