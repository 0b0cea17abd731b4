// Attention on the CPU; the maths is embedkern/reference/attention.py. Visible keys are gathered into scratch, so that
// hidden ones cost nothing, and padded and packed batches are the same to everything below. Bound by arithmetic: a
// block of whole rows of scores stays in the cache, so that there is no online softmax and nothing is rescaled.
#include "attention.h"

#include <type_traits>

#include "gemm.h"

namespace ek::EK_VARIANT {
namespace {

// A walk over the rows of a key/value head: all queries of its first query head, then of the next.
struct Row {
  int64_t h, t;
  const AttentionSequence* s;

  Row(const AttentionParams& p, const AttentionSequence& s, int64_t kv_head, int64_t row)
      : h(kv_head * (p.heads / p.kv_heads) + row / s.q_length), t(s.q_start + row % s.q_length), s(&s) {}
  EK_INLINE void next() {
    if (++t == s->q_start + s->q_length) t = s->q_start, h++;
  }
  template <class T>
  EK_INLINE T* in(const Strided& x) const {
    return static_cast<T*>(x.data) + s->b * x.stride_b + h * x.stride_h + t * x.stride_t;
  }
};

template <class T>
EK_INLINE T* key_row(const Strided& x, const AttentionSequence& s, int64_t kv_head, int64_t j) {
  const int64_t t = s.k_start + (s.key ? s.key[j] : s.k_first + j);
  return static_cast<T*>(x.data) + s.b * x.stride_b + kv_head * x.stride_h + t * x.stride_t;
}

// Rows that the next head will read or write. In (B, L, H, D) they are far apart and no hardware prefetcher finds them.
// Fetched between the tiles of this head's products, evenly, they cost next to nothing: at L = 32 forward and backward
// take 15.5 µs a head without, 11.4 when fetched in bursts, 9.1 so (Zen 3, one thread, 8.0 with all in the cache).
struct Ahead {
  struct Rows {
    const char* row;
    int64_t bytes, stride, left;
  };
  Rows pending[8];
  int count = 0, at = 0;
  int64_t total = 0, pace = 0;

