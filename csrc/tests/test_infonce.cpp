// The contrastive loss without torch: each variant against plain loops in double, several panels, NaN in all
// scratch.
#include <algorithm>

#include "naive.h"

namespace {

constexpr int64_t n = 53, m = 150, k = 2, dim = 38, padded_dim = 48, panel = 48, groups = 1;
constexpr int64_t blocks = (m + ek::infonce_block - 1) / ek::infonce_block;
const float nan = std::nanf("");

std::vector<float> unwritten(int64_t size) { return std::vector<float>(size_t(size), nan); }

// x / |x|, and the gradient of x from the gradient of that.
struct Unit {
  std::vector<double> u;
  double norm = 1;

  Unit(const float* x, bool cosine, size_t size = dim) : u(x, x + size) {
    double squares = 0;
    for (double value : u) squares += value * value;
    if (cosine) norm = std::sqrt(squares);
    for (double& value : u) value /= norm;
  }
  double dot(const std::vector<double>& other) const {
    double sum = 0;
    for (size_t c = 0; c < u.size(); c++) sum += u[c] * other[c];
    return sum;
  }
  bool has_gradient(const float* got, const std::vector<double>& d_unit, bool cosine, double tolerance) const {
    bool right = true;
    const double along = cosine ? dot(d_unit) : 0;
    for (size_t c = 0; c < dim; c++) right &= naive::close(got[c], (d_unit[c] - u[c] * along) / norm, tolerance);
    return right;
  }
};

struct Example {
  bool cosine, with_positives, soft;  // soft: documents with the query's label are positives, and label smoothing
  ek::DType dtype;
  std::vector<uint16_t> bf16[4];
  std::vector<float> queries = naive::random(n * dim, 1), documents = naive::random(m * dim, 2);
  std::vector<float> negatives = naive::random(n * k * dim, 3), positives = naive::random(n * dim, 4);
  std::vector<float> temperature = unwritten(n), d_loss = naive::random(n, 5);
  std::vector<int64_t> targets, query_labels, document_labels;
  std::vector<float> loss = unwritten(n), d_queries = unwritten(n * dim), d_documents = unwritten(m * padded_dim);
  std::vector<float> d_negatives = unwritten(n * k * dim), d_positives = unwritten(n * dim);
  std::vector<float> d_temperature = unwritten(n);
  bool apart = true;  // tasks that may run at the same time wrote nothing in common
  ek::InfoNCEParams p{};

  Example(bool with_cosine, bool positives_given, bool soft_targets, ek::DType of_vectors)
      : cosine(with_cosine), with_positives(positives_given), soft(soft_targets), dtype(of_vectors) {
    for (int64_t i = 0; i < n; i++) {
      temperature[size_t(i)] = 0.3f + 0.02f * float(i);
      targets.push_back((i * 31 + 140) % m);
      query_labels.push_back((i % 7) << 33 | 5);  // they differ in the upper half
    }
    for (int64_t j = 0; j < m; j++) document_labels.push_back((j % 9) << 33 | 5);
  }

  ek::InfoNCEVectors vectors(std::vector<float>& x, int which) {
    if (dtype == ek::DType::f32) return {x.data(), dtype, dim};
    bf16[which] = naive::as_bf16(x);
    return {bf16[which].data(), dtype, dim};
  }

