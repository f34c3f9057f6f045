// The Python module moert.runtime._reader, for moert/runtime/transfer.py.
#include <nanobind/nanobind.h>

#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <tuple>

#include "crc32.h"
#include "interpreter_lock.h"
#include "reader.h"

namespace nb = nanobind;

NB_MODULE(_reader, m) {
  using namespace moert;
  m.doc() = "Threads that read slices.";
  nb::set_leak_warnings(false);  // what lives until the interpreter ends is no leak
  nb::class_<Job>(m, "Job", "A read on its way; it does not own its buffers.")
      .def_ro("outcome", &Job::outcome)
      .def_ro("damaged", &Job::damaged)
      .def_ro("begun", &Job::begun)
      .def_ro("ended", &Job::ended);
  nb::class_<Reader>(m, "Reader", "Threads that read chunks, those first that somebody waits for.")
      // (address, threads, bytes of a chunk, who owns the memory)
      .def(
          "__init__",
          [](Reader* self, uintptr_t memory, int threads, int64_t chunk_bytes, nb::handle) {
            new (self) Reader(memory, threads, chunk_bytes);
          },
          nb::keep_alive<1, 5>())
      // parts: (where in memory, bytes, CRC-32 or a negative number)
      .def("submit",
           [](Reader& self, int fd, bool cached, int64_t offset,
              const std::vector<std::tuple<int64_t, int64_t, int64_t>>& parts, bool ahead) {
             auto job = std::make_shared<Job>();
             job->fd = fd;
             job->cached = cached;
             job->offset = offset;
             for (auto [at, size, checksum] : parts) job->parts.push_back({self.memory() + at, size, checksum});
             self.submit(job, ahead);
             return job;
           })
      .def("promote", [](Reader& self, const Job& job) { self.promote(&job); })
      .def("cancel", [](Reader& self, Job& job) { return self.cancel(&job); })
      .def("done", [](Reader& self, const Job& job) { return self.done(&job); })
      .def("idle", &Reader::idle)
      // Looks for Ctrl-C now and then.
      .def("wait",
           [](Reader& self, const Job& job) {
             while (true) {
               {
                 const WithoutInterpreter without;
                 if (self.wait(&job, 0.05)) return;
               }
               if (PyErr_CheckSignals() != 0) throw nb::python_error();
             }
           })
      .def("drain", &Reader::drain, nb::call_guard<WithoutInterpreter>())
      .def("close", &Reader::close, nb::call_guard<WithoutInterpreter>());
  m.def("crc32", [](uintptr_t data, size_t size) { return crc32(reinterpret_cast<const uint8_t*>(data), size); });
}
