// Every variant that this CPU supports against a double loop: odd sizes, holes, grouped heads, strides, all gradients.
#include <cstdlib>
#include <cstring>
#include <memory>

#include "naive.h"

using namespace ek;

static int failures = 0;  // of one variant

// (B, L, H, D) in memory, NaN between the heads' rows; exactly as large as it must be, so that a sanitizer sees more,
// but for room to align rows of 16 numbers, or a multiple of that, to 64 bytes.
struct Rows {
  int64_t length, heads, dim, apart;
  std::vector<float> x;
  float* first;
  Rows(int64_t batch, int64_t l, int64_t h, int64_t d, float fill, bool aligned = false)
      : length(l), heads(h), dim(d), apart(d + (aligned ? 16 : 3)), x(size_t(batch * l * h * apart)) {
    if (aligned) x.resize(x.size() + 15);
    first = aligned ? x.data() + -(reinterpret_cast<uintptr_t>(x.data()) / 4) % 16 : x.data();
    for (float& value : x) value = NAN;
    for (int64_t b = 0; b < batch; b++) {
      for (int64_t t = 0; t < l; t++) {
        for (int64_t i = 0; i < h; i++) {
          for (int64_t c = 0; c < d; c++)
            at(b, i, t)[c] = fill != 0 ? fill : float(std::rand()) / float(RAND_MAX) - 0.5f;
        }
      }
    }
  }
  float* at(int64_t b, int64_t h, int64_t t) { return first + ((b * length + t) * heads + h) * apart; }
  Strided strided(DType dtype = DType::f32) {
    if (x.empty()) return {};
    if (dtype == DType::bf16) bf16 = naive::as_bf16(x);
    void* data = dtype == DType::f32 ? static_cast<void*>(first) : bf16.data() + (first - x.data());
    return {data, length * heads * apart, apart, heads * apart};
  }
  std::vector<uint16_t> bf16;  // what kernels see of x with that type
};

static double tolerance;

static void check(const char* what, const std::vector<int64_t>& shape, double got, double wanted) {
  const bool both_nan = got != got && wanted != wanted;
  if (naive::close(got, wanted, tolerance) || got == wanted || both_nan || failures++ > 20) return;  // ==: infinities
  std::printf("%s: got %g, wanted %g; shape", what, got, wanted);
  for (int64_t n : shape) std::printf(" %lld", static_cast<long long>(n));
  std::printf("\n");
}

static std::vector<double> zeros(int64_t n) { return std::vector<double>(static_cast<size_t>(n)); }

