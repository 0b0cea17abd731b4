// The CUDA kernels of pooling, run on the CPU, against plain loops in double; NaN wherever nothing may be read. With
// the argument `mutants`: kernels broken on purpose, each of which these comparisons have to notice.
#include "host_cuda.h"
// The kernels need CUDA's words from there.
#include "../cuda/pooling.cuh"
#include "naive.h"

namespace {

using ek::PoolMode;
using ek::cuda::Bf16;
using ek::cuda::F16;
using Values = std::vector<int64_t>;

const float nan = std::nanf("");
const Values every_mode = {
    PoolMode::cls, PoolMode::lasttoken,           PoolMode::max, PoolMode::mean, PoolMode::weightedmean,
    PoolMode::sum, PoolMode::mean_sqrt_len_tokens};

struct Call {
  std::string name;
  int64_t batch, length, channels;  // batch 0: packed
  Values modes;
  Values lengths = {}, cu_seqlens = {}, skip = {}, spans = {};
  bool masked = false;
  int64_t out_channels = 0;  // 0: all
  bool normalize = false;
  int64_t gap_t = 0, gap_b = 0, shift = 0;  // elements between rows and sequences, and before the first
  bool wide = true;                         // int64
};

// One row of a segment, as plain loops find it.
struct Member {
  int64_t row, rank;
};

template <class T>
struct Test {
  Call call;
  int64_t rows, columns, segments;
  std::vector<Member> no_members;
  std::vector<std::vector<Member>> members;  // of each segment
  Values starts;
  std::vector<char> mask;
  std::vector<T> hidden, out, d_out, d_hidden;
  std::vector<float> x;  // (rows, channels), hidden's values
  std::vector<float> pooled, d_pooled;
  std::vector<int32_t> argmax;
  std::vector<ek::PoolSegment> found;
  std::vector<std::vector<int32_t>> narrow;
  ek::PoolParams p{};
  ek::cuda::PoolPlaces places{};

  explicit Test(const Call& c) : call(c) {
    rows = std::max<int64_t>(call.batch, 1) * call.length;
    const int64_t all_columns = int64_t(call.modes.size()) * call.channels;
    columns = call.out_channels ? call.out_channels : all_columns;
    mask.assign(size_t(rows), 1);
    std::mt19937 random(3);
    for (char& visible : mask) visible = !call.masked || random() % 3 > 0;
    find_members();
    segments = int64_t(members.size());
    fill_hidden();
    const size_t size = size_t(segments * columns);
    out.assign(size, ek::cuda::from_float<T>(nan));
    pooled.assign(size, nan);
    d_pooled.assign(size, nan);
    argmax.assign(size, 1 << 20);
    for (float value : naive::random(size, 2)) d_out.push_back(ek::cuda::from_float<T>(value));
    d_hidden.assign(size_t(rows * call.channels), ek::cuda::from_float<T>(nan));
    // More than there are: a kernel that is broken on purpose may look there.
    found.assign(size_t(segments + 512), ek::PoolSegment{0, 0, 0, 0, -1, 0});

    p.segments = segments, p.rows = rows, p.length = call.length, p.channels = call.channels, p.out_channels = columns;
    p.modes = int64_t(call.modes.size()), p.mode = call.modes.data(), p.dtype = dtype(T{});
    p.stride_t = call.channels + call.gap_t, p.stride_b = call.length * p.stride_t + call.gap_b;
    p.hidden = hidden.data() + call.shift;
    p.segment = found.data();
    p.mask = call.masked ? reinterpret_cast<const bool*>(mask.data()) : nullptr, p.mask_stride = call.length;
    p.normalize = call.normalize, p.eps = 1e-12f;
    p.out = out.data(), p.pooled = pooled.data(), p.argmax = argmax.data();
    p.d_out = d_out.data(), p.d_out_stride = columns, p.d_pooled = d_pooled.data(), p.d_hidden = d_hidden.data();
    narrow.reserve(4);
    places = {integers(call.lengths), integers(call.cu_seqlens), integers(call.skip), integers(call.spans)};
  }

  static ek::DType dtype(float) { return ek::DType::f32; }
  static ek::DType dtype(Bf16) { return ek::DType::bf16; }
  static ek::DType dtype(F16) { return ek::DType::f16; }

