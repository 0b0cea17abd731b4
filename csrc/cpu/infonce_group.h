// A group of rows of the contrastive loss, and what stands before its first column. For infonce.cpp alone.
#pragma once
#include "gemm.h"
#include "infonce.h"
#include "pairs.h"

namespace ek::EK_VARIANT {
namespace {

constexpr int64_t G = infonce_rows, block_size = infonce_block;
constexpr float eps = 1e-12f;  // under cosine, x / max(|x|, eps)
constexpr int64_t depth =
    512;  // of one product: beyond it, a panel of the right-hand side leaves the first-level cache

// Below, n is rounded up to whole vectors: what lies between is zero.
EK_INLINE float dot(const float* a, const float* b, int64_t n) {
  Vec sums{};
  for (int64_t c = 0; c < n; c += W) sums += load(a + c) * load(b + c);
  return sum_lanes(sums);
}

// Σ |a_c b_c|: dot() is within a few roundings of it.
EK_INLINE float dot_of_sizes(const float* a, const float* b, int64_t n) {
  Vec sums{};
  for (int64_t c = 0; c < n; c += W) sums += (Vec)((IVec)(load(a + c) * load(b + c)) & 0x7fffffff);
  return sum_lanes(sums);
}

EK_INLINE void scale(float* x, float by, int64_t n) {
  for (int64_t c = 0; c < n; c += W) store(x + c, by * load(x + c));
}

EK_INLINE void add(float* to, float by, const float* x, int64_t n) {
  for (int64_t c = 0; c < n; c += W) store(to + c, load(to + c) + by * load(x + c));
}

// Into the second-level cache, while something else is computed: a product takes 64 bytes of each row in turn, which
// the hardware doesn't foresee. With prefixes the two products of a tile took 28 ns a pair of vectors without, 19 so.
EK_INLINE void fetch(const float* row, int64_t n) {
  for (int64_t c = 0; c < n; c += 16) __builtin_prefetch(row + c, 0, 2);
}

// The first `width` numbers of some rows of a matrix, fetched evenly between a product's tiles.
struct Ahead {
  const float* row;
  int64_t stride, width, left, pace;

  Ahead(const float* first, int64_t row_stride, int64_t of_row, int64_t rows, int64_t tiles)
      : row(first), stride(row_stride), width(of_row), left(rows), pace((rows + tiles - 1) / tiles) {}
  EK_INLINE void step() {
    for (int64_t i = 0; i < pace && left > 0; i++, left--, row += stride) fetch(row, width);
  }
};

// The labels of G rows, in halves: lanes hold 32 bits.
struct Labels {
  int32_t low[G] = {}, high[G] = {};