static void compare(const Variant& variant, int64_t group, int64_t kv_heads, int64_t lq, int64_t lk, int64_t d,
                    int64_t dv, int holes, DType dtype, bool large = false, bool with_nan = false) {
  const int64_t batch = 2, heads = group * kv_heads;
  tolerance = dtype == DType::f32 ? 2e-5 : 8e-3;
  const std::vector<int64_t> shape = {group, kv_heads, lq, lk, d, dv, holes};
  Rows q(batch, lq, heads, d, 0), k(batch, lk, kv_heads, d, 0), v(batch, lk, kv_heads, dv, 0),
      d_out(batch, lq, heads, dv, 0);
  Rows out(batch, lq, heads, dv, NAN, large), dq(batch, lq, heads, d, NAN, large),
      dk(batch, lk, kv_heads, d, NAN, large), dvalue(batch, lk, kv_heads, dv, NAN, large);
  Rows tau(batch, lq, heads, 1, 0), d_lse(batch, lq, heads, 1, 0), lse(batch, lq, heads, 1, NAN),
      d_tau(batch, lq, heads, 1, NAN), d_scale(batch, lq, heads, 1, NAN);
  AttentionParams p{};
  p.heads = heads;
  p.kv_heads = kv_heads;
  p.dim = d;
  p.dim_v = dv;
  p.dtype = dtype;
  p.large = large;
  p.scale_number = 0.7f;
  p.out = out.strided(dtype), p.d_out = d_out.strided(dtype);
  p.d_query = dq.strided(dtype), p.d_key = dk.strided(dtype), p.d_value = dvalue.strided(dtype);
  p.temperature = tau.strided(), p.d_lse = d_lse.strided(), p.lse = lse.strided();
  p.d_temperature = d_tau.strided(), p.d_scale = d_scale.strided();

  std::vector<int32_t> list;
  for (int64_t b = 0; b < batch; b++) {
    list.clear();
    for (int64_t j = 0; j < lk; j++) {
      if (holes == 0 || (holes == 1 && (j + b) % 3 != 1)) list.push_back(int32_t(j));
      if (holes == 2 && j >= 2 && j + 1 < lk) list.push_back(int32_t(j));  // a run that doesn't start at 0
    }
    std::vector<bool> visible(size_t(lk), false);
    for (int32_t j : list) visible[size_t(j)] = true;
    for (int64_t h = 0; h < kv_heads; h++) {
      for (int64_t j = 0; j < lk; j++) {
        for (int64_t c = 0; !visible[size_t(j)] && c < d; c++) k.at(b, h, j)[c] = NAN;
        for (int64_t c = 0; !visible[size_t(j)] && c < dv; c++) v.at(b, h, j)[c] = NAN;
      }
    }
    for (int64_t h = 0; with_nan && h < kv_heads; h++) k.at(b, h, list.back())[0] = NAN;
    for (int64_t h = 0; h < heads; h++) {
      for (int64_t i = 0; i < lq; i++) *tau.at(b, h, i) += 0.6f;  // in [0.1, 1.1]
    }
    p.query = q.strided(dtype), p.key = k.strided(dtype), p.value = v.strided(dtype);
    const AttentionSequence s = {b,
                                 0,
                                 lq,
                                 0,
                                 lk,
                                 int64_t(list.size()),
                                 holes == 2 && !list.empty() ? list[0] : 0,
                                 holes == 1 && !list.empty() ? list.data() : nullptr};
    const size_t floats = size_t(attention_scratch_floats(p, s.visible, group * lq, true));
    std::unique_ptr<float, void (*)(void*)> scratch(
        static_cast<float*>(std::aligned_alloc(64, (floats * 4 + 63) / 64 * 64)), std::free);
    std::memset(scratch.get(), 0xff, floats * 4);        // NaN
    AttentionTask task = {&s, 1, 1, 0, 0, 0, kv_heads};  // its own successor, so that rows are fetched ahead
    for (; task.chunk * attention_chunk < group * lq; task.chunk++)
      variant.attention.forward(p, task, &task, scratch.get());
    std::memset(scratch.get(), 0xff, floats * 4);
    task.chunk = 0;
    variant.attention.backward(p, task, &task, scratch.get());
    for (Rows* rows : {&out, &dq, &dk, &dvalue}) naive::from_bf16(rows->bf16, rows->x);

    for (int64_t h = 0; h < kv_heads; h++) {
      std::vector<double> want_dk = zeros(lk * d), want_dv = zeros(lk * dv);
      for (int64_t row = 0; row < group * lq; row++) {
        const int64_t head = h * group + row / lq, i = row % lq;
        const double t = *tau.at(b, head, i);
        std::vector<double> u = zeros(lk), weight = zeros(lk), d_weight = zeros(lk), o = zeros(dv), want_dq = zeros(d);
        double top = -INFINITY, sum = 0, delta = 0, want_tau = 0, want_scale = 0;
        for (int32_t j : list) {
          for (int64_t c = 0; c < d; c++) u[size_t(j)] += double(q.at(b, head, i)[c]) * k.at(b, h, j)[c] * 0.7f / t;
          top = std::fmax(top, u[size_t(j)]);
        }
        for (int32_t j : list) sum += weight[size_t(j)] = std::exp(u[size_t(j)] - top);
        for (int32_t j : list) {
          weight[size_t(j)] /= sum;
          for (int64_t c = 0; c < dv; c++) {
            o[size_t(c)] += weight[size_t(j)] * v.at(b, h, j)[c];
            d_weight[size_t(j)] += double(d_out.at(b, head, i)[c]) * v.at(b, h, j)[c];
            want_dv[size_t(j * dv + c)] += weight[size_t(j)] * d_out.at(b, head, i)[c];
          }
          delta += weight[size_t(j)] * d_weight[size_t(j)];
        }
        for (int32_t j : list) {
          const double du = weight[size_t(j)] * (d_weight[size_t(j)] - delta + *d_lse.at(b, head, i));
          want_tau -= du * u[size_t(j)] / t;
          want_scale += du * u[size_t(j)] / 0.7f;
          for (int64_t c = 0; c < d; c++) {
            want_dq[size_t(c)] += du * k.at(b, h, j)[c] * 0.7f / t;
            want_dk[size_t(j * d + c)] += du * q.at(b, head, i)[c] * 0.7f / t;
          }
        }
        const double want_lse = list.empty() ? -INFINITY : top + std::log(sum);
        for (int64_t c = 0; c < dv; c++) check("out", shape, out.at(b, head, i)[c], o[size_t(c)]);
        for (int64_t c = 0; c < d; c++) check("d_query", shape, dq.at(b, head, i)[c], want_dq[size_t(c)]);
        check("lse", shape, *lse.at(b, head, i), want_lse);
        check("d_temperature", shape, *d_tau.at(b, head, i), want_tau);
        check("d_scale", shape, *d_scale.at(b, head, i), want_scale);
      }
      for (int64_t j = 0; j < lk; j++) {
        for (int64_t c = 0; c < d; c++) check("d_key", shape, dk.at(b, h, j)[c], want_dk[size_t(j * d + c)]);
        for (int64_t c = 0; c < dv; c++) check("d_value", shape, dvalue.at(b, h, j)[c], want_dv[size_t(j * dv + c)]);
      }
    }
  }
}

int main() {
  return naive::for_variants([](const Variant& variant) {
    failures = 0;
    for (DType dtype : {DType::f32, DType::bf16}) {
      for (int holes = 0; holes < 3; holes++) {
        for (int64_t n : {1, 2, 7, 16, 33}) compare(variant, 1, 2, n, n, 8, 8, holes, dtype);
        for (bool large : {false, true}) compare(variant, 1, 2, 33, 29, 32, 48, holes, dtype, large);  // whole vectors
        compare(variant, 2, 2, 13, 29, 24, 40, holes, dtype);
        compare(variant, 3, 1, 70, 9, 256, 8, holes, dtype);
        compare(variant, 1, 1, 5, 400, 8, 256, holes, dtype);
        compare(variant, 4, 1, 250, 67, 16, 8, holes, dtype);
      }
      compare(variant, 1, 2, 13, 29, 24, 40, 0, dtype, false, true);
      compare(variant, 1, 1, 1, 0, 8, 8, 0, dtype);
      compare(variant, 1, 1, 0, 3, 8, 8, 0, dtype);
    }
    naive::report(variant.name + " attention", failures == 0);
  });
}