  ek::cuda::Integers integers(const Values& values) {
    if (values.empty()) return {};
    if (call.wide) return {values.data(), true};
    narrow.emplace_back(values.begin(), values.end());
    return {narrow.back().data(), false};
  }

  // Values out of range count as the nearest that is in range.
  void find_members() {
    Values bounds = call.spans;
    for (size_t s = 0; bounds.empty() && s + 1 < call.cu_seqlens.size(); s++) {
      bounds.push_back(call.cu_seqlens[s]), bounds.push_back(call.cu_seqlens[s + 1]);
    }
    for (int64_t b = 0; call.spans.empty() && call.cu_seqlens.empty() && b < call.batch; b++) {
      const int64_t n =
          call.lengths.empty() ? call.length : std::clamp<int64_t>(call.lengths[size_t(b)], 0, call.length);
      bounds.push_back(b * call.length), bounds.push_back(b * call.length + n);
    }
    for (size_t i = 0; i + 1 < bounds.size(); i += 2) {
      const int64_t start = std::clamp<int64_t>(bounds[i], 0, rows), end = std::min(bounds[i + 1], rows);
      std::vector<Member> all;
      int64_t rank = 0;
      for (int64_t row = start; row < end; row++) {
        if (!mask[size_t(row)] || ++rank <= (call.skip.empty() ? 0 : call.skip[i / 2])) continue;
        all.push_back({row, rank});
      }
      members.push_back(all);
      starts.push_back(start);
    }
  }

  void fill_hidden() {
    std::vector<bool> pooled_anywhere(size_t(rows), false);
    for (const auto& each : members) {
      for (const Member& member : each) pooled_anywhere[size_t(member.row)] = true;
    }
    x = naive::random(size_t(rows * call.channels), 1);
    const int64_t stride_t = call.channels + call.gap_t, stride_b = call.length * stride_t + call.gap_b;
    const int64_t size = call.shift + std::max<int64_t>(call.batch, 1) * stride_b;
    hidden.assign(size_t(size), ek::cuda::from_float<T>(nan));
    for (int64_t row = 0; row < rows; row++) {
      for (int64_t c = 0; c < call.channels; c++) {
        float& value = x[size_t(row * call.channels + c)];
        value = std::floor(value * 8) / 8;  // so that there are several maxima
        const int64_t at = call.shift + row / call.length * stride_b + row % call.length * stride_t + c;
        if (pooled_anywhere[size_t(row)]) hidden[size_t(at)] = ek::cuda::from_float<T>(value);
      }
    }
  }

  std::vector<int> barriers;  // of each launch

  // The launch of that number is made without one of its barriers.
  void run(int faulty_launch = -1, int faulty_barrier = -1) {
    const auto launch = [&](auto kernel, int64_t blocks, const auto&... arguments) {
      host_cuda::left_out_barrier = int(barriers.size()) == faulty_launch ? faulty_barrier : -1;
      host_cuda::launch(blocks, ek::cuda::threads, [&] { kernel(arguments...); });
      barriers.push_back(host_cuda::barriers_met);
    };
    ek::cuda::forward(p, places, launch);
    ek::cuda::backward(p, places, launch);
  }

  // ------------------------------------------------------------------------------------------------ the plain loops

  static double divisor(int64_t mode, const std::vector<Member>& all) {
    double ranks = 0;
    for (const Member& member : all) ranks += double(member.rank);
    switch (mode) {
      case PoolMode::mean: return double(all.size());
      case PoolMode::mean_sqrt_len_tokens: return std::sqrt(double(all.size()));
      case PoolMode::weightedmean: return ranks;
      default: return 1;
    }
  }

  // How much each member counts in channel c.
  std::vector<double> weights(int64_t mode, const std::vector<Member>& all, int64_t c) const {
    std::vector<double> w;
    size_t largest = 0;
    for (size_t i = 0; i < all.size(); i++) {
      if (at(all[i].row, c) > at(all[largest].row, c)) largest = i;
    }
    for (size_t i = 0; i < all.size(); i++) {
      const bool chosen = i == (mode == PoolMode::cls ? 0 : mode == PoolMode::max ? largest : all.size() - 1);
      const bool one = mode == PoolMode::cls || mode == PoolMode::lasttoken || mode == PoolMode::max;
      const double weight = one ? double(chosen) : mode == PoolMode::weightedmean ? double(all[i].rank) : 1;
      w.push_back(weight / divisor(mode, all));
    }
    return w;
  }