  void run(const ek::InfoNCEKernels& kernels, bool in_stretches) {
    const int64_t stride = ek::infonce_stride(dim);
    std::vector<float> unit_documents = unwritten(m * stride), document_norm = unwritten(m);
    std::vector<float> unit_queries = unwritten(panel * stride), of_rows = unwritten(9 * panel);
    std::vector<float> exponentials = unwritten(groups * m * ek::infonce_rows);
    std::vector<float> block_max = unwritten(groups * blocks * ek::infonce_rows);
    std::vector<float> document_sum = unwritten(stride), document_factor = unwritten(m),
                       query_factor = unwritten(panel);
    std::vector<float> document_pairs = unwritten(m / 2 * padded_dim), query_pairs = unwritten(panel / 2 * padded_dim);
    const std::vector<int32_t> key(targets.begin(), targets.end());
    p.n = n, p.k = k, p.dim = dim, p.cosine = cosine, p.period = m;
    p.columns[1].vectors = vectors(queries, 0), p.columns[1].count = n;
    p.columns[1].labels = query_labels.data();
    ek::InfoNCEColumns& of_documents = p.columns[0];
    of_documents.vectors = vectors(documents, 1), of_documents.count = m;
    of_documents.labels = document_labels.data();
    of_documents.gradient = d_documents.data(), of_documents.unit = unit_documents.data();
    of_documents.norm = document_norm.data(), of_documents.sum = soft ? document_sum.data() : nullptr;
    if (with_positives) p.positives = vectors(positives, 2);
    p.negatives = vectors(negatives, 3);
    p.negatives_stride = k * dim;
    p.targets = targets.data(), p.temperature = temperature.data(), p.temperature_stride = 1;
    p.passes = p.anchors = p.parts = 1;
    p.pass[0] = {0, 0, 0, true, m, key.data(), exponentials.data(), block_max.data(), false, false};
    p.hooks = p.sum_anchors[0] = true;
    p.same_positive = soft, p.label_smoothing = soft ? 0.1f : 0;
    p.d_loss = d_loss.data(), p.loss = loss.data();
    p.d_queries = d_queries.data(), p.d_negatives = d_negatives.data();
    p.d_positives = with_positives ? d_positives.data() : nullptr, p.d_temperature = d_temperature.data();
    p.padded_dim = padded_dim, p.stride = stride;
    p.unit_anchors[0] = unit_queries.data();
    p.paired = kernels.pairs && dtype == ek::DType::bf16;
    p.anchor_pairs[0] = query_pairs.data(), p.anchor_factor[0] = query_factor.data();
    of_documents.pairs = document_pairs.data(), of_documents.factor = document_factor.data();
    p.row_max[0] = of_rows.data(), p.row_scale[0] = p.row_max[0] + panel, p.row_spread[0] = p.row_scale[0] + panel;
    p.row_share[0] = p.row_spread[0] + panel, p.positive_scale = p.row_share[0] + panel;
    std::vector<float> d_query_parts = unwritten(blocks * panel * stride);
    std::vector<ek::InfoNCEStretch> of_stretches(blocks);
    p.stretch = ek::infonce_block, p.d_query_parts = d_query_parts.data(), p.of_stretches = of_stretches.data();
    std::vector<float> scratch = unwritten(ek::infonce_scratch_floats(p));
    for (int64_t block = 0; block < blocks; block++) kernels.normalise(p, 0, block);
    if (soft) kernels.column_sum(p, 0, scratch.data());
    for (p.panel_begin = 0; p.panel_begin < n; p.panel_begin = p.panel_end) {
      p.panel_end = p.panel_begin + panel < n ? p.panel_begin + panel : n;
      if (in_stretches) {
        // Stretches of a group run at the same time: none may write what they share.
        const auto shared = {&unit_queries, &query_pairs, &query_factor};
        for (std::vector<float>* x : shared) std::fill(x->begin(), x->end(), nan);
        for (int64_t stretch = 0; stretch < blocks; stretch++) kernels.rows_stretch(p, 0, stretch, scratch.data());
        for (const std::vector<float>* x : shared) {
          apart &= std::all_of(x->begin(), x->end(), [](float value) { return std::isnan(value); });
        }
        kernels.rows_merge(p, 0, scratch.data());
      } else {
        kernels.rows(p, 0, scratch.data());
      }
      for (int64_t block = 0; block < blocks; block++) kernels.columns(p, 0, block, scratch.data());
    }
  }

