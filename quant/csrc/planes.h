// Lists of planes that are known at compile time, for x86.
#pragma once

#include <immintrin.h>

#include "kernel.h"

namespace moert {
namespace MOERT_ISA {

// Planes of these bits, the most significant first: everything but the addresses is known at compile time.
template <int... Bits>
struct PlaneList {
  static constexpr int kCount = sizeof...(Bits);
  static constexpr int bits(int plane) {
    constexpr int list[] = {Bits...};
    return list[plane];
  }
  static constexpr int kWidth = (Bits + ...);
  static constexpr int shift(int plane) {
    int below = 0;
    for (int p = plane + 1; p < kCount; p++) below += bits(p);
    return below;
  }
  // Where the 32 columns of `block` of a group begin in a plane.
  static const uint8_t* chunk(const NestedMatrix& w, int64_t cell, int block, int plane) {
    return w.planes[plane].data + cell * w.planes[plane].stride + 64 * bits(plane) * block;
  }

  // Asks for the bytes of a cell; see kernel.h.
  static inline __attribute__((always_inline)) void prefetch(const NestedMatrix& w, int64_t tile, int64_t group) {
    const int64_t cell = tile * w.groups + group;
    for (int p = 0; p < kCount; p++)
      for (int line = 0; line < w.group_size * bits(p) / 32; line++)
        _mm_prefetch(w.planes[p].data + cell * w.planes[p].stride + 64 * line, _MM_HINT_T1);
    _mm_prefetch(w.scales_of(tile, group), _MM_HINT_T1);
  }
};

inline int listed_bits(const NestedMatrix& w) {
  int list = 0;
  for (int p = 0; p < w.num_planes; p++) list = 10 * list + w.planes[p].bits;
  return list;
}

// Calls use(planes) with the type that knows the planes of w: Fixed<their bits...> for those of the widths that are used
// most, else Any.
template <template <int...> class Fixed, class Any, class Use>
inline void with_planes(const NestedMatrix& w, const Use& use) {
  switch (listed_bits(w)) {
    case 8: return use(Fixed<8>());
    case 4: return use(Fixed<4>());
    case 42: return use(Fixed<4, 2>());
    case 2: return use(Fixed<2>());
    case 21: return use(Fixed<2, 1>());
    case 211: return use(Fixed<2, 1, 1>());
    case 22: return use(Fixed<2, 2>());
    default: return use(Any());
  }
}

// The same for the trellis code.
template <template <int...> class Fixed, class Any, class Use>
inline void with_trellis_planes(const NestedMatrix& w, const Use& use) {
  switch (listed_bits(w)) {
    case 2: return use(Fixed<2>());
    case 21: return use(Fixed<2, 1>());
    case 211: return use(Fixed<2, 1, 1>());
    case 2111: return use(Fixed<2, 1, 1, 1>());
    case 21111: return use(Fixed<2, 1, 1, 1, 1>());
    case 22: return use(Fixed<2, 2>());
    case 222: return use(Fixed<2, 2, 2>());
    default: return use(Any());
  }
}

}  // namespace MOERT_ISA
}  // namespace moert
