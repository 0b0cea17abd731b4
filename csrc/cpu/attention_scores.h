// What attention's options do between q·k and the softmax, and their gradients; the maths is _attend() in
// embedkern/reference/attention.py. Row i stands at position p = i + k_length - q_length. For variant sources only.
#pragma once
#include "attention_rows.h"

namespace ek::EK_VARIANT {
namespace {

constexpr float hidden_score = -__builtin_inff();

EK_INLINE int64_t position(const Row& row) { return row.t - row.s->q_start + row.s->k_length - row.s->q_length; }

// Of the visible keys, those [first, first + n) that any of a block's rows can see: multiples of W from 0 on, n >= 1.
struct KeyRange {
  int64_t first, n;

  KeyRange(const AttentionParams& p, Row row, int64_t m, int64_t visible) : first(0), n(visible) {
    if (p.window_left < 0 && p.window_right < 0) return;
    int64_t least_position = position(row), most_position = least_position;
    for (int64_t i = 0; i < m; i++, row.next()) {
      least_position = least(least_position, position(row));
      most_position = most(most_position, position(row));
    }
    const int64_t k_first = row.s->k_first;
    int64_t end = visible;
    if (p.window_left >= 0) first = most(0, least_position - p.window_left - k_first);
    if (p.window_right >= 0) end = most(0, least(end, most_position + p.window_right + 1 - k_first));
    first = least(first, visible - 1) / W * W;
    n = most(1, end - first);
  }
};

template <class T>
EK_INLINE T* at(const ScoreGrid& x, const Row& row, int64_t key) {
  return static_cast<T*>(x.data) + row.s->b * x.stride_b + row.h * x.stride_h + (row.t - row.s->q_start) * x.stride_t +
         key * x.stride_k;
}

// term[first + i] for lanes i < n, of a row of a bias
EK_INLINE Vec bias_at(const float* term, int64_t stride, int64_t j, int64_t n) {
  if (stride == 1) return load_at(term, j, n);
  Vec x{};
  for (int64_t lane = 0; lane < least(W, n - j); lane++) x[lane] = term[(j + lane) * stride];
  return x;
}

// term[clip(d, -reach, reach) + reach] for the distances d = distance … distance + W - 1
EK_INLINE Vec relative_at(const float* term, int64_t reach, int64_t distance) {
  if (distance >= -reach && distance + W - 1 <= reach) return load(term + distance + reach);
  Vec x;
  for (int64_t lane = 0; lane < W; lane++) x[lane] = term[most(-reach, least(reach, distance + lane)) + reach];
  return x;
}

// -∞ if one of them is: a key that is hidden once stays so, whatever is added.
EK_INLINE Vec plus_term(Vec z, Vec term) {
  return select((z == hidden_score) | (term == hidden_score), splat(hidden_score), z + term);
}

// Cephes' tanhf: a polynomial below 0.625, beyond it 1 - 2 / (e^2x + 1).
EK_INLINE Vec tanh(Vec x) {
  const Vec magnitude = (Vec)((IVec)x & 0x7fffffff), square = x * x;
  Vec y = -5.70498872745e-3f * square + 2.06390887954e-2f;
  y = y * square - 5.37397155531e-2f;
  y = y * square + 1.33314422036e-1f;
  y = y * square - 3.33332819422e-1f;
  const Vec bounded = select(magnitude > 20.0f, splat(20.0f), magnitude);
  const Vec large = 1.0f - 2.0f / (exp(2 * bounded) + 1.0f);
  const Vec with_sign = (Vec)((IVec)large | ((IVec)x & int32_t(0x80000000)));
  return select(x != x, x, select(magnitude < 0.625f, x + x * square * y, with_sign));
}

// z (m, n) = scale · q·k of the keys from range.first on → cap(z) + bias + relative_bias, -∞ where a row doesn't see
// the key. key_bias: -∞ for a hidden key, NaN for one whose value no row that sees it may hide, else 0; null: all 0.
// cap_slope: the derivative of cap, null if it isn't wanted.
inline void adjust(const AttentionParams& p, Row row, int64_t m, const KeyRange& range, const float* key_bias, float* z,
                   float* cap_slope, int64_t ld) {
  const int64_t n = range.n, key = row.s->k_first + range.first;  // of column 0
  for (int64_t i = 0; i < m; i++, row.next(), z += ld, cap_slope = cap_slope ? cap_slope + ld : nullptr) {
    const float* bias = p.bias.data ? at<const float>(p.bias, row, key) : nullptr;
    const float* relative = p.relative_bias ? p.relative_bias + row.h * (2 * p.reach + 1) : nullptr;
    for (int64_t j = 0; p.softcap > 0 && j < n; j += W) {
      const Vec t = tanh(load(z + j) / p.softcap);
      store(z + j, p.softcap * t);
      if (cap_slope) store(cap_slope + j, 1.0f - t * t);
    }
    for (int64_t j = 0; bias && j < n; j += W) {
      store(z + j, plus_term(load(z + j), bias_at(bias, p.bias.stride_k, j, n)));
    }
    for (int64_t j = 0; relative && j < n; j += W) {
      store(z + j, plus_term(load(z + j), relative_at(relative, p.reach, key + j - position(row))));
    }
    for (int64_t j = 0; key_bias && j < n; j += W) {
      store(z + j, plus_term(load(z + j), load(key_bias + range.first + j)));
    }
    if (p.mask.data) {
      const bool* mask = at<const bool>(p.mask, row, key);
      for (int64_t j = 0; j < n; j++) z[j] = mask[j * p.mask.stride_k] ? z[j] : hidden_score;
    }
    if (p.window_left >= 0) {
      const int64_t begin = least(n, position(row) - p.window_left - key);
      for (int64_t j = 0; j < begin; j++) z[j] = hidden_score;
    }
    if (p.window_right >= 0) {
      for (int64_t j = most(0, position(row) + p.window_right + 1 - key); j < n; j++) z[j] = hidden_score;
    }
  }
}

// d (m, n): gradients of z / temperature, times 1 / temperature → of scale · q·k. Adds those of bias and relative_bias
// to the task's slot, and writes temperature's: -Σ d (z - top) / temperature - top · d_lse / temperature².
inline void adjust_backward(const AttentionParams& p, Row row, int64_t m, const KeyRange& range, int64_t slot,
                            const float* z, const float* top, const float* inverse, const float* d_lse,
                            const float* cap_slope, float* d, int64_t ld) {
  const int64_t n = range.n, key = row.s->k_first + range.first;
  for (int64_t i = 0; i < m; i++, row.next(), d += ld) {
    if (p.d_bias.data) {
      double* to = at<double>(p.d_bias, row, key) + slot * p.d_bias_slot;
      const int64_t stride = p.d_bias.stride_k;
      for (int64_t j = 0; j < n; j++) to[j * stride] += d[j];
    }
    if (p.d_relative_bias) {
      double* to = p.d_relative_bias + (slot * p.heads + row.h) * (2 * p.reach + 1) + p.reach;
      const int64_t distance = key - position(row);  // of column 0
      const int64_t low = most(0, least(n, -p.reach - distance)), high = most(low, least(n, p.reach + 1 - distance));
      double left = 0, right = 0;
      for (int64_t j = 0; j < low; j++) left += d[j];
      for (int64_t j = low; j < high; j++) to[distance + j] += d[j];
      for (int64_t j = high; j < n; j++) right += d[j];
      to[-p.reach] += left;
      to[p.reach] += right;
    }
    if (p.d_temperature.data) {
      Vec total{};
      for (int64_t j = 0; j < n; j += W) {
        const Vec d_u = load(d + j);
        total += select(d_u == 0.0f, Vec{}, d_u * (load(z + i * ld + j) - top[i]));  // 0 · -∞ where it is hidden
      }
      *row.in<float>(p.d_temperature) = -(sum_lanes(total) + top[i] * d_lse[i] * inverse[i]) * inverse[i];
    }
    for (int64_t j = 0; p.softcap > 0 && j < n; j += W) {
      const Vec d_capped = load(d + j);  // 0 · NaN where it is hidden
      store(d + j, select(d_capped == 0.0f, Vec{}, d_capped * load(cap_slope + i * ld + j)));
    }
  }
}

// Finite elements as they are, 0 for the others: what a row doesn't see is multiplied by 0 all the same.
template <class E>
void finite_only(E* x, int64_t n) {
  for (int64_t i = 0; i < n; i += W) store(x + i, select(load(x + i) - load(x + i) == 0.0f, load(x + i), Vec{}));
}

// key_bias of n visible keys, and whether one isn't 0. value (n, dim): what isn't finite there makes the rows that see
// its key NaN; null: not asked.
template <class E>
bool find_key_bias(const AttentionSequence& s, const E* value, int64_t dim, float* key_bias) {
  for (int64_t j = 0; j < s.visible + 1; j += W) store(key_bias + j, Vec{});
  bool found = false;
  for (int64_t j = 0; (value || s.hidden) && j < s.visible; j++) {
    Vec sum{};
    for (int64_t c = 0; value && c < dim; c += W) sum += load(value + j * dim + c) - load(value + j * dim + c);
    if (value) key_bias[j] = sum_lanes(sum);
    if (s.hidden && s.hidden[s.k_first + j] != 0) key_bias[j] = hidden_score;
    found |= key_bias[j] != 0;
  }
  return found;
}

// A bijection of 32 bits that spreads every bit over all, as _mix() in the reference.
template <class Bits>
EK_INLINE Bits mix(Bits x) {
  x = (x ^ (x >> 16)) * 0x21F0AAADu;
  x = (x ^ (x >> 15)) * 0xD35A2D97u;
  return x ^ (x >> 15);
}

// to = weights (m, n) of the keys that dropout keeps, 0 for the others: by dropout_factors() in the reference, but for
// the factor 1 / (1 - dropout_p).
inline void drop(const AttentionParams& p, Row row, int64_t m, const KeyRange& range, const float* weights, float* to,
                 int64_t ld) {
  const uint32_t low = uint32_t(p.seed), high = uint32_t(p.seed >> 32);
  const uint32_t threshold = p.dropout_p >= 1 ? 0 : uint32_t(p.dropout_p * 4294967296.0);
  UVec lanes;
  for (int lane = 0; lane < W; lane++) lanes[lane] = uint32_t(row.s->k_first + range.first + lane);
  for (int64_t i = 0; i < m; i++, row.next()) {
    const int64_t number =
        row.s->b * p.row_number.stride_b + row.h * p.row_number.stride_h + row.t * p.row_number.stride_t;
    const uint32_t of_row = mix(mix(uint32_t(number) + low) + high);
    for (int64_t j = 0; j < range.n; j += W) {
      const UVec bits = mix(mix(lanes + uint32_t(j)) ^ of_row);
      const IVec kept = bits >= threshold;
      store(to + i * ld + j, select(kept, load(weights + i * ld + j), Vec{}));
    }
  }
}

}  // namespace
}  // namespace ek::EK_VARIANT
