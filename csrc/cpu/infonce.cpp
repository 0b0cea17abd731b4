// The contrastive loss on the CPU; the maths is embedkern/reference/infonce.py. A tile of z = q̂·d̂ / τ lives in the
// cache: it becomes exponentials under the row's running maximum (Milakov and Gimelshein 2018), which make d_queries at
// once and wait for the documents' pass. Three products in all, and the exponentials are normalised afterwards:
//   d_q̂_i = d_loss_i / τ_i · (Σ_j p_ij d̂_j - d̂_t),   d_d̂_j = Σ_i d_loss_i / τ_i · (p_ij - [j = t_i]) q̂_i.
// The positive is kept apart: with rest = Σ_{j≠t} exp(z_ij - max), p_it - 1 = -rest / sum has no cancellation.
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
  switch (vectors.dtype) {
    case DType::f32: return load_typed<float>(vectors, offset, n, to);
    case DType::bf16: return load_typed<Bf16>(vectors, offset, n, to);
    case DType::f16: return load_typed<F16>(vectors, offset, n, to);
  }
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

// A group of G queries; lanes beyond `count` hold zero vectors.
struct Group {
  int64_t first, count, width;  // width: count in whole vectors
  int64_t target[G];
  int32_t label_low[G], label_high[G];
  float tau[G], norm[G];
  float positive[G];      // the positive's z
  float max[G], rest[G];  // Σ exp(z - max) without the positive's
  float moment[G];        // Σ exp(z - max) (z - max), for τ: d_τ = -d_loss / τ · Σ_j (p_ij - y_ij) z_ij
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
    g.label_low[i] = g.label_high[i] = 0;
    if (i < g.count) {
      const int64_t row = g.first + i;
      load_row(p.queries, row * p.queries.stride, p.dim, q);
      g.norm[i] = make_unit(p, q);
      g.tau[i] = p.temperature[row * p.temperature_stride];
      for (int64_t c = round_up(p.dim, W); c < p.stride; c++) q[c] = 0;
      for (int64_t c = 0; c < p.dim; c += W) store(q + c, load(q + c) / g.tau[i]);
      g.target[i] = p.targets[row];
      if (p.query_labels) {
        g.label_low[i] = int32_t(p.query_labels[row]);
        g.label_high[i] = int32_t(p.query_labels[row] >> 32);
      }
    }
    for (int64_t c = 0; c < p.dim; c++) transposed[c * G + i] = i < g.count ? q[c] : 0;
  }
}