  bool is_right() const {
    const double tolerance = p.paired ? 3e-2 : 2e-5;
    bool right = apart;
    std::vector<std::vector<double>> d_unit_documents(m, std::vector<double>(dim));
    for (size_t i = 0; i < n; i++) {
      // The row's columns: every document, then its negatives; the positive may be another vector.
      const Unit q(&queries[i * dim], cosine);
      const size_t own = size_t(targets[i]);
      std::vector<Unit> columns;
      std::vector<double> z, dz, y;
      double sum = 0, moment = 0, targets_sum = 0, wanted_loss = 0;
      for (size_t j = 0; j < m + k; j++) {
        const float* x = j < m ? &documents[j * dim] : &negatives[(i * k + j - m) * dim];
        columns.emplace_back(j == own && with_positives ? &positives[i * dim] : x, cosine);
        z.push_back(q.dot(columns[j].u) / temperature[i]);
        const bool same = j < m && j != own && query_labels[i] == document_labels[j];
        y.push_back(j == own || (soft && same));
        targets_sum += y[j];
        dz.push_back(same && !soft ? 0 : std::exp(z[j]));
        sum += dz[j];
      }
      for (size_t j = 0; j < m + k; j++) {
        y[j] = soft ? 0.9 * y[j] / targets_sum + 0.1 / (m + k) : y[j];
        wanted_loss += y[j] * (std::log(sum) - z[j]);
      }
      right &= naive::close(loss[i], wanted_loss);
      std::vector<double> d_unit_query(dim);
      for (size_t j = 0; j < m + k; j++) {
        dz[j] = d_loss[i] * (dz[j] / sum - y[j]);
        moment += dz[j] * z[j];
        std::vector<double> d_column(dim);
        for (size_t c = 0; c < dim; c++) {
          d_unit_query[c] += dz[j] / temperature[i] * columns[j].u[c];
          d_column[c] = dz[j] / temperature[i] * q.u[c];
          if (j < m && !(j == own && with_positives)) d_unit_documents[j][c] += d_column[c];
        }
        if (j >= m) right &= columns[j].has_gradient(&d_negatives[(i * k + j - m) * dim], d_column, cosine, tolerance);
        if (j == own && with_positives)
          right &= columns[j].has_gradient(&d_positives[i * dim], d_column, cosine, tolerance);
      }
      right &= q.has_gradient(&d_queries[i * dim], d_unit_query, cosine, tolerance);
      right &= naive::close(d_temperature[i], -moment / temperature[i], 2e-5);
    }
    for (size_t j = 0; j < m; j++) {
      const Unit d(&documents[j * dim], cosine);
      right &= d.has_gradient(&d_documents[j * padded_dim], d_unit_documents[j], cosine, tolerance);
    }
    return right;
  }
};

// One softmax of a row: pairs of vectors, of which the first is the target.
struct Softmax {
  struct Pair {
    const Unit *a, *b;
    std::vector<double>*d_a, *d_b;  // by the unit vectors
  };
  std::vector<Pair> pairs;

  // Its loss; d_loss times the gradients is added.
  double add(double tau, double d_loss, double* d_tau) const {
    std::vector<double> z;
    double sum = 0;
    for (const Pair& pair : pairs) {
      z.push_back(pair.a->dot(pair.b->u) / tau);
      sum += std::exp(z.back());
    }
    for (size_t j = 0; j < pairs.size(); j++) {
      const double dz = d_loss * (std::exp(z[j]) / sum - (j == 0));
      *d_tau -= dz * z[j] / tau;
      for (size_t c = 0; c < pairs[j].a->u.size(); c++) {
        (*pairs[j].d_a)[c] += dz / tau * pairs[j].b->u[c];
        (*pairs[j].d_b)[c] += dz / tau * pairs[j].a->u[c];
      }
    }
    return std::log(sum) - z[0];
  }
};

// Vectors as unit vectors of some dimensions, with gradients.
struct Units {
  std::vector<Unit> of;
  std::vector<std::vector<double>> d;

  Units(const std::vector<float>& x, bool cosine, size_t size = dim) {
    for (size_t i = 0; i < x.size(); i += dim) of.emplace_back(&x[i], cosine, size);
    d.assign(of.size(), std::vector<double>(size));
  }
};

// What both calls below need: rows' queries, every vector's place, τ and the upstream gradient.
struct Call {
  int64_t rows, documents_count;
  bool cosine;
  std::vector<float> queries = naive::random(size_t(rows * dim), 6);
  std::vector<float> documents = naive::random(size_t(documents_count * dim), 7);
  std::vector<float> temperature = std::vector<float>(size_t(rows), 0), d_loss = naive::random(size_t(rows), 8);
  std::vector<float> loss = unwritten(rows), d_temperature = unwritten(rows), d_queries = unwritten(rows * dim);
  std::vector<int32_t> key;
  std::vector<int64_t> targets;
  std::vector<std::vector<float>> scratch;
  ek::InfoNCEParams p{};

