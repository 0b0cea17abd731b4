// The contrastive loss without torch: each variant against plain loops in double, two panels, NaN in all scratch.
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

  Unit(const float* x, bool cosine) : u(x, x + dim) {
    double squares = 0;
    for (double value : u) squares += value * value;
    if (cosine) norm = std::sqrt(squares);
    for (double& value : u) value /= norm;
  }
  double dot(const std::vector<double>& other) const {
    double sum = 0;
    for (size_t c = 0; c < dim; c++) sum += u[c] * other[c];
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

  void run(const ek::InfoNCEKernels& kernels) {
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
    std::vector<float> scratch = unwritten(ek::infonce_scratch_floats(p));
    for (int64_t block = 0; block < blocks; block++) kernels.normalise(p, 0, block);
    if (soft) kernels.column_sum(p, 0, scratch.data());
    for (p.panel_begin = 0; p.panel_begin < n; p.panel_begin = p.panel_end) {
      p.panel_end = p.panel_begin + panel < n ? p.panel_begin + panel : n;
      kernels.rows(p, 0, scratch.data());
      for (int64_t block = 0; block < blocks; block++) kernels.columns(p, 0, block, scratch.data());
    }
  }

  bool is_right() const {
    const double tolerance = p.paired ? 3e-2 : 2e-5;
    bool right = true;
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

}  // namespace

int main() {
  return naive::for_variants([](const ek::Variant& variant) {
    for (const bool cosine : {true, false}) {
      for (const bool with_positives : {true, false}) {
        for (const bool soft : {true, false}) {
          for (const ek::DType dtype : {ek::DType::f32, ek::DType::bf16}) {
            Example example(cosine, with_positives, soft, dtype);
            example.run(variant.infonce);
            std::string name = variant.name + (cosine ? " cosine" : " dot") + (with_positives ? ", positives" : "");
            name += dtype == ek::DType::bf16 ? ", bf16" : "";
            naive::report(name + (soft ? ", several targets" : ""), example.is_right());
          }
        }
      }
    }
  });
}
