// Tests of every compiled kernel, of the pool of threads and of the products, without Python, so that they can run
// under sanitizers and emulators. Expected values are computed in double.
// Usage: kernel_test [threads]: everything, or the threads and products only. Exit code 1 where something is wrong.
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "kernel.h"
#include "packed_matrix.h"
#include "products.h"
#include "raw_test.h"
#include "thread_pool.h"

using namespace moert;

namespace {

// T tokens, N rows, K columns, G group size
enum Row { kNormal, kZeros, kSaturated, kOutlier, kTiny, kHuge, kNan, kInfinite, kDenormal, kRows };

// Token t is of kind t % kRows.
std::vector<float> inputs(int64_t tokens, int64_t cols) {
  std::vector<float> x(tokens * cols);
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t k = 0; k < cols; k++) {
      const float scale[kRows] = {1, 0, 1, 1, 1e-25f, 1e20f, 1, 1, 1e-40f};
      x[t * cols + k] = scale[t % kRows] * (t % kRows == kSaturated ? (k % 2 ? 3.0f : -3.0f) : normal());
      if (k != cols / 2) continue;
      if (t % kRows == kOutlier) x[t * cols + k] = 1e6f;
      if (t % kRows == kNan) x[t * cols + k] = NAN;
      if (t % kRows == kInfinite) x[t * cols + k] = -INFINITY;
    }
  return x;
}

// Inputs as a kernel rounds them, token by token, and `view`: some of them side by side for each group.
struct Rounded {
  std::vector<int8_t> q;
  std::vector<float> scales;
  std::vector<int32_t> sums;
  int64_t groups, width;
  int group_size;
  bool reads_on;  // to the end of a block of 16 tokens
  Memory<int8_t> viewed;  // no longer than needed: the last view
  std::vector<float> viewed_scales;
  std::vector<int32_t> viewed_sums;

  Rounded(const Kernel& kernel, const float* x, int64_t tokens, int64_t cols, int group_size)
      : groups(blocks(cols, group_size)),
        width(groups * group_size),
        group_size(group_size),
        reads_on(std::strcmp(kernel.name, "amx") == 0) {
    Memory<int8_t> row = memory<int8_t>(width);
    scales.resize(tokens * groups), sums.resize(tokens * groups);
    for (int64_t t = 0; t < tokens; t++) {
      kernel.quantise(x + t * cols, cols, groups, group_size, false, row.get(), &scales[t * groups], &sums[t * groups]);
      q.insert(q.end(), row.get(), row.get() + width);
    }
  }
  Activations view(int64_t first, int64_t count) {
    viewed = memory<int8_t>((count * groups + (reads_on ? 16 : 0)) * group_size);
    viewed_scales.resize(count * groups + (reads_on ? 16 : 0)), viewed_sums.resize(viewed_scales.size());
    const Activations result{viewed.get(), viewed_scales.data(), viewed_sums.data(), count, count};
    for (int64_t t = 0; t < count; t++)
      for (int64_t g = 0; g < groups; g++) {
        const int64_t at = g * count + t, from = (first + t) * groups + g;
        std::memcpy(&viewed[at * group_size], &q[from * group_size], group_size);
        viewed_scales[at] = scales[from], viewed_sums[at] = sums[from];
      }
    return result;
  }
};

// Checks what a kernel made of x, and returns it as the products see it.
std::vector<double> check_quantised(const Rounded& in, const std::vector<float>& x, int64_t cols, int group_size) {
  std::vector<double> seen(x.size());
  for (int64_t t = 0; t < int64_t(in.sums.size()) / in.groups; t++)
    for (int64_t g = 0; g < in.groups; g++) {
      const int64_t from = g * group_size, to = std::min(cols, from + group_size);
      double peak = 0, sum = 0;
      bool finite = true;
      for (int64_t k = from; k < to; k++) {
        peak = std::max(peak, std::fabs(double(x[t * cols + k])));
        finite = finite && std::isfinite(x[t * cols + k]);
      }
      const double scale = double(in.scales[t * in.groups + g]) * 2;
      CHECK(finite ? std::fabs(scale - peak / 127) <= 2e-7 * scale + 1e-44 : std::isnan(scale));
      for (int64_t k = from; k < from + group_size; k++) {
        const int q = in.q[t * in.width + k];
        sum += q;
        CHECK(q >= -127);
        if (k >= to) CHECK(q == 0);
        if (k >= to || !finite || t % kRows == kDenormal) continue;
        CHECK(std::fabs(q - (peak > 0 ? x[t * cols + k] * 127 / peak : 0)) <= 0.5001);
        seen[t * cols + k] = q * peak / 127;
      }
      CHECK(sum == in.sums[t * in.groups + g]);
    }
  return seen;
}

