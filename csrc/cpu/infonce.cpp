// The contrastive loss on the CPU; the maths is embedkern/reference/infonce.py. A tile of z = q̂·d̂ / τ lives in the
// cache: it becomes exponentials under the row's running maximum (Milakov and Gimelshein 2018), which make d_queries at
// once and wait for the documents' pass. Three products in all, and the exponentials are normalised afterwards:
//   d_q̂_i = d_loss_i / τ_i · (Σ_j p_ij d̂_j - d̂_t),   d_d̂_j = Σ_i d_loss_i / τ_i · (p_ij - [j = t_i]) q̂_i.
// The positive is kept apart: with rest = Σ_{j≠t} exp(z_ij - max), p_it - 1 = -rest / sum has no cancellation.
// Other targets than the positive alone (label smoothing, documents with the query's label) take p - y for p - [j = t]:
// y is `spread` on every visible column and `share` on those with the label, so that sums over documents serve.
#include "infonce.h"

#include "gemm.h"

namespace ek::EK_VARIANT {
namespace {

constexpr int64_t G = infonce_rows, block_size = infonce_block;
constexpr float eps = 1e-12f;  // under cosine, x / max(|x|, eps)
constexpr int64_t depth =
    512;  // of one product: beyond it, a panel of the right-hand side leaves the first-level cache

template <class T>
void load_typed(const InfoNCEVectors& vectors, int64_t offset, int64_t n, float* to) {
  const T* from = static_cast<const T*>(vectors.data) + offset;
  for (int64_t c = 0; c < n; c += W) store(to + c, load_at(from, c, n));
}

// A row in float32, zeros up to a whole vector.
void load_row(const InfoNCEVectors& vectors, int64_t offset, int64_t n, float* to) {
  BY_DTYPE(vectors.dtype, load_typed<T>(vectors, offset, n, to))
}

// Below, n is rounded up to whole vectors: what lies between is zero.
float dot(const float* a, const float* b, int64_t n) {
  Vec sums{};
  for (int64_t c = 0; c < n; c += W) sums += load(a + c) * load(b + c);
  return sum_lanes(sums);
}

void scale(float* x, float by, int64_t n) {
  for (int64_t c = 0; c < n; c += W) store(x + c, by * load(x + c));
}

void add(float* to, float by, const float* x, int64_t n) {
  for (int64_t c = 0; c < n; c += W) store(to + c, load(to + c) + by * load(x + c));
}

// x -> x / max(|x|, eps) under cosine; returns |x|
float make_unit(const InfoNCEParams& p, float* x) {
  if (!p.cosine) return 1;
  const float norm = __builtin_sqrtf(dot(x, x, p.dim));
  const float divisor = norm < eps ? eps : norm;  // this way round NaN stays NaN
  for (int64_t c = 0; c < p.dim; c += W) store(x + c, load(x + c) / divisor);
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

void documents(const InfoNCEParams& p, int64_t block) {
  for (int64_t j = block * block_size; j < least((block + 1) * block_size, p.m); j++) {
    float* unit = p.unit_documents + j * p.stride;
    load_row(p.documents, j * p.documents.stride, p.dim, unit);
    for (int64_t c = round_up(p.dim, W); c < p.stride; c++) unit[c] = 0;
    p.document_norm[j] = make_unit(p, unit);
  }
}

// Σ_j d̂_j, block by block: shorter sums round less.
void document_sum(const InfoNCEParams& p, float* part) {
  for (int64_t c = 0; c < p.stride; c++) p.document_sum[c] = 0;
  for (int64_t first = 0; first < p.m; first += block_size) {
    for (int64_t c = 0; c < p.stride; c++) part[c] = 0;
    for (int64_t j = first; j < least(first + block_size, p.m); j++) {
      add(part, 1, p.unit_documents + j * p.stride, p.dim);
    }
    add(p.document_sum, 1, part, p.dim);
  }
}

// The labels of G queries, in halves: lanes hold 32 bits.
struct Labels {
  int32_t low[G] = {}, high[G] = {};

  void load(const int64_t* labels, int64_t count) {
    for (int64_t i = 0; i < count; i++) low[i] = int32_t(labels[i]), high[i] = int32_t(labels[i] >> 32);
  }
  EK_INLINE IVec equal(int64_t v, int64_t label) const {
    return (*reinterpret_cast<const IVec*>(low + v) == int32_t(label)) &
           (*reinterpret_cast<const IVec*>(high + v) == int32_t(label >> 32));
  }
};

// A group of G queries; lanes beyond `count` hold zero vectors.
struct Group {
  int64_t first, count, width;  // width: count in whole vectors
  int64_t target[G];
  Labels labels;
  float tau[G], norm[G];
  float positive[G];      // the positive's z
  float max[G], rest[G];  // Σ exp(z - max) without the positive's
  float moment[G];        // Σ exp(z - max) (z - max), for τ: d_τ = -d_loss / τ · Σ_j (p_ij - y_ij) z_ij
  // Of the documents with the query's label, its positive aside: their number and Σ z, and (G, stride) Σ d̂.
  float same_count[G], same_z[G];
  float* same;  // null: nobody asks
};

// e^(z - max) for values z of one vector of rows; hidden ones are -inf.
EK_INLINE Vec take(Vec z, Vec max, Vec& rest, Vec& moment) {
  const Vec e = exp(z - max);
  rest += e;
  moment += select(e > 0.0f, e * (z - max), Vec{});
  return e;
}

// The maximum grows to `larger`: what was summed under the old one is scaled, and so are rows of d_queries.
void raise_max(Group& g, const float* larger, float* d_queries, int64_t stride, int64_t padded_dim) {
  float factor[G];
  for (int64_t v = 0; v < g.width; v += W) {
    const Vec old = load(g.max + v), now = load(larger + v), by = exp(old - now);
    store(g.moment + v, by * (load(g.moment + v) + (old - now) * load(g.rest + v)));
    store(g.rest + v, by * load(g.rest + v));
    store(g.max + v, now);
    store(factor + v, by);
  }
  for (int64_t i = 0; d_queries && i < g.count; i++) {
    if (factor[i] != 1) scale(d_queries + i * stride, factor[i], padded_dim);
  }
}

void load_queries(const InfoNCEParams& p, Group& g, float* unit, float* transposed) {
  for (int64_t i = 0; i < G; i++) {
    float* q = unit + i * p.stride;
    g.tau[i] = g.norm[i] = 1;
    g.target[i] = -1;
    g.positive[i] = 0;
    if (i < g.count) {
      const int64_t row = g.first + i;
      load_row(p.queries, row * p.queries.stride, p.dim, q);
      g.norm[i] = make_unit(p, q);
      g.tau[i] = p.temperature[row * p.temperature_stride];
      for (int64_t c = round_up(p.dim, W); c < p.stride; c++) q[c] = 0;
      for (int64_t c = 0; c < p.dim; c += W) store(q + c, load(q + c) / g.tau[i]);
      g.target[i] = p.targets[row];
    }
    for (int64_t c = 0; c < p.dim; c++) transposed[c * G + i] = i < g.count ? q[c] : 0;
  }
}

// Adds document j, where `equal` says that it has the query's label.
void add_same(const InfoNCEParams& p, Group& g, int64_t j, IVec equal, int64_t v, const float* z) {
  for (int64_t i = v; i < least(v + W, g.count); i++) {
    if (!equal[i - v] || j == g.target[i]) continue;
    g.same_count[i] += 1;
    g.same_z[i] += z[i];
    if (p.d_queries) add(g.same + i * p.stride, 1, p.unit_documents + j * p.stride, p.dim);
  }
}

// z (n, G) of n documents: the product, then the positives and what the labels hide become -inf.
void logits(const InfoNCEParams& p, Group& g, int64_t first, int64_t n, const float* queries, float* z) {
  const float* d = p.unit_documents + first * p.stride;
  gemm<false>(n, g.width, least(depth, p.dim), d, p.stride, 1, queries, G, z, G);
  for (int64_t c = depth; c < p.dim; c += depth) {
    gemm<true>(n, g.width, least(depth, p.dim - c), d + c, p.stride, 1, queries + c * G, G, z, G);
  }
  const Vec minus_infinity = splat(-__builtin_inff());
  for (int64_t j = 0; p.query_labels && j < n; j++) {
    for (int64_t v = 0; v < g.width; v += W) {
      const IVec equal = g.labels.equal(v, p.document_labels[first + j]);
      if (g.same) add_same(p, g, first + j, equal, v, z + j * G);
      if (!p.same_positive) store(z + j * G + v, select(equal, minus_infinity, load(z + j * G + v)));
    }
  }
  for (int64_t i = 0; i < g.count; i++) {
    const int64_t j = g.target[i] - first;
    if (j >= 0 && j < n) z[j * G + i] = -__builtin_inff();
  }
}

// z (n, G) -> exponentials in place, under a maximum that covers them.
void exponentials(Group& g, int64_t n, float* z, float* d_queries, int64_t stride, int64_t padded_dim) {
  float larger[G];
  bool grows = false;
  for (int64_t v = 0; v < g.width; v += W) {
    const Vec old = load(g.max + v);
    Vec max = old;
    for (int64_t j = 0; j < n; j++) max = ek::EK_VARIANT::larger(load(z + j * G + v), max);
    store(larger + v, max);
    grows |= max_lanes(select(max > old, splat(1), Vec{})) > 0;
  }
  if (grows) raise_max(g, larger, d_queries, stride, padded_dim);
  for (int64_t v = 0; v < g.width; v += W) {
    const Vec max = load(g.max + v);
    Vec rest{}, moment{};  // of this block alone: shorter sums round less
    for (int64_t j = 0; j < n; j++) store(z + j * G + v, take(load(z + j * G + v), max, rest, moment));
    store(g.rest + v, load(g.rest + v) + rest);
    store(g.moment + v, load(g.moment + v) + moment);
  }
}

const float* positive_of(const InfoNCEParams& p, const Group& g, int64_t i, float* row, float* norm) {
  if (!p.positives.data) return p.unit_documents + g.target[i] * p.stride;
  load_row(p.positives, (g.first + i) * p.positives.stride, p.dim, row);
  *norm = make_unit(p, row);
  return row;
}

float load_negative(const InfoNCEParams& p, int64_t query, int64_t k, float* row) {
  load_row(p.negatives, query * p.negatives_stride + k * p.negatives.stride, p.dim, row);
  return make_unit(p, row);
}

// What row i's exponentials come to: its loss and gradients. z_negatives holds exponentials, d the sum Σ_j e_ij d̂_j.
void finish_row(const InfoNCEParams& p, const Group& g, int64_t i, float e_positive, float negatives_z,
                const float* z_negatives, const float* unit, float* d, float* row, float* d_row) {
  const int64_t query = g.first + i, in_panel = query - p.panel_begin;
  const float z_positive = g.positive[i], same = g.same ? g.same_count[i] : 0, same_z = g.same ? g.same_z[i] : 0;
  const float hidden = p.same_positive ? 0 : same, positives = p.same_positive ? same : 0;  // beside its own positive
  const float others = float(p.m + p.k - 1) - hidden;
  const float* document = p.unit_documents + g.target[i] * p.stride;
  float others_z = 0, norm = 1;
  if (p.document_sum && others > 0) {
    others_z = dot(unit, p.document_sum, p.dim) - dot(unit, document, p.dim) + negatives_z;
    if (!p.same_positive) others_z -= same_z;
  }
  const float spread = others > 0 ? p.label_smoothing / (others + 1) : 0;
  const float share = (1 - p.label_smoothing) / (1 + positives);
  // Σ y z less the positive's z; 0 if that is the only target
  const float to_targets =
      spread * (others_z - others * z_positive) + (p.same_positive ? share * (same_z - same * z_positive) : 0);
  // Under max = z_t the positive's exponential is 1 and this is log1p(rest): small losses keep their digits.
  p.loss[query] = (g.max[i] - z_positive) + __builtin_log1pf(g.rest[i] + (e_positive - 1)) - to_targets;
  if (p.metrics) {  // a tie may be a rounding apart: the positive's product is summed in another order
    const float tie = 2e-6f * (__builtin_fabsf(g.max[i]) + __builtin_fabsf(z_positive));
    float* metrics = p.metrics + query * 4;
    metrics[0] = !(g.max[i] - z_positive > tie);
    metrics[1] = z_positive * g.tau[i];
    metrics[2] = (others_z - (p.same_positive ? same_z : 0)) * g.tau[i];
    metrics[3] = others - positives;
  }
  if (!p.d_loss) return;

  const float d_loss = p.d_loss[query], by = d_loss / (g.rest[i] + e_positive), d_spread = d_loss * spread;
  const float d_share = p.same_positive ? d_loss * share : 0;
  // p - y of the positive. As the only target it is p - 1; among others p and y are alike and small.
  const bool only_target = spread == 0 && positives == 0;
  const float dz_positive = only_target ? -by * g.rest[i] : by * e_positive - d_loss * (share + spread);
  p.row_max[in_panel] = g.max[i];
  p.row_scale[in_panel] = by;
  p.row_spread[in_panel] = d_spread;
  p.row_share[in_panel] = d_share;
  p.positive_scale[in_panel] = p.positives.data ? 0 : dz_positive;
  if (p.d_temperature) {
    const float z_dz = by * (g.moment[i] - g.rest[i] * (z_positive - g.max[i])) - d_loss * to_targets;
    p.d_temperature[query] = -z_dz / g.tau[i];
  }
  if (p.d_queries) {
    scale(d, by, p.dim);
    if (d_spread != 0) {
      add(d, -d_spread, p.document_sum, p.dim);
      add(d, d_spread, document, p.dim);
    }
    if (g.same) add(d, p.same_positive ? -d_share : d_spread, g.same + i * p.stride, p.dim);
  }
  if (p.d_queries || p.d_positives) {
    const float* positive = positive_of(p, g, i, row, &norm);
    if (p.d_queries) add(d, dz_positive, positive, p.dim);
    if (p.d_positives) {
      for (int64_t c = 0; c < p.dim; c += W) store(d_row + c, dz_positive * load(unit + c));
      write_gradient(p, d_row, positive, 1, norm, p.d_positives + query * p.dim);
    }
  }
  for (int64_t k = 0; (p.d_queries || p.d_negatives) && k < p.k; k++) {
    const float negative_norm = load_negative(p, query, k, row), dz = by * z_negatives[k * G + i] - d_spread;
    if (p.d_queries) add(d, dz, row, p.dim);
    if (p.d_negatives) {
      for (int64_t c = 0; c < p.dim; c += W) store(d_row + c, dz * load(unit + c));
      write_gradient(p, d_row, row, 1, negative_norm, p.d_negatives + (query * p.k + k) * p.dim);
    }
  }
  if (p.d_queries) {
    scale(d, 1 / g.tau[i], p.dim);
    write_gradient(p, d, unit, g.tau[i], g.norm[i], p.d_queries + query * p.dim);
  }
}

void rows(const InfoNCEParams& p, int64_t group, float* scratch) {
  const int64_t blocks = (p.m + block_size - 1) / block_size;
  float* transposed = scratch;                       // (dim, G)
  float* d_q = transposed + p.dim * G;               // (G, stride)
  float* same = d_q + G * p.stride;                  // (G, stride)
  float* z_negatives = same + G * p.stride;          // (k, G)
  float* tile = z_negatives + p.k * G;               // (block_size, G)
  float* row = tile + block_size * G;                // (stride)
  float* d_row = row + p.stride;                     // (stride)
  float* q = p.unit_queries + group * G * p.stride;  // (G, stride)
  float* scaled = p.d_queries ? d_q : nullptr;       // whenever a maximum grows
  float negatives_z[G] = {}, e_positive[G];
  Group g;
  g.first = p.panel_begin + group * G;
  g.count = least(G, p.panel_end - g.first);
  g.width = round_up(g.count, W);
  g.same = p.query_labels && (p.same_positive || p.document_sum) ? same : nullptr;
  if (p.query_labels) g.labels.load(p.query_labels + g.first, g.count);
  load_queries(p, g, q, transposed);
  for (int64_t k = 0; k < p.k * G; k++) z_negatives[k] = 0;
  for (int64_t i = 0; i < g.count; i++) {
    float norm = 1;
    g.positive[i] = dot(q + i * p.stride, positive_of(p, g, i, row, &norm), p.dim);
    for (int64_t k = 0; k < p.k; k++) {
      load_negative(p, g.first + i, k, row);
      z_negatives[k * G + i] = dot(q + i * p.stride, row, p.dim);
      negatives_z[i] += z_negatives[k * G + i];
    }
  }
  for (int64_t i = 0; i < G; i++) {
    g.max[i] = g.positive[i];
    g.rest[i] = g.moment[i] = g.same_count[i] = g.same_z[i] = 0;
  }
  for (int64_t i = 0; p.d_queries && i < G * p.stride; i++) d_q[i] = 0;
  for (int64_t i = 0; p.d_queries && g.same && i < G * p.stride; i++) same[i] = 0;

  for (int64_t block = 0; block < blocks; block++) {
    const int64_t first = block * block_size, n = least(block_size, p.m - first);
    float* z = p.exponentials ? p.exponentials + (group * p.m + first) * G : tile;
    logits(p, g, first, n, transposed, z);
    exponentials(g, n, z, scaled, p.stride, p.padded_dim);
    if (p.d_queries) {
      gemm<true>(g.count, p.padded_dim, n, z, 1, G, p.unit_documents + first * p.stride, p.stride, d_q, p.stride);
    }
    for (int64_t i = 0; p.exponentials && i < G; i++) p.block_max[(group * blocks + block) * G + i] = g.max[i];
  }
  if (p.k) exponentials(g, p.k, z_negatives, scaled, p.stride, p.padded_dim);
  for (int64_t v = 0; v < g.width; v += W) store(e_positive + v, exp(load(g.positive + v) - load(g.max + v)));
  for (int64_t i = 0; i < g.count; i++) {
    finish_row(p, g, i, e_positive[i], negatives_z[i], z_negatives, q + i * p.stride, d_q + i * p.stride, row, d_row);
  }
}

// dz (n, G) of a group's queries by n documents, from their exponentials.
void logit_gradients(const InfoNCEParams& p, int64_t group, int64_t first, int64_t n, float* dz) {
  const int64_t begin = group * G, count = least(G, p.panel_end - p.panel_begin - begin);
  const int64_t blocks = (p.m + block_size - 1) / block_size;
  const float* e = p.exponentials + (group * p.m + first) * G;
  const float* block_max = p.block_max + (group * blocks + first / block_size) * G;
  float by[G] = {}, spread[G] = {}, share[G] = {};
  for (int64_t v = 0; v < count; v += W) {
    const Vec max = load_at(p.row_max + begin, v, count), scale = load_at(p.row_scale + begin, v, count);
    store(by + v, scale * exp(load(block_max + v) - max));
    store(spread + v, load_at(p.row_spread + begin, v, count));
    store(share + v, load_at(p.row_share + begin, v, count));
  }
  for (int64_t j = 0; j < n; j++) {
    for (int64_t v = 0; v < count; v += W) store(dz + j * G + v, load(by + v) * load(e + j * G + v));
  }
  if (p.label_smoothing != 0 || p.same_positive) {
    Labels labels;
    if (p.query_labels) labels.load(p.query_labels + p.panel_begin + begin, count);
    for (int64_t j = 0; j < n; j++) {
      for (int64_t v = 0; v < count; v += W) {
        Vec y = load(spread + v);
        if (p.query_labels) {
          const Vec with_label = p.same_positive ? y + load(share + v) : Vec{};
          y = select(labels.equal(v, p.document_labels[first + j]), with_label, y);
        }
        store(dz + j * G + v, load(dz + j * G + v) - y);
      }
    }
  }
  for (int64_t i = 0; i < count; i++) {
    const int64_t j = p.targets[p.panel_begin + begin + i] - first;
    if (j >= 0 && j < n) dz[j * G + i] = p.positive_scale[begin + i];
  }
}

void d_documents(const InfoNCEParams& p, int64_t block, float* dz) {
  const int64_t first = block * block_size, n = least(block_size, p.m - first), panel = p.panel_end - p.panel_begin;
  float* d = p.d_documents + first * p.padded_dim;
  for (int64_t begin = 0; begin < panel; begin += G) {
    const int64_t count = least(G, panel - begin);
    const float* q = p.unit_queries + begin * p.stride;
    logit_gradients(p, begin / G, first, n, dz);
    if (p.panel_begin == 0 && begin == 0) {
      gemm<false>(n, p.padded_dim, count, dz, G, 1, q, p.stride, d, p.padded_dim);
    } else {
      gemm<true>(n, p.padded_dim, count, dz, G, 1, q, p.stride, d, p.padded_dim);
    }
  }
  for (int64_t j = 0; p.panel_end == p.n && j < n; j++) {
    float* row = d + j * p.padded_dim;
    write_gradient(p, row, p.unit_documents + (first + j) * p.stride, 1, p.document_norm[first + j], row);
  }
}

}  // namespace

extern const InfoNCEKernels infonce;  // without this line a const is private to the file
const InfoNCEKernels infonce = {documents, document_sum, rows, d_documents};

}  // namespace ek::EK_VARIANT
