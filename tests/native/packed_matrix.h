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

// kind 0: anything; 1: the least and the largest code, or level, only; 2: subnormal and zero scales.
// Of the trellis code all is in the space of rotated inputs, with the padded columns; its tables are random.
struct Packed {
  int64_t rows, cols, tiles, groups;
  int group_size;
  std::vector<int> widths;
  bool trellis;
  int64_t columns, scale_groups;             // of codes, and of scales
  std::vector<uint8_t> codes;                // [N][columns], of the largest width
  std::vector<std::vector<uint16_t>> scales;  // of each width: [N][scale_groups]
  std::vector<std::vector<int>> levels;       // of each plane
  std::vector<uint8_t> tables;                // the same for kernels
  std::vector<Memory<uint8_t>> slices;

  Packed(int64_t n, int64_t k, int g, std::vector<int> list, int kind = 0, bool trellis = false)
      : rows(n), cols(k), tiles(blocks(n, 16)), groups(blocks(k, g)), group_size(g), widths(std::move(list)),
        trellis(trellis), columns(trellis ? groups * g : k), scale_groups(trellis ? 1 : groups) {
    const int top = widths.back();
    if (trellis) make_tables(kind);
    for (int64_t i = 0; i < rows * columns; i++) {
      const int code = int(generator() % (1u << top));
      codes.push_back(uint8_t(kind == 1 ? (i % 3 ? (1 << top) - 1 : 0) : code));
    }
    for (size_t s = 0; s < widths.size(); s++) {
      scales.emplace_back();
      for (int64_t i = 0; i < rows * scale_groups; i++)
        scales.back().push_back(uint16_t(kind == 2 ? generator() % 1024 * (i % 3) : 0x2000 + generator() % 0x2000));
      pack(int(s));
    }
  }

  std::vector<int> planes(int s) const {
    const int bits = widths[s] - (s ? widths[s - 1] : 0);
    std::vector<int> list(trellis ? bits / 2 : 0, 2);
    for (int p : {8, 4, 2, 1})
      if (bits & p && !(trellis && p > 1)) list.push_back(p);
    return list;
  }
  int64_t group_bytes(int s) const { return 16 * group_size * (widths[s] - (s ? widths[s - 1] : 0)) / 8; }

  // Sums of levels are from -127 to 127, and get there.
  void make_tables(int kind) {
    int num_planes = 0;
    for (size_t s = 0; s < widths.size(); s++) num_planes += int(planes(int(s)).size());
    for (size_t s = 0; s < widths.size(); s++)
      for (int bits : planes(int(s))) {
        const int most = levels.empty() ? 127 - 9 * (num_planes - 1) : 9;
        std::vector<int> list;
        for (int i = 0; i < (bits == 2 ? 64 : 16); i++)
          list.push_back(kind == 1 ? (generator() % 2 ? most : -most) : int(generator() % (2 * most + 1)) - most);
        for (int i = 0; i < 64; i++)
          tables.push_back(uint8_t(list[i % list.size()] + (levels.empty() ? kTrellisBias : 0)));
        levels.push_back(list);
      }
  }

  // The code of a weight at widths[s], or its level.
  int code_at(int64_t n, int64_t k, int s) const {
    if (!trellis) return codes[n * columns + k] >> (widths.back() - widths[s]);
    int total = 0, shift = widths.back();
    size_t plane = 0;
    for (int i = 0; i <= s; i++)
      for (int bits : planes(i)) {
        shift -= bits;
        int window = 0;  // the newest code on top
        for (int64_t back = bits == 2 ? 2 : 3; back >= 0; back--) {
          // In the ring of a row: columns 0, 4, 8, ..., then 1, 5, 9, ...
          const int64_t quarter = columns / 4, place = (k % 4 * quarter + k / 4 - back + columns) % columns;
          const int64_t before = place % quarter * 4 + place / quarter;
          const int code = codes[n * columns + before] >> shift & ((1 << bits) - 1);
          window = window >> bits | code << (bits == 2 ? 4 : 3);
        }
        total += levels[plane++][window];
      }
    return total;
  }

  void pack(int s) {
    const int64_t codes_bytes = tiles * groups * group_bytes(s);
    slices.push_back(memory<uint8_t>(codes_bytes + blocks(tiles * scale_groups * 32, 64) * 64));
    uint8_t* slice = slices.back().get();
    for (int64_t n = 0; n < rows; n++)
      for (int64_t k = 0; k < columns; k++) {
        const int64_t cell = n / 16 * groups + k / group_size;
        uint8_t* plane = slice + cell * group_bytes(s);
        int below = widths.back() - (s ? widths[s - 1] : 0);  // bits of the code that are not placed yet
        for (int p : planes(s)) {
          below -= p;
          const int cover = 32 / p, inside = int(k % group_size), column = inside % cover;
          const int value = codes[n * columns + k] >> below & ((1 << p) - 1);
          plane[64 * (inside / cover) + 4 * (n % 16) + column % 4] |= uint8_t(value << p * (column / 4));
          plane += 16 * group_size * p / 8;
        }
        if (k % group_size == 0 && k / group_size < scale_groups) {
          const uint16_t half = scales[s][n * scale_groups + k / group_size];
          uint8_t* place = slice + codes_bytes + ((n / 16 * scale_groups + k / group_size) * 16 + n % 16) * 2;
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
    m.tiles = tiles, m.groups = groups, m.scale_groups = int(scale_groups), m.rows = rows, m.group_size = group_size;
    m.tables = trellis ? tables.data() : nullptr;
    m.levels = trellis ? 2 * kTrellisBias : (1 << widths[s]) - 1, m.midpoint = float(m.levels) / 2;
    return m;
  }

  double scale_at(int64_t n, int64_t group, int s) const {
    return half_value(scales[s][n * scale_groups + (trellis ? 0 : group)]);
  }

  std::vector<int> codes_at(int s) const {
    std::vector<int> list;
    for (int64_t i = 0; i < rows * columns; i++) list.push_back(code_at(i / columns, i % columns, s));
    return list;
  }

  std::vector<double> weights(int s) const {
    std::vector<double> w;
    for (int64_t n = 0; n < rows; n++)
      for (int64_t k = 0; k < columns; k++) {
        const double middle = trellis ? 0 : (std::pow(2.0, widths[s]) - 1) / 2;
        w.push_back((code_at(n, k, s) - middle) * scale_at(n, k / group_size, s));
      }
    return w;
  }
};

// Rows of x [., cols], padded to whole groups, with a Hadamard transform of every group; that of weights undoes itself.
template <class V>
std::vector<V> rotated(const std::vector<V>& x, int64_t cols, int64_t columns, int group_size) {
  std::vector<V> result(x.size() / cols * columns);
  for (size_t i = 0; i < x.size(); i++) result[i / cols * columns + i % cols] = x[i];
  for (V* group = result.data(); group < result.data() + result.size(); group += group_size) {
    for (int step = 1; step < group_size; step *= 2)
      for (int i = 0; i < group_size; i++) {
        const V a = group[i], b = group[i ^ step];
        if (!(i & step)) group[i] = a + b, group[i ^ step] = a - b;
      }
    for (int i = 0; i < group_size; i++) group[i] *= V(1 / std::sqrt(double(group_size)));
  }
  return result;
}

}  // namespace moert
