// Pooling without torch: each variant against plain loops, with NaN wherever nothing may be read.
#include "naive.h"

namespace {

constexpr int64_t length = 70, channels = 37, batch = 3, rows = batch * length;
const float nan = std::nanf("");

struct Example {
  std::vector<float> hidden = naive::random(rows * channels, 1);
  std::vector<int64_t> lengths = {70, 0, 13}, modes;
  std::vector<ek::PoolSegment> segments;
  std::vector<float> out, pooled, d_out, d_pooled, d_hidden;
  std::vector<int32_t> argmax;
  std::vector<int64_t> chunk_segments, chunk_offset = {0};
  std::vector<float> scratch = std::vector<float>(ek::pool_scratch_floats + 2 * channels + 64, nan);
  ek::PoolParams p{};

  explicit Example(std::vector<int64_t> modes_wanted) : modes(std::move(modes_wanted)) {
    for (int64_t b = 0; b < batch; b++) {
      const int64_t n = lengths[size_t(b)], skipped = n > 2 ? 2 : 0, start = b * length;
      segments.push_back({start, start + n, skipped, start + skipped, start + n - 1, n - skipped});
      for (int64_t t = 0; t < length; t++) {
        for (int64_t c = 0; c < channels; c++) {
          if (t < skipped || t >= n) hidden[size_t((start + t) * channels + c)] = nan;
        }
      }
    }
    const size_t size = size_t(batch) * modes.size() * channels;
    out = pooled = d_pooled = std::vector<float>(size, nan);
    d_out = naive::random(size, 2);
    d_hidden.assign(rows * channels, nan);
    argmax.assign(size, 0);
    for (int64_t chunk = 0; chunk * ek::pool_chunk < rows; chunk++) {
      for (int64_t s = 0; s < batch; s++) {
        const ek::PoolSegment& segment = segments[size_t(s)];
        const bool touches = segment.first < (chunk + 1) * ek::pool_chunk && segment.last >= chunk * ek::pool_chunk;
        if (segment.count && touches) chunk_segments.push_back(s);
      }
      chunk_offset.push_back(int64_t(chunk_segments.size()));
    }
    const int64_t out_channels = int64_t(modes.size()) * channels;
    p.segments = batch, p.rows = rows, p.length = length, p.channels = channels, p.out_channels = out_channels;
    p.modes = int64_t(modes.size()), p.mode = modes.data(), p.dtype = ek::DType::f32;
    p.hidden = hidden.data(), p.stride_b = length * channels, p.stride_t = channels;
    p.segment = segments.data(), p.eps = 1e-12f;
    p.out = out.data(), p.pooled = pooled.data(), p.argmax = argmax.data();
    p.d_out = d_out.data(), p.d_out_stride = out_channels, p.d_pooled = d_pooled.data(), p.d_hidden = d_hidden.data();
    p.chunk_segments = chunk_segments.data(), p.chunk_offset = chunk_offset.data();
  }

  void run(const ek::PoolingKernels& kernels) {
    for (int64_t s = 0; s < batch; s++) kernels.pool(p, s, 0, scratch.data());
    for (int64_t s = 0; s < batch; s++) kernels.normalize(p, s);
    for (int64_t s = 0; s < batch; s++) kernels.d_pooled(p, s);
    for (size_t i = 0; i + 1 < chunk_offset.size(); i++) kernels.d_hidden(p, int64_t(i), scratch.data());
  }

