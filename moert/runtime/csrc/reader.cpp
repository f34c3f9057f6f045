#include "reader.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <stdexcept>

#include "crc32.h"

namespace moert {
namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

}  // namespace

Reader::Reader(uintptr_t memory, int threads, int64_t chunk_bytes)
    : process_(getpid()), memory_(reinterpret_cast<uint8_t*>(memory)), chunk_bytes_(chunk_bytes) {
  for (int i = 0; i < threads; i++) threads_.emplace_back([this] { work(); });
}

bool Reader::forked() const { return getpid() != process_; }

void Reader::check_process() const {
  if (forked()) throw std::runtime_error("the reader's threads are in the process that this one was forked from");
}

Reader::~Reader() {
  if (forked()) {
    for (std::thread& thread : threads_) thread.detach();
    (void)queued_.release();
    (void)ended_.release();
    return;
  }
  {
    std::lock_guard<std::mutex> hold(lock_);
    demanded_.clear();
    ahead_.clear();
  }
  close();
}

void Reader::submit(const std::shared_ptr<Job>& job, bool ahead) {
  check_process();
  for (const Part& part : job->parts) job->total += part.size;
  {
    std::lock_guard<std::mutex> hold(lock_);
    if (closed_) throw std::runtime_error("the reader is closed");
    std::deque<Chunk>& queue = ahead ? ahead_ : demanded_;
    for (int64_t first = 0; first < job->total; first += chunk_bytes_) {
      queue.push_back({job, first, std::min(first + chunk_bytes_, job->total)});
      job->left++;
    }
  }
  queued_->notify_all();
}

void Reader::promote(const Job* job) {
  if (forked()) return;
  std::lock_guard<std::mutex> hold(lock_);
  const auto middle = std::stable_partition(ahead_.begin(), ahead_.end(), [&](const Chunk& c) { return c.job.get() != job; });
  demanded_.insert(demanded_.end(), middle, ahead_.end());
  ahead_.erase(middle, ahead_.end());
}

bool Reader::cancel(Job* job) {
  check_process();
  std::lock_guard<std::mutex> hold(lock_);
  if (job->started) return false;
  for (std::deque<Chunk>* queue : {&demanded_, &ahead_})
    queue->erase(std::remove_if(queue->begin(), queue->end(), [&](const Chunk& c) { return c.job.get() == job; }),
                 queue->end());
  job->done = true;
  ended_->notify_all();
  return true;
}

bool Reader::wait(const Job* job, double seconds) {
  check_process();
  std::unique_lock<std::mutex> hold(lock_);
  return ended_->wait_for(hold, std::chrono::duration<double>(seconds), [&] { return job->done; });
}

bool Reader::done(const Job* job) {
  check_process();
  std::lock_guard<std::mutex> hold(lock_);
  return job->done;
}

bool Reader::idle() {
  check_process();
  std::lock_guard<std::mutex> hold(lock_);
  return busy_ == 0 && demanded_.empty() && ahead_.empty();
}

void Reader::drain() {
  if (forked()) return;
  std::unique_lock<std::mutex> hold(lock_);
  for (std::deque<Chunk>* queue : {&demanded_, &ahead_}) {
    const auto fresh = [](const Chunk& c) { return !c.job->started; };
    for (Chunk& chunk : *queue)
      if (fresh(chunk)) chunk.job->done = true;
    queue->erase(std::remove_if(queue->begin(), queue->end(), fresh), queue->end());
  }
  ended_->wait(hold, [&] { return busy_ == 0 && demanded_.empty() && ahead_.empty(); });
}

void Reader::close() {
  if (forked()) return;
  {
    std::lock_guard<std::mutex> hold(lock_);
    closed_ = true;
  }
  queued_->notify_all();
  std::lock_guard<std::mutex> closer(closers_);  // a second caller waits for the first
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
}

void Reader::work() {
  std::unique_lock<std::mutex> hold(lock_);
  while (true) {
    queued_->wait(hold, [&] { return closed_ || !demanded_.empty() || !ahead_.empty(); });
    std::deque<Chunk>& queue = demanded_.empty() ? ahead_ : demanded_;
    if (queue.empty()) return;
    const Chunk chunk = queue.front();
    queue.pop_front();
    Job& job = *chunk.job;
    busy_++;
    if (!job.started) {
      job.started = true;
      job.begun = now();
    }
    const bool useful = job.outcome == kFine;  // the rest of what has failed is of no use
    hold.unlock();
    const int outcome = useful ? fill(job, chunk.first, chunk.last) : kFine;
    hold.lock();
    if (job.outcome == kFine) job.outcome = outcome;
    if (--job.left == 0) {
      hold.unlock();
      finish(job);
      hold.lock();
      job.done = true;
    }
    busy_--;
    ended_->notify_all();
  }
}

void Reader::finish(Job& job) {
  for (size_t i = 0; i < job.parts.size() && job.outcome == kFine; i++) {
    const Part& part = job.parts[i];
    if (part.checksum >= 0 && crc32(part.data, size_t(part.size)) != uint32_t(part.checksum)) {
      job.outcome = kDamaged;
      job.damaged = int(i);
    }
  }
  job.ended = now();
}

int Reader::fill(const Job& job, int64_t first, int64_t last) {
  while (first < last) {
    std::vector<iovec> pieces;
    int64_t begin = 0;
    for (const Part& part : job.parts) {
      const int64_t from = std::max(first, begin), to = std::min(last, begin + part.size);
      if (from < to && pieces.size() < IOV_MAX) pieces.push_back({part.data + (from - begin), size_t(to - from)});
      begin += part.size;
    }
    const ssize_t got = preadv(job.fd, pieces.data(), int(pieces.size()), job.offset + first);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return errno;
    if (got == 0) return kShort;
#if defined(POSIX_FADV_DONTNEED)
    if (job.cached) posix_fadvise(job.fd, job.offset + first, got, POSIX_FADV_DONTNEED);
#endif
    first += got;
  }
  return kFine;
}

}  // namespace moert
