// Matryoshka: the losses of several prefixes of the vectors at the cost of about one. For infonce.cpp alone. Level k
// has the first level_end[k] dimensions; block k lies between two ends. With u a unit vector, u's prefix times its
// ratio r_k is one again, so that
//   z^k_ij = r_k,i r_k,j S^k_ij / τ_i,  S^k = S^(k-1) + the product over block k,
// and the gradient of u_j in block b is a single product with the levels' sum, less each level's part along u:
//   Σ_i D^b_ij u_i / τ_i - u_j Σ_k≥b r_k,j² Σ_i dz^k_ij z^k_ij,  D^b_ij = Σ_k≥b dz^k_ij r_k,i r_k,j.
// A panel keeps z^k of all levels; once its softmaxes are known, each stretch of documents makes D^k tile by tile and
// takes both products of them at once.
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

void begin_levels(const InfoNCEParams& p, Group& g, InfoNCELevels& of) {
  float ratio[infonce_levels], square[infonce_levels];
  for (int64_t i = 0; i < G; i++) {
    for (int64_t k = 0; k < p.levels; k++)
      of.ratio[k][i] = of.positive[k][i] = of.max[k][i] = of.least[k][i] = of.scale[k][i] = 0;
    if (i >= g.count) continue;
    const float *unit = g.anchors[0].unit + i * p.stride, *document = p.columns[0].unit + g.target[i] * p.stride;
    of.norm[i] = g.anchors[0].norm[i];
    ratios_of(p, unit, g.tau[i], of.norm[i], ratio, square);
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

void finish_levels(const InfoNCEParams& p, const Group& g, InfoNCELevels& of, int64_t i) {
  const int64_t row = g.first + i;
  float loss = 0, z_dz = 0;
  for (int64_t k = 0; k < p.levels; k++) {
    const Part& s = g.part[k];
    const float z_positive = of.positive[k][i], e_positive = exp(splat(z_positive - s.max[i]))[0];
    loss += p.level_weight[k] * ((s.max[i] - z_positive) + __builtin_log1pf(s.rest[i] + (e_positive - 1)));
    if (!p.d_loss) continue;
    const float by = p.d_loss[row] * p.level_weight[k] / (s.rest[i] + e_positive);
    of.max[k][i] = s.max[i];
    of.least[k][i] = s.max[i] - 88;
    of.scale[k][i] = by;
    of.dz_positive[k][i] = -by * s.rest[i];
    of.z_dz[k][i] = by * (s.moment[i] - s.rest[i] * (z_positive - s.max[i]));
    z_dz += of.z_dz[k][i];
  }
  p.loss[row] = loss;
  if (p.d_temperature) p.d_temperature[row] = -z_dz / g.tau[i];
}

// z^k (n, G) of a block, kept as they are and summed, Σ exp(z - max) and Σ exp(z - max) (z - max), in one pass: the
// maximum may lag behind, for exponentials up to e^lag sum as well as those up to 1.
template <class Value>
EK_INLINE void sum_level(Part& s, int64_t width, int64_t n, const Value& value, float* kept) {
  constexpr float lag = 40;
  for (int64_t v = 0; v < width; v += W) {
    const Vec old = load(s.max + v);
    Vec max = old, rest, moment;
    for (bool again = true; again;) {
      Vec largest = max;
      rest = moment = Vec{};
      for (int64_t j = 0; j < n; j++) {
        const Vec z = value(j, v);
        store(kept + j * G + v, z);
        largest = larger(z, largest);
        take(z, max, rest, moment);
      }
      again = any(largest > max + lag);
      if (again) max = largest;
    }
    add_sums(s, v, old, max, rest, moment);
  }
}

// The losses of a group, and the z that its gradients wait for.
void prefix_rows(const InfoNCEParams& p, int64_t group, float* scratch) {
  Group g;
  Space space;
  InfoNCELevels& of = p.of_levels[group];
  begin_group(p, group, false, scratch, g, space);
  begin_levels(p, g, of);
  const InfoNCEColumns& columns = p.columns[0];
  const int64_t m = columns.count;
  for (int64_t first = 0; first < m; first += block_size) {
    const int64_t n = least(block_size, m - first);
    const float* d = columns.unit + first * p.stride;
    const float* guide = guide_tile(p, p.pass[0], g, first, n, space.guide_tile);
    for (int64_t k = 0; k < p.levels; k++) {
      const int64_t begin = level_begin(p, k), width = p.level_end[k] - begin;
      Ahead next(d + n * p.stride + begin, p.stride, width, least(block_size, m - first - n),
                 gemm_tiles(n, g.width, width));
      for (int64_t c = 0; c < width; c += depth) {
        gemm(k > 0 || c > 0, n, g.width, least(depth, width - c), d + begin + c, p.stride, 1,
             g.anchors[0].transposed + (begin + c) * G, G, space.tile, G, {}, next);
      }
      float* z = p.pass[0].exponentials ? level_tile(p, group, k) + first * G : space.level_tile;
      if (k == 0) hide_own(p, 0, g, first, n, space.tile);  // and so in every level's sum
      const float *ratio = of.ratio[k], *of_columns = p.ratio + k * m + first;
      const auto scaled = [&](int64_t j, int64_t v) {
        return load(space.tile + j * G + v) * (load(ratio + v) * of_columns[j]);
      };
      if (p.hooks) {
        for (int64_t j = 0; j < n; j++) {
          for (int64_t v = 0; v < g.width; v += W) store(z + j * G + v, scaled(j, v));
        }
        apply_hooks(p, 0, k, g, first, n, z, guide);
        sum_level(g.part[k], g.width, n, [&](int64_t j, int64_t v) { return load(z + j * G + v); }, z);
      } else {
        sum_level(g.part[k], g.width, n, scaled, z);
      }
    }
  }
  for (int64_t i = 0; i < g.count; i++) finish_levels(p, g, of, i);
}

// sums[j] += Σ over lanes of columns[j], for n <= W of them.
void add_lanes(Vec* columns, int64_t n, float* sums) {
  Vec sum{};
  transpose(columns);
  for (int64_t l = 0; l < W; l++) sum += columns[l];
  store_at(sums, 0, n, load_at(sums, 0, n) + sum);
}

// z^k (n, G) of a group and a block -> D^k (n, G) in `tiles`, block_size · G apart; each column's Σ_i dz^k z^k into
// column_z_dz.
void level_gradients(const InfoNCEParams& p, int64_t group, int64_t first, int64_t n, float* tiles) {
  const InfoNCELevels& of = p.of_levels[group];
  const int64_t m = p.columns[0].count, row = p.panel_begin + group * G, count = least(G, p.panel_end - row);
  const float* z_tiles = level_tile(p, group, 0) + first * G;
  float* z_dz = p.column_z_dz + first;
  for (int64_t begin = 0; begin < n; begin += W) {
    const int64_t end = least(begin + W, n);
    Vec along[infonce_levels][W];
    for (int64_t k = 0; k < p.levels; k++) {
      for (int64_t j = end - begin; j < W; j++) along[k][j] = Vec{};
    }
    for (int64_t j = begin; j < end; j++) {
      fetch(p.columns[0].unit + (first + j) * p.stride, p.dim);  // for the product that follows
      Vec sum[G / W] = {};                                       // D^k, from the last level down
      for (int64_t k = p.levels - 1; k >= 0; k--) {
        const float* z_of = z_tiles + (k * m + j) * G;
        const float ratio = p.ratio[k * m + first + j];
        Vec of_column{};
        for (int64_t v = 0; v < count; v += W) {
          const Vec z = larger(load(of.least[k] + v), load(z_of + v));  // finite where it is hidden
          const Vec dz = load(of.scale[k] + v) * exp_within_88(z - load(of.max[k] + v));
          of_column += dz * z;
          sum[v / W] += dz * (load(of.ratio[k] + v) * ratio);
          store(tiles + (k * block_size + j) * G + v, sum[v / W]);
        }
        along[k][j - begin] = of_column;
      }
    }
    for (int64_t k = 0; k < p.levels; k++) add_lanes(along[k], end - begin, z_dz + k * m + begin);
  }
  for (int64_t i = 0; i < count; i++) {
    const int64_t j = p.targets[row + i] - first;
    if (j < 0 || j >= n) continue;
    float sum = 0;
    for (int64_t k = p.levels - 1; k >= 0; k--) {
      sum += of.dz_positive[k][i] * of.ratio[k][i] * p.ratio[k * m + first + j];
      tiles[(k * block_size + j) * G + i] = sum;
      z_dz[k * m + j] += of.dz_positive[k][i] * of.positive[k][i];
    }
  }
}

// What a panel and a stretch of documents give each other. The queries' gradients are one sum for each stretch.
void prefix_columns(const InfoNCEParams& p, int64_t stretch, float* tiles) {
  const InfoNCEColumns& columns = p.columns[0];
  const int64_t m = columns.count, begin = stretch * p.stretch, end = least(begin + p.stretch, m);
  const int64_t panel = p.panel_end - p.panel_begin;
  for (int64_t k = 0; p.panel_begin == 0 && k < p.levels; k++) {
    for (int64_t j = begin; j < end; j++) p.column_z_dz[k * m + j] = 0;
  }
  for (int64_t first = begin; first < end; first += block_size) {
    const int64_t n = least(block_size, end - first);
    const float* document = columns.unit + first * p.stride;
    float* d_document = columns.gradient ? columns.gradient + first * p.padded_dim : nullptr;
    for (int64_t row = 0; row < panel; row += G) {
      const int64_t count = least(G, panel - row);
      const float* query = p.unit_anchors[0] + row * p.stride;
      float* d_query = p.d_query_parts + (stretch * panel + row) * p.stride;
      level_gradients(p, row / G, first, n, tiles);
      for (int64_t k = 0; k < p.levels; k++) {
        const int64_t c = level_begin(p, k), width = round_up(p.level_end[k] - c, W);
        const float* tile = tiles + k * block_size * G;
        if (p.d_queries) {
          Ahead next(d_document ? d_document + c : document, p.padded_dim, width, d_document ? n : 0,
                     gemm_tiles(count, width, n));
          gemm(first > begin, count, width, n, tile, 1, G, document + c, p.stride, d_query + c, p.stride, {}, next);
        }
        if (d_document) {
          gemm(p.panel_begin + row > 0, n, width, count, tile, G, 1, query + c, p.stride, d_document + c, p.padded_dim);
        }
      }
    }
  }
  if (p.panel_end < p.n || !columns.gradient) return;
  for (int64_t j = begin; j < end; j++) {
    float z_dz[infonce_levels], *d = columns.gradient + j * p.padded_dim;
    for (int64_t k = 0; k < p.levels; k++) z_dz[k] = p.column_z_dz[k * m + j];
    write_prefix_gradient(p, d, 1, columns.unit + j * p.stride, 1, columns.norm[j], z_dz, d);
  }
}

// The queries' gradients of a group.
void prefix_queries(const InfoNCEParams& p, int64_t group) {
  const InfoNCELevels& of = p.of_levels[group];
  const int64_t m = p.columns[0].count, panel = p.panel_end - p.panel_begin, begin = group * G;
  for (int64_t i = 0; i < least(G, panel - begin); i++) {
    float z_dz[infonce_levels], *d = p.d_query_parts + (begin + i) * p.stride;
    for (int64_t stretch = 1; stretch * p.stretch < m; stretch++) {
      add(d, 1, d + stretch * panel * p.stride, p.dim);
    }
    for (int64_t k = 0; k < p.levels; k++) z_dz[k] = of.z_dz[k][i];
    const int64_t row = p.panel_begin + begin + i;
    const float tau = p.temperature[row * p.temperature_stride];
    write_prefix_gradient(p, d, 1 / tau, p.unit_anchors[0] + (begin + i) * p.stride, tau, of.norm[i], z_dz,
                          p.d_queries + row * p.dim);
  }
}

}  // namespace
}  // namespace ek::EK_VARIANT