// The arithmetic that kernel.h promises, with fused multiply-add: what every kernel but the portable one gives to the bit.
float promised(const Packed& m, const Rounded& in, int s, int64_t t, int64_t n) {
  float total = 0;
  for (int64_t g = 0; g < m.groups; g++) {
    int32_t dot = 0, levels = (1 << m.widths[s]) - 1;
    for (int64_t k = g * m.group_size; k < std::min(m.cols, (g + 1) * m.group_size); k++)
      dot += (m.codes[n * m.cols + k] >> (m.widths.back() - m.widths[s])) * in.q[t * in.width + k];
    const float factor = float(half_value(m.scales[s][n * m.groups + g])) * in.scales[t * m.groups + g];
    total = std::fma(float(2 * dot - levels * in.sums[t * m.groups + g]), factor, total);
  }
  return total;
}

void test_matrix(const Kernel& kernel, const Packed& m, const std::vector<int64_t>& counts) {
  const int64_t tokens = counts.back(), stride = m.rows + 5;
  const std::vector<float> x = inputs(tokens, m.cols);
  Rounded in(kernel, x.data(), tokens, m.cols, m.group_size);
  const std::vector<double> seen = check_quantised(in, x, m.cols, m.group_size);
  const float untouched = -12345;
  for (size_t s = 0; s < m.widths.size(); s++) {
    const NestedMatrix view = m.view(int(s));
    const std::vector<double> w = m.weights(int(s));
    std::vector<float> one(tokens * stride, untouched);
    for (int64_t t = 0; t < tokens; t++)
      kernel.nested_matmul(view, in.view(t, 1), &one[t * stride], stride, 0, m.tiles);
    for (int64_t t = 0; t < tokens; t++) {
      for (int64_t n = 0; n < m.rows; n++) {
        double sum = 0, size = 0;
        for (int64_t k = 0; k < m.cols; k++) {
          const double part = seen[t * m.cols + k] * w[n * m.cols + k];
          sum += part, size += std::fabs(part);
        }
        const float got = one[t * stride + n];
        if (t % kRows == kNan || t % kRows == kInfinite) CHECK(std::isnan(got));
        else if (t % kRows == kDenormal) CHECK(std::fabs(got) < 1e-30f);
        else CHECK(std::fabs(got - sum) <= 4e-6 * size + 1e-37);
        if (kernel.name != std::string("generic") && !std::isnan(got)) CHECK(got == promised(m, in, int(s), t, n));
      }
      for (int64_t n = m.rows; n < stride; n++) CHECK(one[t * stride + n] == untouched);
    }
    for (int64_t count : counts) {  // many tokens in two calls for ranges of tiles: the same bytes
      std::vector<float> many(count * stride, untouched);
      kernel.nested_matmul(view, in.view(0, count), many.data(), stride, 0, m.tiles / 2);
      kernel.nested_matmul(view, in.view(0, count), many.data(), stride, m.tiles / 2, m.tiles);
      for (float& v : many) v = std::isnan(v) ? NAN : v;
      for (float& v : one) v = std::isnan(v) ? NAN : v;  // the bits of a NaN are not promised
      CHECK(std::memcmp(many.data(), one.data(), many.size() * sizeof(float)) == 0);
    }
    std::vector<float> plain(m.rows * (m.cols + 3), untouched);
    kernel.nested_dequantise(view, m.cols, plain.data(), m.cols + 3, 0, m.tiles);
    for (int64_t n = 0; n < m.rows; n++)
      for (int64_t k = 0; k < m.cols + 3; k++) {
        const double want = k < m.cols ? w[n * m.cols + k] : untouched;
        CHECK(std::fabs(plain[n * (m.cols + 3) + k] - want) <= 1e-6 * std::fabs(want));
      }
  }
}

void test_products_of_kernel(const Kernel& kernel) {
  const std::vector<std::vector<int>> lists = {{2, 3, 4}, {8}, {5, 6, 7}, {2}, {3, 8}, {2, 4}, {2, 3, 4, 5, 6, 7, 8}, {4, 8}};
  for (int group_size : {32, 64, 128})
    for (size_t i = 0; i < lists.size(); i++) {
      where = std::string(kernel.name) + ", G " + std::to_string(group_size) + ", list " + std::to_string(i);
      test_matrix(kernel, {37, 3 * group_size - 5, group_size, lists[i], int(i % 3)}, {2, 3, 4, 5, 8, 17, 35});
      test_matrix(kernel, {16, group_size, group_size, lists[i], int((i + 1) % 3)}, {1, 9, 16});
      test_matrix(kernel, {5, 7, group_size, lists[i], int((i + 2) % 3)}, {6, 7, 20});
    }
  where = std::string(kernel.name) + ", every number of tokens";
  std::vector<int64_t> every;
  for (int64_t t = 1; t <= 70; t++) every.push_back(t);
  test_matrix(kernel, {20, 130, 64, {4}}, every);
  where = std::string(kernel.name) + ", more columns than a panel";
  test_matrix(kernel, {17, 2300, 32, {2, 8}}, {4, 12});
}

