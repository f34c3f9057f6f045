// Threads that read slices from disk straight into memory, without the interpreter's lock.
//
// A read is cut into chunks. What somebody waits for goes first, so that it waits for one chunk of each thread at most.
// Threads block while there is nothing to do. The reader owns neither files nor buffers: both must stay until the read
// has ended. In a child after fork there are no threads: submit and wait throw std::runtime_error there.
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
  ~Reader();  // drops what is queued; the threads need no interpreter to end

  uint8_t* memory() const { return memory_; }
  void submit(const std::shared_ptr<Job>& job, bool ahead);  // throws std::runtime_error once it is closed
  void promote(const Job* job);  // somebody waits for it now
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
  bool forked() const;  // whether this is a child of the process that has the threads: nothing may be waited for
  void check_process() const;

  const int process_;
  uint8_t* const memory_;
  const int64_t chunk_bytes_;
  std::mutex lock_, closers_;
  // Apart, because one that threads of the parent wait for cannot be destroyed in a child.
  std::unique_ptr<std::condition_variable> queued_{new std::condition_variable}, ended_{new std::condition_variable};
  std::deque<Chunk> demanded_, ahead_;
  int busy_ = 0;
  bool closed_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace moert