  Call(int64_t row_count, int64_t column_count, bool with_cosine, int64_t in_panel, int64_t copies)
      : rows(row_count), documents_count(column_count), cosine(with_cosine) {
    for (std::vector<float>* x : {&queries, &documents}) {
      for (float& value : *x) value *= 0.4f;  // logits of a few units, whose exponentials keep their digits
    }
    for (int64_t i = 0; i < rows; i++) {
      temperature[size_t(i)] = 0.3f + 0.002f * float(i);
      targets.push_back(i);
      key.push_back(int32_t(i));
    }
    p.n = rows, p.dim = dim, p.cosine = cosine, p.padded_dim = padded_dim, p.stride = ek::infonce_stride(dim);
    p.targets = targets.data(), p.temperature = temperature.data(), p.temperature_stride = 1;
    p.d_loss = d_loss.data(), p.loss = loss.data();
    p.d_temperature = d_temperature.data(), p.d_queries = d_queries.data();
    p.columns[0].vectors = {documents.data(), ek::DType::f32, dim}, p.columns[0].count = documents_count;
    p.columns[1].vectors = {queries.data(), ek::DType::f32, dim}, p.columns[1].count = rows;
    for (ek::InfoNCEColumns& columns : p.columns) {
      columns.unit = floats(columns.count * p.stride), columns.norm = floats(columns.count);
      columns.gradient = floats(columns.count * padded_dim);
    }
    for (ek::InfoNCEPass& pass : p.pass) {
      pass.own_apart = true, pass.period = documents_count, pass.key = key.data();
      pass.exponentials = floats(in_panel * copies * documents_count);
    }
    for (float*& units : p.unit_anchors) units = floats(in_panel * p.stride);
  }

  float* floats(int64_t size) {
    scratch.push_back(unwritten(size));
    return scratch.back().data();
  }