  double at(int64_t row, int64_t c) const { return x[size_t(row * call.channels + c)]; }

  bool is_right() const {
    const double tolerance = std::is_same_v<T, float> ? 2e-6 : std::is_same_v<T, Bf16> ? 5e-3 : 1e-3;
    bool right = true;
    std::vector<double> gradient(size_t(rows * call.channels), 0);
    for (size_t s = 0; s < members.size(); s++) {
      std::vector<double> values, d(size_t(columns), 0);
      double squares = 0, along = 0;
      for (int64_t i = 0; i < columns; i++) {
        const std::vector<double> w = weights(call.modes[size_t(i / call.channels)], members[s], i % call.channels);
        double value = 0;
        for (size_t j = 0; j < w.size(); j++) value += w[j] * at(members[s][j].row, i % call.channels);
        values.push_back(value);
        squares += value * value;
        along += value * ek::cuda::to_float(d_out[s * size_t(columns) + size_t(i)]);
      }
      const double norm = call.normalize && squares > 0 ? std::sqrt(squares) : 1;
      for (int64_t i = 0; i < columns; i++) {
        const size_t place = s * size_t(columns) + size_t(i);
        const int64_t mode = call.modes[size_t(i / call.channels)], c = i % call.channels;
        right &= naive::close(pooled[place], values[size_t(i)], 2e-6);
        right &= naive::close(ek::cuda::to_float(out[place]), values[size_t(i)] / norm, tolerance);
        double upstream = ek::cuda::to_float(d_out[place]);
        if (call.normalize && squares > 0) upstream = (upstream - values[size_t(i)] * along / squares) / norm;
        const std::vector<double> w = weights(mode, members[s], c);
        int64_t row_of_largest = -1;
        for (size_t j = 0; j < w.size(); j++) {
          gradient[size_t(members[s][j].row * call.channels + c)] += upstream * w[j];
          if (w[j] > 0) row_of_largest = members[s][j].row - starts[s];
        }
        right &= argmax[place] == (mode == PoolMode::max ? row_of_largest : -1);
      }
    }
    for (size_t i = 0; i < gradient.size(); i++) {
      right &= naive::close(ek::cuda::to_float(d_hidden[i]), gradient[i], tolerance);
    }
    return right;
  }
};

// --------------------------------------------------------------------------------------------------------- the cases

Call many_spans() {  // more than d_rows looks at at a time
  Call call{"many spans", 1, 70, 8, {PoolMode::mean, PoolMode::weightedmean}};
  std::mt19937 random(4);
  for (int i = 0; i < 600; i++) {
    const int64_t start = random() % 66;
    call.spans.insert(call.spans.end(), {start, start + int64_t(random() % 4)});
  }
  return call;
}

std::vector<Call> calls() {
  constexpr int64_t huge = int64_t(1) << 62;
  const Values mean_and_max = {PoolMode::mean, PoolMode::max};
  std::vector<Call> all;
  const char* names[] = {"cls", "lasttoken", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "sum"};
  for (int64_t mode = 0; mode < ek::pool_mode_count; mode++) {
    all.push_back({names[mode], 4, 70, 40, {mode}, {70, 0, 1, 13}});
    all.push_back({std::string(names[mode]) + " normalised", 3, 33, 37, {mode}, {33, 0, 13}, {}, {2, 1, 0}});
    all.back().normalize = true;
    all.push_back({std::string(names[mode]) + " masked", 3, 70, 24, {mode}, {}, {}, {1, 0, 80}});
    all.back().masked = true;
  }
  all.push_back({"every mode", 2, 70, 136, every_mode, {70, 9}, {}, {3, 0}});
  all.push_back({"every mode, odd width", 2, 70, 131, every_mode, {65, 70}});
  all.push_back({"every mode, truncated, normalised", 3, 20, 24, every_mode, {20, 0, 7}});
  all.back().out_channels = 100, all.back().normalize = true;
  all.push_back({"truncated to less than one mode", 2, 20, 80, {PoolMode::weightedmean, PoolMode::max}, {20, 7}});
  all.back().out_channels = 30;
  all.push_back({"more than one slab, no lengths", 2, 10, 300, mean_and_max});
  all.push_back({"one channel", 2, 5, 1, every_mode});
  all.push_back({"gaps between rows and sequences", 3, 20, 40, every_mode, {20, 6, 0}});
  all.back().gap_t = 8, all.back().gap_b = 16;
  all.push_back({"gaps that break the alignment", 3, 20, 40, every_mode, {20, 6, 0}});
  all.back().gap_t = 3, all.back().gap_b = 1;
  all.push_back({"a start that isn't aligned", 2, 20, 40, every_mode, {20, 6}});
  all.back().shift = 1;
  all.push_back({"packed", 0, 140, 40, every_mode, {}, {0, 5, 5, 6, 140}, {2, 1, 0, 3}});
  all.push_back({"packed, int32, normalised", 0, 140, 37, every_mode, {}, {0, 64, 128, 140}});
  all.back().wide = false, all.back().normalize = true;
  all.push_back({"spans", 3, 40, 24, every_mode, {}, {}, {}, {3, 9, 15, 60, 0, 120, 50, 50, 47, 80, 85, 90}});
  all.push_back({"spans, masked, int32, normalised", 3, 40, 24, every_mode, {}, {}, {}, {15, 60, 0, 120, 85, 90}});
  all.back().masked = true, all.back().wide = false, all.back().normalize = true;
  all.push_back({"spans over gaps", 3, 40, 24, every_mode, {}, {}, {}, {15, 60, 0, 120, 85, 90}});
  all.back().masked = true, all.back().gap_b = 32;
  all.push_back(many_spans());
  all.push_back({"longer than a chunk", 1, 2200, 8, every_mode, {2199}});
  all.push_back({"longer than a chunk, masked", 1, 2200, 9, every_mode, {}, {}, {700}});
  all.back().masked = true;
  all.push_back({"lengths out of range", 4, 20, 16, every_mode, {21, -1, huge, 3}, {}, {0, 0, huge, huge}});
  all.push_back({"skip out of range", 2, 20, 16, every_mode, {20, 20}, {}, {-5, 19}});
  all.push_back({"cu_seqlens out of range", 0, 20, 16, mean_and_max, {}, {-7, 5, huge}});
  all.push_back(
      {"spans out of range", 2, 20, 16, every_mode, {}, {}, {}, {-3, 7, 30, huge, 12, 5, huge, huge, 5, -huge}});
  all.push_back({"nothing to pool", 2, 20, 16, every_mode, {0, 20}, {}, {0, 20}});
  all.back().normalize = true;
  all.push_back({"no token", 2, 0, 16, every_mode});
  return all;
}

template <class T>
void test_calls(const char* dtype) {
  for (const Call& call : calls()) {
    Test<T> test(call);
    test.run();
    naive::report(std::string(dtype) + " " + call.name, test.is_right());
  }
}

template <class T>
void test_offsets_beyond_32_bits() {  // rows so far apart that their offsets are: only the first pages are ever touched
  Call call{"", 0, 3, 8, {PoolMode::sum}, {}, {0, 3}};
  Test<T> test(call);
  const int64_t stride = int64_t(3) << 30;
  const std::unique_ptr<T[]> memory(new T[size_t(2 * stride + 8)]);
  for (int64_t t = 0; t < 3; t++) {
    for (int64_t c = 0; c < 8; c++) memory[size_t(t * stride + c)] = test.hidden[size_t(t * 8 + c)];
  }
  test.p.hidden = memory.get(), test.p.stride_t = stride;
  test.run();
  naive::report("offsets beyond 32 bits", test.is_right());
}

void test_same_bits_in_any_order() {
  std::vector<std::vector<float>> results;
  for (unsigned seed = 1; seed < 4; seed++) {
    host_cuda::seed = seed;
    Test<float> test({"", 2, 300, 12, every_mode, {300, 77}});
    test.run();
    results.push_back(test.pooled);
    results.back().insert(results.back().end(), test.d_hidden.begin(), test.d_hidden.end());
  }
  host_cuda::seed = 1;
  naive::report("the same bits in any order of threads", results[0] == results[1] && results[0] == results[2]);
}

// ------------------------------------------------------------------------------------------------------- the mutants

// Each barrier of each kernel in turn is left out. Fresh memory holds NaN, or zeros: one of them has to show.
void test_barriers(const Call& call) {
  const size_t launches = call.normalize ? 6 : 5;
  for (size_t launch = 0; launch < launches; launch++) {
    for (int barrier = 0, barriers = 1; barrier < barriers; barrier++) {
      bool right = true;
      for (const int poison : {0xFF, 0}) {
        host_cuda::poison = poison;
        Test<float> test(call);
        test.run(int(launch), barrier);
        right &= test.is_right();
        barriers = test.barriers[launch];
      }
      const std::string name = call.name + ", launch " + std::to_string(launch) + " without barrier ";
      if (barriers > 0) naive::report(name + std::to_string(barrier) + " is noticed", !right);
    }
  }
  host_cuda::poison = 0xFF;
}

// The comparisons have an eye on what hides rows.
void test_what_is_left_out() {
  Call call{"", 2, 70, 24, {PoolMode::mean, PoolMode::weightedmean}, {}, {}, {3, 3}};
  call.masked = true;
  const auto notice = [&](const char* name, const auto& breakage) {
    Test<float> test(call);
    breakage(test);
    test.run();
    naive::report(std::string("leaving out ") + name + " is noticed", !test.is_right());
  };
  notice("mask", [](Test<float>& test) { test.p.mask = nullptr; });
  notice("skip", [](Test<float>& test) { test.places.skip = {}; });
  call.masked = false, call.skip = {}, call.lengths = {70, 8};
  notice("lengths", [](Test<float>& test) { test.places.lengths = {}; });
}

void expect_thrown(const std::string& name, const std::function<void()>& kernel) {
  try {
    host_cuda::launch(1, 64, kernel);
    naive::report(name, false);
  } catch (const std::logic_error& error) {
    naive::report(name + " (" + error.what() + ")", true);
  }
}

void test_what_would_hang_or_trap() {
  expect_thrown("a thread leaves", [] {
    if (threadIdx.x > 0) __syncthreads();
  });
  expect_thrown("a lane isn't in its mask", [] { __syncwarp(1); });
#ifndef __SANITIZE_ADDRESS__  // UBSan sees it first
  static uint4 memory[2];
  expect_thrown("a vector isn't aligned",
                [] { memory[0] = *reinterpret_cast<const uint4*>(reinterpret_cast<const char*>(memory) + 8); });
#endif
}

void test_warp_functions() {
  bool right = true;
  host_cuda::launch(2, 64, [&] {
    __shared__ unsigned squares[64];
    const unsigned i = threadIdx.x, warp_start = i / 32 * 32;
    right &= squares[i] == ~0u;  // poison, in the second block too
    __syncthreads();
    squares[i] = i * i;
    __syncwarp();
    right &= squares[i ^ 1] == (i ^ 1) * (i ^ 1);
    right &= __ballot_sync(~0u, i % 2) == 0xAAAAAAAA;
    right &= __shfl_sync(~0u, i, 3) == warp_start + 3;
    right &= __shfl_down_sync(~0u, i, 1) == (i % 32 == 31 ? i : i + 1);
    if (i < 8) right &= __shfl_xor_sync(0xFF, i, 7) == 7 - i;
  });
  naive::report("warp functions", right);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && argv[1] == std::string("mutants")) {
    Call call{"every mode", 2, 70, 24, every_mode, {70, 9}};
    call.normalize = true;
    test_barriers(call);
    test_barriers(many_spans());
    test_what_is_left_out();
  } else {
    test_warp_functions();
    test_what_would_hang_or_trap();
    test_calls<float>("float32");
    test_calls<Bf16>("bfloat16");
    test_calls<F16>("float16");
    test_offsets_beyond_32_bits<Bf16>();
    test_same_bits_in_any_order();
  }
  return naive::failures != 0;
}
