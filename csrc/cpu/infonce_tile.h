// A tile of logits of the contrastive loss and what its options do to it: hooks that add to a logit, hide it, or count
// it as a target. For infonce.cpp alone.
#pragma once
#include "infonce_group.h"

namespace ek::EK_VARIANT {
namespace {

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

// Every option's say on z (n, G) of a pass's columns from `first` on, in softmax `of_part`: hidden ones become -inf.
void apply_hooks(const InfoNCEParams& p, int64_t number, int64_t of_part, Group& g, int64_t first, int64_t n, float* z,
                 const float* guide) {
  const InfoNCEPass& pass = p.pass[number];
  const InfoNCEColumns& columns = p.columns[pass.columns];
  Anchors& a = g.anchors[pass.anchors];
  Part& part = g.part[of_part];
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

// The guide's similarities of a tile; null without one.
const float* guide_tile(const InfoNCEParams& p, const InfoNCEPass& pass, const Group& g, int64_t first, int64_t n,
                        float* to) {
  const InfoNCEColumns& columns = p.columns[pass.columns];
  if (!columns.guide) return nullptr;
  product(n, g.width, p.guide_dim, columns.guide + first * p.guide_stride, p.guide_stride,
          g.anchors[pass.anchors].guide, to);
  return to;
}

// What is apart becomes -inf: all there is to do without hooks.
void hide_own(const InfoNCEParams& p, int64_t number, const Group& g, int64_t first, int64_t n, float* z) {
  const InfoNCEPass& pass = p.pass[number];
  for (int64_t i = 0; pass.own_apart && i < g.count; i++) {
    int64_t j = (g.key[number][i] - first) % pass.period;
    for (j += j < 0 ? pass.period : 0; j < n; j += pass.period) z[j * G + i] = -__builtin_inff();
  }
}

// z (n, G) of n columns: the product, then the hooks; what is apart or hidden becomes -inf.
void logits(const InfoNCEParams& p, int64_t number, Group& g, int64_t first, int64_t n, float* z, float* guide) {
  const InfoNCEPass& pass = p.pass[number];
  const InfoNCEColumns& columns = p.columns[pass.columns];
  const Anchors& a = g.anchors[pass.anchors];
  if (p.paired) {
    product(n, g.width, p.dim / 2, reinterpret_cast<const Pair*>(bf16_row(columns.vectors, first)),
            columns.vectors.stride / 2, as_pairs(a.transposed), z, {columns.factor + first, false, a.factor});
  } else {
    product(n, g.width, p.dim, columns.unit + first * p.stride, p.stride, a.transposed, z);
  }
  if (p.hooks) {
    apply_hooks(p, number, pass.part, g, first, n, z, guide_tile(p, pass, g, first, n, guide));
  } else {
    hide_own(p, number, g, first, n, z);
  }
}

// The maximum grows to `larger`: what was summed under the old one is scaled, and so are rows of the anchors' d.
void raise_max(const InfoNCEParams& p, Group& g, int64_t part, const float* larger) {
  Part& s = g.part[part];
  bool grows = false;
  for (int64_t v = 0; v < g.width; v += W) {
    grows |= max_lanes(select(load(larger + v) > load(s.max + v), splat(1), Vec{})) > 0;
  }
  if (!grows) return;
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

// e^(z - max) for values z of one vector of rows, z <= max + 88; hidden ones are -inf: their part of the moment is
// 0 · -88.
EK_INLINE Vec take(Vec z, Vec max, Vec& rest, Vec& moment) {
  const Vec x = larger(splat(-88), z - max), e = exp_within_88(x);
  rest += e;
  moment += e * x;
  return e;
}

// Two sums Σ exp(z - max), with their moments, become one.
EK_INLINE void merge(Vec& max, Vec& rest, Vec& moment, Vec other_max, Vec other_rest, Vec other_moment) {
  const Vec now = larger(other_max, max), by = exp(max - now), other = exp(other_max - now);
  moment = by * (moment + (max - now) * rest) + other * (other_moment + (other_max - now) * other_rest);
  rest = by * rest + other * other_rest;
  max = now;
}

// Adds a block's sums under `max` to those under `old`, for one vector of rows.
EK_INLINE void add_sums(Part& s, int64_t v, Vec old, Vec max, Vec rest, Vec moment) {
  const Vec by = exp(old - max), of_rest = load(s.rest + v);
  store(s.moment + v, by * (load(s.moment + v) + (old - max) * of_rest) + moment);
  store(s.rest + v, by * of_rest + rest);
  store(s.max + v, max);
}

// z (n, G) -> exponentials under the row's maximum: in place, or with `sum` only summed. With `mark`, hidden ones
// become -0.
template <bool mark, bool sum = false>
void sum_exponentials(Group& g, int64_t part, int64_t n, float* z) {
  Part& s = g.part[part];
  for (int64_t v = 0; v < g.width; v += W) {
    const Vec max = load(s.max + v);
    Vec rest{}, moment{};  // of this block alone: shorter sums round less
    for (int64_t j = 0; j < n; j++) {
      const Vec value = load(z + j * G + v), e = take(value, max, rest, moment);
      if constexpr (!sum) store(z + j * G + v, mark ? select(value == -__builtin_inff(), splat(-0.0f), e) : e);
    }
    store(s.rest + v, load(s.rest + v) + rest);
    store(s.moment + v, load(s.moment + v) + moment);
  }
}

// The same under a maximum that first grows to cover them.
template <bool mark, bool sum = false>
void exponentials(const InfoNCEParams& p, Group& g, int64_t part, int64_t n, float* z) {
  float maxima[G];
  for (int64_t v = 0; v < g.width; v += W) {
    Vec max = load(g.part[part].max + v);
    for (int64_t j = 0; j < n; j++) max = larger(load(z + j * G + v), max);
    store(maxima + v, max);
  }
  raise_max(p, g, part, maxima);
  sum_exponentials<mark, sum>(g, part, n, z);
}

}  // namespace
}  // namespace ek::EK_VARIANT
