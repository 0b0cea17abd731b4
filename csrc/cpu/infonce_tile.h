// A tile of logits of the contrastive loss and what its options do to it: hooks that add to a logit, hide it, or count
// it as a target. For infonce.cpp alone.
#pragma once
#include "gemm.h"
#include "infonce.h"

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

EK_INLINE void scale(float* x, float by, int64_t n) {
  for (int64_t c = 0; c < n; c += W) store(x + c, by * load(x + c));
}

EK_INLINE void add(float* to, float by, const float* x, int64_t n) {
  for (int64_t c = 0; c < n; c += W) store(to + c, load(to + c) + by * load(x + c));
}

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
  float* transposed;  // (dim, G)
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
  Part part[2];
  Anchors anchors[2];
};

EK_INLINE IVec load_ints(const int32_t* p) { return *reinterpret_cast<const IVec*>(p); }

EK_INLINE bool any(IVec mask) {
  int32_t found = 0;
  for (int lane = 0; lane < W; lane++) found |= mask[lane];
  return found != 0;
}

// Adds column vectors to the sums of the rows in `mask`.
EK_INLINE void add_to(float* sums, IVec mask, int64_t v, const InfoNCEParams& p, const float* column) {
  for (int64_t i = v; i < v + W; i++) {
    if (mask[i - v]) add(sums + i * p.stride, 1, column, p.dim);
  }
}

// Every option's say on z (n, G) of a pass's columns from `first` on: hidden ones become -inf.
void apply_hooks(const InfoNCEParams& p, const InfoNCEPass& pass, Group& g, int64_t first, int64_t n, float* z,
                 const float* guide) {
  const InfoNCEColumns& columns = p.columns[pass.columns];
  Anchors& a = g.anchors[pass.anchors];
  Part& part = g.part[pass.part];
  const int64_t number = &pass - p.pass;
  const bool forward = number == 0, with_labels = columns.labels != nullptr;
  const float infinity = __builtin_inff();
  const InfoNCEHardness hardness = forward ? p.hardness : no_hardness;
  for (int64_t v = 0; v < g.width; v += W) {
    const IVec key = load_ints(g.key[number] + v), query = load_ints(g.query + v), none{}, all = ~none;
    const IVec inside = load_ints(g.query + v) >= 0;
    const Vec threshold = load(g.threshold + v), by_similarity = p.strength * load(g.tau + v), zero{};
    Vec count{}, z_sum{}, same_count{}, same_z{}, best = load(g.best + v), negative_sum{}, negative_count{};
    for (int64_t j = 0; j < n; j++) {
      const int64_t column = first + j;
      const Vec raw = load(z + j * G + v);
      const IVec own = key == int32_t(column % pass.period);
      const IVec apart = pass.own_apart ? own : none, kept = pass.own_apart ? none : own;
      IVec same = none, out = apart;
      if (with_labels) {
        const IVec equal = a.labels.equal(v, columns.labels[column]) & ~own & inside;
        same = p.same_positive ? equal : none;
        out |= p.same_positive ? none : equal;
      }
      if (guide) out |= (load(guide + j * G + v) > threshold) & ~same & ~kept;
      Vec added{};
      if (columns.log_weight) {
        const IVec negative = ~(same | kept);
        added = select(negative, splat(columns.log_weight[column]), zero);
        out |= columns.log_weight[column] == -infinity ? negative : none;
      }
      if (hardness != no_hardness) {
        const IVec of_query = query == int32_t(column % p.period);
        const IVec harder = hardness == in_batch_negatives ? ~of_query : hardness == hard_negatives ? of_query : all;
        added += select(harder & ~same, by_similarity * raw, zero);
      }
      const Vec changed = select(out, splat(-infinity), raw + added);
      store(z + j * G + v, changed);
      if (p.label_smoothing != 0) {
        count += select(out, zero, splat(1));
        z_sum += select(out, zero, changed);
        if (a.hidden && any(out & inside)) add_to(a.hidden, out & inside, v, p, columns.unit + column * p.stride);
      }
      if (p.same_positive && any(same)) {
        same_count += select(same, splat(1), zero);
        same_z += select(same, changed, zero);
        if (a.same) add_to(a.same, same, v, p, columns.unit + column * p.stride);
      }
      if (p.metrics && forward) {
        best = larger(select(out, splat(-infinity), raw), best);
        negative_sum += select(out | same, zero, raw);
        negative_count += select(out | same, zero, splat(1));
      }
    }
    store(part.count + v, load(part.count + v) + count);
    store(part.z_sum + v, load(part.z_sum + v) + z_sum);
    store(part.same_count + v, load(part.same_count + v) + same_count);
    store(part.same_z + v, load(part.same_z + v) + same_z);
    store(g.best + v, best);
    store(g.negative_sum + v, load(g.negative_sum + v) + negative_sum);
    store(g.negative_count + v, load(g.negative_count + v) + negative_count);
  }
}

