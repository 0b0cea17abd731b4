// The row softmax of attention, forward and backward. For variant sources only.
#pragma once
#include "attention_rows.h"

namespace ek::EK_VARIANT {
namespace {

// What each row of a block has: z = scale · q·k, the gradient's slope = scale / temperature (or the inverse
// temperature, where scale comes later), and e^(x / temperature) as 2^(c x), c = 1 / (temperature ln 2) = high + low, x
// >= least, below which it is 0.
struct Factors {
  bool scale_later;
  float *scale, *inverse, *slope, *high, *low, *least;

  Factors(Scratch& scratch, int64_t rows, bool scale_later)
      : scale_later(scale_later),
        scale(scratch.take(rows + W)),
        inverse(scratch.take(rows + W)),
        slope(scratch.take(rows + W)),
        high(scratch.take(rows + W)),
        low(scratch.take(rows + W)),
        least(scratch.take(rows + W)) {}

  void set(int64_t i, float scale_given, float temperature) {
    // Beyond these bounds nothing changes any more, and within them nothing overflows.
    const float tau = temperature < 1e-30f ? 1e-30f : temperature > 1e30f ? 1e30f : temperature;
    const double c = 1.4426950408889634 / tau;
    scale[i] = scale_given;
    inverse[i] = 1 / tau;
    slope[i] = (scale_later ? 1 : scale_given) / tau;
    high[i] = float(c);
    low[i] = float(c - double(high[i]));
    least[i] = float(-127 / c);
  }
  void of_rows(const AttentionParams& p, Row row, int64_t m) {
    for (int64_t i = 0; i < m; i++, row.next()) {
      set(i, p.scale.data ? *row.in<float>(p.scale) : p.scale_number,
          p.temperature.data ? *row.in<float>(p.temperature) : p.temperature_number);
    }
  }
  // Numbers hold for every block: once is enough. The divisions took a tenth of the time at L = 32.
  void of_all(const AttentionParams& p, int64_t rows) {
    if (p.scale.data || p.temperature.data) return;
    set(0, p.scale_number, p.temperature_number);
    for (float* x : {scale, inverse, slope, high, low, least}) {
      for (int64_t i = 1; i < rows; i++) x[i] = x[0];
    }
  }
  void of_block(const AttentionParams& p, const Row& row, int64_t m) {
    if (p.scale.data || p.temperature.data) of_rows(p, row, m);
  }
};

// One value for each of W rows from the vectors that hold their lanes' partial results.
template <class Combine>
EK_INLINE Vec across(Vec* partial, const Combine& combine) {
  transpose(partial);
#pragma GCC unroll 4
  for (int half = W / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; i++) partial[i] = combine(partial[i], partial[i + half]);
  return partial[0];
}

constexpr auto add = [](Vec a, Vec b) __attribute__((always_inline)) { return a + b; };
constexpr auto maximum = [](Vec a, Vec b) __attribute__((always_inline)) { return larger(a, b); };

// 2^(c x) for x <= 0, c in two floats so that its own rounding doesn't grow with x. With c x = n + f, |f| <= ½: 2^n
// from the bits of the sum that rounds c x, exponent bias included, and a polynomial for 2^f (relative error 2e-9). 0
// below 2^-126, NaN for NaN; 18 instructions, exp() has 28.
EK_INLINE Vec power(Vec x, Vec high, Vec low, Vec least) {
  constexpr float rounder = 0x1.8p23f + 127;
  x = larger(least, x);  // this way round NaN stays NaN
  const Vec shifted = x * high + rounder;
  const Vec f = x * low + (x * high - (shifted - rounder));
  Vec y = 1.5345810970757e-4f * f + 1.3399930903688e-3f;
  y = y * f + 9.6184890717268e-3f;
  y = y * f + 5.5503286421299e-2f;
  y = y * f + 2.4022646248341e-1f;
  y = y * f + 6.9314718246460e-1f;
  y = y * f + 1.0f;
  return y * (Vec)((UVec)shifted << 23);
}

// z (m, n) → exp((z - top) / temperature) in place; top: each row's maximum, sum: of its exponentials. The maximum goes
// before the division by temperature, which may overflow.
void exponentials(float* z, int64_t ld, int64_t m, int64_t n, const Factors& factors, float* top, float* sum) {
  const int64_t whole = n / W * W;
  IVec tail;
  for (int lane = 0; lane < W; lane++) tail[lane] = lane < n - whole ? -1 : 0;
  for (int64_t i = 0; i < m; i += W) {
    const int64_t rows = least(W, m - i);
    Vec partial[W];
    for (int64_t r = rows; r < W; r++) partial[r] = Vec{};
    for (int64_t r = 0; r < rows; r++) {
      float* row = z + (i + r) * ld;
      if (whole < n) store(row + whole, select(tail, load(row + whole), splat(-__builtin_inff())));
      Vec largest = load(row), other = largest;
      int64_t j = W;
      for (; j + W < n; j += 2 * W) {
        largest = larger(largest, load(row + j));
        other = larger(other, load(row + j + W));
      }
      if (j < n) largest = larger(largest, load(row + j));
      partial[r] = larger(largest, other);
    }
    store(top + i, larger(across(partial, maximum), splat(-3.4028235e38f)));  // finite where no key is seen
    for (int64_t r = 0; r < rows; r++) {
      float* row = z + (i + r) * ld;
      const Vec shift = splat(top[i + r]);
      const Vec high = splat(factors.high[i + r]), low = splat(factors.low[i + r]),
                low_end = splat(factors.least[i + r]);
      Vec total{}, other{};
      int64_t j = 0;
      for (; j + W < n; j += 2 * W) {  // two at a time: they share the loads of the constants
        const Vec e = power(load(row + j) - shift, high, low, low_end);
        const Vec f = power(load(row + j + W) - shift, high, low, low_end);
        store(row + j, e);
        store(row + j + W, f);
        total += e;
        other += f;
      }
      if (j < n) {
        const Vec e = power(load(row + j) - shift, high, low, low_end);
        store(row + j, e);
        total += e;
      }
      partial[r] = total + other;
    }
    for (int64_t r = rows; r < W; r++) partial[r] = splat(1.0f);  // to be divided by, unused
    store(sum + i, across(partial, add));
  }
}

// With e the exponentials, r their row sums, P = e / r and g = d_out / r, which is thin:  d_v = eᵀ · g,
// dP / r = g · vᵀ,  delta = Σ P dP = Σ e dP / r,  dS = slope P (dP - delta + d_lse) = slope e (dP / r - (delta - d_lse)
// / r),  d_q = dS · k,  d_k = dSᵀ · q. `d` comes as dP / r and leaves as dS. excess: Σ dS - slope d_lse, 0 but for
// rounding.
template <bool with_excess>
void softmax_backward(const float* e, float* d, int64_t ld, int64_t m, int64_t n, const float* d_lse,
                      const float* reciprocal, const float* slope, float* excess) {
  for (int64_t i = 0; i < m; i += W) {
    const int64_t rows = least(W, m - i);
    Vec partial[W];
    for (int64_t r = rows; r < W; r++) partial[r] = Vec{};
    for (int64_t r = 0; r < rows; r++) {
      const int64_t row = (i + r) * ld;
      Vec total{};
      for (int64_t j = 0; j < n; j += W) total += load(e + row + j) * load(d + row + j);
      partial[r] = total;
    }
    float shift[W];
    store(shift, (across(partial, add) - load(d_lse + i)) * load(reciprocal + i));
    for (int64_t r = 0; r < rows; r++) {
      const int64_t row = (i + r) * ld;
      const Vec factor = splat(slope[i + r]), less = splat(shift[r]);
      Vec total{};
      for (int64_t j = 0; j < n; j += W) {
        const Vec d_s = load(e + row + j) * factor * (load(d + row + j) - less);
        store(d + row + j, d_s);
        if (with_excess) total += d_s;
      }
      partial[r] = total;
    }
    for (int64_t r = rows; r < W; r++) partial[r] = Vec{};
    if (with_excess) store(excess + i, across(partial, add) - load(slope + i) * load(d_lse + i));
  }
}

}  // namespace
}  // namespace ek::EK_VARIANT
