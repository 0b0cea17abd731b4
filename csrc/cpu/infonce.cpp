// The contrastive loss on the CPU; the maths is embedkern/reference/infonce.py. A tile of z = q̂·d̂ / τ lives in the
// cache: it becomes exponentials under the row's running maximum (Milakov and Gimelshein 2018), which make d_queries at
// once and wait for the columns' pass. Three products in all, and the exponentials are normalised afterwards:
//   d_q̂_i = d_loss_i / τ_i · (Σ_j p_ij d̂_j - d̂_t),   d_d̂_j = Σ_i d_loss_i / τ_i · (p_ij - [j = t_i]) q̂_i.
// The positive is kept apart: with rest = Σ_{j≠t} exp(z_ij - max), p_it - 1 = -rest / sum has no cancellation.
// Other targets than the positive alone (label smoothing, columns with the row's label) take p - y for p - [j = t]:
// y is `spread` on every visible column and `share` on those with the label, so that sums over columns serve.
// A direction is a pass: the queries or their positives against documents or queries, in one softmax or two.
#include "infonce_mutual.h"
#include "infonce_prefixes.h"

namespace ek::EK_VARIANT {
namespace {

void normalise(const InfoNCEParams& p, int64_t set, int64_t block) {
  const InfoNCEColumns& columns = p.columns[set];
  for (int64_t j = block * block_size; j < least((block + 1) * block_size, columns.count); j++) {
    float* unit = columns.unit + j * p.stride;
    load_row(columns.vectors, j * columns.vectors.stride, p.dim, unit);
    for (int64_t c = round_up(p.dim, W); c < p.stride; c++) unit[c] = 0;
    columns.norm[j] = make_unit(p, unit, p.dim);
    if (p.paired) columns.factor[j] = unit_factor(p, columns.norm[j]);
  }
  if (p.paired) {
    const int64_t first = block * block_size;
    pair_rows(bf16_row(columns.vectors, first), columns.vectors.stride, least(block_size, columns.count - first), p.dim,
              columns.pairs + first / 2 * p.padded_dim, p.padded_dim);
  }
}

void guide(const InfoNCEParams& p, const InfoNCEVectors& vectors, int64_t begin, int64_t end, float* unit) {
  for (int64_t j = begin; j < end; j++) {
    float* row = unit + j * p.guide_stride;
    load_row(vectors, j * vectors.stride, p.guide_dim, row);
    for (int64_t c = round_up(p.guide_dim, W); c < p.guide_stride; c++) row[c] = 0;
    make_unit(p, row, p.guide_dim);
  }
}

// Σ_j d̂_j, block by block: shorter sums round less.
void column_sum(const InfoNCEParams& p, int64_t set, float* part) {
  const InfoNCEColumns& columns = p.columns[set];
  for (int64_t c = 0; c < p.stride; c++) columns.sum[c] = 0;
  for (int64_t first = 0; first < columns.count; first += block_size) {
    for (int64_t c = 0; c < p.stride; c++) part[c] = 0;
    for (int64_t j = first; j < least(first + block_size, columns.count); j++) {
      add(part, 1, columns.unit + j * p.stride, p.dim);
    }
    add(columns.sum, 1, part, p.dim);
  }
}

float load_negative(const InfoNCEParams& p, int64_t row, int64_t k, float* buffer) {
  load_row(p.negatives, row * p.negatives_stride + k * p.negatives.stride, p.dim, buffer);
  return make_unit(p, buffer, p.dim);
}

bool counts(const InfoNCEParams& p, int64_t row, int64_t k) {
  return !p.negative_weight || p.negative_weight[row * p.k + k] > -__builtin_inff();
}

// z (k, G) of the rows' own negatives, with what options add.
void negative_logits(const InfoNCEParams& p, Group& g, float* z, float* buffer) {
  Part& part = g.part[0];
  for (int64_t k = 0; k < p.k * G; k++) z[k] = 0;
  for (int64_t i = 0; i < g.count; i++) {
    for (int64_t k = 0; k < p.k; k++) {
      const int64_t row = g.first + i;
      load_negative(p, row, k, buffer);
      const float raw = dot(g.anchors[0].unit + i * p.stride, buffer, p.dim);
      float& to = z[k * G + i];
      to = raw;
      if (p.hardness > in_batch_negatives) to += p.strength * g.tau[i] * raw;
      if (p.negative_weight) to += p.negative_weight[row * p.k + k];
      if (!counts(p, row, k)) {
        to = -__builtin_inff();
        continue;
      }
      part.count[i] += 1;
      part.z_sum[i] += to;
      g.best[i] = raw > g.best[i] ? raw : g.best[i];
      g.negative_sum[i] += raw;
      g.negative_count[i] += 1;
    }
  }
}

// Σ_j dz_ij d̂_j of row i as an anchor, from Σ_j exp(z_ij - max) d̂_j.
void finish_sum(const InfoNCEParams& p, const Anchors& a, int64_t kind, int64_t i, float by, float d_spread,
                float d_share) {
  float* d = a.d + i * p.stride;
  scale(d, by, p.dim);
  if (d_spread != 0) {
    for (int64_t pass = 0; pass < p.passes; pass++) {
      if (p.pass[pass].anchors == kind) add(d, -d_spread, p.columns[p.pass[pass].columns].sum, p.dim);
    }
    add(d, d_spread, a.hidden + i * p.stride, p.dim);
  }
  if (a.same) add(d, -d_share, a.same + i * p.stride, p.dim);
}

// What row i's exponentials come to: its loss and gradients. z_negatives holds exponentials.
void finish_row(const InfoNCEParams& p, const Group& g, int64_t i, const float* z_negatives, float* row, float* d_row) {
  const int64_t query = g.first + i, in_panel = query - p.panel_begin;
  const float z_positive = g.positive[i];
  const float* unit = g.anchors[0].unit + i * p.stride;
  float norm = 1;
  const float* positive = positive_of(p, query, row, &norm);
  float loss = 0, dz_positive = 0, z_dz = 0, by[2], d_spread[2], d_share[2];
  const float d_loss = p.d_loss ? p.d_loss[query] / float(p.parts) : 0;
  for (int64_t part = 0; part < p.parts; part++) {
    const Part& s = g.part[part];
    const float others = s.count[i], same = p.same_positive ? s.same_count[i] : 0;
    const float spread = others > 0 ? p.label_smoothing / (others + 1) : 0;
    const float share = (1 - p.label_smoothing) / (1 + same);
    // Σ y z less the positive's z; 0 if that is the only target
    const float to_targets = (spread != 0 ? spread * (s.z_sum[i] - others * z_positive) : 0) +
                             (same > 0 ? share * (s.same_z[i] - same * z_positive) : 0);
    const float e_positive = exp(splat(z_positive - s.max[i]))[0];
    // Under max = z_t the positive's exponential is 1 and this is log1p(rest): small losses keep their digits.
    loss += (s.max[i] - z_positive) + __builtin_log1pf(s.rest[i] + (e_positive - 1)) - to_targets;
    if (!p.d_loss) continue;
    by[part] = d_loss / (s.rest[i] + e_positive);
    d_spread[part] = d_loss * spread;
    d_share[part] = p.same_positive ? d_loss * share : 0;
    // p - y of the positive. As the only target it is p - 1; among others p and y are alike and small.
    const bool only_target = spread == 0 && same == 0;
    dz_positive += only_target ? -by[part] * s.rest[i] : by[part] * e_positive - d_loss * (share + spread);
    z_dz += by[part] * (s.moment[i] - s.rest[i] * (z_positive - s.max[i])) - d_loss * to_targets;
    p.row_max[part][in_panel] = s.max[i];
    p.row_scale[part][in_panel] = by[part];
    p.row_spread[part][in_panel] = d_spread[part];
    p.row_share[part][in_panel] = d_share[part];
  }
  p.loss[query] = loss / float(p.parts);
  if (p.metrics) {  // a tie may be a rounding of the sum apart: the positive's is summed in another order
    const float tie = 2e-6f * dot_of_sizes(unit, positive, p.dim);
    float* metrics = p.metrics + query * 4;
    metrics[0] = !(g.best[i] - z_positive > tie);
    metrics[1] = z_positive * g.tau[i];
    metrics[2] = g.negative_sum[i] * g.tau[i];
    metrics[3] = g.negative_count[i];
  }
  if (!p.d_loss) return;

  p.positive_scale[in_panel] = p.positives.data ? 0 : dz_positive;
  const Anchors &q = g.anchors[0], &b = g.anchors[1];
  float* d = q.d + i * p.stride;
  if (p.sum_anchors[0]) finish_sum(p, q, 0, i, by[0], d_spread[0], d_share[0]);
  if (p.sum_anchors[1]) finish_sum(p, b, 1, i, by[p.parts - 1], d_spread[p.parts - 1], d_share[p.parts - 1]);
  if (p.sum_anchors[0] || p.d_positives) {
    if (p.sum_anchors[0]) add(d, dz_positive, positive, p.dim);
    if (p.d_positives) {
      for (int64_t c = 0; c < p.dim; c += W) store(d_row + c, dz_positive * load(unit + c));
      if (p.sum_anchors[1]) add(d_row, 1 / g.tau[i], b.d + i * p.stride, p.dim);
      write_gradient(p, d_row, positive, 1, norm, p.d_positives + query * p.dim);
    }
  }
  for (int64_t k = 0; (p.sum_anchors[0] || p.d_negatives) && k < p.k; k++) {
    const float negative_norm = load_negative(p, query, k, row);
    const float dz = by[0] * z_negatives[k * G + i] - (counts(p, query, k) ? d_spread[0] : 0);
    if (p.sum_anchors[0]) add(d, dz, row, p.dim);
    if (p.d_negatives) {
      for (int64_t c = 0; c < p.dim; c += W) store(d_row + c, dz * load(unit + c));
      write_gradient(p, d_row, row, 1, negative_norm, p.d_negatives + (query * p.k + k) * p.dim);
    }
  }
  if (p.d_temperature) {
    // Σ_j dz_j z_j: constants added to z don't scale with 1 / τ, then it is q·d_q.
    if (p.columns[0].log_weight || p.negative_weight || p.hardness != no_hardness) {
      z_dz = dot(unit, d, p.dim) + (p.anchors > 1 ? dot(b.unit + i * p.stride, b.d + i * p.stride, p.dim) : 0);
    }
    p.d_temperature[query] = -z_dz / g.tau[i];
  }
  if (p.d_queries) {
    scale(d, 1 / g.tau[i], p.dim);
    write_gradient(p, d, unit, g.tau[i], q.norm[i], p.d_queries + query * p.dim);
  }
  if (p.d_anchors) {
    scale(b.d + i * p.stride, 1 / g.tau[i], p.dim);
    write_gradient(p, b.d + i * p.stride, b.unit + i * p.stride, g.tau[i], b.norm[i], p.d_anchors + query * p.dim);
  }
}

void begin_rows(const InfoNCEParams& p, int64_t group, bool shared, float* scratch, Group& g, Space& space) {
  begin_group(p, group, shared, scratch, g, space);
  for (int64_t i = 0; i < G; i++) {
    float norm = 1;
    g.positive[i] =
        i < g.count ? dot(g.anchors[0].unit + i * p.stride, positive_of(p, g.first + i, space.row, &norm), p.dim) : 0;
  }
  for (int64_t part = 0; part < p.parts; part++) begin_part(g, part, g.positive);
}

// A pass over some whole blocks of its columns: into its softmax's sums and the anchors' d.
void take_columns(const InfoNCEParams& p, int64_t number, int64_t group, int64_t begin, int64_t end, Group& g,
                  const Space& space) {
  const InfoNCEPass& pass = p.pass[number];
  const InfoNCEColumns& columns = p.columns[pass.columns];
  const int64_t blocks = (columns.count + block_size - 1) / block_size;
  const Anchors& a = g.anchors[pass.anchors];
  for (int64_t first = begin; first < end; first += block_size) {
    const int64_t n = least(block_size, end - first);
    float* z = pass.exponentials ? pass.exponentials + (group * columns.count + first) * G : space.tile;
    logits(p, number, g, first, n, z, space.guide_tile);
    if (p.label_smoothing != 0) {
      exponentials<true>(p, g, pass.part, n, z);
    } else {
      exponentials<false>(p, g, pass.part, n, z);
    }
    if (p.sum_anchors[pass.anchors]) {
      // The next block's vectors are fetched meanwhile: 8 % of a call in bfloat16 at N = 8,192.
      const int64_t next_n = least(block_size, columns.count - first - n);
      if (p.paired) {
        pair_scores(z, n, g.width, G, columns.factor + first, space.pairs);
        const int64_t count = (n + 1) / 2;
        const float* pairs = columns.pairs + first / 2 * p.padded_dim;
        Ahead next(pairs + count * p.padded_dim, p.padded_dim, p.padded_dim, (next_n + 1) / 2,
                   gemm_tiles(g.count, p.padded_dim, count));
        gemm(true, g.count, p.padded_dim, count, as_pairs(space.pairs), 1, G, as_pairs(pairs), p.padded_dim, a.d,
             p.stride, {}, next);
      } else {
        const float* unit = columns.unit + first * p.stride;
        Ahead next(unit + n * p.stride, p.stride, p.stride, next_n, gemm_tiles(g.count, p.padded_dim, n));
        gemm(true, g.count, p.padded_dim, n, z, 1, G, unit, p.stride, a.d, p.stride, {}, next);
      }
    }
    for (int64_t i = 0; pass.exponentials && i < G; i++) {
      pass.block_max[(group * blocks + first / block_size) * G + i] = g.part[pass.part].max[i];
    }
  }
}

// What the rows' own negatives add, and the end.
void finish_rows(const InfoNCEParams& p, Group& g, const Space& space) {
  if (p.k) {
    negative_logits(p, g, space.z_negatives, space.row);
    exponentials<false>(p, g, 0, p.k, space.z_negatives);
  }
  for (int64_t i = 0; i < g.count; i++) finish_row(p, g, i, space.z_negatives, space.row, space.d_row);
}

void rows(const InfoNCEParams& p, int64_t group, float* scratch) {
  Group g;
  Space space;
  begin_rows(p, group, false, scratch, g, space);
  for (int64_t number = 0; number < p.passes; number++) {
    take_columns(p, number, group, 0, p.columns[p.pass[number].columns].count, g, space);
  }
  finish_rows(p, g, space);
}

// A stretch of documents of the only pass, for few rows: its sums and d wait for the others.
void rows_stretch(const InfoNCEParams& p, int64_t group, int64_t stretch, float* scratch) {
  Group g;
  Space space;
  begin_rows(p, group, true, scratch, g, space);
  const int64_t panel = p.panel_end - p.panel_begin, begin = stretch * p.stretch;
  float* const d = p.d_query_parts + (stretch * panel + group * G) * p.stride;
  if (p.sum_anchors[0]) {
    g.anchors[0].d = d;
    for (int64_t c = 0; c < g.count * p.stride; c++) d[c] = 0;
  }
  take_columns(p, 0, group, begin, least(begin + p.stretch, p.columns[0].count), g, space);
  InfoNCEStretch& to = p.of_stretches[stretch * ((panel + G - 1) / G) + group];
  for (int64_t i = 0; i < G; i++) {
    to.max[i] = g.part[0].max[i], to.rest[i] = g.part[0].rest[i], to.moment[i] = g.part[0].moment[i];
    to.best[i] = g.best[i], to.negative_sum[i] = g.negative_sum[i], to.negative_count[i] = g.negative_count[i];
  }
}

void rows_merge(const InfoNCEParams& p, int64_t group, float* scratch) {
  Group g;
  Space space;
  begin_rows(p, group, false, scratch, g, space);
  const int64_t panel = p.panel_end - p.panel_begin;
  Part& s = g.part[0];
  for (int64_t stretch = 0; stretch * p.stretch < p.columns[0].count; stretch++) {
    const InfoNCEStretch& from = p.of_stretches[stretch * ((panel + G - 1) / G) + group];
    float old[G], now[G];
    for (int64_t i = 0; i < G; i++) old[i] = s.max[i];
    for (int64_t v = 0; v < G; v += W) {
      Vec max = load(s.max + v), rest = load(s.rest + v), moment = load(s.moment + v);
      merge(max, rest, moment, load(from.max + v), load(from.rest + v), load(from.moment + v));
      store(s.max + v, max), store(s.rest + v, rest), store(s.moment + v, moment);
      store(g.best + v, larger(load(from.best + v), load(g.best + v)));
      store(g.negative_sum + v, load(g.negative_sum + v) + load(from.negative_sum + v));
      store(g.negative_count + v, load(g.negative_count + v) + load(from.negative_count + v));
      store(old + v, exp(load(old + v) - max)), store(now + v, exp(load(from.max + v) - max));
    }
    for (int64_t i = 0; p.sum_anchors[0] && i < g.count; i++) {
      float* d = g.anchors[0].d + i * p.stride;
      scale(d, old[i], p.padded_dim);
      add(d, now[i], p.d_query_parts + (stretch * panel + group * G + i) * p.stride, p.padded_dim);
    }
  }
  finish_rows(p, g, space);
}

// dz (n, G) of a group's rows by n columns of a pass, from their exponentials; in Pairs' products times the rows'
// factor.
void logit_gradients(const InfoNCEParams& p, const InfoNCEPass& pass, int64_t group, int64_t first, int64_t n,
                     float* dz) {
  const InfoNCEColumns& columns = p.columns[pass.columns];
  const int64_t begin = group * G, count = least(G, p.panel_end - p.panel_begin - begin);
  const int64_t blocks = (columns.count + block_size - 1) / block_size;
  const float* e = pass.exponentials + (group * columns.count + first) * G;
  const float* block_max = pass.block_max + (group * blocks + first / block_size) * G;
  float by[G] = {}, spread[G] = {}, share[G] = {};
  for (int64_t v = 0; v < count; v += W) {
    const Vec max = load_at(p.row_max[pass.part] + begin, v, count);
    store(by + v, load_at(p.row_scale[pass.part] + begin, v, count) * exp(load(block_max + v) - max));
    store(spread + v, load_at(p.row_spread[pass.part] + begin, v, count));
    store(share + v, load_at(p.row_share[pass.part] + begin, v, count));
  }
  const float* factor = p.paired ? p.anchor_factor[pass.anchors] + begin : nullptr;
  for (int64_t v = 0; factor && v < count; v += W) {
    for (float* x : {by, spread, share}) store(x + v, load(x + v) * load(factor + v));
  }
  for (int64_t j = 0; j < n; j++) {
    for (int64_t v = 0; v < count; v += W) store(dz + j * G + v, load(by + v) * load(e + j * G + v));
  }
  if (p.label_smoothing != 0 || p.same_positive) {
    Labels labels;
    int32_t key[G];
    const InfoNCEColumns& like = p.columns[pass.anchors == 0];
    for (int64_t i = 0; i < G; i++) {
      const int64_t row = p.panel_begin + begin + i;
      key[i] = i < count ? pass.key[row] : -1;
      if (like.labels && i < count) labels.set(i, like.labels[pass.anchors == 0 ? p.offset + row : p.targets[row]]);
    }
    for (int64_t j = 0; j < n; j++) {
      for (int64_t v = 0; v < count; v += W) {
        Vec y = p.label_smoothing != 0 ? select((IVec)load(e + j * G + v) < 0, Vec{}, load(spread + v)) : Vec{};
        if (p.same_positive) {
          const IVec own = load_ints(key + v) == int32_t((first + j) % pass.period);
          y += select(labels.equal(v, columns.labels[first + j]) & ~own, load(share + v), Vec{});
        }
        store(dz + j * G + v, load(dz + j * G + v) - y);
      }
    }
  }
  for (int64_t i = 0; &pass == p.pass && i < count; i++) {
    const int64_t j = p.targets[p.panel_begin + begin + i] - first;
    if (j >= 0 && j < n) dz[j * G + i] = p.positive_scale[begin + i] * (factor ? factor[i] : 1);
  }
}

void columns(const InfoNCEParams& p, int64_t set, int64_t block, float* dz) {
  const InfoNCEColumns& columns = p.columns[set];
  const int64_t first = block * block_size, n = least(block_size, columns.count - first);
  const int64_t panel = p.panel_end - p.panel_begin;
  float* d = columns.gradient + first * p.padded_dim;
  bool empty = p.panel_begin == 0;
  for (int64_t begin = 0; begin < panel; begin += G) {
    const int64_t count = least(G, panel - begin);
    for (int64_t number = 0; number < p.passes; number++) {
      const InfoNCEPass& pass = p.pass[number];
      if (pass.columns != set) continue;
      logit_gradients(p, pass, begin / G, first, n, dz);
      if (p.paired) {
        pair_neighbours(dz, n, count, G, nullptr, dz, G);
        gemm(!empty, n, p.padded_dim, (count + 1) / 2, as_pairs(dz), G, 1,
             as_pairs(p.anchor_pairs[pass.anchors]) + begin / 2 * p.padded_dim, p.padded_dim, d, p.padded_dim);
      } else {
        gemm(!empty, n, p.padded_dim, count, dz, G, 1, p.unit_anchors[pass.anchors] + begin * p.stride, p.stride, d,
             p.padded_dim);
      }
      empty = false;
    }
  }
  for (int64_t j = 0; p.panel_end == p.n && j < n; j++) {
    float* row = d + j * p.padded_dim;
    write_gradient(p, row, columns.unit + (first + j) * p.stride, 1, columns.norm[first + j], row);
  }
}

void add_anchors(const InfoNCEParams& p) {
  for (int64_t i = 0; i < p.n; i++) {
    float* to = p.columns[0].gradient + p.targets[i] * p.padded_dim;
    const float* from = p.d_anchors + i * p.dim;
    for (int64_t c = 0; c < p.dim; c += W) store_at(to, c, p.dim, load(to + c) + load_at(from, c, p.dim));
  }
}

}  // namespace

extern const InfoNCEKernels infonce;  // without this line a const is private to the file
const InfoNCEKernels infonce = {
    normalise,    column_sum,    guide,       rows,           rows_stretch,     rows_merge,   columns,
    add_anchors,  prefix_ratios, prefix_rows, prefix_columns, prefix_queries,   mutual_begin, mutual_sums,
    mutual_merge, mutual_finish, mutual_rows, mutual_columns, mutual_gradients, has_pairs};

}  // namespace ek::EK_VARIANT
