// A nested-bit matrix of random codes and scales, packed by the words of quant/format.py and by no other code.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <random>
#include <utility>
#include <vector>

#include "kernel.h"

namespace moert {

// N rows, K columns, G group size
inline std::mt19937 generator(1);

inline float normal() { return std::normal_distribution<float>()(generator); }
inline int64_t blocks(int64_t n, int64_t of) { return (n + of - 1) / of; }

struct Free {
  void operator()(void* p) const { std::free(p); }
};
template <class V>
using Memory = std::unique_ptr<V[], Free>;

// On 64 bytes and no longer than needed, so that AddressSanitizer sees a read beyond the end.
template <class V>
Memory<V> memory(int64_t count) {
  void* p = nullptr;
  if (posix_memalign(&p, 64, count * sizeof(V)) != 0) throw std::bad_alloc();
  std::memset(p, 0, count * sizeof(V));
  return Memory<V>(static_cast<V*>(p));
}

inline double half_value(uint16_t h) {
  const int exponent = h >> 10 & 31, fraction = h & 1023;
  const double size = exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
  return h >> 15 ? -size : size;
}

// kind 0: anything; 1: the least and the largest code only; 2: subnormal and zero scales.
struct Packed {
  int64_t rows, cols, tiles, groups;
  int group_size;
  std::vector<int> widths;
  std::vector<uint8_t> codes;                // [N][K], of the largest width
  std::vector<std::vector<uint16_t>> scales;  // of each width: [N][groups]
  std::vector<Memory<uint8_t>> slices;

  Packed(int64_t n, int64_t k, int g, std::vector<int> list, int kind = 0)
      : rows(n), cols(k), tiles(blocks(n, 16)), groups(blocks(k, g)), group_size(g), widths(std::move(list)) {
    const int top = widths.back();
    for (int64_t i = 0; i < rows * cols; i++) {
      const int code = int(generator() % (1u << top));
      codes.push_back(uint8_t(kind == 1 ? (i % 3 ? (1 << top) - 1 : 0) : code));
    }
    for (size_t s = 0; s < widths.size(); s++) {
      scales.emplace_back();
      for (int64_t i = 0; i < rows * groups; i++)
        scales.back().push_back(uint16_t(kind == 2 ? generator() % 1024 * (i % 3) : 0x2000 + generator() % 0x2000));
      pack(int(s));
    }
  }

  std::vector<int> planes(int s) const {
    const int bits = widths[s] - (s ? widths[s - 1] : 0);
    std::vector<int> list;
    for (int p : {8, 4, 2, 1})
      if (bits & p) list.push_back(p);
    return list;
  }
  int64_t group_bytes(int s) const { return 16 * group_size * (widths[s] - (s ? widths[s - 1] : 0)) / 8; }

  void pack(int s) {
    const int64_t codes_bytes = tiles * groups * group_bytes(s);
    slices.push_back(memory<uint8_t>(codes_bytes + blocks(tiles * groups * 32, 64) * 64));
    uint8_t* slice = slices.back().get();
    for (int64_t n = 0; n < rows; n++)
      for (int64_t k = 0; k < cols; k++) {
        const int64_t cell = n / 16 * groups + k / group_size;
        uint8_t* plane = slice + cell * group_bytes(s);
        int below = widths.back() - (s ? widths[s - 1] : 0);  // bits of the code that are not placed yet
        for (int p : planes(s)) {
          below -= p;
          const int cover = 32 / p, inside = int(k % group_size), column = inside % cover;
          const int value = codes[n * cols + k] >> below & ((1 << p) - 1);
          plane[64 * (inside / cover) + 4 * (n % 16) + column % 4] |= uint8_t(value << p * (column / 4));
          plane += 16 * group_size * p / 8;
        }
        if (k % group_size == 0) {
          const uint16_t half = scales[s][n * groups + k / group_size];
          uint8_t* place = slice + codes_bytes + (cell * 16 + n % 16) * 2;
          place[0] = uint8_t(half), place[1] = uint8_t(half >> 8);
        }
      }
  }

  // As the compiled module describes the matrix at widths[s] to a kernel.
  NestedMatrix view(int s) const {
    NestedMatrix m{};
    int shift = widths[s];
    for (int i = 0; i <= s; i++) {
      const uint8_t* at = slices[i].get();
      for (int p : planes(i)) {
        m.planes[m.num_planes++] = Plane{at, size_t(group_bytes(i)), p, shift -= p};
        at += 16 * group_size * p / 8;
      }
    }
    m.scales = slices[s].get() + tiles * groups * group_bytes(s);
    m.tiles = tiles, m.groups = groups, m.scale_groups = int(groups), m.rows = rows, m.group_size = group_size;
    m.levels = (1 << widths[s]) - 1, m.midpoint = float(m.levels) / 2;
    return m;
  }

  std::vector<double> weights(int s) const {
    std::vector<double> w;
    for (int64_t n = 0; n < rows; n++)
      for (int64_t k = 0; k < cols; k++) {
        const int code = codes[n * cols + k] >> (widths.back() - widths[s]);
        w.push_back((code - (std::pow(2.0, widths[s]) - 1) / 2) * half_value(scales[s][n * groups + k / group_size]));
      }
    return w;
  }
};

}  // namespace moert
