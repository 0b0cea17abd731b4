// Directions and their ways back at once, for infonce.cpp alone: with doc_to_query, what a query's row takes from a
// document and what the document's row takes from the query are one similarity, and among queries, or documents, half
// of the products serve. The similarities of a pair of sets (a pass) are computed twice: for the sums of both ways'
// softmaxes, then for the weights
//   w_ab = dz(a -> b) / τ_a + dz(b -> a) / τ_b,   d_û_a = Σ_b w_ab û_b,   d_û_b = Σ_a w_ab û_a.
// Four directions come to 8 products of N×M: 2 + 2 for similarities, 4 for gradients; a pass for each takes 12.
#pragma once
#include "infonce_tile.h"

namespace ek::EK_VARIANT {
namespace {

// Among vectors of one set, pairs within a square of so many are taken from either side, by rows alone; beyond it,
// once.
constexpr int64_t square = 8 * G;
static_assert(square % block_size == 0, "a block lies in one square");

// G vectors of a kind: queries (0), or the documents that are a row's positive (1).
struct Side {
  int64_t kind, group, first, count, width;
  const float* unit;
  float* transposed;      // (dim, G)
  float rate[G], max[G];  // 1 / τ; of the row's softmax
  float scale[G];         // d_loss / τ / Σ exp(z - max)
  Labels labels;
};

Side begin_side(const InfoNCEParams& p, int64_t kind, int64_t group, float* transposed) {
  Side a{kind, group, p.panel_begin + group * G, 0, 0, nullptr, transposed, {}, {}, {}, {}};
  a.count = least(G, p.panel_end - a.first);
  a.width = round_up(a.count, W);
  a.unit = p.columns[1 - kind].unit + a.first * p.stride;
  const float* rows[G] = {};
  for (int64_t i = 0; i < a.count; i++) rows[i] = a.unit + i * p.stride;
  transpose_rows(rows, p.dim, transposed);
  const int64_t* labels = p.columns[1 - kind].labels;
  for (int64_t i = 0; i < a.count; i++) {
    a.rate[i] = p.rate[a.first + i];
    if (labels) a.labels.set(i, labels[a.first + i]);
  }
  return a;
}

// The first column that rows of the group at `row` see in a pass, and the first beyond their square.
int64_t first_column(const InfoNCEPass& pass, int64_t row) {
  return pass.columns == 1 - pass.anchors ? row / square * square : 0;
}
int64_t first_beyond(const InfoNCEPass& pass, int64_t row) {
  return pass.columns == 1 - pass.anchors ? (row / square + 1) * square : 0;
}

// Of a block of columns, the first that isn't a row of the same square: documents that are nobody's positive never are.
int64_t first_seen_once(const InfoNCEParams& p, const InfoNCEPass& pass, int64_t row, int64_t first) {
  return first >= first_beyond(pass, row) ? 0 : most(0, p.n - first);
}

// visit(i, j) for each of a tile's pairs that is a row's own.
template <class Visit>
EK_INLINE void for_own(const InfoNCEPass& pass, const Side& a, int64_t first, int64_t n, const Visit& visit) {
  for (int64_t i = 0; i < a.count; i++) {
    int64_t j = (a.first + i - first) % pass.period;
    for (j += j < 0 ? pass.period : 0; j < n; j += pass.period) visit(i, j);
  }
}

// Similarities (n, G) of a tile; pairs with equal labels are out, on both ways.
void similarities(const InfoNCEParams& p, const InfoNCEColumns& columns, const Side& a, int64_t first, int64_t n,
                  float* tile) {
  product(n, a.width, p.dim, columns.unit + first * p.stride, p.stride, a.transposed, tile);
  for (int64_t j = 0; columns.labels && j < n; j++) {
    for (int64_t v = 0; v < a.width; v += W) {
      const IVec out = a.labels.equal(v, columns.labels[first + j]);
      store(tile + j * G + v, select(out, splat(-__builtin_inff()), load(tile + j * G + v)));
    }
  }
}

// Each row's 1 / τ and positive; its sums are empty.
void mutual_begin(const InfoNCEParams& p, int64_t block) {
  for (int64_t i = block * block_size; i < least((block + 1) * block_size, p.n); i++) {
    p.rate[i] = 1 / p.temperature[i * p.temperature_stride];
    p.positive[i] = dot(p.columns[1].unit + i * p.stride, p.columns[0].unit + i * p.stride, p.dim);
    for (int64_t kind = 0; kind < 2; kind++) {
      for (float* sums : {p.row_sums[kind], p.column_sums[kind]}) {
        sums[i] = p.rate[i] * p.positive[i];
        sums[p.n + i] = sums[2 * p.n + i] = 0;
      }
    }
  }
}

// Of a tile (n, G), into the rows' sums.
void sum_rows(const Side& a, int64_t n, const float* tile, Part& s) {
  for (int64_t v = 0; v < a.width; v += W) {
    const Vec rate = load(a.rate + v), old = load(s.max + v);
    Vec max = old, rest{}, moment{};
    for (int64_t j = 0; j < n; j++) max = larger(rate * load(tile + j * G + v), max);
    for (int64_t j = 0; j < n; j++) take(rate * load(tile + j * G + v), max, rest, moment);
    add_sums(s, v, old, max, rest, moment);
  }
}

// The same of one column (G) as an anchor: sums (3, n) of its group.
void sum_column(const InfoNCEParams& p, const Side& a, int64_t j, const float* tile, float* sums) {
  const Vec rate = splat(p.rate[j]);
  Vec larger_max = rate * p.positive[j], rest{}, moment{};
  for (int64_t v = 0; v < a.width; v += W) larger_max = larger(rate * load(tile + v), larger_max);
  const float max = max_lanes(larger_max);
  for (int64_t v = 0; v < a.width; v += W) take(rate * load(tile + v), splat(max), rest, moment);
  sums[j] = max;
  sums[p.n + j] = sum_lanes(rest);
  sums[2 * p.n + j] = sum_lanes(moment);
}

void mutual_sums(const InfoNCEParams& p, int64_t kind, int64_t group, float* scratch) {
  const Side a = begin_side(p, kind, group, scratch);
  float* tile = scratch + p.dim * G;
  Part s{};
  for (int64_t i = 0; i < a.count; i++) s.max[i] = a.rate[i] * p.positive[a.first + i];
  for (int64_t number = 0; number < p.passes; number++) {
    const InfoNCEPass& pass = p.pass[number];
    if (pass.anchors != kind) continue;
    const InfoNCEColumns& columns = p.columns[pass.columns];
    float* sums = p.tile_sums[1 - pass.columns] + group * 3 * p.n;
    for (int64_t first = first_column(pass, a.first); first < columns.count; first += block_size) {
      const int64_t n = least(block_size, columns.count - first);
      similarities(p, columns, a, first, n, tile);
      for (int64_t j = 0; j < n; j++) {
        for (int64_t i = a.count; i < a.width; i++) tile[j * G + i] = -__builtin_inff();
      }
      for_own(pass, a, first, n, [&](int64_t i, int64_t j) {
        tile[j * G + i] = pass.own_back ? p.positive[a.first + i] : -__builtin_inff();
      });
      for (int64_t j = 0; pass.back && first >= first_beyond(pass, a.first) && j < least(n, p.n - first); j++) {
        sum_column(p, a, first + j, tile + j * G, sums);
      }
      for_own(pass, a, first, n, [&](int64_t i, int64_t j) { tile[j * G + i] = -__builtin_inff(); });
      sum_rows(a, n, tile, s);
    }
  }
  for (int64_t i = 0; i < a.count; i++) {
    float* sums = p.row_sums[kind] + a.first + i;
    sums[0] = s.max[i];
    sums[p.n] = s.rest[i];
    sums[2 * p.n] = s.moment[i];
  }
}

// What a panel of a kind's rows adds to the sums of a block of columns.
void mutual_merge(const InfoNCEParams& p, int64_t kind, int64_t set, int64_t block) {
  const int64_t begin = block * block_size, end = least(begin + block_size, p.n);
  float* sums = p.column_sums[1 - set];
  for (int64_t number = 0; number < p.passes; number++) {
    const InfoNCEPass& pass = p.pass[number];
    if (pass.anchors != kind || pass.columns != set || !pass.back) continue;
    for (int64_t row = p.panel_begin; row < p.panel_end; row += G) {
      if (begin < first_beyond(pass, row)) continue;
      const float* of_group = p.tile_sums[1 - set] + (row - p.panel_begin) / G * 3 * p.n;
      for (int64_t j = begin; j < end; j += W) {
        Vec x[6];
        for (int64_t k = 0; k < 3; k++) {
          x[k] = load_at(sums + k * p.n, j, end);
          x[3 + k] = load_at(of_group + k * p.n, j, end);
        }
        merge(x[0], x[1], x[2], x[3], x[4], x[5]);
        for (int64_t k = 0; k < 3; k++) store_at(sums + k * p.n, j, end, x[k]);
      }
    }
  }
}

// The losses of a block of rows, and what turns similarities into weights.
void mutual_finish(const InfoNCEParams& p, int64_t block) {
  for (int64_t i = block * block_size; i < least((block + 1) * block_size, p.n); i++) {
    const float z_positive = p.rate[i] * p.positive[i], d_loss = p.d_loss ? p.d_loss[i] / float(p.parts) : 0;
    float loss = 0, dz_positive = 0, z_dz = 0;
    for (int64_t part = 0; part < p.parts; part++) {
      Vec maxima = splat(z_positive), rests{}, moments{};
      for (int64_t kind = 0; kind < 2; kind++) {
        if (p.parts > 1 && kind != part) continue;
        for (const float* sums : {p.row_sums[kind] + i, p.column_sums[kind] + i}) {
          merge(maxima, rests, moments, splat(sums[0]), splat(sums[p.n]), splat(sums[2 * p.n]));
        }
      }
      const float max = maxima[0], rest = rests[0], e_positive = exp(splat(z_positive) - maxima)[0];
      loss += (max - z_positive) + __builtin_log1pf(rest + (e_positive - 1));
      const float by = d_loss / (rest + e_positive);
      dz_positive -= by * rest;
      z_dz += by * (moments[0] - rest * (z_positive - max));
      for (int64_t kind = 0; kind < 2; kind++) {
        if (p.parts > 1 && kind != part) continue;
        p.anchor_max[kind][i] = max;
        p.anchor_scale[kind][i] = by * p.rate[i];
      }
    }
    p.loss[i] = loss / float(p.parts);
    p.pair[i] = dz_positive * p.rate[i];
    if (p.d_temperature) p.d_temperature[i] = -z_dz * p.rate[i];
  }
}

// Similarities (n, G) of a tile -> weights, of both ways where the column is an anchor.
void weigh(const InfoNCEParams& p, const InfoNCEPass& pass, const Side& a, int64_t first, int64_t n, float* w) {
  const int64_t kind = 1 - pass.columns, anchors = pass.back ? p.n : 0;
  for_own(pass, a, first, n, [&](int64_t i, int64_t j) { w[j * G + i] = -__builtin_inff(); });
  for (int64_t j = 0; j < n; j++) {
    const bool both = first + j < anchors;
    const Vec rate = splat(both ? p.rate[first + j] : 0), max = splat(both ? p.anchor_max[kind][first + j] : 0),
              scale = splat(both ? p.anchor_scale[kind][first + j] : 0);
    for (int64_t v = 0; v < a.width; v += W) {
      const Vec s = load(w + j * G + v);
      Vec weight = load(a.scale + v) * exp(load(a.rate + v) * s - load(a.max + v));
      if (both) weight += scale * exp(rate * s - max);
      store(w + j * G + v, weight);
    }
  }
  if (&pass != p.pass) return;
  for_own(pass, a, first, n, [&](int64_t i, int64_t j) {  // the positive pair
    const int64_t row = a.first + i;
    const float back = exp(splat(a.rate[i] * p.positive[row] - p.anchor_max[1][row]))[0] * p.anchor_scale[1][row];
    w[j * G + i] = p.pair[row] + (pass.own_back ? back : 0);
  });
}

// The gradients of a group of a kind as rows; weights of pairs that count once are kept for the columns.
void mutual_rows(const InfoNCEParams& p, int64_t kind, int64_t group, float* scratch) {
  Side a = begin_side(p, kind, group, scratch);
  float *tile = scratch + p.dim * G, *d = tile + block_size * G, *d_rows = kind == 0 ? p.d_queries : p.d_anchors;
  for (int64_t i = 0; i < a.count; i++) {
    a.max[i] = p.anchor_max[kind][a.first + i];
    a.scale[i] = p.anchor_scale[kind][a.first + i];
  }
  for (int64_t c = 0; c < G * p.stride; c++) d[c] = 0;
  for (int64_t number = 0; number < p.passes; number++) {
    const InfoNCEPass& pass = p.pass[number];
    const InfoNCEColumns& columns = p.columns[pass.columns];
    if (pass.anchors != kind || (!d_rows && !columns.gradient)) continue;
    for (int64_t first = first_column(pass, a.first); first < columns.count; first += block_size) {
      const int64_t n = least(block_size, columns.count - first);
      const float* unit = columns.unit + first * p.stride;
      const bool kept = columns.gradient && first_seen_once(p, pass, a.first, first) < n;
      float* w = kept ? pass.exponentials + (group * columns.count + first) * G : tile;
      similarities(p, columns, a, first, n, w);
      weigh(p, pass, a, first, n, w);
      if (d_rows) gemm(true, a.count, p.padded_dim, n, w, 1, G, unit, p.stride, d, p.stride);
    }
  }
  for (int64_t i = 0; d_rows && i < a.count; i++) {
    const float norm = p.columns[1 - kind].norm[a.first + i];
    write_gradient(p, d + i * p.stride, a.unit + i * p.stride, 1, norm, d_rows + (a.first + i) * p.dim);
  }
}

// What a panel of a kind's rows adds to the gradient of a block of columns, as unit vectors.
void mutual_columns(const InfoNCEParams& p, int64_t kind, int64_t set, int64_t block) {
  const InfoNCEColumns& columns = p.columns[set];
  const int64_t first = block * block_size, n = least(block_size, columns.count - first);
  float* d = columns.gradient + first * p.padded_dim;
  for (int64_t number = 0; number < p.passes; number++) {
    const InfoNCEPass& pass = p.pass[number];
    if (pass.anchors != kind || pass.columns != set) continue;
    for (int64_t row = p.panel_begin; row < p.panel_end; row += G) {
      const int64_t skipped = first_seen_once(p, pass, row, first);
      if (skipped >= n) continue;
      const float* w = pass.exponentials + ((row - p.panel_begin) / G * columns.count + first + skipped) * G;
      const float* unit = p.columns[1 - kind].unit + row * p.stride;
      gemm(true, n - skipped, p.padded_dim, least(G, p.panel_end - row), w, G, 1, unit, p.stride,
           d + skipped * p.padded_dim, p.padded_dim);
    }
  }
}

// d_û -> d_x of a block of columns, once every panel is in.
void mutual_gradients(const InfoNCEParams& p, int64_t set, int64_t block) {
  const InfoNCEColumns& columns = p.columns[set];
  for (int64_t j = block * block_size; j < least((block + 1) * block_size, columns.count); j++) {
    float* d = columns.gradient + j * p.padded_dim;
    write_gradient(p, d, columns.unit + j * p.stride, 1, columns.norm[j], d);
  }
}

}  // namespace
}  // namespace ek::EK_VARIANT
