// Attention of one token or many, with the softmax kept up over spans of keys as in FlashAttention (arXiv 2205.14135,
// section 3.1). Part of step_body.h.
//
// A row is a query head of a token. Spans begin at multiples of their length wherever a row begins, so that a row's
// sums do not depend on the rows beside it.
namespace moert {
namespace MOERT_ISA {

constexpr int kSpan = 64;  // positions
constexpr int kSlab = 32;  // rows that go through a span together, while its keys are in the first cache
// A register of floats. Arrays of longer vectors, which the compiler would have to take apart, stay in memory.
typedef float Floats __attribute__((vector_size(kRegister)));
constexpr int kLanes = kRegister / 4, kParts = 16 / kLanes;
// Rows, and sixteens of numbers, of a block of sums, which should fill the registers but for some operands.
constexpr int kRowBlock = kRegister == 64 ? 8 : 4;
constexpr int kSixteens = kRegister == 64 ? 2 : 1;

// Cached numbers as floats: bytes are to be scaled by the caller.
inline Floats cached(const float* p) { return load<Floats>(p); }
#if defined(__AVX512F__)
inline Floats cached(const Half* p) { return load_half(p); }
inline Floats cached(const int8_t* p) {
  return Floats(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))));
}
#elif defined(__AVX2__)
inline Floats cached(const Half* p) { return Floats(_mm256_cvtph_ps(load<__m128i>(p))); }
inline Floats cached(const int8_t* p) {
  return Floats(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))));
}
#else
inline Floats cached(const Half* p) {
#if defined(__aarch64__)
  typedef __fp16 Halves __attribute__((vector_size(2 * kLanes)));
  return __builtin_convertvector(load<Halves>(p), Floats);
#else
  typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
  typedef uint32_t Words __attribute__((vector_size(kRegister)));
  const Words h = __builtin_convertvector(load<Halves>(p), Words);
  const Words special = bits_as<Words>((h & 0x7c00u) == 0x7c00u) & 0x7f800000u;  // infinity and NaN
  return bits_as<Floats>(bits_as<Words>(bits_as<Floats>((h & 0x7fffu) << 13) * 0x1p112f) | special | (h & 0x8000u) << 16);
#endif
}
inline Floats cached(const int8_t* p) {
  typedef int8_t Bytes __attribute__((vector_size(kLanes)));
  typedef int32_t Whole __attribute__((vector_size(kRegister)));
  return __builtin_convertvector(__builtin_convertvector(load<Bytes>(p), Whole), Floats);
}
#endif

// Some rows on their way: their queries and sums, which positions first ... last - 1 they see, and what a softmax keeps.
struct Slab {
  int rows;
  const float* q[kSlab];
  float* out[kSlab];
  int64_t first[kSlab], last[kSlab];
  float peak[kSlab], total[kSlab], shrink[kSlab];
  alignas(64) float scores[kSlab][kSpan];
};

// Scores of R rows with V blocks of 16 keys.
template <int R, int V, class Number>
inline void score(Slab& slab, int row, const Number* keys, int d, int column) {
  constexpr int N = V * kParts;
  Floats sum[R][N] = {};
  const float* q[R];
  for (int r = 0; r < R; r++) q[r] = slab.q[row + r];
  for (int i = 0; i < d; i++) {
    Floats key[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) key[n] = cached(keys + (int64_t(n / kParts) * d + i) * 16 + n % kParts * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) sum[r][n] += q[r][i] * key[n];
  }
  for (int r = 0; r < R; r++) std::memcpy(slab.scores[row + r] + column, sum[r], sizeof(sum[r]));
}

// Adds values of positions [begin, end) of a span, times what the softmax says, to 16 * V numbers of R rows.
template <int R, int V, class Number>
inline void add_values(Slab& slab, int row, const Number* values, int d, int column, int begin, int end) {
  constexpr int N = V * kParts;
  Floats sum[R][N];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int n = 0; n < N; n++)
      sum[r][n] = load<Floats>(slab.out[row + r] + column + n * kLanes) * slab.shrink[row + r];
  for (int s = begin; s < end; s++) {
    Floats value[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) value[n] = cached(values + int64_t(s) * d + column + n * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) sum[r][n] += slab.scores[row + r][s] * value[n];
  }
  for (int r = 0; r < R; r++) std::memcpy(slab.out[row + r] + column, sum[r], sizeof(sum[r]));
}

// Calls use(rows in a block known at compile time, first row) until all rows are done.
template <int R = kRowBlock, class Use>
inline void row_blocks(int rows, const Use& use, int row = 0) {
  for (; row + R <= rows; row += R) use(std::integral_constant<int, R>(), row);
  if constexpr (R > 1) row_blocks<R / 2>(rows, use, row);
}

// The same for `count` sixteens.
template <class Use>
inline void sixteen_blocks(int count, const Use& use) {
  int v = 0;
  for (; v + kSixteens <= count; v += kSixteens) use(std::integral_constant<int, kSixteens>(), v);
  for (; v < count; v++) use(std::integral_constant<int, 1>(), v);
}