void test_silu(const Kernel& kernel) {
  where = std::string(kernel.name) + ", silu";
  for (int64_t count = 1; count < 70; count++) {
    std::vector<float> gate(count), up(count);
    for (float& g : gate) g = normal() * (generator() % 4 ? 5.0f : 60.0f);
    for (float& u : up) u = normal();
    gate[0] = count % 3 ? 0.0f : count % 2 ? 1e4f : -1e4f;
    const std::vector<float> before = gate;
    kernel.silu_product(gate.data(), up.data(), count);
    for (int64_t i = 0; i < count; i++) {
      const double g = before[i], want = g / (1 + std::exp(-g)) * up[i];
      CHECK(std::fabs(gate[i] - want) <= 1e-6 * std::fabs(want) + 2e-38 * std::fabs(g * up[i]));
    }
  }
}

double as_half(double v) {
  const double step = std::ldexp(1.0, std::max(std::ilogb(v + 1e-300) - 10, -24));
  return std::nearbyint(v / step) * step;
}

// Error of codes and scales over all widths, each against what rounding costs there. No scales given: the best.
double search_error(const float* w, const uint8_t* codes, int size, const std::vector<int>& widths, const double* given) {
  double cost = 0;
  for (size_t b = 0; b < widths.size(); b++) {
    double product = 0, square = 0, error = 0;
    std::vector<double> level(size);
    for (int i = 0; i < size; i++) {
      level[i] = (codes[i] >> (widths.back() - widths[b])) - (std::pow(2.0, widths[b]) - 1) / 2;
      product += w[i] * level[i], square += level[i] * level[i];
    }
    const double scale = given ? given[b] : as_half(product / square);
    for (int i = 0; i < size; i++) error += std::pow(w[i] - scale * level[i], 2);
    cost += error * std::pow(4.0, widths[b]);
  }
  return cost;
}

void test_search(const Kernel& kernel) {
  const float clips[] = {1.0f, 0.86f, 0.72f, 0.58f};
  for (const std::vector<int>& widths : {std::vector<int>{2, 3, 4}, {4}, {2, 8}, {3, 5, 6, 7}})
    for (int size : {32, 64, 128}) {
      where = std::string(kernel.name) + ", search, G " + std::to_string(size);
      const int64_t groups = 24;
      std::vector<float> w(groups * size);
      for (int64_t i = 0; i < groups * size; i++)  // group 1: zeros; 2: one value; 3: an outlier; 4: below fp16
        w[i] = i / size == 1 ? 0 : i / size == 2 ? 0.7f : normal() * (i / size == 4 ? 1e-20f : 0.02f);
      w[3 * size + 5] = 6e4f;
      std::vector<uint8_t> codes(groups * size);
      std::vector<uint16_t> scales(widths.size() * groups);
      const Search search{widths.data(), int(widths.size()), clips, 4, size, groups};
      kernel.search_codes(search, w.data(), codes.data(), scales.data(), 0, 10);
      kernel.search_codes(search, w.data(), codes.data(), scales.data(), 10, groups);
      for (int64_t g = 0; g < groups; g++) {
        const float* values = &w[g * size];
        double best = INFINITY, peak = 1e-30, given[8];
        for (int i = 0; i < size; i++) peak = std::max(peak, std::fabs(double(values[i])));
        for (float clip : clips) {
          const double half = std::pow(2.0, widths.back() - 1);
          std::vector<uint8_t> trial(size);
          for (int i = 0; i < size; i++)
            trial[i] = uint8_t(std::min(std::max(std::floor(values[i] * half / (peak * clip) + half), 0.0), 2 * half - 1));
          best = std::min(best, search_error(values, trial.data(), size, widths, nullptr));
        }
        for (size_t b = 0; b < widths.size(); b++) given[b] = half_value(scales[b * groups + g]);
        const double got = search_error(values, &codes[g * size], size, widths, given);
        CHECK(got <= 1.02 * best);
      }
    }
}

