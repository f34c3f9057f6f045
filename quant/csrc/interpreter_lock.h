// Giving up the interpreter's lock while computing or waiting.
#pragma once

#include <Python.h>

#include <chrono>
#include <thread>

namespace moert {

// Without the interpreter's lock from here to the end of the block.
//
// Once the interpreter shuts down, CPython before 3.14 ends a daemon thread that asks for the lock by unwinding its
// stack, which ends the whole program at the first destructor on the way. Such a thread stays here instead, as 3.14
// has it: the program ends without it.
class WithoutInterpreter {
 public:
  WithoutInterpreter() : state_(PyEval_SaveThread()) {}
  WithoutInterpreter(const WithoutInterpreter&) = delete;
  WithoutInterpreter& operator=(const WithoutInterpreter&) = delete;
  ~WithoutInterpreter() {
    try {
      PyEval_RestoreThread(state_);
    } catch (...) {
      while (true) std::this_thread::sleep_for(std::chrono::hours(1));
    }
  }

 private:
  PyThreadState* state_;
};

}  // namespace moert
