// How long the kernels have computed.
#pragma once

#include <chrono>

namespace moert {

// Adds the time from here to the end of the block to what the kernels have taken so far.
class Busy {
 public:
  ~Busy() { total += std::chrono::steady_clock::now() - begun_; }
  inline static std::chrono::steady_clock::duration total{};  // changed under the interpreter's lock

 private:
  std::chrono::steady_clock::time_point begun_ = std::chrono::steady_clock::now();
};

}  // namespace moert