void test_pool() {
  ThreadPool pool(1);
  for (int threads : {1, 2, 3, 7, 2, 1, 4}) {
    pool.resize(threads);
    where = "pool of " + std::to_string(threads);
    CHECK(pool.size() == threads);
    for (int64_t count : {0, 1, 2, 63, 1000})
      for (int64_t grain : {1, 3, 64}) {
        std::vector<std::atomic<int>> seen(count);
        pool.parallel_for(count, grain, [&](int64_t first, int64_t last) {
          for (int64_t i = first; i < last; i++) seen[i]++;
        });
        for (const auto& times : seen) CHECK(times == 1);
      }
    std::atomic<int64_t> total{0};  // many small calls, from two threads at once
    const int calls = 500;
    auto caller = [&] {
      for (int i = 0; i < calls; i++) pool.parallel_for(5, 1, [&](int64_t first, int64_t last) { total += last - first; });
    };
    std::thread other(caller);
    caller();
    other.join();
    CHECK(total == 2 * 5 * calls);
  }
}

void test_products(const Kernel& kernel) {
  ThreadPool pool(1);
  Products products(pool);
  const int64_t tokens = 9, hidden = 150, inner = 70;
  const Packed a(130, hidden, 64, {2, 3, 4}), b(20, hidden, 64, {8});
  std::vector<Packed> gate, up, down;
  std::vector<ExpertMatrices> experts;
  for (int e = 0; e < 3; e++) {
    gate.emplace_back(inner, hidden, 32, std::vector<int>{2, 4});
    up.emplace_back(inner, hidden, 32, std::vector<int>{2, 4});
    down.emplace_back(hidden, inner, 32, std::vector<int>{2, 4});
  }
  for (int e = 0; e < 3; e++)
    experts.push_back({gate[e].view(1 - e % 2), up[e].view(1 - e % 2), down[e].view(1 - e % 2)});  // widths may differ
  std::vector<float> x(tokens * hidden);
  for (float& v : x) v = normal();

  auto linear = [&](const Packed& m, int s, const float* rows, int64_t count) {
    Rounded in(kernel, rows, count, m.cols, m.group_size);
    std::vector<float> out(count * m.rows);
    kernel.nested_matmul(m.view(s), in.view(0, count), out.data(), m.rows, 0, m.tiles);
    return out;
  };
  for (int threads : {1, 2, 5}) {
    where = std::string(kernel.name) + ", products, " + std::to_string(threads) + " threads";
    pool.resize(threads);
    for (int64_t count : {int64_t(1), tokens}) {
      std::vector<float> first(count * a.rows), second(count * b.rows);
      const Matrix views[] = {Matrix{a.view(2)}, Matrix{b.view(0)}};
      const Matrix* const both[] = {&views[0], &views[1]};
      float* const outs[] = {first.data(), second.data()};
      products.linear(kernel, both, 2, x.data(), count, hidden, hidden, outs);
      CHECK(first == linear(a, 2, x.data(), count));
      CHECK(second == linear(b, 0, x.data(), count));

      std::vector<int64_t> counts = {1, 1, 1}, tokens_of = {0, 0, 0};
      if (count > 1) counts = {tokens, 0, 2}, tokens_of = {0, 1, 2, 3, 4, 5, 6, 7, 8, 8, 3};
      std::vector<float> out(tokens_of.size() * hidden);
      products.experts(kernel, experts, counts, tokens_of.data(), x.data(), count, hidden, inner, out.data());
      for (size_t r = 0, e = 0, used = 0; r < tokens_of.size(); r++) {
        for (; used == size_t(counts[e]); used = 0) e++;
        used++;
        const float* row = &x[tokens_of[r] * hidden];
        const int s = 1 - int(e) % 2;
        std::vector<float> g = linear(gate[e], s, row, 1), u = linear(up[e], s, row, 1);
        kernel.silu_product(g.data(), u.data(), inner);
        const std::vector<float> want = linear(down[e], s, g.data(), 1);
        CHECK(std::memcmp(&out[r * hidden], want.data(), hidden * sizeof(float)) == 0);
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const bool threads_only = argc > 1 && std::string(argv[1]) == "threads";
  test_pool();
  const Kernel* all[] = {
#if defined(MOERT_WITH_AVX2)
      &kAvx2Kernel,
#endif
#if defined(MOERT_WITH_AVX512)
      &kAvx512Kernel,
#endif
#if defined(MOERT_WITH_AMX)
      &kAmxKernel,
#endif
#if defined(MOERT_WITH_NEON)
      &kNeonKernel,
#endif
      &kGenericKernel};
  std::string tested, missing;
  for (const Kernel* kernel : all) {
    (kernel->supported() ? tested : missing) += std::string(" ") + kernel->name;
    if (!kernel->supported()) continue;
    generator.seed(1);
    test_products(*kernel);
    if (threads_only) continue;
    test_products_of_kernel(*kernel);
    test_silu(*kernel);
    test_raw(*kernel);
    test_search(*kernel);
  }
  std::printf("tested:%s\nnot on this processor:%s\n", tested.c_str(), missing.c_str());
  std::printf("%lld checks, %lld failures\n", (long long)checks, (long long)failures);
  return failures != 0;
}