// to (n, width) = columns (n, dim) · rows (dim, G): the same sums in the same order wherever a vector stands.
void product(int64_t n, int64_t width, int64_t dim, const float* columns, int64_t stride, const float* rows,
             float* to) {
  gemm<false>(n, width, least(depth, dim), columns, stride, 1, rows, G, to, G);
  for (int64_t c = depth; c < dim; c += depth) {
    gemm<true>(n, width, least(depth, dim - c), columns + c, stride, 1, rows + c * G, G, to, G);
  }
}

// z (n, G) of n columns: the product, then the hooks; what is apart or hidden becomes -inf.
void logits(const InfoNCEParams& p, const InfoNCEPass& pass, Group& g, int64_t first, int64_t n, float* z,
            float* guide) {
  const InfoNCEColumns& columns = p.columns[pass.columns];
  const Anchors& a = g.anchors[pass.anchors];
  product(n, g.width, p.dim, columns.unit + first * p.stride, p.stride, a.transposed, z);
  if (p.hooks) {
    if (columns.guide) {
      product(n, g.width, p.guide_dim, columns.guide + first * p.guide_stride, p.guide_stride, a.guide, guide);
    }
    return apply_hooks(p, pass, g, first, n, z, columns.guide ? guide : nullptr);
  }
  for (int64_t i = 0; pass.own_apart && i < g.count; i++) {
    int64_t j = (g.key[&pass - p.pass][i] - first) % pass.period;
    for (j += j < 0 ? pass.period : 0; j < n; j += pass.period) z[j * G + i] = -__builtin_inff();
  }
}

// The maximum grows to `larger`: what was summed under the old one is scaled, and so are rows of the anchors' d.
void raise_max(const InfoNCEParams& p, Group& g, int64_t part, const float* larger) {
  Part& s = g.part[part];
  float factor[G];
  for (int64_t v = 0; v < g.width; v += W) {
    const Vec old = load(s.max + v), now = load(larger + v), by = exp(old - now);
    store(s.moment + v, by * (load(s.moment + v) + (old - now) * load(s.rest + v)));
    store(s.rest + v, by * load(s.rest + v));
    store(s.max + v, now);
    store(factor + v, by);
  }
  for (int64_t kind = 0; kind < p.anchors; kind++) {
    if (!p.sum_anchors[kind] || (p.parts > 1 && kind != part)) continue;
    for (int64_t i = 0; i < g.count; i++) {
      if (factor[i] != 1) scale(g.anchors[kind].d + i * p.stride, factor[i], p.padded_dim);
    }
  }
}

// e^(z - max) for values z of one vector of rows; hidden ones are -inf.
EK_INLINE Vec take(Vec z, Vec max, Vec& rest, Vec& moment) {
  const Vec e = exp(z - max);
  rest += e;
  moment += select(e > 0.0f, e * (z - max), Vec{});
  return e;
}

// z (n, G) -> exponentials in place, under a maximum that covers them. With `mark`, hidden ones become -0.
template <bool mark>
void exponentials(const InfoNCEParams& p, Group& g, int64_t part, int64_t n, float* z) {
  Part& s = g.part[part];
  float larger[G];
  bool grows = false;
  for (int64_t v = 0; v < g.width; v += W) {
    const Vec old = load(s.max + v);
    Vec max = old;
    for (int64_t j = 0; j < n; j++) max = ek::EK_VARIANT::larger(load(z + j * G + v), max);
    store(larger + v, max);
    grows |= max_lanes(select(max > old, splat(1), Vec{})) > 0;
  }
  if (grows) raise_max(p, g, part, larger);
  for (int64_t v = 0; v < g.width; v += W) {
    const Vec max = load(s.max + v);
    Vec rest{}, moment{};  // of this block alone: shorter sums round less
    for (int64_t j = 0; j < n; j++) {
      const Vec value = load(z + j * G + v), e = take(value, max, rest, moment);
      store(z + j * G + v, mark ? select(value == -__builtin_inff(), splat(-0.0f), e) : e);
    }
    store(s.rest + v, load(s.rest + v) + rest);
    store(s.moment + v, load(s.moment + v) + moment);
  }
}

}  // namespace
}  // namespace ek::EK_VARIANT
