// Tensors to InfoNCEParams, the checks that need values, and the order of the passes; nothing else.
#include <algorithm>

#include "../cpu/variants.h"
#include "parallel.h"
#include "tensors.h"

namespace {

using ek::InfoNCEParams;
using ek::InfoNCEVectors;
using ek::OptionalTensor;
using ek::Tensor;

InfoNCEVectors vectors_of(const Tensor& x) { return {x.const_data_ptr(), ek::dtype_of(x), x.stride(x.dim() - 2)}; }

// Queries of a panel: as many as keep its exponentials in 24 MB, or in half of the documents' own size where that is
// more: each panel loads and stores d_documents once.
int64_t panel_rows(const InfoNCEParams& p) {
  constexpr int64_t most = 16 * ek::infonce_rows, floats = 24 * (1 << 20) / 4;
  const int64_t rows = std::min(most, std::max(floats / p.m, p.stride / 2));
  return std::max(int64_t(1), rows / ek::infonce_rows) * ek::infonce_rows;
}

std::vector<int64_t> checked_targets(const OptionalTensor& targets, int64_t n, int64_t m) {
  std::vector<int64_t> values(size_t(n), 0);
  for (int64_t i = 0; i < n; i++) values[size_t(i)] = i;
  if (targets) values = ek::integers(*targets);
  for (size_t i = 0; i < values.size(); i++) {
    if (values[i] < 0 || values[i] >= m) {
      ek::refuse("targets[" + std::to_string(i) + "] must be in [0, " + std::to_string(m) + "), got " +
                 std::to_string(values[i]));
    }
  }
  return values;
}

// loss (n,), metrics (n, 4) and the gradients of Σ d_loss · loss, float32; those not wanted are empty.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> info_nce(
    Tensor queries, Tensor documents, OptionalTensor negatives, OptionalTensor positives, OptionalTensor targets,
    Tensor temperature, OptionalTensor query_labels, OptionalTensor document_labels, bool same_positive,
    double label_smoothing, bool cosine, bool metrics, OptionalTensor d_loss, bool d_queries, bool d_documents,
    bool d_negatives, bool d_positives, bool d_temperature) {
  InfoNCEParams p{};
  p.n = queries.size(0);
  p.m = documents.size(0);
  p.dim = queries.size(1);
  p.cosine = cosine;
  p.label_smoothing = float(label_smoothing);
  queries = ek::with_unit_stride(queries);
  documents = ek::with_unit_stride(documents);
  p.queries = vectors_of(queries);
  p.documents = vectors_of(documents);
  if (positives) {
    positives = ek::with_unit_stride(*positives);
    p.positives = vectors_of(*positives);
  }
  if (negatives) {
    negatives = ek::with_unit_stride(*negatives);
    p.negatives = vectors_of(*negatives);
    p.k = negatives->size(1);
    p.negatives_stride = negatives->stride(0);
  }
  const std::vector<int64_t> target = checked_targets(targets, p.n, p.m);
  p.targets = target.data();
  std::vector<int64_t> labels_of_queries, labels_of_documents;
  if (query_labels && document_labels) {
    labels_of_queries = ek::integers(*query_labels);
    labels_of_documents = ek::integers(*document_labels);
    p.query_labels = labels_of_queries.data();
    p.document_labels = labels_of_documents.data();
    p.same_positive = same_positive;
  }
  temperature = torch::stable::contiguous(temperature);
  p.temperature = temperature.const_data_ptr<float>();
  p.temperature_stride = temperature.dim();
  if (d_loss) {
    d_loss = torch::stable::contiguous(*d_loss);
    p.d_loss = d_loss->const_data_ptr<float>();
  }

  const auto floats = [&](std::vector<int64_t> shape) {
    return torch::stable::new_empty(queries, shape, ek::ScalarType::Float);
  };
  p.padded_dim = (p.dim + 15) / 16 * 16;
  p.stride = ek::infonce_stride(p.dim);
  const auto wanted = [&](bool wants, float*& data, std::vector<int64_t> shape) {
    if (!wants) return floats({0});
    Tensor result = floats(std::move(shape));
    data = result.mutable_data_ptr<float>();
    return result;
  };
  Tensor loss = wanted(true, p.loss, {p.n});
  Tensor row_metrics = wanted(metrics, p.metrics, {p.n, 4});
  Tensor queries_gradient = wanted(d_queries, p.d_queries, {p.n, p.dim});
  Tensor documents_gradient = wanted(d_documents, p.d_documents, {p.m, p.padded_dim});
  Tensor negatives_gradient = wanted(d_negatives, p.d_negatives, {p.n, p.k, p.dim});
  Tensor positives_gradient = wanted(d_positives, p.d_positives, {p.n, p.dim});
  Tensor temperature_gradient = wanted(d_temperature, p.d_temperature, {p.n});
  if (p.n == 0 && d_documents) torch::stable::zero_(documents_gradient);

  const int64_t panel = std::min(panel_rows(p), (p.n + ek::infonce_rows - 1) / ek::infonce_rows * ek::infonce_rows);
  const int64_t groups = panel / ek::infonce_rows, blocks = (p.m + ek::infonce_block - 1) / ek::infonce_block;
  Tensor unit_documents = wanted(true, p.unit_documents, {p.m, p.stride});
  Tensor document_norm = wanted(true, p.document_norm, {p.m});
  Tensor document_sum = wanted(metrics || label_smoothing != 0, p.document_sum, {p.stride});
  Tensor unit_queries = wanted(true, p.unit_queries, {panel, p.stride});
  Tensor exponentials = wanted(d_documents, p.exponentials, {groups, p.m, ek::infonce_rows});
  Tensor block_max = wanted(d_documents, p.block_max, {groups, blocks, ek::infonce_rows});
  Tensor of_rows = floats({5, panel});
  p.row_max = of_rows.mutable_data_ptr<float>();
  p.row_scale = p.row_max + panel;
  p.row_spread = p.row_scale + panel;
  p.row_share = p.row_spread + panel;
  p.positive_scale = p.row_share + panel;

  const ek::InfoNCEKernels& kernels = ek::variant().infonce;
  ek::for_tasks(blocks, p.m * p.dim, 0, [&](int64_t block, float*) { kernels.documents(p, block); });
  if (p.document_sum) ek::for_tasks(1, 0, p.stride, [&](int64_t, float* scratch) { kernels.document_sum(p, scratch); });
  for (p.panel_begin = 0; p.panel_begin < p.n; p.panel_begin = p.panel_end) {
    p.panel_end = std::min(p.panel_begin + panel, p.n);
    const int64_t rows = p.panel_end - p.panel_begin, work = rows * p.m * p.dim;
    ek::for_tasks((rows + ek::infonce_rows - 1) / ek::infonce_rows, work, ek::infonce_scratch_floats(p.dim, p.k),
                  [&](int64_t group, float* scratch) { kernels.rows(p, group, scratch); });
    if (!d_documents) continue;
    ek::for_tasks(blocks, work, ek::infonce_rows * ek::infonce_block,
                  [&](int64_t block, float* scratch) { kernels.d_documents(p, block, scratch); });
  }
  return {loss,
          row_metrics,
          queries_gradient,
          documents_gradient,
          negatives_gradient,
          positives_gradient,
          temperature_gradient};
}

STABLE_TORCH_LIBRARY_IMPL(embedkern, CPU, library) { EK_IMPL(library, "info_nce", info_nce); }

}  // namespace