  template <class Groups, class Columns>
  void for_panels(int64_t in_panel, const Groups& groups_of_panel, const Columns& columns_of_panel) {
    for (p.panel_begin = 0; p.panel_begin < rows; p.panel_begin = p.panel_end) {
      p.panel_end = std::min(p.panel_begin + in_panel, rows);
      for (int64_t group = 0; group * ek::infonce_rows < p.panel_end - p.panel_begin; group++) groups_of_panel(group);
      columns_of_panel();
    }
  }
};

int64_t blocks_of(int64_t count) { return (count + ek::infonce_block - 1) / ek::infonce_block; }

// Both ways at once, beyond the square that rows share: with all four directions, or doc_to_query in a softmax apart.
bool mutual_is_right(const ek::InfoNCEKernels& kernels, bool cosine, bool all, bool with_labels) {
  constexpr int64_t rows = 400, count = 2 * rows, in_panel = 5 * ek::infonce_rows;
  Call call(rows, count, cosine, in_panel, 1);
  ek::InfoNCEParams& p = call.p;
  std::vector<float> d_anchors = unwritten(rows * dim);
  p.mutual = true, p.anchors = 2, p.parts = all ? 1 : 2, p.period = rows,
  p.d_anchors = all ? d_anchors.data() : nullptr;
  // query_to_doc, query_to_query, doc_to_doc (without a query's own documents), each with its way back
  p.passes = all ? 3 : 1;
  for (int64_t i = 0; i < p.passes; i++) {
    ek::InfoNCEPass& pass = p.pass[i];
    pass.anchors = i == 2, pass.columns = i == 1, pass.period = i == 0 ? count : rows;
    pass.back = true, pass.own_back = i == 0 && all;
  }
  std::vector<int64_t> labels;  // equal ones, but a row's own positive, are out
  for (int64_t j = 0; j < count; j++) labels.push_back((j % 70) << 33 | 5);
  for (ek::InfoNCEColumns& columns : p.columns) columns.labels = with_labels ? labels.data() : nullptr;
  const auto seen = [&](size_t i, size_t j) { return !with_labels || labels[i] != labels[j]; };
  p.rate = call.floats(rows), p.positive = call.floats(rows), p.pair = call.floats(rows);
  for (int64_t kind = 0; kind < 2; kind++) {
    p.row_sums[kind] = call.floats(3 * rows), p.column_sums[kind] = call.floats(3 * rows);
    p.tile_sums[kind] = call.floats(in_panel / ek::infonce_rows * 3 * rows);
    p.anchor_max[kind] = call.floats(rows), p.anchor_scale[kind] = call.floats(rows);
  }
  float* space = call.floats(ek::infonce_scratch_floats(p));
  for (int64_t set = 0; set < 2; set++) {
    for (int64_t block = 0; block < blocks_of(p.columns[set].count); block++) kernels.normalise(p, set, block);
    std::fill_n(p.columns[set].gradient, p.columns[set].count * padded_dim, 0.f);
  }
  const auto for_blocks = [&](int64_t set, const auto& task) {
    for (int64_t block = 0; block < blocks_of(set < 0 ? rows : p.columns[set].count); block++) task(block);
  };
  for_blocks(-1, [&](int64_t block) { kernels.mutual_begin(p, block); });
  for (int64_t kind = 0; kind <= all; kind++) {
    call.for_panels(
        in_panel, [&](int64_t group) { kernels.mutual_sums(p, kind, group, space); },
        [&] {
          for (int64_t set = 0; set < 2; set++)
            for_blocks(-1, [&](int64_t block) { kernels.mutual_merge(p, kind, set, block); });
        });
  }
  for_blocks(-1, [&](int64_t block) { kernels.mutual_finish(p, block); });
  for (int64_t kind = 0; kind <= all; kind++) {
    call.for_panels(
        in_panel, [&](int64_t group) { kernels.mutual_rows(p, kind, group, space); },
        [&] {
          for (int64_t set = 0; set < 2; set++)
            for_blocks(set, [&](int64_t block) { kernels.mutual_columns(p, kind, set, block); });
        });
  }
  for (int64_t set = 0; set < 2; set++)
    for_blocks(set, [&](int64_t block) { kernels.mutual_gradients(p, set, block); });
  if (all) kernels.add_anchors(p);

  bool right = true;
  Units q(call.queries, cosine), d(call.documents, cosine);
  for (size_t i = 0; i < rows; i++) {
    Softmax softmax[2];
    softmax[0].pairs.push_back({&q.of[i], &d.of[i], &q.d[i], &d.d[i]});
    if (!all) softmax[1] = softmax[0];
    for (size_t j = 0; j < count; j++) {
      // doc_to_query: the positive pair stands there once more, or is that softmax's target
      if (j < rows && (j == i ? all : seen(i, j)))
        softmax[!all].pairs.push_back({&d.of[i], &q.of[j], &d.d[i], &q.d[j]});
      if (j == i || !seen(i, j)) continue;
      softmax[0].pairs.push_back({&q.of[i], &d.of[j], &q.d[i], &d.d[j]});
      if (all && j % rows != i) softmax[0].pairs.push_back({&d.of[i], &d.of[j], &d.d[i], &d.d[j]});
      if (all && j < rows) softmax[0].pairs.push_back({&q.of[i], &q.of[j], &q.d[i], &q.d[j]});
    }
    double loss = 0, d_tau = 0;
    const double tau = call.temperature[i], parts = all ? 1 : 2;
    for (const Softmax& each : softmax) {
      if (!each.pairs.empty()) loss += each.add(tau, call.d_loss[i] / parts, &d_tau) / parts;
    }
    right &= naive::close(call.loss[i], loss) && naive::close(call.d_temperature[i], d_tau, 2e-5);
  }
  for (size_t i = 0; i < count; i++) {
    right &= d.of[i].has_gradient(p.columns[0].gradient + i * padded_dim, d.d[i], cosine, 2e-5);
    if (i >= rows) continue;
    std::vector<float> both(dim);  // as rows and as columns
    for (size_t c = 0; c < dim; c++) both[c] = call.d_queries[i * dim + c] + p.columns[1].gradient[i * padded_dim + c];
    right &= q.of[i].has_gradient(both.data(), q.d[i], cosine, 2e-5);
  }
  return right;
}

// Prefixes in one pass, the last of which isn't whole vectors; two panels, stretches of one block.
bool prefixes_are_right(const ek::InfoNCEKernels& kernels, bool cosine, bool hooks) {
  constexpr int64_t levels = 2, ends[levels] = {16, dim}, in_panel = ek::infonce_rows;
  constexpr float weights[levels] = {1.5f, 0.5f};
  Call call(n, m, cosine, in_panel, levels);
  ek::InfoNCEParams& p = call.p;
  p.passes = p.anchors = p.parts = 1, p.period = m, p.levels = levels, p.hooks = hooks;
  for (int64_t k = 0; k < levels; k++) p.level_end[k] = ends[k], p.level_weight[k] = weights[k];
  for (size_t c = 0; c < dim; c++) call.queries[3 * dim + c] = -call.documents[3 * dim + c];
  call.temperature[3] = cosine ? 0.02f : 0.1f;  // its positive's z lies far below the others'
  std::vector<int64_t> labels[2];               // hidden: j ≡ i modulo 7
  for (int64_t set = 0; set < 2; set++) {
    for (int64_t j = 0; j < p.columns[set].count; j++) labels[set].push_back(j % 7);
    p.columns[set].labels = hooks ? labels[set].data() : nullptr;
  }
  std::vector<ek::InfoNCELevels> of_levels(1);
  p.of_levels = of_levels.data(), p.stretch = ek::infonce_block;
  p.ratio = call.floats(levels * m), p.column_z_dz = call.floats(levels * m);
  p.d_query_parts = call.floats(blocks_of(m) * in_panel * p.stride);
  float* space = call.floats(std::max(ek::infonce_scratch_floats(p), levels * ek::infonce_rows * ek::infonce_block));
  for (int64_t block = 0; block < blocks_of(m); block++) {
    kernels.normalise(p, 0, block);
    kernels.prefix_ratios(p, block);
  }
  call.for_panels(
      in_panel, [&](int64_t group) { kernels.prefix_rows(p, group, space); },
      [&] {
        for (int64_t stretch = 0; stretch < blocks_of(m); stretch++) kernels.prefix_columns(p, stretch, space);
        kernels.prefix_queries(p, 0);
      });

  bool right = true;
  std::vector<double> wanted_loss(n), wanted_tau(n);
  std::vector<std::vector<double>> d_x[2];
  const std::vector<float>* inputs[2] = {&call.queries, &call.documents};
  for (int64_t k = 0; k < levels; k++) {
    Units q(call.queries, cosine, size_t(ends[k])), d(call.documents, cosine, size_t(ends[k]));
    for (size_t i = 0; i < n; i++) {
      Softmax softmax;
      softmax.pairs.push_back({&q.of[i], &d.of[i], &q.d[i], &d.d[i]});
      for (size_t j = 0; j < m; j++) {
        if (j != i && !(hooks && j % 7 == i % 7)) softmax.pairs.push_back({&q.of[i], &d.of[j], &q.d[i], &d.d[j]});
      }
      wanted_loss[i] += weights[k] * softmax.add(call.temperature[i], weights[k] * call.d_loss[i], &wanted_tau[i]);
    }
    for (int64_t set = 0; set < 2; set++) {
      Units& x = set == 0 ? q : d;
      d_x[set].resize(inputs[set]->size() / dim, std::vector<double>(dim));
      for (size_t i = 0; i < x.of.size(); i++) {
        const double along = cosine ? x.of[i].dot(x.d[i]) : 0;
        for (size_t c = 0; c < size_t(ends[k]); c++)
          d_x[set][i][c] += (x.d[i][c] - x.of[i].u[c] * along) / x.of[i].norm;
      }
    }
  }
  for (size_t i = 0; i < m; i++) {
    for (size_t c = 0; c < dim; c++) {
      right &= naive::close(p.columns[0].gradient[i * padded_dim + c], d_x[1][i][c], 2e-5);
      if (i < n) right &= naive::close(call.d_queries[i * dim + c], d_x[0][i][c], 2e-5);
    }
    if (i < n) right &= naive::close(call.loss[i], wanted_loss[i]);
    if (i < n) right &= naive::close(call.d_temperature[i], wanted_tau[i], 2e-5);
  }
  return right;
}

}  // namespace