  template <class T>
  void add(const Strided& x, const AttentionSequence& s, int64_t h, int64_t t, int64_t rows, int64_t dim) {
    const int64_t size = sizeof(T);
    if (!x.data || rows == 0) return;
    const T* first = static_cast<const T*>(x.data) + s.b * x.stride_b + h * x.stride_h + t * x.stride_t;
    pending[count++] = {reinterpret_cast<const char*>(first), dim * size, x.stride_t * size, rows};
    total += rows;
  }
  void spread_over(int64_t steps) { pace = (total + steps - 1) / steps; }
  EK_INLINE void step() {
    for (int64_t i = 0; i < pace && at < count; i++) {
      Rows& next = pending[at];
      for (int64_t byte = 0; byte < next.bytes; byte += 64) __builtin_prefetch(next.row + byte);
      next.row += next.stride;
      if (--next.left == 0) at++;
    }
  }
};

constexpr int64_t ahead_limit = 256;  // keys; with more of them the products hide the waiting

// Rows of a matrix, ld apart: a tensor's own, where products can read or write them, or scratch.
struct Panel {
  float* x;
  int64_t ld;
};

// float32 rows of whole vectors, one head's: products take them where they are. With more keys the rows, a power of two
// or so apart, push each other out of the first-level cache, and to copy them costs little beside the products.
template <class T>
bool in_place(const AttentionParams& p, const AttentionSequence& s) {
  return std::is_same<T, float>::value && p.heads == p.kv_heads && !s.key && s.visible <= 64 && p.dim % W == 0 &&
         p.dim_v % W == 0;
}

struct Scratch {
  float* free;
  float* take(int64_t floats) {
    float* taken = free;
    free += round_up(floats, 16);
    return taken;
  }
};

// The visible rows of x (n, dim), as they are (rows round_up(dim, W) apart) and transposed (dim, n) (rows ld apart,
// zeros up to a multiple of W); either may be null.
template <class T>
void gather(const Strided& x, const AttentionSequence& s, int64_t kv_head, int64_t dim, float* plain, float* transposed,
            int64_t ld) {
  const int64_t n = s.visible, dim_padded = round_up(dim, W);
  for (int64_t j = 0; j < n; j += W) {
    const int live = int(least(W, n - j));
    const T* rows[W];
    for (int i = 0; i < W; i++) rows[i] = key_row<T>(x, s, kv_head, j + least(i, live - 1));
    for (int64_t c = 0; c < dim; c += W) {
      Vec tile[W];
      if (c + W <= dim) {
#pragma GCC unroll 16
        for (int i = 0; i < W; i++) tile[i] = load(rows[i] + c);
      } else {
        for (int i = 0; i < W; i++) tile[i] = load_first(rows[i] + c, dim - c);
      }
      for (int i = 0; plain && i < live; i++) store(plain + (j + i) * dim_padded + c, tile[i]);
      if (!transposed) continue;
      for (int i = live; i < W; i++) tile[i] = Vec{};
      transpose(tile);
      if (c + W <= dim) {
#pragma GCC unroll 16
        for (int i = 0; i < W; i++) store(transposed + (c + i) * ld + j, tile[i]);
      } else {
        for (int i = 0; i < dim - c; i++) store(transposed + (c + i) * ld + j, tile[i]);
      }
    }
  }
}

// m rows of x from `row` on, each times its factor (null: 1).
template <class T>
void gather_rows(const Strided& x, Row row, int64_t m, int64_t dim, const float* factor, float* to) {
  const int64_t ld = round_up(dim, W);
  for (int64_t i = 0; i < m; i++, row.next()) {
    const T* from = row.in<T>(x);
    const float times = factor ? factor[i] : 1;
    for (int64_t c = 0; c < dim; c += W) store(to + i * ld + c, load_at(from, c, dim) * times);
  }
}

// x's rows to m rows from `row` on.
template <class T>
void scatter_rows(const Strided& to, Row row, int64_t m, int64_t dim, const float* x) {
  const int64_t ld = round_up(dim, W);
  for (int64_t i = 0; i < m; i++, row.next()) {
    T* out = row.in<T>(to);
    for (int64_t c = 0; c < dim; c += W) store_at(out, c, dim, load(x + i * ld + c));
  }
}

// Gradients of the visible keys to their places (x null: they are there), zeros to the hidden ones.
template <class T>
void scatter_keys(const Strided& to, const AttentionSequence& s, int64_t kv_head, int64_t dim, const float* x) {
  T* row = static_cast<T*>(to.data) + s.b * to.stride_b + kv_head * to.stride_h + s.k_start * to.stride_t;
  if (!x && s.visible == s.k_length) return;
  int64_t j = 0;
  for (int64_t t = 0; t < s.k_length; t++, row += to.stride_t) {
    if (j < s.visible && t == (s.key ? s.key[j] : s.k_first + j)) {
      for (int64_t c = 0; x && c < dim; c += W) store_at(row, c, dim, load(x + j * round_up(dim, W) + c));
      j++;
    } else {
      for (int64_t c = 0; c < dim; c += W) store_at(row, c, dim, Vec{});
    }
  }
}

// What each row of a block has: z = scale · q·k, the gradient's slope = scale / temperature, and e^(x / temperature) as
// 2^(c x), c = 1 / (temperature ln 2) = high + low, x >= least, below which it is 0.
struct Factors {
  float *scale, *inverse, *slope, *high, *low, *least;

