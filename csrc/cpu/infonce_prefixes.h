// Matryoshka: the losses of several prefixes of the vectors at the cost of about one. For infonce.cpp alone. Level k
// has the first level_end[k] dimensions; block k lies between two ends. With u a unit vector, u's prefix times its
// ratio r_k is one again, so that
//   z^k_ij = r_k,i r_k,j S^k_ij / τ_i,  S^k = S^(k-1) + the product over block k,
// and the gradient of u_j in block b is a single product with the levels' sum, less each level's part along u:
//   Σ_i D^b_ij u_i / τ_i - u_j Σ_k≥b r_k,j² Σ_i dz^k_ij z^k_ij,  D^b_ij = Σ_k≥b dz^k_ij r_k,i r_k,j.
// A panel keeps z^k of all levels, which become D^k in place.
#pragma once
#include "infonce_tile.h"

namespace ek::EK_VARIANT {
namespace {

EK_INLINE int64_t level_begin(const InfoNCEParams& p, int64_t k) { return k == 0 ? 0 : p.level_end[k - 1]; }

EK_INLINE float divisor(float norm) { return norm < eps ? eps : norm; }

// ratio[k] of a vector whose unit vector is `unit` times `by`, and its square, or 0 where a prefix is shorter than eps.
void ratios_of(const InfoNCEParams& p, const float* unit, float by, float norm, float* ratio, float* square) {
  float squares = 0;
  for (int64_t k = 0; k < p.levels; k++) {
    ratio[k] = square[k] = 1;
    if (!p.cosine) {
      square[k] = 0;
      continue;
    }
    squares += dot(unit + level_begin(p, k), unit + level_begin(p, k), p.level_end[k] - level_begin(p, k));
    const float length = __builtin_sqrtf(squares) * by, least_length = eps / divisor(norm);
    ratio[k] = 1 / (length < least_length ? least_length : length);
    square[k] = length < least_length ? 0 : ratio[k] * ratio[k];
  }
}

// d (padded_dim), Σ D u in each block, -> d_x; z_dz[k] = Σ dz^k z^k. `by` as above, `factor` of d.
void write_prefix_gradient(const InfoNCEParams& p, const float* d, float factor, const float* unit, float by,
                           float norm, const float* z_dz, float* d_x) {
  float ratio[infonce_levels], square[infonce_levels], along = 0;
  ratios_of(p, unit, by, norm, ratio, square);
  const float length = p.cosine ? divisor(norm) : 1;
  for (int64_t k = p.levels - 1; k >= 0; k--) {
    along += z_dz[k] * square[k] * by;
    for (int64_t c = level_begin(p, k); c < p.level_end[k]; c += W) {
      store_at(d_x, c, p.level_end[k], (factor * load(d + c) - along * load(unit + c)) / length);
    }
  }
}

void prefix_ratios(const InfoNCEParams& p, int64_t block) {
  const InfoNCEColumns& columns = p.columns[0];
  float ratio[infonce_levels], square[infonce_levels];
  for (int64_t j = block * block_size; j < least((block + 1) * block_size, columns.count); j++) {
    ratios_of(p, columns.unit + j * p.stride, 1, columns.norm[j], ratio, square);
    for (int64_t k = 0; k < p.levels; k++) p.ratio[k * columns.count + j] = ratio[k];
  }
}

// Where a group's z of level k starts.
EK_INLINE float* level_tile(const InfoNCEParams& p, int64_t group, int64_t k) {
  return p.pass[0].exponentials + (group * p.levels + k) * p.columns[0].count * G;
}

// Of a group: ratios, the positives' z, and what makes an exponential dz.
struct Levels {
  float ratio[infonce_levels][G], positive[infonce_levels][G];
  float scale[infonce_levels][G], dz_positive[infonce_levels][G], z_dz[infonce_levels][G];
};

void begin_levels(const InfoNCEParams& p, Group& g, Levels& of) {
  float ratio[infonce_levels], square[infonce_levels];
  for (int64_t i = 0; i < G; i++) {
    for (int64_t k = 0; k < p.levels; k++) of.ratio[k][i] = of.positive[k][i] = of.scale[k][i] = 0;
    if (i >= g.count) continue;
    const float *unit = g.anchors[0].unit + i * p.stride, *document = p.columns[0].unit + g.target[i] * p.stride;
    ratios_of(p, unit, g.tau[i], g.anchors[0].norm[i], ratio, square);
    float s = 0;
    for (int64_t k = 0; k < p.levels; k++) {
      const int64_t c = level_begin(p, k);
      s += dot(unit + c, document + c, p.level_end[k] - c);
      of.ratio[k][i] = ratio[k];
      of.positive[k][i] = s * ratio[k] * p.ratio[k * p.columns[0].count + g.target[i]];
    }
  }
  for (int64_t k = 0; k < p.levels; k++) begin_part(g, k, of.positive[k]);
}

void finish_levels(const InfoNCEParams& p, const Group& g, Levels& of, int64_t i) {
  const int64_t row = g.first + i;
  float loss = 0, z_dz = 0;
  for (int64_t k = 0; k < p.levels; k++) {
    const Part& s = g.part[k];
    const float z_positive = of.positive[k][i], e_positive = exp(splat(z_positive - s.max[i]))[0];
    loss += p.level_weight[k] * ((s.max[i] - z_positive) + __builtin_log1pf(s.rest[i] + (e_positive - 1)));
    if (!p.d_loss) continue;
    const float by = p.d_loss[row] * p.level_weight[k] / (s.rest[i] + e_positive);
    of.scale[k][i] = by;
    of.dz_positive[k][i] = -by * s.rest[i];
    of.z_dz[k][i] = by * (s.moment[i] - s.rest[i] * (z_positive - s.max[i]));
    z_dz += of.z_dz[k][i];
  }
  p.loss[row] = loss;
  if (p.d_temperature) p.d_temperature[row] = -z_dz / g.tau[i];
}

// sums[j] = Σ over lanes of columns[j], for n of them rounded up to whole vectors.
void sum_columns(const Vec* columns, int64_t n, float* sums) {
  for (int64_t j = 0; j < n; j += W) {
    Vec of_lane[W], sum{};
    for (int64_t l = 0; l < W; l++) of_lane[l] = columns[j + l];
    transpose(of_lane);
    for (int64_t l = 0; l < W; l++) sum += of_lane[l];
    store_at(sums, j, n, sum);
  }
}

// z^k (n, G) of a block -> D^k in place, and each column's Σ_i dz^k z^k over the group.
void level_gradients(const InfoNCEParams& p, const Group& g, const Levels& of, int64_t group, int64_t first,
                     int64_t n) {
  const int64_t m = p.columns[0].count;
  float *tiles = level_tile(p, group, 0) + first * G, *z_dz = p.tile_z_dz + group * p.levels * m;
  Vec along[infonce_levels][block_size];
  for (int64_t k = 0; k < p.levels; k++) {
    for (int64_t j = n; j < block_size; j++) along[k][j] = Vec{};
  }
  for (int64_t j = 0; j < n; j++) {
    fetch(p.columns[0].unit + (first + j) * p.stride, p.dim);  // for the product that follows
    Vec sum[G / W] = {};                                       // D^k, from the last level down
    for (int64_t k = p.levels - 1; k >= 0; k--) {
      float* tile = tiles + (k * m + j) * G;
      const float ratio = p.ratio[k * m + first + j];
      Vec of_column{};
      for (int64_t v = 0; v < g.width; v += W) {
        const Vec z = load(tile + v), dz = load(of.scale[k] + v) * exp(z - load(g.part[k].max + v));
        of_column += select(z < -__FLT_MAX__, Vec{}, dz * z);
        sum[v / W] += dz * (load(of.ratio[k] + v) * ratio);
        store(tile + v, sum[v / W]);
      }
      along[k][j] = of_column;
    }
  }
  for (int64_t k = 0; k < p.levels; k++) sum_columns(along[k], n, z_dz + k * m + first);
  for (int64_t i = 0; i < g.count; i++) {
    const int64_t j = g.target[i] - first;
    if (j < 0 || j >= n) continue;
    float sum = 0;
    for (int64_t k = p.levels - 1; k >= 0; k--) {
      sum += of.dz_positive[k][i] * of.ratio[k][i] * p.ratio[k * m + first + j];
      level_tile(p, group, k)[(first + j) * G + i] = sum;
      z_dz[k * m + first + j] += of.dz_positive[k][i] * of.positive[k][i];
    }
  }
}

// S^k (n, G) of a block -> z^k, under a maximum that covers it.
void scale_level(const InfoNCEParams& p, Group& g, int64_t k, const float* ratio, int64_t first, int64_t n,
                 const float* s, float* z) {
  const float* of_columns = p.ratio + k * p.columns[0].count + first;
  float maxima[G];
  for (int64_t v = 0; v < g.width; v += W) {
    const Vec of_rows = load(ratio + v);
    Vec max = load(g.part[k].max + v);
    for (int64_t j = 0; j < n; j++) {
      const Vec value = load(s + j * G + v) * (of_rows * of_columns[j]);
      store(z + j * G + v, value);
      max = larger(value, max);
    }
    store(maxima + v, max);
  }
  if (!p.hooks) raise_max(p, g, k, maxima);
}

void prefix_rows(const InfoNCEParams& p, int64_t group, float* scratch) {
  Group g;
  Space space;
  Levels of;
  begin_group(p, group, scratch, g, space);
  begin_levels(p, g, of);
  const InfoNCEColumns& columns = p.columns[0];
  const Anchors& a = g.anchors[0];
  const int64_t m = columns.count;
  for (int64_t first = 0; first < m; first += block_size) {
    const int64_t n = least(block_size, m - first);
    const float* d = columns.unit + first * p.stride;
    const float* guide = guide_tile(p, p.pass[0], g, first, n, space.guide_tile);
    for (int64_t k = 0; k < p.levels; k++) {
      for (int64_t c = level_begin(p, k); c < p.level_end[k]; c += depth) {
        const int64_t of_product = least(depth, p.level_end[k] - c);
        gemm(c > 0, n, g.width, of_product, d + c, p.stride, 1, a.transposed + c * G, G, space.tile, G);
      }
      float* z = p.pass[0].exponentials ? level_tile(p, group, k) + first * G : space.level_tile;
      if (k == 0) hide_own(p, 0, g, first, n, space.tile);  // and so in every level's sum
      scale_level(p, g, k, of.ratio[k], first, n, space.tile, z);
      for (int64_t j = first + n; j < least(first + n + block_size, m); j++) {  // the next block's part of this level
        fetch(columns.unit + j * p.stride + level_begin(p, k), p.level_end[k] - level_begin(p, k));
      }
      if (p.hooks) {
        apply_hooks(p, 0, k, g, first, n, z, guide);
        exponentials<false, true>(p, g, k, n, z);
      } else {
        sum_exponentials<false, true>(g, k, n, z);
      }
    }
  }
  for (int64_t i = 0; i < g.count; i++) finish_levels(p, g, of, i);
  if (!p.d_loss) return;
  for (int64_t first = 0; first < m; first += block_size) {
    const int64_t n = least(block_size, m - first);
    level_gradients(p, g, of, group, first, n);
    for (int64_t k = 0; p.d_queries && k < p.levels; k++) {
      const int64_t begin = level_begin(p, k), width = round_up(p.level_end[k] - begin, W);
      gemm(true, g.count, width, n, level_tile(p, group, k) + first * G, 1, G, columns.unit + first * p.stride + begin,
           p.stride, a.d + begin, p.stride);
    }
  }
  for (int64_t i = 0; p.d_queries && i < g.count; i++) {
    float z_dz[infonce_levels];
    for (int64_t k = 0; k < p.levels; k++) z_dz[k] = of.z_dz[k][i];
    write_prefix_gradient(p, a.d + i * p.stride, 1 / g.tau[i], a.unit + i * p.stride, g.tau[i], a.norm[i], z_dz,
                          p.d_queries + (g.first + i) * p.dim);
  }
}

void prefix_columns(const InfoNCEParams& p, int64_t block) {
  const InfoNCEColumns& columns = p.columns[0];
  const int64_t first = block * block_size, n = least(block_size, columns.count - first), m = columns.count;
  const int64_t panel = p.panel_end - p.panel_begin;
  float* d = columns.gradient + first * p.padded_dim;
  for (int64_t k = 0; k < p.levels; k++) {
    const int64_t begin = level_begin(p, k), width = round_up(p.level_end[k] - begin, W);
    float* z_dz = p.column_z_dz + k * m + first;
    for (int64_t j = 0; p.panel_begin == 0 && j < n; j++) z_dz[j] = 0;
    for (int64_t row = 0; row < panel; row += G) {
      const int64_t count = least(G, panel - row);
      const float *dz = level_tile(p, row / G, k) + first * G, *unit = p.unit_anchors[0] + row * p.stride + begin;
      gemm(p.panel_begin > 0 || row > 0, n, width, count, dz, G, 1, unit, p.stride, d + begin, p.padded_dim);
      const float* of_group = p.tile_z_dz + (row / G * p.levels + k) * m + first;
      for (int64_t j = 0; j < n; j++) z_dz[j] += of_group[j];
    }
  }
  for (int64_t j = 0; p.panel_end == p.n && j < n; j++) {
    float z_dz[infonce_levels];
    for (int64_t k = 0; k < p.levels; k++) z_dz[k] = p.column_z_dz[k * m + first + j];
    write_prefix_gradient(p, d + j * p.padded_dim, 1, columns.unit + (first + j) * p.stride, 1, columns.norm[first + j],
                          z_dz, d + j * p.padded_dim);
  }
}

}  // namespace
}  // namespace ek::EK_VARIANT