int main() {
  return naive::for_variants([](const ek::Variant& variant) {
    for (const bool cosine : {true, false}) {
      const std::string vectors = variant.name + (cosine ? " cosine" : " dot");
      for (const bool flag : {true, false}) {
        for (const bool labels : {true, false}) {
          naive::report(vectors + ", both ways" + (flag ? " of all directions" : "") + (labels ? " with labels" : ""),
                        mutual_is_right(variant.infonce, cosine, flag, labels));
        }
        naive::report(vectors + ", prefixes" + (flag ? " with labels" : ""),
                      prefixes_are_right(variant.infonce, cosine, flag));
      }
      for (const bool with_positives : {true, false}) {
        for (const bool soft : {true, false}) {
          for (const ek::DType dtype : {ek::DType::f32, ek::DType::bf16}) {
            for (const bool in_stretches : {true, false}) {
              if (in_stretches && soft) continue;
              Example example(cosine, with_positives, soft, dtype);
              example.run(variant.infonce, in_stretches);
              std::string name = vectors + (with_positives ? ", positives" : "");
              name += dtype == ek::DType::bf16 ? ", bf16" : "";
              name += in_stretches ? ", in stretches" : "";
              naive::report(name + (soft ? ", several targets" : ""), example.is_right());
            }
          }
        }
      }
    }
  });
}
