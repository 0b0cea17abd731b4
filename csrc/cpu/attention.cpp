// Attention on the CPU; the maths is embedkern/reference/attention.py. Visible keys are gathered into scratch, so that
// hidden ones cost nothing, and padded and packed batches are the same to everything below. Bound by arithmetic: a
// block of whole rows of scores stays in the cache, so that there is no online softmax and nothing is rescaled.
#include "attention.h"

#include "attention_scores.h"
#include "attention_softmax.h"
#include "gemm.h"

namespace ek::EK_VARIANT {
namespace {

// What a block of rows needs, forward and backward.
struct Block {
  Factors factors;
  float *top, *sum, *reciprocal;  // of each row
  float *q_copy, *scores;
  Panel q;
  float *key_bias, *z, *cap_slope;  // of options, null where there are none; z and cap_slope only for the backward pass
  bool biased;                      // key_bias isn't all 0

  Block(const AttentionParams& p, Scratch& scratch, int64_t rows, int64_t ld, bool backward)
      : factors(scratch, rows, adjusts_scores(p) || p.d_scale.data),
        top(scratch.take(rows + W)),
        sum(scratch.take(rows + W)),
        reciprocal(scratch.take(rows + W)),
        q_copy(scratch.take(rows * round_up(p.dim, W))),
        scores(scratch.take(rows * ld)),
        q{},
        key_bias(adjusts_scores(p) ? scratch.take(ld + W) : nullptr),
        z(backward && adjusts_scores(p) && p.d_temperature.data ? scratch.take(rows * ld) : nullptr),
        cap_slope(backward && p.softcap > 0 ? scratch.take(rows * ld) : nullptr),
        biased(false) {
    factors.of_all(p, rows);
  }
};

// gemm() of scratch that holds T's operands; k counts numbers, strides words.
template <class T>
void product(bool add, int64_t m, int64_t n, int64_t k, const float* a, int64_t a_row, int64_t a_col, const float* b,
             int64_t ldb, float* c, int64_t ldc, const End& end, Ahead& ahead) {
  gemm(add, m, n, (k + per_word<T> - 1) / per_word<T>, reinterpret_cast<const Operand<T>*>(a), a_row, a_col,
       reinterpret_cast<const Operand<T>*>(b), ldb, c, ldc, end, ahead);
}

template <class T>
Element<T>* elements(float* gathered) {
  return reinterpret_cast<Element<T>*>(gathered);
}

// z = scale · q·kᵀ and what options add to it, scores = exp((z - top) / temperature), of the keys in range
template <class T>
void weigh(const AttentionParams& p, const Row& row, int64_t m, const KeyRange& range, const float* k_transposed,
           int64_t ld, bool direct, Block& b, Ahead& ahead) {
  b.factors.of_block(p, row, m);
  if (direct) {
    b.q = {row.in<float>(p.query), p.query.stride_t};
  } else {
    b.q = {b.q_copy, row_words<T>(p.dim)};
    gather_rows<T>(p.query, row, m, p.dim, nullptr, b.q.x);
  }
  product<T>(false, m, round_up(range.n, W), p.dim, b.q.x, b.q.ld, 1, k_transposed + range.first, ld, b.scores, ld,
             {b.factors.scale}, ahead);
  if (b.key_bias) adjust(p, row, m, range, b.biased ? b.key_bias : nullptr, b.scores, b.cap_slope, ld);
  for (int64_t i = 0; b.z && i < m * ld; i += W) store(b.z + i, load(b.scores + i));
  exponentials(b.scores, ld, m, range.n, b.factors, b.top, b.sum);
  for (int64_t i = 0; i < m; i += W) {
    const Vec sum = load(b.sum + i);
    store(b.reciprocal + i, select(sum == 0.0f, Vec{}, 1 / sum));
  }
  for (int64_t i = 0; b.key_bias && !direct && i < m; i++) {  // a row that sees no key: 0 · NaN would be NaN in d_k
    for (int64_t c = 0; b.sum[i] == 0 && c < b.q.ld; c += W) store(b.q.x + i * b.q.ld + c, Vec{});
  }
}

// Where results don't fit the caches, writing past them saves reading them first, a fifth of the traffic at L = 32.
bool streams(const AttentionParams& p, const AttentionSequence& s, bool direct) {
  return p.large && direct && s.q_length <= KC;
}

// What the products of the block of rows from `start` on fetch meanwhile: what the next block reads, with the keys and
// values of its head if that is another one, and where this block's results go, those of the keys behind the last.
template <class T>
Ahead look_ahead(const AttentionParams& p, const Rows& rows, int64_t start, int64_t block, const Rows& after,
                 int64_t tiles) {
  const int64_t left = rows.first + rows.count - start;
  const Rows now = {rows.s, rows.kv_head, start, least(block, left)};
  const bool last = left <= block;
  const Rows next = last ? after : Rows{rows.s, rows.kv_head, start + block, least(block, left - block)};
  Ahead ahead;
  if (next.s) {
    if (last) {
      ahead.add_keys<T>(next, p.key, p.dim);
      ahead.add_keys<T>(next, p.value, p.dim_v);
    }
    ahead.add_queries<T>(p, next, p.query, p.dim);
    ahead.add_queries<T>(p, next, p.d_out, p.dim_v);
  }
  if (!streams(p, *now.s, in_place<T>(p, *now.s))) {
    ahead.add_queries<T>(p, now, p.out, p.dim_v);
    ahead.add_queries<T>(p, now, p.d_query, p.dim);
    if (last && !now.s->partial) {
      ahead.add_keys<T>(now, p.d_key, p.dim);
      ahead.add_keys<T>(now, p.d_value, p.dim_v);
    }
  }
  ahead.spread_over(tiles);
  return ahead;
}

// What dropout leaves is divided by 1 - dropout_p: in the reciprocals of the sums, which are multiplied to it anyway.
void scale_kept(const AttentionParams& p, int64_t m, const float* reciprocal, float* scaled) {
  const float factor = p.dropout_p >= 1 ? 0 : float(1 / (1 - p.dropout_p));
  for (int64_t i = 0; i < m; i++) scaled[i] = reciprocal[i] * factor;
}

template <class T>
void forward_typed(const AttentionParams& p, const Rows& rows, const Rows& next, float* memory) {
  const AttentionSequence& s = *rows.s;
  const int64_t kv_head = rows.kv_head, begin = rows.first, end = begin + rows.count;
  const int64_t n = s.visible, ld = attention_stride(n), dim_v = round_up(p.dim_v, W);
  if (n == 0) {
    Row row(p, s, kv_head, begin);
    for (int64_t i = begin; i < end; i++, row.next()) {
      for (int64_t c = 0; c < p.dim_v; c += W) store_at(row.in<T>(p.out), c, p.dim_v, Vec{});
      *row.in<float>(p.lse) = -__builtin_inff();
    }
    return;
  }
  const bool direct = in_place<T>(p, s) && (!adjusts_scores(p) || finite_keys(p.value, s, kv_head, p.dim_v));
  const int64_t block = attention_block(n, rows.count);
  Scratch scratch{memory};
  float* k_transposed = scratch.take(p.dim * ld);
  const int64_t v_words = row_words<T>(p.dim_v);
  Panel v{scratch.take(n * v_words), v_words}, out{scratch.take(block * dim_v), dim_v};
  Block b(p, scratch, block, ld, false);
  gather<T>(p.key, s, kv_head, p.dim, nullptr, k_transposed, ld);
  if (direct) {
    v = {key_row<float>(p.value, s, kv_head, 0), p.value.stride_t};
    if (b.key_bias) b.biased = find_key_bias<float>(s, nullptr, 0, b.key_bias);
  } else {
    gather<T>(p.value, s, kv_head, p.dim_v, v.x, nullptr, 0);
  }
  if (b.key_bias && !direct) {
    b.biased = find_key_bias(s, elements<T>(v.x), v_words * per_word<T>, b.key_bias);
    finite_only(elements<T>(v.x), n * v_words * per_word<T>);
  }
  if constexpr (paired<T>) {
    float* pairs = scratch.take((n + 1) / 2 * dim_v);
    pair_rows(elements<T>(v.x), 2 * v_words, n, p.dim_v, pairs, dim_v);
    v = {pairs, dim_v};
  }
  for (int64_t start = begin; start < end; start += block) {
    const int64_t m = least(block, end - start);
    Row row(p, s, kv_head, start);
    const KeyRange range(p, row, m, n);
    const int64_t tiles = gemm_tiles(m, range.n, p.dim) + gemm_tiles(m, p.dim_v, range.n);
    Ahead ahead = look_ahead<T>(p, rows, start, block, next, tiles);
    weigh<T>(p, row, m, range, k_transposed, ld, direct, b, ahead);
    if (p.dropout_p > 0) {
      drop(p, row, m, range, b.scores, b.scores, ld);
      scale_kept(p, m, b.reciprocal, b.reciprocal);
    }
    if (direct) out = {row.in<float>(p.out), p.out.stride_t};
    if constexpr (paired<T>) pair_neighbours(b.scores, m, range.n, ld, nullptr, b.scores, ld);
    product<T>(false, m, dim_v, range.n, b.scores, ld, 1, v.x + range.first / per_word<T> * v.ld, v.ld, out.x, out.ld,
               {b.reciprocal, streams(p, s, direct)}, ahead);
    if (!direct) scatter_rows<T>(p.out, row, m, p.dim_v, out.x);
    for (int64_t i = 0; i < m; i += W) {
      const Vec sum = load(b.sum + i), lse = load(b.top + i) * load(b.factors.inverse + i) + log(sum);
      store(b.top + i, select(sum == 0.0f, splat(-__builtin_inff()), lse));
    }
    for (int64_t i = 0; i < m; i++, row.next()) *row.in<float>(p.lse) = b.top[i];
  }
}

// With u = scale · q·k / temperature: Σ_j dU_ij u_ij = Σ_j dS_ij q·k = q·d_q needs no pass over dS. What dS's rounding
// adds to it, excess · q·k, is largest at the row's maximum, most of which is taken off. With scale_later dS and d_q
// arrive without the factor scale, as scale's gradient needs them, and get it here.
template <class T>
void row_gradients(const AttentionParams& p, Row row, int64_t m, const Panel& d_q, float* d_scores, int64_t ld,
                   const Block& b, const float* excess) {
  const bool later = b.factors.scale_later;
  for (int64_t first = 0; first < m; first += W) {  // W rows at once: one row's sums and divisions wait for each other
    const int64_t rows = least(W, m - first);
    Row r = row;
    Vec partial[W];
    for (int64_t i = rows; i < W; i++) partial[i] = Vec{};
    for (int64_t i = 0; i < rows; i++, r.next()) {
      const T* query = r.in<T>(p.query);
      const float* d = d_q.x + (first + i) * d_q.ld;
      Vec total{};
      for (int64_t c = 0; c < p.dim; c += W) total += load_at(query, c, p.dim) * load(d + c);
      partial[i] = total;
    }
    const Vec scale = load(b.factors.scale + first);
    Vec along = select(load(b.sum + first) == 0.0f, Vec{}, across(partial, add));
    if (!b.key_bias) along -= select(scale == 0.0f, Vec{}, load(excess + first) * load(b.top + first) / scale);
    float of_scale[W], of_temperature[W];
    store(of_scale, along);
    store(of_temperature, -(later ? scale * along : along) * load(b.factors.inverse + first));
    for (int64_t i = 0; i < rows; i++, row.next()) {
      if (p.d_scale.data) *row.in<float>(p.d_scale) = of_scale[i];
      // Or else adjust_backward() has written it.
      if (p.d_temperature.data && !b.key_bias) *row.in<float>(p.d_temperature) = of_temperature[i];
    }
  }
  for (int64_t i = 0; later && i < m; i++) {
    float *d = d_q.x + i * d_q.ld, *d_s = d_scores + i * ld, scale = b.factors.scale[i];
    for (int64_t c = 0; c < p.dim; c += W) store(d + c, load(d + c) * scale);
    for (int64_t j = 0; j < ld; j += W) store(d_s + j, load(d_s + j) * scale);
  }
}

// Where part `chunk` of a split sequence leaves the gradient of a head's keys (0) or values (1).
float* part(const AttentionParams& p, const AttentionSequence& s, int64_t chunk, int64_t kv_head, int which) {
  return s.partial + ((chunk * p.kv_heads + kv_head) * 2 + which) * attention_partial_floats(p, s.visible);
}

template <class T>
void backward_typed(const AttentionParams& p, const Rows& rows, const Rows& next, int64_t slot, int64_t chunk,
                    float* memory) {
  const AttentionSequence& s = *rows.s;
  const int64_t kv_head = rows.kv_head, begin = rows.first, end = begin + rows.count;
  const int64_t n = s.visible, ld = attention_stride(n);
  const int64_t dim = round_up(p.dim, W), dim_v = round_up(p.dim_v, W), block = attention_block(n, rows.count);
  const bool direct = in_place<T>(p, s) &&
                      (!adjusts_scores(p) || (finite_keys(p.key, s, kv_head, p.dim) &&
                                              finite_keys(p.value, s, kv_head, p.dim_v) && finite_queries(p, rows)));
  Scratch scratch{memory};
  const int64_t k_words = row_words<T>(p.dim), d_out_words = row_words<T>(p.dim_v);
  float *k_transposed = scratch.take(p.dim * ld), *v_transposed = scratch.take(p.dim_v * ld);
  Panel k{scratch.take(n * k_words), k_words}, d_k{scratch.take(n * dim), dim}, d_v{scratch.take(n * dim_v), dim_v};
  Block b(p, scratch, block, ld, true);
  float* d_scores = scratch.take(block * ld);
  const Panel d_out{scratch.take(block * d_out_words), d_out_words};
  Panel d_q{scratch.take(block * dim), dim};
  float *d_lse = scratch.take(block + W), *excess = scratch.take(block + W);
  const bool rows_wanted = p.d_temperature.data || p.d_scale.data || b.factors.scale_later,
             scores_wanted = rows_wanted || p.d_query.data || p.d_key.data;
  gather<T>(p.key, s, kv_head, p.dim, direct ? nullptr : k.x, k_transposed, ld);
  gather<T>(p.value, s, kv_head, p.dim_v, nullptr, v_transposed, ld);
  if (direct) {
    k = {key_row<float>(p.key, s, kv_head, 0), p.key.stride_t};
    if (p.d_key.data) d_k = {key_row<float>(p.d_key, s, kv_head, 0), p.d_key.stride_t};
    if (p.d_value.data) d_v = {key_row<float>(p.d_value, s, kv_head, 0), p.d_value.stride_t};
  }
  if (s.partial) {
    d_k.x = part(p, s, chunk, kv_head, 0);
    d_v.x = part(p, s, chunk, kv_head, 1);
  }
  if (b.key_bias) b.biased = find_key_bias<float>(s, nullptr, 0, b.key_bias);
  if (b.key_bias && !direct) {
    finite_only(elements<T>(k.x), n * k_words * per_word<T>);
    finite_only(elements<T>(v_transposed), p.dim_v * ld);
  }
  [[maybe_unused]] float *panel = nullptr, *q_pairs = nullptr, *d_out_pairs = nullptr;  // where products take Pairs
  if constexpr (paired<T>) {
    float* pairs = scratch.take((n + 1) / 2 * dim);
    pair_rows(elements<T>(k.x), 2 * k_words, n, p.dim, pairs, dim);
    k = {pairs, dim};
    q_pairs = scratch.take((block + 1) / 2 * dim);
    d_out_pairs = scratch.take((block + 1) / 2 * dim_v);
    panel = scratch.take((block + 1) * round_up(ld / 2, W));
  }
  const bool stream = streams(p, s, direct) && end - begin <= block;
  for (int64_t i = 0; i < block; i++) d_lse[i] = 0;
  int64_t from = 0, to = 0;  // the first block writes these keys' gradients, and later ones add to them
  if (rows.count > 0) {
    const KeyRange first(p, Row(p, s, kv_head, begin), least(block, rows.count), n);
    from = first.first;
    to = from + first.n;
  }
  for (int64_t j = 0; j < n; j++) {
    if (j >= from && j < to) continue;
    for (int64_t c = 0; p.d_key.data && c < dim; c += W) store(d_k.x + j * d_k.ld + c, Vec{});
    for (int64_t c = 0; p.d_value.data && c < dim_v; c += W) store(d_v.x + j * d_v.ld + c, Vec{});
  }

  for (int64_t start = begin; start < end; start += block) {
    const int64_t m = least(block, end - start);
    const bool add = start > begin, d_q_direct = direct && p.d_query.data;
    Row row(p, s, kv_head, start);
    if (d_q_direct) d_q = {row.in<float>(p.d_query), p.d_query.stride_t};
    if (n == 0) {
      for (int64_t i = 0; i < m; i++, row.next()) {
        for (int64_t c = 0; p.d_query.data && c < p.dim; c += W) store_at(row.in<T>(p.d_query), c, p.dim, Vec{});
        if (p.d_scale.data) *row.in<float>(p.d_scale) = 0;
        if (p.d_temperature.data) *row.in<float>(p.d_temperature) = 0;
      }
      continue;
    }
    const KeyRange range(p, row, m, n);
    const int64_t tiles = gemm_tiles(m, range.n, p.dim) + gemm_tiles(m, range.n, p.dim_v) +
                          gemm_tiles(m, p.dim, range.n) + gemm_tiles(range.n, p.dim + p.dim_v, m);
    Ahead ahead = look_ahead<T>(p, rows, start, block, next, tiles);
    weigh<T>(p, row, m, range, k_transposed, ld, direct, b, ahead);
    const float *weights = b.scores, *reciprocal = b.reciprocal;  // as dropout leaves them
    if (p.dropout_p > 0) {                                        // in scratch that isn't needed yet
      drop(p, row, m, range, b.scores, d_scores, ld);
      scale_kept(p, m, b.reciprocal, excess);
      weights = d_scores;
      reciprocal = excess;
    }
    gather_rows<T>(p.d_out, row, m, p.dim_v, reciprocal, d_out.x);
    Panel right = d_out;  // of products over rows: weights · reciprocal · d_out, here with the factor in d_out
    if constexpr (paired<T>) {
      pair_scores(weights, m, range.n, ld, reciprocal, panel);
      pair_rows(elements<T>(d_out.x), 2 * d_out_words, m, p.dim_v, d_out_pairs, dim_v);
      weights = panel;
      right = {d_out_pairs, dim_v};
    }
    if (p.d_value.data) {
      product<T>(add, range.n, dim_v, m, weights, 1, ld, right.x, right.ld, d_v.x + range.first * d_v.ld, d_v.ld,
                 {nullptr, stream}, ahead);
    }
    if (!scores_wanted) continue;
    product<T>(false, m, round_up(range.n, W), p.dim_v, d_out.x, d_out.ld, 1, v_transposed + range.first, ld, d_scores,
               ld, {paired<T> ? reciprocal : nullptr}, ahead);
    if (p.dropout_p > 0) drop(p, row, m, range, d_scores, d_scores, ld);
    Row r = row;
    for (int64_t i = 0; p.d_lse.data && i < m; i++, r.next()) d_lse[i] = b.sum[i] == 0 ? 0 : *r.in<float>(p.d_lse);
    if (rows_wanted) {
      softmax_backward<true>(b.scores, d_scores, ld, m, range.n, d_lse, b.reciprocal, b.factors.slope, excess);
    } else {
      softmax_backward<false>(b.scores, d_scores, ld, m, range.n, d_lse, b.reciprocal, b.factors.slope, excess);
    }
    if (b.key_bias) {
      adjust_backward(p, row, m, range, slot, b.z, b.top, b.factors.inverse, d_lse, b.cap_slope, d_scores, ld);
    }
    const float* left = d_scores;
    int64_t left_ld = ld;
    if (p.d_query.data || rows_wanted) {
      if constexpr (paired<T>) {
        left = panel;
        left_ld = round_up(ld / 2, W);
        pair_neighbours(d_scores, m, range.n, ld, rows_wanted ? excess : nullptr, panel, left_ld);
      }
      product<T>(false, m, dim, range.n, left, left_ld, 1, k.x + range.first / per_word<T> * k.ld, k.ld, d_q.x, d_q.ld,
                 {nullptr, stream && d_q_direct && !rows_wanted}, ahead);
    }
    if (rows_wanted) row_gradients<T>(p, row, m, d_q, d_scores, ld, b, excess);
    if (p.d_key.data) {
      left = d_scores;
      right = b.q;
      if constexpr (paired<T>) {
        pair_scores(d_scores, m, range.n, ld, nullptr, panel);
        pair_rows(elements<T>(b.q.x), 2 * b.q.ld, m, p.dim, q_pairs, dim);
        left = panel;
        right = {q_pairs, dim};
      }
      product<T>(add, range.n, dim, m, left, 1, ld, right.x, right.ld, d_k.x + range.first * d_k.ld, d_k.ld,
                 {nullptr, stream}, ahead);
    }
    if (p.d_query.data && !d_q_direct) scatter_rows<T>(p.d_query, row, m, p.dim, d_q.x);
  }
  if (s.partial) return;
  if (p.d_key.data) scatter_keys<T>(p.d_key, s, kv_head, p.dim, direct ? nullptr : d_k.x);
  if (p.d_value.data) scatter_keys<T>(p.d_value, s, kv_head, p.dim_v, direct ? nullptr : d_v.x);
}

template <class T>
void sum_parts_typed(const AttentionParams& p, const AttentionSequence& s, int64_t kv_head) {
  for (int which = 0; which < 2; which++) {
    const Strided& to = which == 0 ? p.d_key : p.d_value;
    const int64_t dim = which == 0 ? p.dim : p.dim_v;
    if (!to.data) continue;
    float* sum = part(p, s, 0, kv_head, which);
    for (int64_t chunk = 1; chunk < s.splits; chunk++) {
      const float* x = part(p, s, chunk, kv_head, which);
      for (int64_t i = 0; i < s.visible * round_up(dim, W); i += W) store(sum + i, load(sum + i) + load(x + i));
    }
    scatter_keys<T>(to, s, kv_head, dim, sum);
  }
}

// Those of chunk `chunk`, or in the backward pass of part `chunk`.
Rows rows_of(const AttentionParams& p, const AttentionSequence& s, int64_t kv_head, int64_t chunk, bool backward) {
  const int64_t all = p.heads / p.kv_heads * s.q_length;
  const int64_t rows = backward ? (all + s.splits - 1) / s.splits : attention_chunk, first = least(all, chunk * rows);
  return {&s, kv_head, first, least(rows, all - first)};
}

// run(rows, next) for each of a task's heads; next: the first rows of the task's next head, or those of `after`.
template <class Run>
void each_head(const AttentionParams& p, const AttentionTask& task, const AttentionTask* after, bool backward,
               const Run& run) {
  const int64_t heads = task.end - task.first, count = task.count * heads;
  for (int64_t i = 0; i < count; i++) {
    const auto nth = [&](int64_t n) {
      return rows_of(p, task.s[n / heads * task.step], task.first + n % heads, task.chunk, backward);
    };
    Rows next{};
    if (i + 1 < count) {
      next = nth(i + 1);
    } else if (after) {
      next = rows_of(p, *after->s, after->first, after->chunk, backward);
    }
    if (next.s) next.count = attention_block(next.s->visible, next.count);
    run(nth(i), next);
  }
  if (p.large) fence();
}

void forward(const AttentionParams& p, const AttentionTask& task, const AttentionTask* after, float* scratch) {
  BY_DTYPE(p.dtype, each_head(p, task, after, false,
                              [&](const Rows& rows, const Rows& next) { forward_typed<T>(p, rows, next, scratch); }))
}
void backward(const AttentionParams& p, const AttentionTask& task, const AttentionTask* after, float* scratch) {
  BY_DTYPE(p.dtype, each_head(p, task, after, true, [&](const Rows& rows, const Rows& next) {
             backward_typed<T>(p, rows, next, task.slot, task.chunk, scratch);
           }))
}
void sum_parts(const AttentionParams& p, const AttentionTask& task) {
  BY_DTYPE(p.dtype, sum_parts_typed<T>(p, *task.s, task.first))
}

}  // namespace

extern const AttentionKernels attention;  // without this line a const is private to the file
const AttentionKernels attention = {forward, backward, sum_parts};

}  // namespace ek::EK_VARIANT