  Factors(Scratch& scratch, int64_t rows)
      : scale(scratch.take(rows + W)),
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
    slope[i] = scale_given / tau;
    high[i] = float(c);
    low[i] = float(c - double(high[i]));
    least[i] = float(-127 / c);
  }
  void of_rows(const AttentionParams& p, Row row, int64_t m) {
    for (int64_t i = 0; i < m; i++, row.next()) {
      set(i, p.scale.data ? *row.in<float>(p.scale) : p.scale_number,
          p.temperature.data ? *row.in<float>(p.temperature) : p.temperature_number);
      // A scale of 0 has a gradient too: the scores' gradients stay, row_gradients makes them 0.
      if (scale[i] == 0 && p.d_scale.data) slope[i] = inverse[i];
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
    store(top + i, across(partial, maximum));
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

// What a block of rows needs, forward and backward.
struct Block {
  Factors factors;
  float *top, *sum, *reciprocal;  // of each row
  float *q_copy, *scores;
  Panel q;

  Block(Scratch& scratch, int64_t rows, int64_t dim, int64_t ld)
      : factors(scratch, rows),
        top(scratch.take(rows + W)),
        sum(scratch.take(rows + W)),
        reciprocal(scratch.take(rows + W)),
        q_copy(scratch.take(rows * round_up(dim, W))),
        scores(scratch.take(rows * ld)),
        q{} {}
};

// z = scale · q·kᵀ, scores = exp((z - top) / temperature)
template <class T>
void weigh(const AttentionParams& p, const AttentionSequence& s, const Row& row, int64_t m, const float* k_transposed,
           int64_t ld, Block& b, Ahead& ahead) {
  b.factors.of_block(p, row, m);
  if (in_place<T>(p, s)) {
    b.q = {row.in<float>(p.query), p.query.stride_t};
  } else {
    b.q = {b.q_copy, round_up(p.dim, W)};
    gather_rows<T>(p.query, row, m, p.dim, nullptr, b.q.x);
  }
  gemm<false>(m, round_up(s.visible, W), p.dim, b.q.x, b.q.ld, 1, k_transposed, ld, b.scores, ld, b.factors.scale,
              ahead);
  exponentials(b.scores, ld, m, s.visible, b.factors, b.top, b.sum);
  for (int64_t i = 0; i < m; i += W) store(b.reciprocal + i, 1 / load(b.sum + i));
}

template <class T>
void forward_typed(const AttentionParams& p, const AttentionSequence& s, int64_t kv_head, int64_t chunk, float* memory,
                   Ahead& ahead) {
  const int64_t all = p.heads / p.kv_heads * s.q_length, end = least(all, (chunk + 1) * attention_chunk);
  const int64_t n = s.visible, ld = attention_stride(n), dim_v = round_up(p.dim_v, W);
  if (n == 0) {
    Row row(p, s, kv_head, chunk * attention_chunk);
    for (int64_t i = chunk * attention_chunk; i < end; i++, row.next()) {
      for (int64_t c = 0; c < p.dim_v; c += W) store_at(row.in<T>(p.out), c, p.dim_v, Vec{});
      *row.in<float>(p.lse) = -__builtin_inff();
    }
    return;
  }
  const bool direct = in_place<T>(p, s);
  const int64_t block = attention_block(n, all);
  Scratch scratch{memory};
  float* k_transposed = scratch.take(p.dim * ld);
  Panel v{scratch.take(n * dim_v), dim_v}, out{scratch.take(block * dim_v), dim_v};
  Block b(scratch, block, p.dim, ld);
  b.factors.of_all(p, block);
  gather<T>(p.key, s, kv_head, p.dim, nullptr, k_transposed, ld);
  if (direct) {
    v = {key_row<float>(p.value, s, kv_head, 0), p.value.stride_t};
  } else {
    gather<T>(p.value, s, kv_head, p.dim_v, v.x, nullptr, 0);
  }
  for (int64_t start = chunk * attention_chunk; start < end; start += block) {
    const int64_t m = least(block, end - start);
    Row row(p, s, kv_head, start);
    weigh<T>(p, s, row, m, k_transposed, ld, b, ahead);
    if (direct) out = {row.in<float>(p.out), p.out.stride_t};
    gemm<false>(m, dim_v, n, b.scores, ld, 1, v.x, v.ld, out.x, out.ld, b.reciprocal, ahead);
    if (!direct) scatter_rows<T>(p.out, row, m, p.dim_v, out.x);
    for (int64_t i = 0; i < m; i += W) {
      store(b.top + i, load(b.top + i) * load(b.factors.inverse + i) + log(load(b.sum + i)));
    }
    for (int64_t i = 0; i < m; i++, row.next()) *row.in<float>(p.lse) = b.top[i];
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

// sum (n, dim) = or += panelᵀ · x, of m rows
void add_product(bool add, int64_t n, int64_t dim, int64_t m, const float* panel, int64_t ld, const Panel& x,
                 const Panel& sum, Ahead& ahead) {
  if (add) {
    gemm<true>(n, dim, m, panel, 1, ld, x.x, x.ld, sum.x, sum.ld, nullptr, ahead);
  } else {
    gemm<false>(n, dim, m, panel, 1, ld, x.x, x.ld, sum.x, sum.ld, nullptr, ahead);
  }
}

// With u = scale · q·k / temperature: Σ_j dU_ij u_ij = Σ_j dS_ij q·k = q·d_q needs no pass over dS. What dS's rounding
// adds to it, excess · q·k, is largest at the row's maximum, most of which is taken off.
template <class T>
void row_gradients(const AttentionParams& p, Row row, int64_t m, const Panel& d_q, float* d_scores, int64_t ld,
                   const Block& b, const float* excess) {
  for (int64_t i = 0; i < m; i++, row.next()) {
    const T* query = row.in<T>(p.query);
    float* d = d_q.x + i * d_q.ld;
    Vec total{};
    for (int64_t c = 0; c < p.dim; c += W) total += load_at(query, c, p.dim) * load(d + c);
    const float scale = b.factors.scale[i];
    float d_u = sum_lanes(total);
    if (scale != 0) d_u -= excess[i] * b.top[i] / scale;
    if (p.d_scale.data) *row.in<float>(p.d_scale) = scale == 0 ? d_u : d_u / scale;
    if (p.d_temperature.data) *row.in<float>(p.d_temperature) = scale == 0 ? 0 : -d_u * b.factors.inverse[i];
    if (scale != 0 || !p.d_scale.data) continue;
    for (int64_t c = 0; c < p.dim; c += W) store(d + c, Vec{});
    for (int64_t j = 0; j < ld; j += W) store(d_scores + i * ld + j, Vec{});
  }
}

template <class T>
void backward_typed(const AttentionParams& p, const AttentionSequence& s, int64_t kv_head, float* memory,
                    Ahead& ahead) {
  const int64_t all = p.heads / p.kv_heads * s.q_length;
  const int64_t n = s.visible, ld = attention_stride(n), n_padded = round_up(n, W);
  const int64_t dim = round_up(p.dim, W), dim_v = round_up(p.dim_v, W);
  const bool rows_wanted = p.d_temperature.data || p.d_scale.data,
             scores_wanted = rows_wanted || p.d_query.data || p.d_key.data, direct = in_place<T>(p, s);
  const int64_t block = attention_block(n, all);
  Scratch scratch{memory};
  float *k_transposed = scratch.take(p.dim * ld), *v_transposed = scratch.take(p.dim_v * ld);
  Panel k{scratch.take(n * dim), dim}, d_k{scratch.take(n * dim), dim}, d_v{scratch.take(n * dim_v), dim_v};
  Block b(scratch, block, p.dim, ld);
  b.factors.of_all(p, block);
  float* d_scores = scratch.take(block * ld);
  const Panel d_out{scratch.take(block * dim_v), dim_v};
  Panel d_q{scratch.take(block * dim), dim};
  float *d_lse = scratch.take(block + W), *excess = scratch.take(block + W);
  gather<T>(p.key, s, kv_head, p.dim, direct ? nullptr : k.x, k_transposed, ld);
  gather<T>(p.value, s, kv_head, p.dim_v, nullptr, v_transposed, ld);
  if (direct) {
    k = {key_row<float>(p.key, s, kv_head, 0), p.key.stride_t};
    if (p.d_key.data) d_k = {key_row<float>(p.d_key, s, kv_head, 0), p.d_key.stride_t};
    if (p.d_value.data) d_v = {key_row<float>(p.d_value, s, kv_head, 0), p.d_value.stride_t};
  }
  for (int64_t i = 0; i < block; i++) d_lse[i] = 0;
  if (all == 0) {  // no block writes them
    for (int64_t j = 0; j < n; j++) {
      for (int64_t c = 0; p.d_key.data && c < dim; c += W) store(d_k.x + j * d_k.ld + c, Vec{});
      for (int64_t c = 0; p.d_value.data && c < dim_v; c += W) store(d_v.x + j * d_v.ld + c, Vec{});
    }
  }

  for (int64_t start = 0; start < all; start += block) {
    const int64_t m = least(block, all - start);
    Row row(p, s, kv_head, start);
    const bool d_q_direct = direct && p.d_query.data;
    if (d_q_direct) d_q = {row.in<float>(p.d_query), p.d_query.stride_t};
    if (n == 0) {
      b.factors.of_block(p, row, m);
      for (int64_t i = 0; i < m; i++) b.top[i] = excess[i] = 0;
      for (int64_t i = 0; i < m; i++) {
        for (int64_t c = 0; c < dim; c += W) store(d_q.x + i * d_q.ld + c, Vec{});
      }
    } else {
      weigh<T>(p, s, row, m, k_transposed, ld, b, ahead);
      gather_rows<T>(p.d_out, row, m, p.dim_v, b.reciprocal, d_out.x);
      if (p.d_value.data) add_product(start > 0, n, dim_v, m, b.scores, ld, d_out, d_v, ahead);
      if (!scores_wanted) continue;
      gemm<false>(m, n_padded, p.dim_v, d_out.x, d_out.ld, 1, v_transposed, ld, d_scores, ld, nullptr, ahead);
      Row r = row;
      for (int64_t i = 0; p.d_lse.data && i < m; i++, r.next()) d_lse[i] = *r.in<float>(p.d_lse);
      if (rows_wanted) {
        softmax_backward<true>(b.scores, d_scores, ld, m, n, d_lse, b.reciprocal, b.factors.slope, excess);
      } else {
        softmax_backward<false>(b.scores, d_scores, ld, m, n, d_lse, b.reciprocal, b.factors.slope, excess);
      }
      if (p.d_query.data || rows_wanted)
        gemm<false>(m, dim, n, d_scores, ld, 1, k.x, k.ld, d_q.x, d_q.ld, nullptr, ahead);
    }
    if (rows_wanted) row_gradients<T>(p, row, m, d_q, d_scores, ld, b, excess);
    if (n > 0 && p.d_key.data) add_product(start > 0, n, dim, m, d_scores, ld, b.q, d_k, ahead);
    if (p.d_query.data && !d_q_direct) scatter_rows<T>(p.d_query, row, m, p.dim, d_q.x);
  }
  if (p.d_key.data) scatter_keys<T>(p.d_key, s, kv_head, p.dim, direct ? nullptr : d_k.x);
  if (p.d_value.data) scatter_keys<T>(p.d_value, s, kv_head, p.dim_v, direct ? nullptr : d_v.x);
}

// A task's heads, each with the rows of what comes after it: the task's next head, or `next`'s first.
template <class T, class Run>
void each_head(const AttentionParams& p, const AttentionTask& task, const AttentionTask* next, bool backward,
               const Run& run) {
  const int64_t group = p.heads / p.kv_heads;
  for (int64_t h = task.first; h < task.end; h++) {
    const bool last = h + 1 == task.end;
    Ahead ahead;
    if ((!last || next) && task.s->visible <= ahead_limit) {
      const AttentionSequence& s = last ? *next->s : *task.s;
      const int64_t kv_head = last ? next->first : h + 1, key = s.k_start + s.k_first;
      const int64_t rows = least(s.q_length, ahead_limit), keys = least(s.visible, ahead_limit);
      ahead.add<T>(p.key, s, kv_head, key, keys, p.dim);
      ahead.add<T>(p.value, s, kv_head, key, keys, p.dim_v);
      ahead.add<T>(p.query, s, kv_head * group, s.q_start, rows, p.dim);
      ahead.add<T>(p.out, s, kv_head * group, s.q_start, rows, p.dim_v);
      ahead.add<T>(p.d_out, s, kv_head * group, s.q_start, rows, p.dim_v);
      ahead.add<T>(p.d_query, s, kv_head * group, s.q_start, rows, p.dim);
      ahead.add<T>(p.d_key, s, kv_head, key, keys, p.dim);
      ahead.add<T>(p.d_value, s, kv_head, key, keys, p.dim_v);
      const int64_t m = group * task.s->q_length, n = task.s->visible;
      ahead.spread_over(1 + gemm_tiles(m, n) * (backward ? 2 : 1) + gemm_tiles(m, p.dim_v) +
                        (backward ? 2 * gemm_tiles(n, p.dim) : 0));
    }
    run(h, ahead);
  }
}

void forward(const AttentionParams& p, const AttentionTask& task, const AttentionTask* next, float* scratch) {
  BY_DTYPE(p.dtype, each_head<T>(p, task, next, false, [&](int64_t h, Ahead& ahead) {
             forward_typed<T>(p, *task.s, h, task.chunk, scratch, ahead);
           }))
}
void backward(const AttentionParams& p, const AttentionTask& task, const AttentionTask* next, float* scratch) {
  BY_DTYPE(p.dtype, each_head<T>(p, task, next, true,
                                 [&](int64_t h, Ahead& ahead) { backward_typed<T>(p, *task.s, h, scratch, ahead); }))
}

}  // namespace

extern const AttentionKernels attention;  // without this line a const is private to the file
const AttentionKernels attention = {forward, backward};

}  // namespace ek::EK_VARIANT