  // Mean and max of one channel of one sequence, and their gradients, by plain loops.
  bool is_right() const {
    bool right = true;
    for (int64_t b = 0; b < batch; b++) {
      const ek::PoolSegment& s = segments[size_t(b)];
      for (int64_t c = 0; c < channels; c++) {
        double sum = 0, largest = -INFINITY;
        int64_t where = -1;
        for (int64_t row = s.first; s.count && row <= s.last; row++) {
          const float x = hidden[size_t(row * channels + c)];
          sum += x;
          if (x > largest) largest = x, where = row;
        }
        const size_t at = size_t(b * 2 * channels + c);
        right &= naive::close(out[at], s.count ? sum / double(s.count) : 0);
        right &= naive::close(out[at + channels], s.count ? largest : 0);
        for (int64_t row = b * length; row < (b + 1) * length; row++) {
          double wanted = 0;
          if (s.count && row >= s.first && row <= s.last) {
            wanted = d_out[at] / double(s.count) + (row == where ? d_out[at + channels] : 0);
          }
          right &= naive::close(d_hidden[size_t(row * channels + c)], wanted);
        }
      }
    }
    return right;
  }
};

// What 16 bits stand for.
double value(int bits, ek::DType dtype) {
  const int digits = dtype == ek::DType::f16 ? 10 : 7, bias = dtype == ek::DType::f16 ? 15 : 127;
  const int exponent = (bits & 0x7fff) >> digits, fraction = bits & ((1 << digits) - 1);
  if (exponent > 2 * bias) return fraction ? NAN : bits & 0x8000 ? -INFINITY : INFINITY;
  const int leading = exponent ? 1 << digits : 0;
  const double magnitude = std::ldexp(leading + fraction, (exponent ? exponent : 1) - bias - digits);
  return bits & 0x8000 ? -magnitude : magnitude;
}

bool same(double a, double b) { return a == b ? std::signbit(a) == std::signbit(b) : a != a && b != b; }

// Every number of 16 bits is read and written; between two of them the nearest is written, of both the even one.
bool conversions_are_right(const ek::PoolingKernels& kernels, ek::DType dtype) {
  constexpr int all = 1 << 16;
  const int infinite = dtype == ek::DType::f16 ? 0x7c00 : 0x7f80;
  const double past_the_last = dtype == ek::DType::f16 ? 0x1p16 : 0x1p128;
  const int64_t mode = ek::cls;
  std::vector<uint16_t> hidden(all), out(all);
  std::vector<float> pooled(all, nan), scratch(ek::pool_scratch_floats);
  for (int i = 0; i < all; i++) hidden[size_t(i)] = uint16_t(i);
  ek::PoolSegment segment = {0, 1, 0, 0, 0, 1};
  ek::PoolParams p{};
  p.segments = p.rows = p.length = p.modes = 1, p.channels = p.out_channels = p.stride_b = p.stride_t = all;
  p.mode = &mode, p.dtype = dtype, p.hidden = hidden.data(), p.segment = &segment;
  p.out = out.data(), p.pooled = pooled.data();
  for (int64_t block = 0; block * ek::pool_block < all; block++) kernels.pool(p, 0, block, scratch.data());
  kernels.normalize(p, 0);
  bool right = true;
  for (int i = 0; i < all; i++) {
    right &= same(pooled[size_t(i)], value(i, dtype)) && same(value(out[size_t(i)], dtype), value(i, dtype));
  }
  for (const int side : {-1, 0, 1}) {  // of the middle between a number and the next one
    const auto finite = [&](int i) { return (i & 0x7fff) < infinite; };
    for (int i = 0; i < all; i++) {
      if (!finite(i)) continue;
      const int bits = i & 0x7fff;
      const double next = bits + 1 == infinite ? past_the_last : value(bits + 1, dtype);
      const float middle = float((value(bits, dtype) + next) / 2);
      const float x = side == 0 ? middle : std::nextafter(middle, side < 0 ? 0 : INFINITY);
      pooled[size_t(i)] = bits == i ? x : -x;
    }
    kernels.normalize(p, 0);
    for (int i = 0; i < all; i++) {
      if (finite(i)) right &= out[size_t(i)] == i + (side > 0 || (side == 0 && i & 1));
    }
  }
  return right;
}

}  // namespace

int main() {
  return naive::for_variants([](const ek::Variant& variant) {
    Example example({ek::mean, ek::max});
    example.run(variant.pooling);
    naive::report(variant.name + " mean and max", example.is_right());
    naive::report(variant.name + " bfloat16", conversions_are_right(variant.pooling, ek::DType::bf16));
    naive::report(variant.name + " float16", conversions_are_right(variant.pooling, ek::DType::f16));
  });
}
