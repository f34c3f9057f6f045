// The trellis code with compiler vectors: the rotation of inputs and, byte by byte, the levels of a matrix.
// No include guard on purpose: MOERT_ISA names the namespace.

namespace moert {
namespace MOERT_ISA {

// As many floats as a register holds: gcc takes shuffles of longer vectors apart into single lanes.
typedef float Register __attribute__((vector_size(kRegister)));
constexpr int kLanes = kRegister / 4;

// Lanes i and i + Step (a power of two): their sum and their difference.
template <int Step, int... I>
inline Register butterfly(Register v, std::integer_sequence<int, I...>) {
  typedef int32_t Lanes __attribute__((vector_size(kRegister)));
#if defined(__clang__)
  const Register other = __builtin_shufflevector(v, v, (I ^ Step)...);
#else
  const Register other = __builtin_shuffle(v, Lanes{(I ^ Step)...});
#endif
  constexpr Lanes kSigns = {(I & Step ? INT32_MIN : 0)...};
  return other + bits_as<Register>(bits_as<Lanes>(v) ^ kSigns);
}

template <int Step>
inline void butterflies(Register* v, int count) {
  if constexpr (Step < kLanes) {
    for (int i = 0; i < count; i++) v[i] = butterfly<Step>(v[i], std::make_integer_sequence<int, kLanes>());
    butterflies<2 * Step>(v, count);
  }
}

// The same between the lanes of whole vectors, and the end of a transform of `size` numbers.
template <class V>
inline void end_rotation(V* v, int count, int size) {
  for (int step = 1; step < count; step *= 2)
    for (int start = 0; start < count; start += 2 * step)
      for (int i = start; i < start + step; i++) {
        const V a = v[i], b = v[i + step];
        v[i] = a + b, v[i + step] = a - b;
      }
  const float length = float(1 / std::sqrt(double(size)));
  for (int i = 0; i < count; i++) v[i] *= length;
}

// A Hadamard transform of one group, in the order of trellis.rotate of quant/trellis.py.
inline void rotate(f32x16* group, int group_size) {
  Register v[128 / kLanes];
  const int count = group_size / kLanes;
  std::memcpy(v, group, group_size * sizeof(float));
  butterflies<1>(v, count);
  end_rotation(v, count, group_size);
  std::memcpy(group, v, group_size * sizeof(float));
}

// The same for 16 rows at once.
inline void rotate_columns(f32x16* columns, int group_size) { end_rotation(columns, group_size, group_size); }

// As codes_of.
inline u32x16 trellis_codes(const NestedMatrix& w, int64_t cell, int quad) {
  typedef uint8_t u8x64 __attribute__((vector_size(64)));
  u8x64 sum = {};
  for (int p = 0; p < w.num_planes; p++) {
    const Plane& plane = w.planes[p];
    const int quads = 8 / plane.bits, window_bits = plane.bits == 2 ? 6 : 4;
    const uint8_t* chunk = plane.data + cell * plane.stride + 64 * (quad / quads);
    const uint8_t* before = quad < quads ? w.chunk_before(chunk, plane, cell % w.groups == 0) : chunk - 64;
    const int newest = plane.bits * (quad % quads + 1);  // the window ends there in the byte
    const bool around = quad < quads && cell % w.groups == 0;
    for (int i = 0; i < 64; i++) {
      const int place = around ? (i & ~3) | ((i - 1) & 3) : i;
      const int window = (chunk[i] << 8 | before[place]) >> (newest + 8 - window_bits) & ((1 << window_bits) - 1);
      sum[i] += w.tables[64 * p + window];
    }
  }
  return bits_as<u32x16>(sum);
}

}  // namespace MOERT_ISA
}  // namespace moert