// z (n, G) of n documents: the product, then the positives and what the labels hide become -inf.
void logits(const InfoNCEParams& p, const Group& g, int64_t first, int64_t n, const float* queries, float* z) {
  const float* d = p.unit_documents + first * p.stride;
  gemm<false>(n, g.width, least(depth, p.dim), d, p.stride, 1, queries, G, z, G);
  for (int64_t c = depth; c < p.dim; c += depth) {
    gemm<true>(n, g.width, least(depth, p.dim - c), d + c, p.stride, 1, queries + c * G, G, z, G);
  }
  const Vec minus_infinity = splat(-__builtin_inff());
  for (int64_t j = 0; p.query_labels && j < n; j++) {
    const int64_t label = p.document_labels[first + j];
    for (int64_t v = 0; v < g.width; v += W) {
      const IVec low = *reinterpret_cast<const IVec*>(g.label_low + v) == int32_t(label);
      const IVec high = *reinterpret_cast<const IVec*>(g.label_high + v) == int32_t(label >> 32);
      store(z + j * G + v, select(low & high, minus_infinity, load(z + j * G + v)));
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

void rows(const InfoNCEParams& p, int64_t group, float* scratch) {
  const bool gradients = p.d_loss != nullptr, wants_d_queries = p.d_queries != nullptr;
  const int64_t groups_first = group * G, blocks = (p.m + block_size - 1) / block_size;
  Group g;
  g.first = p.panel_begin + groups_first;
  g.count = least(G, p.panel_end - g.first);
  g.width = round_up(g.count, W);
  float* q = p.unit_queries + groups_first * p.stride;
  float* transposed = scratch;              // (dim, G)
  float* d_q = transposed + p.dim * G;      // (G, stride)
  float* z_negatives = d_q + G * p.stride;  // (k, G)
  float* tile = z_negatives + p.k * G;      // (block_size, G)
  float* row = tile + block_size * G;       // (stride)
  float* d_row = row + p.stride;            // (stride)
  load_queries(p, g, q, transposed);
  for (int64_t i = 0; i < g.count; i++) {
    float norm = 1;
    g.positive[i] = dot(q + i * p.stride, positive_of(p, g, i, row, &norm), p.dim);
    for (int64_t k = 0; k < p.k; k++) {
      load_negative(p, g.first + i, k, row);
      z_negatives[k * G + i] = dot(q + i * p.stride, row, p.dim);
    }
  }
  for (int64_t i = 0; i < G; i++) {
    g.max[i] = g.positive[i];
    g.rest[i] = g.moment[i] = 0;
    for (int64_t k = 0; i >= g.count && k < p.k; k++) z_negatives[k * G + i] = 0;
  }
  for (int64_t i = 0; wants_d_queries && i < G * p.stride; i++) d_q[i] = 0;

  for (int64_t block = 0; block < blocks; block++) {
    const int64_t first = block * block_size, n = least(block_size, p.m - first);
    float* z = p.exponentials ? p.exponentials + (group * p.m + first) * G : tile;
    logits(p, g, first, n, transposed, z);
    exponentials(g, n, z, wants_d_queries ? d_q : nullptr, p.stride, p.padded_dim);
    if (wants_d_queries) {
      gemm<true>(g.count, p.padded_dim, n, z, 1, G, p.unit_documents + first * p.stride, p.stride, d_q, p.stride);
    }
    for (int64_t i = 0; p.exponentials && i < G; i++) p.block_max[(group * blocks + block) * G + i] = g.max[i];
  }
  if (p.k) exponentials(g, p.k, z_negatives, wants_d_queries ? d_q : nullptr, p.stride, p.padded_dim);

  float e_positive[G];
  for (int64_t v = 0; v < g.width; v += W) store(e_positive + v, exp(load(g.positive + v) - load(g.max + v)));
  for (int64_t i = 0; i < g.count; i++) {
    const int64_t query = g.first + i;
    // Under max = z_t the positive's exponential is 1 and this is log1p(rest): small losses keep their digits.
    p.loss[query] = (g.max[i] - g.positive[i]) + __builtin_log1pf(g.rest[i] + (e_positive[i] - 1));
    if (!gradients) continue;
    const float by = p.d_loss[query] / (g.rest[i] + e_positive[i]), by_positive = -by * g.rest[i];
    p.row_max[groups_first + i] = g.max[i];
    p.row_scale[groups_first + i] = by;
    p.positive_scale[groups_first + i] = p.positives.data ? 0 : by_positive;
    if (p.d_temperature) {
      const float z_dz = by * g.moment[i] + by_positive * (g.positive[i] - g.max[i]);
      p.d_temperature[query] = -z_dz / g.tau[i];
    }
    const float* unit = q + i * p.stride;
    float* d = d_q + i * p.stride;
    if (wants_d_queries) scale(d, by, p.dim);
    if (wants_d_queries || p.d_positives) {
      float norm = 1;
      const float* positive = positive_of(p, g, i, row, &norm);
      if (wants_d_queries) add(d, by_positive, positive, p.dim);
      if (p.d_positives) {
        for (int64_t c = 0; c < p.dim; c += W) store(d_row + c, by_positive * load(unit + c));
        write_gradient(p, d_row, positive, 1, norm, p.d_positives + query * p.dim);
      }
    }
    for (int64_t k = 0; (wants_d_queries || p.d_negatives) && k < p.k; k++) {
      const float norm = load_negative(p, query, k, row), dz = by * z_negatives[k * G + i];
      if (wants_d_queries) add(d, dz, row, p.dim);
      if (p.d_negatives) {
        for (int64_t c = 0; c < p.dim; c += W) store(d_row + c, dz * load(unit + c));
        write_gradient(p, d_row, row, 1, norm, p.d_negatives + (query * p.k + k) * p.dim);
      }
    }
    if (wants_d_queries) {
      scale(d, 1 / g.tau[i], p.dim);
      write_gradient(p, d, unit, g.tau[i], g.norm[i], p.d_queries + query * p.dim);
    }
  }
}

void d_documents(const InfoNCEParams& p, int64_t block, float* dz) {
  const int64_t first = block * block_size, n = least(block_size, p.m - first);
  const int64_t blocks = (p.m + block_size - 1) / block_size, panel = p.panel_end - p.panel_begin;
  float* d = p.d_documents + first * p.padded_dim;
  for (int64_t begin = 0; begin < panel; begin += G) {
    const int64_t group = begin / G, count = least(G, panel - begin);
    const float* e = p.exponentials + (group * p.m + first) * G;
    float by[G] = {};
    for (int64_t v = 0; v < round_up(count, W); v += W) {
      const Vec max = load_at(p.row_max + begin, v, count), scale = load_at(p.row_scale + begin, v, count);
      store(by + v, scale * exp(load(p.block_max + (group * blocks + block) * G + v) - max));
    }
    for (int64_t j = 0; j < n; j++) {
      for (int64_t v = 0; v < count; v += W) store(dz + j * G + v, load(by + v) * load(e + j * G + v));
    }
    const float* q = p.unit_queries + begin * p.stride;
    if (p.panel_begin == 0 && begin == 0) {
      gemm<false>(n, p.padded_dim, count, dz, G, 1, q, p.stride, d, p.padded_dim);
    } else {
      gemm<true>(n, p.padded_dim, count, dz, G, 1, q, p.stride, d, p.padded_dim);
    }
  }
  for (int64_t i = 0; i < panel; i++) {
    const int64_t j = p.targets[p.panel_begin + i] - first;
    if (j < 0 || j >= n) continue;
    add(d + j * p.padded_dim, p.positive_scale[i], p.unit_queries + i * p.stride, p.dim);
  }
  for (int64_t j = 0; p.panel_end == p.n && j < n; j++) {
    float* row = d + j * p.padded_dim;
    write_gradient(p, row, p.unit_documents + (first + j) * p.stride, 1, p.document_norm[first + j], row);
  }
}

}  // namespace

extern const InfoNCEKernels infonce;  // without this line a const is private to the file
const InfoNCEKernels infonce = {documents, rows, d_documents};

}  // namespace ek::EK_VARIANT
