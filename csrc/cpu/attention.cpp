// Attention on the CPU; the maths is embedkern/reference/attention.py. Visible keys are gathered into scratch, so that
// hidden ones cost nothing, and padded and packed batches are the same to everything below. Bound by arithmetic: a
// block of whole rows of scores stays in the cache, so that there is no online softmax and nothing is rescaled.
#include "attention.h"

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

// Rows that the next head will read or write. In (B, L, H, D) they are far apart and no hardware prefetcher finds them;
// fetched one at a time between computations they cost nothing (forward + backward at L = 32: 73 ms without).
struct Ahead {
  struct Rows {
    const char* row;
    int64_t bytes, stride, left;
  };
  Rows pending[8];
  int count = 0, at = 0;

  template <class T>
  void add(const Strided& x, const AttentionSequence& s, int64_t h, int64_t t, int64_t rows, int64_t dim) {
    const int64_t size = sizeof(T);
    if (!x.data || rows == 0) return;
    const T* first = static_cast<const T*>(x.data) + s.b * x.stride_b + h * x.stride_h + t * x.stride_t;
    pending[count++] = {reinterpret_cast<const char*>(first), dim * size, x.stride_t * size, rows};
  }
  EK_INLINE void step() {
    if (at == count) return;
    Rows& next = pending[at];
    for (int64_t i = 0; i < next.bytes; i += 64) __builtin_prefetch(next.row + i);
    next.row += next.stride;
    if (--next.left == 0) at++;
  }
};

