// Counting of checks, and what is being tested, for the message of one that fails.
#pragma once

#include <cstdint>
#include <cstdio>
#include <string>

namespace moert {

inline int64_t checks = 0, failures = 0;
inline std::string where;

#define CHECK(condition) check(condition, #condition, __LINE__)
inline void check(bool ok, const char* what, int line) {
  checks++;
  if (ok || ++failures > 20) return;
  std::printf("line %d: %s is false (%s)\n", line, what, where.c_str());
}

}  // namespace moert
