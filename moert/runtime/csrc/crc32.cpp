#include "crc32.h"

#include <array>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace moert {
namespace {

// Eight bytes at a time (Kounavis and Berry, "A Systematic Approach to Building High Performance, Software-based, CRC
// Generators", 2005).
struct Tables {
  std::array<std::array<uint32_t, 256>, 8> at;
  Tables() {
    for (uint32_t i = 0; i < 256; i++) {
      uint32_t c = i;
      for (int bit = 0; bit < 8; bit++) c = c & 1 ? 0xEDB88320u ^ (c >> 1) : c >> 1;
      at[0][i] = c;
    }
    for (int t = 1; t < 8; t++)
      for (uint32_t i = 0; i < 256; i++) at[t][i] = (at[t - 1][i] >> 8) ^ at[0][at[t - 1][i] & 255];
  }
};

uint32_t by_table(const uint8_t* data, size_t size, uint32_t state) {
  static const Tables tables;
  const auto& t = tables.at;
  for (; size >= 8; data += 8, size -= 8) {
    state ^= uint32_t(data[0]) | uint32_t(data[1]) << 8 | uint32_t(data[2]) << 16 | uint32_t(data[3]) << 24;
    state = t[7][state & 255] ^ t[6][state >> 8 & 255] ^ t[5][state >> 16 & 255] ^ t[4][state >> 24] ^ t[3][data[4]] ^
            t[2][data[5]] ^ t[1][data[6]] ^ t[0][data[7]];
  }
  for (; size > 0; data++, size--) state = t[0][(state ^ *data) & 255] ^ (state >> 8);
  return state;
}

#if defined(__x86_64__)
#define MOERT_PRODUCTS __attribute__((target("pclmul,sse4.1")))

MOERT_PRODUCTS inline __m128i load(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }

MOERT_PRODUCTS inline __m128i fold(__m128i x, __m128i k, __m128i next) {
  return _mm_xor_si128(_mm_xor_si128(_mm_clmulepi64_si128(x, k, 0x00), _mm_clmulepi64_si128(x, k, 0x11)), next);
}

// Folds 64 bytes at a time by carry-less products (Gopal et al., "Fast CRC Computation for Generic Polynomials Using
// PCLMULQDQ Instruction", Intel 2009; constants for this polynomial from its section on reflected data). size is a
// multiple of 16 and at least 64.
MOERT_PRODUCTS uint32_t by_products(const uint8_t* data, size_t size, uint32_t state) {
  const __m128i by_64 = _mm_set_epi64x(0x01c6e41596, 0x0154442bd4), by_16 = _mm_set_epi64x(0x00ccaa009e, 0x01751997d0);
  __m128i a = _mm_xor_si128(load(data), _mm_cvtsi32_si128(int(state)));
  __m128i b = load(data + 16), c = load(data + 32), d = load(data + 48);
  for (data += 64, size -= 64; size >= 64; data += 64, size -= 64) {
    a = fold(a, by_64, load(data));
    b = fold(b, by_64, load(data + 16));
    c = fold(c, by_64, load(data + 32));
    d = fold(d, by_64, load(data + 48));
  }
  a = fold(a, by_16, b);
  a = fold(a, by_16, c);
  a = fold(a, by_16, d);
  for (; size >= 16; data += 16, size -= 16) a = fold(a, by_16, load(data));
  // 128 bits to 64, to 32, and what is left of these by Barrett's reduction.
  const __m128i low = _mm_setr_epi32(-1, 0, -1, 0);
  a = _mm_xor_si128(_mm_srli_si128(a, 8), _mm_clmulepi64_si128(a, by_16, 0x10));
  b = _mm_srli_si128(a, 4);
  a = _mm_xor_si128(_mm_clmulepi64_si128(_mm_and_si128(a, low), _mm_set_epi64x(0, 0x0163cd6124), 0x00), b);
  const __m128i reduce = _mm_set_epi64x(0x01f7011641, 0x01db710641);
  b = _mm_and_si128(_mm_clmulepi64_si128(_mm_and_si128(a, low), reduce, 0x10), low);
  a = _mm_xor_si128(a, _mm_clmulepi64_si128(b, reduce, 0x00));
  return uint32_t(_mm_extract_epi32(a, 1));
}
#endif

}  // namespace

uint32_t crc32(const uint8_t* data, size_t size) {
  uint32_t state = ~0u;
#if defined(__x86_64__)
  if (size >= 64 && __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1")) {
    const size_t whole = size / 16 * 16;
    state = by_products(data, whole, state);
    data += whole;
    size -= whole;
  }
#endif
  return ~by_table(data, size, state);
}

}  // namespace moert
