// Threads that read slices from disk straight into memory, without the interpreter's lock.
//
// A read is cut into chunks. What somebody waits for goes first, so that it waits for one chunk of each thread at most.
// Threads block while there is nothing to do. The reader owns neither files nor buffers: both must stay until the read
// has ended.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace moert {

struct Part {
  uint8_t* data;
  int64_t size;
  int64_t checksum;  // CRC-32, or negative: not to be checked
};

// What became of a read: an errno above 0, or one of these.
enum Outcome : int { kFine = 0, kShort = -1, kDamaged = -2 };

struct Job {
  int fd;
  bool cached;  // pages went through the page cache and are given back
  int64_t offset;
  std::vector<Part> parts;
  int64_t total = 0, left = 0;  // bytes; chunks that are not read yet
  bool started = false, done = false;
  int outcome = kFine;
  int damaged = -1;              // which part
  double begun = 0, ended = 0;  // seconds of the steady clock
};

class Reader {
 public:
  Reader(uintptr_t memory, int threads, int64_t chunk_bytes);
  ~Reader();

  uint8_t* memory() const { return memory_; }
  void submit(const std::shared_ptr<Job>& job, bool ahead);
  void hurry(const Job* job);   // somebody waits for it now
  bool cancel(Job* job);        // false where the disk was asked for some of it
  bool wait(const Job* job, double seconds);  // whether it is done by then
  bool done(const Job* job);
  bool idle();
  void drain();  // drops what has not begun, and blocks until nothing writes any more
  void close();  // ends the threads after what is queued

 private:
  struct Chunk {
    std::shared_ptr<Job> job;
    int64_t first, last;
  };
  void work();
  void finish(Job& job);
  static int fill(const Job& job, int64_t first, int64_t last);

  uint8_t* const memory_;
  const int64_t chunk_bytes_;
  std::mutex lock_;
  std::condition_variable queued_, ended_;
  std::deque<Chunk> demanded_, ahead_;
  int busy_ = 0;
  bool closed_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace moert