// Minus infinity where a row does not see the span's positions of block i.
inline f32x16 masked(const Slab& slab, int row, int64_t start, int i, f32x16 score) {
  const f32x16 lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, position = lanes + float(16 * i);
  const f32x16 first = all(float(std::max<int64_t>(slab.first[row] - start, 0)));
  const f32x16 last = all(float(std::min<int64_t>(slab.last[row] - start, kSpan)));
  return where_less(position, first, all(-INFINITY), where_less(position, last, score, all(-INFINITY)));
}

// Turns the scores of a row for the span at `start`, blocks of 16, into weights: 0 outside of what the row sees. Scales
// may be null.
inline void weigh(Slab& slab, int row, int64_t start, int blocks, const float* key_scales, const float* value_scales) {
  const bool whole = slab.first[row] <= start && start + 16 * blocks <= slab.last[row];
  f32x16 score[kSpan / 16], peaks = all(slab.peak[row]);
  for (int i = 0; i < blocks; i++) {
    score[i] = load<f32x16>(slab.scores[row] + 16 * i);
    if (key_scales != nullptr) score[i] *= load<f32x16>(key_scales + 16 * i);
    if (!whole) score[i] = masked(slab, row, start, i, score[i]);
    peaks = where_less(peaks, score[i], score[i], peaks);
  }
  const float peak = largest_lane(peaks);
  f32x16 total = {};
  for (int i = 0; i < blocks; i++) {
    f32x16 weight = exponential_below(score[i] - peak);  // NaN stays NaN
    if (!whole) weight = where_less(score[i], all(-3e38f), f32x16{}, weight);
    total += weight;
    if (value_scales != nullptr) weight *= load<f32x16>(value_scales + 16 * i);
    std::memcpy(slab.scores[row] + 16 * i, &weight, sizeof(weight));
  }
  slab.shrink[row] = 1;
  if (peak > slab.peak[row]) {
    slab.shrink[row] = slab.total[row] == 0 ? 0 : exponential_below(all(slab.peak[row] - peak))[0];
    slab.peak[row] = peak;
  }
  slab.total[row] = slab.total[row] * slab.shrink[row] + sum_lanes(total);
}

template <class Number>
void attend_slab(const Attention& a, int64_t kv_head, Slab& slab) {
  const int d = a.head_dim;
  const Number* keys = static_cast<const Number*>(a.keys) + kv_head * a.capacity * d;
  const Number* values = static_cast<const Number*>(a.values) + kv_head * a.capacity * d;
  int64_t begin = slab.first[0], end = slab.last[0];
  for (int r = 0; r < slab.rows; r++) {
    begin = std::min(begin, slab.first[r]), end = std::max(end, slab.last[r]);
    std::memset(slab.out[r], 0, d * sizeof(float));
    slab.peak[r] = -INFINITY, slab.total[r] = 0;
  }
  for (int64_t start = begin / kSpan * kSpan; start < end; start += kSpan) {
    const int count = int(std::min<int64_t>(end - start, kSpan)), blocks = (count + 15) / 16;
    const int64_t scale = kv_head * a.capacity + start;
    row_blocks(slab.rows, [&](auto R, int row) {
      sixteen_blocks(blocks, [&](auto V, int block) {
        score<R, V>(slab, row, keys + (start + 16 * block) * d, d, 16 * block);
      });
    });
    for (int r = 0; r < slab.rows; r++)
      weigh(slab, r, start, blocks, a.key_scales ? a.key_scales + scale : nullptr,
            a.value_scales ? a.value_scales + scale : nullptr);
    row_blocks(slab.rows, [&](auto R, int row) {
      sixteen_blocks(d / 16, [&](auto V, int block) {
        add_values<R, V>(slab, row, values + start * d, d, 16 * block, int(std::max<int64_t>(begin - start, 0)), count);
      });
    });
  }
  for (int r = 0; r < slab.rows; r++)
    for (int i = 0; i < d; i += 16) {
      const f32x16 mean = load<f32x16>(slab.out[r] + i) / slab.total[r];
      std::memcpy(slab.out[r] + i, &mean, sizeof(mean));
    }
}

inline void attend(const Attention& a, int64_t kv_head, int64_t first, int64_t last) {
  const int64_t shared = a.heads / a.kv_heads, rows = (last - first) * shared;
  Slab slab;
  for (int64_t row = 0; row < rows; row += slab.rows) {
    slab.rows = int(std::min<int64_t>(rows - row, kSlab));
    for (int r = 0; r < slab.rows; r++) {
      const int64_t token = first + (row + r) / shared, head = kv_head * shared + (row + r) % shared;
      slab.q[r] = a.q + (token * a.heads + head) * a.head_dim;
      slab.out[r] = a.out + (token * a.heads + head) * a.head_dim;
      slab.last[r] = a.position + token + 1;
      slab.first[r] = std::max<int64_t>(slab.last[r] - a.window, 0);
    }
    switch (a.type) {
      case CacheType::kHalf: attend_slab<Half>(a, kv_head, slab); break;
      case CacheType::kFloat: attend_slab<float>(a, kv_head, slab); break;
      case CacheType::kByte: attend_slab<int8_t>(a, kv_head, slab); break;
    }
  }
}

}  // namespace MOERT_ISA
}  // namespace moert