constexpr int64_t ahead_limit = 256;  // keys; with more of them the products hide the waiting

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
            int64_t ld, Ahead& ahead) {
  const int64_t n = s.visible, dim_padded = round_up(dim, W);
  for (int64_t j = 0; j < n; j += W) {
    const int live = int(least(W, n - j));
    const T* rows[W];
    for (int i = 0; i < W; i++) rows[i] = key_row<T>(x, s, kv_head, j + least(i, live - 1));
    for (int i = 0; i < live; i++) ahead.step();
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

// m rows of x from `row` on, each times its factor.
template <class T>
void gather_rows(const Strided& x, Row row, int64_t m, int64_t dim, const float* factor, float* to, Ahead& ahead) {
  const int64_t ld = round_up(dim, W);
  for (int64_t i = 0; i < m; i++, row.next()) {
    const T* from = row.in<T>(x);
    ahead.step();
    for (int64_t c = 0; c < dim; c += W) store(to + i * ld + c, load_at(from, c, dim) * factor[i]);
  }
}

void scale_rows(float* x, int64_t m, int64_t dim, const float* factor) {
  for (int64_t i = 0; i < m; i++) {
    for (int64_t c = 0; c < dim; c += W) store(x + i * dim + c, load(x + i * dim + c) * factor[i]);
  }
}

// x's rows, each times its factor, to m rows from `row` on.
template <class T>
void scatter_rows(const Strided& to, Row row, int64_t m, int64_t dim, const float* factor, const float* x,
                  Ahead& ahead) {
  const int64_t ld = round_up(dim, W);
  for (int64_t i = 0; i < m; i++, row.next()) {
    T* out = row.in<T>(to);
    ahead.step();
    for (int64_t c = 0; c < dim; c += W) store_at(out, c, dim, load(x + i * ld + c) * factor[i]);
  }
}

// Gradients of the visible keys to their places, zeros to the hidden ones.
template <class T>
void scatter_keys(const Strided& to, const AttentionSequence& s, int64_t kv_head, int64_t dim, const float* x,
                  Ahead& ahead) {
  T* row = static_cast<T*>(to.data) + s.b * to.stride_b + kv_head * to.stride_h + s.k_start * to.stride_t;
  int64_t j = 0;
  for (int64_t t = 0; t < s.k_length; t++, row += to.stride_t) {
    ahead.step();
    if (j < s.visible && t == (s.key ? s.key[j] : s.k_first + j)) {
      for (int64_t c = 0; c < dim; c += W) store_at(row, c, dim, load(x + c));
      x += round_up(dim, W);
      j++;
    } else {
      for (int64_t c = 0; c < dim; c += W) store_at(row, c, dim, Vec{});
    }
  }
}

// What each row of a block has: q = scale · query, and e^(x / temperature) as 2^(c x), c = 1 / (temperature ln 2) =
// high + low, x >= least, below which it is 0.
struct Factors {
  float *scale, *inverse, *high, *low, *least;

  Factors(Scratch& scratch, int64_t rows)
      : scale(scratch.take(rows + W)),
        inverse(scratch.take(rows + W)),
        high(scratch.take(rows + W)),
        low(scratch.take(rows + W)),
        least(scratch.take(rows + W)) {}

  void set(int64_t i, float scale_given, float temperature) {
    // Beyond these bounds nothing changes any more, and within them nothing overflows.
    const float tau = temperature < 1e-30f ? 1e-30f : temperature > 1e30f ? 1e30f : temperature;
    const double c = 1.4426950408889634 / tau;
    scale[i] = scale_given;
    inverse[i] = 1 / tau;
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
    for (float* x : {scale, inverse, high, low, least}) {
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
void exponentials(float* z, int64_t ld, int64_t m, int64_t n, const Factors& factors, float* top, float* sum,
                  Ahead& ahead) {
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
      ahead.step();
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
  float *q, *scores;

  Block(Scratch& scratch, int64_t rows, int64_t dim, int64_t ld)
      : factors(scratch, rows),
        top(scratch.take(rows + W)),
        sum(scratch.take(rows + W)),
        reciprocal(scratch.take(rows + W)),
        q(scratch.take(rows * round_up(dim, W))),
        scores(scratch.take(rows * ld)) {}
};

// q = scale · query, scores = exp((q·kᵀ - top) / temperature)
template <class T>
void weigh(const AttentionParams& p, const AttentionSequence& s, const Row& row, int64_t m, const float* k_transposed,
           int64_t ld, Block& b, Ahead& ahead) {
  b.factors.of_block(p, row, m);
  gather_rows<T>(p.query, row, m, p.dim, b.factors.scale, b.q, ahead);
  gemm<false>(m, round_up(s.visible, W), p.dim, b.q, round_up(p.dim, W), 1, k_transposed, ld, b.scores, ld);
  exponentials(b.scores, ld, m, s.visible, b.factors, b.top, b.sum, ahead);
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
  const int64_t block = attention_block(n, all);
  Scratch scratch{memory};
  float *k_transposed = scratch.take(p.dim * ld), *v = scratch.take(n * dim_v);
  float* out = scratch.take(block * dim_v);
  Block b(scratch, block, p.dim, ld);
  b.factors.of_all(p, block);
  gather<T>(p.key, s, kv_head, p.dim, nullptr, k_transposed, ld, ahead);
  gather<T>(p.value, s, kv_head, p.dim_v, v, nullptr, 0, ahead);
  for (int64_t start = chunk * attention_chunk; start < end; start += block) {
    const int64_t m = least(block, end - start);
    Row row(p, s, kv_head, start);
    weigh<T>(p, s, row, m, k_transposed, ld, b, ahead);
    gemm<false>(m, dim_v, n, b.scores, ld, 1, v, dim_v, out, dim_v);
    scatter_rows<T>(p.out, row, m, p.dim_v, b.reciprocal, out, ahead);
    for (int64_t i = 0; i < m; i += W) {
      store(b.top + i, load(b.top + i) * load(b.factors.inverse + i) + log(load(b.sum + i)));
    }
    for (int64_t i = 0; i < m; i++, row.next()) *row.in<float>(p.lse) = b.top[i];
  }
}

// With e the exponentials, r their row sums, P = e / r:  dP = d_out · vᵀ,  delta = Σ P dP,  dU = P (dP - delta +
// d_lse), d_v = Pᵀ · d_out,  d_q = scale / temperature · dU · k,  d_k = dUᵀ · q scale / temperature. `d` comes as dP
// and leaves as dU; P is never written: d_v = eᵀ · (d_out / r), since d_out is thin. excess: Σ dU - d_lse, 0 but for
// rounding.
template <bool with_excess>
void softmax_backward(const float* e, float* d, int64_t ld, int64_t m, int64_t n, const float* d_lse,
                      const float* factor, float* excess, Ahead& ahead) {
  for (int64_t i = 0; i < m; i += W) {
    const int64_t rows = least(W, m - i);
    Vec partial[W];
    for (int64_t r = rows; r < W; r++) partial[r] = Vec{};
    for (int64_t r = 0; r < rows; r++) {
      ahead.step();
      const int64_t row = (i + r) * ld;
      Vec total{};
      for (int64_t j = 0; j < n; j += W) total += load(e + row + j) * load(d + row + j);
      partial[r] = total;
    }
    float delta[W];
    store(delta, across(partial, add) * load(factor + i));
    for (int64_t r = 0; r < rows; r++) {
      const int64_t row = (i + r) * ld;
      const Vec normalize = splat(factor[i + r]);
      Vec total{};
      for (int64_t j = 0; j < n; j += W) {
        const Vec d_u = load(e + row + j) * normalize * ((load(d + row + j) - delta[r]) + d_lse[i + r]);
        store(d + row + j, d_u);
        if (with_excess) total += d_u;
      }
      partial[r] = total;
    }
    for (int64_t r = rows; r < W; r++) partial[r] = Vec{};
    if (with_excess) store(excess + i, across(partial, add) - load(d_lse + i));
  }
}

// sum (n, dim) = or += panelᵀ · x, of m rows
void add_product(bool add, int64_t n, int64_t dim, int64_t m, const float* panel, int64_t ld, const float* x,
                 float* sum) {
  if (add) {
    gemm<true>(n, dim, m, panel, 1, ld, x, dim, sum, dim);
  } else {
    gemm<false>(n, dim, m, panel, 1, ld, x, dim, sum, dim);
  }
}

// u = scale · q·k / temperature, so Σ_j dU_ij u_ij = scale / temperature · q · (dU · k) needs no pass over dU. What
// dU's rounding adds to it, excess · u, is largest at the row's maximum, most of which is taken off.
template <class T>
void row_gradients(const AttentionParams& p, Row row, int64_t m, const float* d_q, const Block& b,
                   const float* excess) {
  for (int64_t i = 0; i < m; i++, row.next()) {
    const T* query = row.in<T>(p.query);
    Vec total{};
    for (int64_t c = 0; c < p.dim; c += W) total += load_at(query, c, p.dim) * load(d_q + i * round_up(p.dim, W) + c);
    const float along = sum_lanes(total), scale = b.factors.scale[i], inverse = b.factors.inverse[i];
    const float d_z = scale * along - excess[i] * b.top[i];  // Σ_j dU_ij z_ij
    if (p.d_scale.data) *row.in<float>(p.d_scale) = (scale == 0 ? along : d_z / scale) * inverse;
    if (p.d_temperature.data) *row.in<float>(p.d_temperature) = -d_z * inverse * inverse;
  }
}

template <class T>
void backward_typed(const AttentionParams& p, const AttentionSequence& s, int64_t kv_head, float* memory,
                    Ahead& ahead) {
  const int64_t all = p.heads / p.kv_heads * s.q_length;
  const int64_t n = s.visible, ld = attention_stride(n), n_padded = round_up(n, W);
  const int64_t dim = round_up(p.dim, W), dim_v = round_up(p.dim_v, W);
  const bool rows_wanted = p.d_temperature.data || p.d_scale.data,
             scores_wanted = rows_wanted || p.d_query.data || p.d_key.data;
  const int64_t block = attention_block(n, all);
  Scratch scratch{memory};
  float *k = scratch.take(n * dim), *k_transposed = scratch.take(p.dim * ld),
        *v_transposed = scratch.take(p.dim_v * ld);
  float *d_k = scratch.take(n * dim), *d_v = scratch.take(n * dim_v);
  Block b(scratch, block, p.dim, ld);
  b.factors.of_all(p, block);
  float *d_scores = scratch.take(block * ld), *d_out = scratch.take(block * dim_v), *d_q = scratch.take(block * dim);
  float *d_lse = scratch.take(block + W), *excess = scratch.take(block + W), *ones = scratch.take(block + W);
  gather<T>(p.key, s, kv_head, p.dim, k, k_transposed, ld, ahead);
  gather<T>(p.value, s, kv_head, p.dim_v, nullptr, v_transposed, ld, ahead);
  for (int64_t i = 0; i < block; i++) ones[i] = 1, d_lse[i] = 0;
  if (all == 0) {  // no block writes them
    for (int64_t i = 0; i < n * dim; i += W) store(d_k + i, Vec{});
    for (int64_t i = 0; i < n * dim_v; i += W) store(d_v + i, Vec{});
  }

  for (int64_t start = 0; start < all; start += block) {
    const int64_t m = least(block, all - start);
    Row row(p, s, kv_head, start);
    if (n == 0) {
      b.factors.of_block(p, row, m);
      for (int64_t i = 0; i < m; i++) b.top[i] = excess[i] = 0;
      for (int64_t i = 0; i < m * dim; i++) d_q[i] = 0;
    } else {
      weigh<T>(p, s, row, m, k_transposed, ld, b, ahead);
      gather_rows<T>(p.d_out, row, m, p.dim_v, ones, d_out, ahead);
      if (scores_wanted) gemm<false>(m, n_padded, p.dim_v, d_out, dim_v, 1, v_transposed, ld, d_scores, ld);
      if (p.d_value.data) {
        scale_rows(d_out, m, dim_v, b.reciprocal);
        add_product(start > 0, n, dim_v, m, b.scores, ld, d_out, d_v);
      }
      if (!scores_wanted) continue;
      Row r = row;
      for (int64_t i = 0; p.d_lse.data && i < m; i++, r.next()) d_lse[i] = *r.in<float>(p.d_lse);
      if (rows_wanted) {
        softmax_backward<true>(b.scores, d_scores, ld, m, n, d_lse, b.reciprocal, excess, ahead);
      } else {
        softmax_backward<false>(b.scores, d_scores, ld, m, n, d_lse, b.reciprocal, excess, ahead);
      }
      if (p.d_query.data || rows_wanted) gemm<false>(m, dim, n, d_scores, ld, 1, k, dim, d_q, dim);
      if (p.d_key.data) {
        if (p.temperature.data || p.temperature_number != 1) scale_rows(b.q, m, dim, b.factors.inverse);
        add_product(start > 0, n, dim, m, d_scores, ld, b.q, d_k);
      }
    }
    if (rows_wanted) row_gradients<T>(p, row, m, d_q, b, excess);
    for (int64_t i = 0; i < m; i++) b.sum[i] = b.factors.scale[i] * b.factors.inverse[i];
    if (p.d_query.data) scatter_rows<T>(p.d_query, row, m, p.dim, b.sum, d_q, ahead);
  }
  if (p.d_key.data) scatter_keys<T>(p.d_key, s, kv_head, p.dim, d_k, ahead);
  if (p.d_value.data) scatter_keys<T>(p.d_value, s, kv_head, p.dim_v, d_v, ahead);
}

// What both passes read of a head.
template <class T>
void add_inputs(const AttentionParams& p, const AttentionSequence& s, int64_t kv_head, Ahead& ahead) {
  ahead.add<T>(p.key, s, kv_head, s.k_start + s.k_first, s.visible, p.dim);
  ahead.add<T>(p.value, s, kv_head, s.k_start + s.k_first, s.visible, p.dim_v);
  ahead.add<T>(p.query, s, kv_head * (p.heads / p.kv_heads), s.q_start, s.q_length, p.dim);
}

template <class T>
void forward_heads(const AttentionParams& p, const AttentionSequence& s, int64_t chunk, int64_t first, int64_t end,
                   float* scratch) {
  for (int64_t h = first; h < end; h++) {
    Ahead ahead;
    if (h + 1 < end && s.visible <= ahead_limit) {
      add_inputs<T>(p, s, h + 1, ahead);
      ahead.add<T>(p.out, s, (h + 1) * (p.heads / p.kv_heads), s.q_start, s.q_length, p.dim_v);
    }
    forward_typed<T>(p, s, h, chunk, scratch, ahead);
  }
}

template <class T>
void backward_heads(const AttentionParams& p, const AttentionSequence& s, int64_t first, int64_t end, float* scratch) {
  for (int64_t h = first; h < end; h++) {
    Ahead ahead;
    if (h + 1 < end && s.visible <= ahead_limit) {
      const int64_t head = (h + 1) * (p.heads / p.kv_heads), key = s.k_start + s.k_first;
      add_inputs<T>(p, s, h + 1, ahead);
      ahead.add<T>(p.d_out, s, head, s.q_start, s.q_length, p.dim_v);
      ahead.add<T>(p.d_query, s, head, s.q_start, s.q_length, p.dim);
      ahead.add<T>(p.d_key, s, h + 1, key, s.visible, p.dim);
      ahead.add<T>(p.d_value, s, h + 1, key, s.visible, p.dim_v);
    }
    backward_typed<T>(p, s, h, scratch, ahead);
  }
}

void forward(const AttentionParams& p, const AttentionSequence& s, int64_t chunk, int64_t first, int64_t end,
             float* scratch) {
  BY_DTYPE(p.dtype, forward_heads<T>(p, s, chunk, first, end, scratch))
}
void backward(const AttentionParams& p, const AttentionSequence& s, int64_t first, int64_t end, float* scratch) {
  BY_DTYPE(p.dtype, backward_heads<T>(p, s, first, end, scratch))
}

}  // namespace

extern const AttentionKernels attention;  // without this line a const is private to the file
const AttentionKernels attention = {forward, backward};

}  // namespace ek::EK_VARIANT
