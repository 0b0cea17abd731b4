// The gated unit without torch: each variant against plain loops in float64.
#include "naive.h"

namespace {

constexpr int64_t rows = 150, width = 300, stride = 2 * width + 3;  // two blocks of columns, the second one not whole

double gelu(double x) { return 0.5 * x * std::erfc(-x / std::sqrt(2.0)); }
double d_gelu(double x) {
  return 0.5 * std::erfc(-x / std::sqrt(2.0)) + x * std::exp(-0.5 * x * x) / std::sqrt(2 * std::acos(-1.0));
}

template <class T>
bool is_right(const ek::GatedKernels& kernels, double tolerance) {
  const T nan = T(NAN);
  std::vector<T> u(rows * stride, nan), d_g(3 * width), sums(3 * width, nan), d_u(rows * 2 * width, nan);
  std::vector<T> d_bias(2 * width, nan);
  const std::vector<float> values = naive::random(rows * 2 * width, 1), upstream = naive::random(3 * width, 2);
  const int64_t ends[3] = {70, 70, rows};
  std::vector<int64_t> sequence(rows);
  for (int64_t r = 0; r < rows; r++) {
    sequence[size_t(r)] = r < 70 ? 2 : 0;
    for (int64_t c = 0; c < 2 * width; c++) u[size_t(r * stride + c)] = T(3 * values[size_t(r * 2 * width + c)]);
  }
  for (size_t i = 0; i < d_g.size(); i++) d_g[i] = T(upstream[i]);
  ek::GatedParams p{};
  p.rows = rows, p.width = width, p.wide = sizeof(T) == 8, p.u = u.data(), p.u_stride = stride;
  p.ends = ends, p.sums = sums.data(), p.d_g = d_g.data(), p.sequence = sequence.data();
  p.d_u = d_u.data(), p.d_bias = d_bias.data();
  for (int64_t block = 0; block * ek::gated_block < width; block++) {
    for (int64_t piece = 0; piece < 3; piece++) kernels.sums(p, piece, block);
    kernels.d_u(p, block);
  }

  bool right = true;
  for (int64_t c = 0; c < width; c++) {
    double wanted[3] = {}, of_a = 0, of_gate = 0;
    for (int64_t r = 0; r < rows; r++) {
      const double a = u[size_t(r * stride + c)], gate = u[size_t(r * stride + width + c)];
      const double d = d_g[size_t(sequence[size_t(r)] * width + c)];
      wanted[r < 70 ? 0 : 2] += a * gelu(gate);
      right &= naive::close(d_u[size_t(r * 2 * width + c)], d * gelu(gate), tolerance);
      right &= naive::close(d_u[size_t(r * 2 * width + width + c)], d * a * d_gelu(gate), tolerance);
      of_a += d * gelu(gate), of_gate += d * a * d_gelu(gate);
    }
    for (int64_t piece = 0; piece < 3; piece++) {
      right &= naive::close(sums[size_t(piece * width + c)], wanted[piece], 10 * tolerance);
    }
    right &= naive::close(d_bias[size_t(c)], of_a, 10 * tolerance);
    right &= naive::close(d_bias[size_t(width + c)], of_gate, 10 * tolerance);
  }
  return right;
}

}  // namespace

int main() {
  return naive::for_variants([](const ek::Variant& variant) {
    naive::report(variant.name + " float32", is_right<float>(variant.gated, 1e-6));
    naive::report(variant.name + " float64", is_right<double>(variant.gated, 1e-14));
  });
}