  void set(int64_t i, int64_t label) { low[i] = int32_t(label), high[i] = int32_t(label >> 32); }
  EK_INLINE IVec equal(int64_t v, int64_t label) const {
    return (*reinterpret_cast<const IVec*>(low + v) == int32_t(label)) &
           (*reinterpret_cast<const IVec*>(high + v) == int32_t(label >> 32));
  }
};

// One softmax of G rows. Its positive is kept apart: `rest` is Σ exp(z - max) over the others.
struct Part {
  float max[G], rest[G];
  float moment[G];                 // Σ exp(z - max) (z - max), for τ: d_τ = -d_loss / τ · Σ_j (p_ij - y_ij) z_ij
  float count[G], z_sum[G];        // of the visible columns beside the positive, with smoothing
  float same_count[G], same_z[G];  // of those with the row's label
};

// What a kind of row vectors has of its own: q̂ / τ, or the positives'.
struct Anchors {
  float* unit;        // (G, stride)
  float* transposed;  // (dim, G), or Pairs (dim / 2, G) of the vectors themselves
  float* pairs;       // (G / 2, padded_dim); null where products are float32
  float* factor;      // (G)
  float* d;           // (G, stride): Σ_j exp(z_ij - max) d̂_j
  float* hidden;      // (G, stride): Σ of the columns that are out; null without smoothing
  float* same;        // (G, stride): Σ of those with the row's label; null unless they are positives
  float* guide;       // (guide_dim, G)
  Labels labels;
  float norm[G];
};

// A group of G rows; lanes beyond `count` hold zero vectors.
struct Group {
  int64_t first, count, width;  // width: count in whole vectors
  int64_t target[G];
  int32_t key[4][G];  // of each pass; lanes beyond count: -1
  int32_t query[G];   // target modulo period: whose documents are of the row's own query
  float tau[G];
  float positive[G];                                  // the positive's z
  float threshold[G];                                 // the guide's
  float best[G], negative_sum[G], negative_count[G];  // metrics: the largest z of others, Σ z and number of negatives
  Part part[infonce_levels];                          // one or two; with prefixes one of each
  Anchors anchors[2];
};

template <class T>
void load_typed(const InfoNCEVectors& vectors, int64_t offset, int64_t n, float* to) {
  const T* from = static_cast<const T*>(vectors.data) + offset;
  for (int64_t c = 0; c < n; c += W) store(to + c, load_at(from, c, n));
}

// A row in float32, zeros up to a whole vector.
void load_row(const InfoNCEVectors& vectors, int64_t offset, int64_t n, float* to) {
  BY_DTYPE(vectors.dtype, load_typed<T>(vectors, offset, n, to))
}

// x -> x / max(|x|, eps) under cosine; returns |x|
float make_unit(const InfoNCEParams& p, float* x, int64_t dim) {
  if (!p.cosine) return 1;
  const float norm = __builtin_sqrtf(dot(x, x, dim));
  const float divisor = norm < eps ? eps : norm;  // this way round NaN stays NaN
  for (int64_t c = 0; c < dim; c += W) store(x + c, load(x + c) / divisor);
  return norm;
}

// d_x = (d - u (u·d)) / |x|, or d / eps where eps is larger; d is the gradient of u, which is `unit` times `by`.
void write_gradient(const InfoNCEParams& p, const float* d, const float* unit, float by, float norm, float* d_x) {
  float along = 0, divisor = 1;
  if (p.cosine) {
    if (!(norm < eps)) along = dot(unit, d, p.dim) * by * by;
    divisor = norm < eps ? eps : norm;
  }
  for (int64_t c = 0; c < p.dim; c += W) {
    store_at(d_x, c, p.dim, (load(d + c) - along * load(unit + c)) / divisor);
  }
}

// to (n, width) = columns (n, dim) · rows (dim, G): the same sums in the same order wherever a vector stands.
template <class Operand>
void product(int64_t n, int64_t width, int64_t dim, const Operand* columns, int64_t stride, const Operand* rows,
             float* to, const End& end = {}) {
  Nothing nothing;
  for (int64_t c = 0; c == 0 || c < dim; c += depth) {
    gemm(c > 0, n, width, least(depth, dim - c), columns + c, stride, 1, rows + c * G, G, to, G, end, nothing);
  }
}

// to (dim, G) = the transpose of G rows, whole vectors; null: zeros.
void transpose_rows(const float* const* rows, int64_t dim, float* to) {
  for (int64_t i = 0; i < G; i += W) {
    for (int64_t c = 0; c < dim; c += W) {
      Vec x[W];
      for (int64_t l = 0; l < W; l++) x[l] = rows[i + l] ? load(rows[i + l] + c) : Vec{};
      transpose(x);
      for (int64_t l = 0; l < least(W, dim - c); l++) store(to + (c + l) * G + i, x[l]);
    }
  }
}

const Pair* as_pairs(const float* x) { return reinterpret_cast<const Pair*>(x); }

const Bf16* bf16_row(const InfoNCEVectors& vectors, int64_t row) {
  return static_cast<const Bf16*>(vectors.data) + row * vectors.stride;
}

// What makes a unit vector of one whose norm this is.
float unit_factor(const InfoNCEParams& p, float norm) { return !p.cosine ? 1 : norm < eps ? 1 / eps : 1 / norm; }

const float* positive_of(const InfoNCEParams& p, int64_t row, float* buffer, float* norm) {
  if (!p.positives.data) {
    *norm = p.columns[0].norm[p.targets[row]];
    return p.columns[0].unit + p.targets[row] * p.stride;
  }
  load_row(p.positives, row * p.positives.stride, p.dim, buffer);
  *norm = make_unit(p, buffer, p.dim);
  return buffer;
}

void load_pairs(const InfoNCEParams& p, Group& g, int64_t kind) {
  Anchors& a = g.anchors[kind];
  const Bf16* rows[G];
  for (int64_t i = 0; i < G; i++) {
    rows[i] = i >= g.count       ? nullptr
              : kind == 0        ? bf16_row(p.columns[1].vectors, p.offset + g.first + i)
              : p.positives.data ? bf16_row(p.positives, g.first + i)
                                 : bf16_row(p.columns[0].vectors, g.target[i]);
    const Pair* words = reinterpret_cast<const Pair*>(rows[i]);
    Pair* transposed = reinterpret_cast<Pair*>(a.transposed) + i;
    for (int64_t c = 0; c < p.dim / 2; c++) transposed[c * G] = words ? words[c] : Pair{0};
    a.factor[i] = unit_factor(p, a.norm[i]) / g.tau[i];
  }
  for (int64_t i = 0; i < G; i += 2) {
    pair_two(rows[i], rows[i + 1], p.dim, a.pairs + i / 2 * p.padded_dim, p.padded_dim);
  }
}

void load_anchors(const InfoNCEParams& p, Group& g, int64_t kind, float* row) {
  Anchors& a = g.anchors[kind];
  const float* rows[G];
  for (int64_t i = 0; i < G; i++) {
    float* unit = a.unit + i * p.stride;
    rows[i] = i < g.count ? unit : nullptr;
    a.norm[i] = 1;
    if (i < g.count) {
      const int64_t query = p.offset + g.first + i;
      if (kind == 0) {
        load_row(p.columns[1].vectors, query * p.columns[1].vectors.stride, p.dim, unit);
        a.norm[i] = make_unit(p, unit, p.dim);
        for (int64_t c = 0; c < p.dim; c += W) store(unit + c, load(unit + c) / g.tau[i]);
      } else {
        const float* positive = positive_of(p, g.first + i, row, &a.norm[i]);
        for (int64_t c = 0; c < p.dim; c += W) store(unit + c, load(positive + c) / g.tau[i]);
      }
      for (int64_t c = round_up(p.dim, W); c < p.stride; c++) unit[c] = 0;
      const InfoNCEColumns& like = p.columns[kind == 0];
      if (like.labels) a.labels.set(i, like.labels[kind == 0 ? query : g.target[i]]);
    }
    for (int64_t c = 0; p.sum_anchors[kind] && c < p.stride; c++) a.d[i * p.stride + c] = 0;
    for (int64_t c = 0; a.hidden && c < p.stride; c++) a.hidden[i * p.stride + c] = 0;
    for (int64_t c = 0; a.same && c < p.stride; c++) a.same[i * p.stride + c] = 0;
  }
  if (p.paired) {
    load_pairs(p, g, kind);
  } else {
    transpose_rows(rows, p.dim, a.transposed);
  }
}

// The guide's vectors of the rows, and what a column's similarity may not exceed: the positive's, by the same product
// that tiles take, so that a duplicate's is the same number.
void load_guide(const InfoNCEParams& p, Group& g) {
  for (int64_t kind = 0; kind < 2; kind++) {
    const InfoNCEColumns& like = p.columns[kind == 0];
    const float* rows[G] = {};
    for (int64_t i = 0; i < g.count; i++) {
      rows[i] = like.guide + (kind == 0 ? p.offset + g.first + i : g.target[i]) * p.guide_stride;
    }
    if (kind < p.anchors) transpose_rows(rows, p.guide_dim, g.anchors[kind].guide);
  }
  for (int64_t i = 0; i < g.count; i++) {
    float of_rows[W];
    const int64_t v = i / W * W;
    product(1, W, p.guide_dim, p.columns[0].guide + g.target[i] * p.guide_stride, p.guide_stride,
            g.anchors[0].guide + v, of_rows);
    const float positive = of_rows[i - v];
    g.threshold[i] = positive - (p.relative ? __builtin_fabsf(positive) * p.margin : p.margin);
  }
}

// What a task has of scratch.
struct Space {
  float *z_negatives, *tile, *guide_tile, *level_tile, *pairs, *row, *d_row;
};

// A group's rows, before any column. Their vectors are left to the columns' pass, by the one task that has the group
// to itself; `shared`: other tasks have it at the same time, each its own copy.
void begin_group(const InfoNCEParams& p, int64_t group, bool shared, float* scratch, Group& g, Space& space) {
  g.first = p.panel_begin + group * G;
  g.count = least(G, p.panel_end - g.first);
  g.width = round_up(g.count, W);
  const auto take_floats = [&](int64_t n) { return scratch += n, scratch - n; };
  const auto kept_or_taken = [&](float* kept, int64_t n) { return shared ? take_floats(n) : kept + group * n; };
  for (int64_t kind = 0; kind < p.anchors; kind++) {
    Anchors& a = g.anchors[kind];
    a.unit = kept_or_taken(p.unit_anchors[kind], G * p.stride);
    a.pairs = p.paired ? kept_or_taken(p.anchor_pairs[kind], G / 2 * p.padded_dim) : nullptr;
    a.factor = p.paired ? kept_or_taken(p.anchor_factor[kind], G) : nullptr;
    a.transposed = take_floats(p.dim * G);
    a.d = take_floats(G * p.stride);
    a.guide = take_floats(p.guide_dim * G);
    const bool sums = p.sum_anchors[kind] && (p.label_smoothing != 0 || p.same_positive);
    a.hidden = sums && p.label_smoothing != 0 ? take_floats(G * p.stride) : nullptr;
    a.same = sums && p.same_positive ? take_floats(G * p.stride) : nullptr;
  }
  space.z_negatives = take_floats(p.k * G);
  space.tile = take_floats(block_size * G);
  space.guide_tile = take_floats(block_size * G);
  space.level_tile = take_floats(p.levels ? block_size * G : 0);
  space.pairs = take_floats(p.paired ? block_size / 2 * G : 0);
  space.row = take_floats(p.stride);
  space.d_row = take_floats(p.stride);
  for (int64_t i = 0; i < G; i++) {
    const bool real = i < g.count;
    g.tau[i] = real ? p.temperature[(g.first + i) * p.temperature_stride] : 1;
    g.target[i] = real ? p.targets[g.first + i] : -1;
    g.query[i] = real ? int32_t(g.target[i] % p.period) : -1;
    for (int64_t pass = 0; pass < p.passes; pass++) g.key[pass][i] = real ? p.pass[pass].key[g.first + i] : -1;
    g.threshold[i] = __builtin_inff();
    g.best[i] = -__builtin_inff();
    g.negative_sum[i] = g.negative_count[i] = 0;
  }
  for (int64_t kind = 0; kind < p.anchors; kind++) load_anchors(p, g, kind, space.row);
  if (p.guide_dim) load_guide(p, g);
}

void begin_part(Group& g, int64_t part, const float* positive) {
  Part& s = g.part[part];
  for (int64_t i = 0; i < G; i++) {
    s.max[i] = positive[i];
    s.rest[i] = s.moment[i] = s.count[i] = s.z_sum[i] = s.same_count[i] = s.same_z[i] = 0;
  }
}

}  // namespace
}  // namespace ek::EK_VARIANT
