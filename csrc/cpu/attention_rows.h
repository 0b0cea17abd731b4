// Where attention's rows lie and how they get into scratch and out again. For variant sources only.
#pragma once
#include <type_traits>

#include "attention.h"
#include "pairs.h"

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

// A key/value head and some of its queries' rows.
struct Rows {
  const AttentionSequence* s;
  int64_t kv_head, first, count;
};

// Memory that will soon be read or written. In (B, L, H, D) a head's rows are far apart and no hardware prefetcher
// finds them. Fetched between the tiles of a block's products, evenly, they cost next to nothing: at L = 32 forward and
// backward take 15.5 µs a head without, 11.4 when fetched in bursts, 9.1 so (Zen 3, one thread, 8.0 with all in the
// cache); at L = 512 gathering and scattering rows takes a tenth of the time without, 3 % so. Into the second-level
// cache: the first level has few places for lines under way; at L = 32 waiting for one was a sixth of the time (Zen 4).
struct Ahead {
  struct Lines {
    const char* row;
    int64_t bytes, stride, left;
  };
  Lines pending[8];
  int count = 0, at = 0;
  int64_t total = 0, pace = 0;

  template <class T>
  void add_queries(const AttentionParams& p, const Rows& rows, const Strided& x, int64_t dim) {
    if (rows.count == 0) return;
    const Row row(p, *rows.s, rows.kv_head, rows.first);
    add<T>(x, *rows.s, row.h, row.t, least(rows.count, rows.s->q_start + rows.s->q_length - row.t), dim);
  }
  template <class T>
  void add_keys(const Rows& rows, const Strided& x, int64_t dim) {
    const AttentionSequence& s = *rows.s;
    add<T>(x, s, rows.kv_head, s.k_start + s.k_first, least(s.visible, ahead_keys), dim);
  }
  void spread_over(int64_t steps) { pace = (total + steps - 1) / steps; }
  EK_INLINE void step() {
    for (int64_t i = 0; i < pace && at < count; i++) {
      Lines& next = pending[at];
      for (int64_t byte = 0; byte < next.bytes; byte += 64) __builtin_prefetch(next.row + byte, 0, 2);
      next.row += next.stride;
      if (--next.left == 0) at++;
    }
  }

 private:
  static constexpr int64_t ahead_keys = 512;  // more would push out what is still needed

  template <class T>
  void add(const Strided& x, const AttentionSequence& s, int64_t h, int64_t t, int64_t rows, int64_t dim) {
    const int64_t size = sizeof(T);
    if (!x.data || rows <= 0) return;
    const T* first = static_cast<const T*>(x.data) + s.b * x.stride_b + h * x.stride_h + t * x.stride_t;
    pending[count++] = {reinterpret_cast<const char*>(first), dim * size, x.stride_t * size, rows};
    total += rows;
  }
};

// Rows of a matrix, ld apart: a tensor's own, where products can read or write them, or scratch.
struct Panel {
  float* x;
  int64_t ld;
};

// float32 rows of whole vectors, one head's: products take them where they are. With more keys the rows, a power of two
// or so apart, push each other out of the first-level cache, and to copy them costs little beside the products.
template <class T>
bool in_place(const AttentionParams& p, const AttentionSequence& s) {
  return std::is_same<T, float>::value && p.heads == p.kv_heads && !s.key && !s.partial && s.visible <= 64 &&
         p.dim % W == 0 && p.dim_v % W == 0;
}

// Whether n rows of whole vectors, stride apart, are finite. Only then do products take them in place where an option
// may hide keys from rows: what is hidden is multiplied by 0 all the same.
inline bool finite(const float* x, int64_t stride, int64_t n, int64_t dim) {
  Vec total{};
  for (int64_t i = 0; i < n; i++, x += stride) {
    for (int64_t c = 0; c < dim; c += W) total += load(x + c) - load(x + c);
  }
  return sum_lanes(total) == 0;
}
inline bool finite_keys(const Strided& x, const AttentionSequence& s, int64_t kv_head, int64_t dim) {
  return finite(key_row<float>(x, s, kv_head, 0), x.stride_t, s.visible, dim);
}
inline bool finite_queries(const AttentionParams& p, const Rows& rows) {
  if (rows.count == 0) return true;
  const Row row(p, *rows.s, rows.kv_head, rows.first);
  return finite(row.in<float>(p.query), p.query.stride_t, rows.count, p.dim);
}

// What products read of T: bfloat16 stays as it is where the CPU multiplies it, everything else becomes float32.
// per_word numbers take the place of one float in scratch.
template <class T>
constexpr bool paired = has_pairs && std::is_same<T, Bf16>::value;
template <class T>
using Operand = std::conditional_t<paired<T>, Pair, float>;
template <class T>
using Element = std::conditional_t<paired<T>, Bf16, float>;
template <class T>
constexpr int64_t per_word = paired<T> ? 2 : 1;

// Between gathered rows.
template <class T>
EK_INLINE int64_t row_words(int64_t dim) {
  return round_up(dim / per_word<T>, W);
}

struct Scratch {
  float* free;
  float* take(int64_t floats) {
    float* taken = free;
    free += round_up(floats, 16);
    return taken;
  }
};

// The visible rows of x (n, dim), as they are (row_words(dim) apart) and transposed (dim, n) (rows ld apart, zeros up
// to a multiple of W), Pairs as units; either may be null.
template <class T>
void gather(const Strided& x, const AttentionSequence& s, int64_t kv_head, int64_t channels, float* plain,
            float* transposed, int64_t ld) {
  using From = std::conditional_t<paired<T>, Pair, T>;
  const int64_t n = s.visible, dim = channels / per_word<T>, dim_padded = round_up(dim, W);
  for (int64_t j = 0; j < n; j += W) {
    const int live = int(least(W, n - j));
    const From* rows[W];
    for (int i = 0; i < W; i++) {
      rows[i] = reinterpret_cast<const From*>(key_row<T>(x, s, kv_head, j + least(i, live - 1)));
    }
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

// m rows of x from `row` on, each times its factor (null: 1); Pairs come as they are.
template <class T>
void gather_rows(const Strided& x, Row row, int64_t m, int64_t dim, const float* factor, float* to) {
  const int64_t ld = row_words<T>(dim);
  for (int64_t i = 0; i < m; i++, row.next()) {
    const T* from = row.in<T>(x);
    if (factor && factor[i] == 0) {  // whatever the row holds: it sees no key
      for (int64_t c = 0; c < ld; c += W) store(to + i * ld + c, Vec{});
    } else if constexpr (paired<T>) {
      const Pair* pairs = reinterpret_cast<const Pair*>(from);
      for (int64_t c = 0; c < dim / 2; c += W) store(to + i * ld + c, load_at(pairs, c, dim / 2));
    } else {
      const float times = factor ? factor[i] : 1;
      for (int64_t c = 0; c < dim; c += W) store(to + i * ld + c, load_at(from, c, dim) * times);
    }
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

}  // namespace
}  // namespace ek::EK_VARIANT
