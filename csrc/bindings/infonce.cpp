// Tensors to InfoNCEParams, the checks that need values, and the order of the passes; nothing else.
#include <algorithm>
#include <cmath>

#include "../cpu/variants.h"
#include "parallel.h"
#include "tensors.h"

namespace {

using ek::InfoNCEColumns;
using ek::InfoNCEParams;
using ek::InfoNCEPass;
using ek::InfoNCEVectors;
using ek::OptionalTensor;
using ek::Tensor;

InfoNCEVectors vectors_of(const Tensor& x) { return {x.const_data_ptr(), ek::dtype_of(x), x.stride(x.dim() - 2)}; }

int64_t blocks_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Rows of a panel: as many as keep its exponentials, of `columns` a row, in 24 MB, or in half of the columns' own size
// where that is more: each panel loads and stores the columns' gradients once. Sums over rows go group by group, so
// that a panel may follow the number of threads: no thread waits for another's last group. With prefixes each has one
// group: what they keep is large, and best left in the cache (1.42 against 1.47 of the plain call with two each).
int64_t panel_rows(int64_t columns, int64_t stride, bool prefixes) {
  constexpr int64_t most = 16 * ek::infonce_rows, floats = 24 * (1 << 20) / 4;
  const int64_t rows = std::min(most, std::max(floats / std::max(columns, int64_t(1)), stride / 2));
  const int64_t groups = std::max(int64_t(1), rows / ek::infonce_rows);
  const int64_t threads = torch::stable::get_num_threads();
  if (groups <= threads) return groups * ek::infonce_rows;
  return (prefixes ? threads : groups / threads * threads) * ek::infonce_rows;
}

// How many documents a task takes with a group of rows; 0: all. Prefixes' are cut in up to 32: more would cost more
// sums of d_queries, fewer leave threads idle. Beside few rows, 4096 make the sums cheap.
int64_t stretch_of(const InfoNCEParams& p) {
  const int64_t blocks = blocks_of(p.columns[0].count, ek::infonce_block);
  if (p.levels) return blocks_of(blocks, 32) * ek::infonce_block;
  const bool few_rows = p.n <= 16 * ek::infonce_rows && p.columns[0].count > 4096;
  return few_rows && p.passes == 1 && p.label_smoothing == 0 && !p.same_positive && !p.mutual ? 4096 : 0;
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

std::vector<float> logarithms(const OptionalTensor& weights) {
  std::vector<float> values;
  if (!weights) return values;
  const Tensor dense = torch::stable::contiguous(*weights);
  values.assign(dense.const_data_ptr<float>(), dense.const_data_ptr<float>() + dense.numel());
  for (float& value : values) {
    if (!(value >= 0)) ek::refuse("negative_weights must be ≥ 0, got " + std::to_string(value));
    value = std::log(value);
  }
  return values;
}

// Both directions of every pair of vectors at once; csrc/cpu/infonce_mutual.h.
void run_mutual(InfoNCEParams& p, const ek::InfoNCEKernels& kernels, int64_t panel) {
  const int64_t kinds = p.pass[p.passes - 1].anchors + 1, blocks = blocks_of(p.n, ek::infonce_block);
  const auto for_panels = [&](const auto& rows, const auto& columns) {
    for (int64_t kind = 0; kind < kinds; kind++) {
      for (p.panel_begin = 0; p.panel_begin < p.n; p.panel_begin = p.panel_end) {
        p.panel_end = std::min(p.panel_begin + panel, p.n);
        const int64_t in_panel = p.panel_end - p.panel_begin, work = in_panel * p.columns[0].count * p.dim;
        ek::for_tasks(blocks_of(in_panel, ek::infonce_rows), work, ek::infonce_scratch_floats(p),
                      [&](int64_t group, float* space) { rows(kind, group, space); });
        for (int64_t set = 0; set < 2; set++) columns(kind, set, work);
      }
    }
  };
  ek::for_tasks(blocks, p.n * p.dim, 0, [&](int64_t block, float*) { kernels.mutual_begin(p, block); });
  for_panels([&](int64_t kind, int64_t group, float* space) { kernels.mutual_sums(p, kind, group, space); },
             [&](int64_t kind, int64_t set, int64_t work) {
               ek::for_tasks(blocks, work, 0,
                             [&](int64_t block, float*) { kernels.mutual_merge(p, kind, set, block); });
             });
  ek::for_tasks(blocks, p.n * p.dim, 0, [&](int64_t block, float*) { kernels.mutual_finish(p, block); });
  if (!p.d_queries && !p.columns[0].gradient) return;
  const auto of_columns = [&](int64_t set, int64_t work, const auto& task) {
    if (!p.columns[set].gradient) return;
    ek::for_tasks(blocks_of(p.columns[set].count, ek::infonce_block), work, 0, task);
  };
  for_panels([&](int64_t kind, int64_t group, float* space) { kernels.mutual_rows(p, kind, group, space); },
             [&](int64_t kind, int64_t set, int64_t work) {
               of_columns(set, work, [&](int64_t block, float*) { kernels.mutual_columns(p, kind, set, block); });
             });
  for (int64_t set = 0; set < 2; set++) {
    of_columns(set, p.n * p.dim, [&](int64_t block, float*) { kernels.mutual_gradients(p, set, block); });
  }
}

// The losses and the gradients of Σ d_loss · loss, float32; those not wanted are empty. Rows are `rows` queries from
// `offset` on; their gradients as columns, and so all that queries outside have, are d_query_columns.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> info_nce(
    Tensor queries, Tensor documents, OptionalTensor negatives, OptionalTensor positives, OptionalTensor targets,
    int64_t rows, int64_t offset, int64_t period, Tensor temperature, OptionalTensor query_labels,
    OptionalTensor document_labels, bool same_positive, OptionalTensor guide_queries, OptionalTensor guide_documents,
    double margin, bool relative, OptionalTensor document_weights, OptionalTensor negative_weights, int64_t hardness,
    double strength, double label_smoothing, bool cosine, bool query_to_query, bool doc_to_query, bool doc_to_doc,
    bool per_direction, std::vector<int64_t> prefixes, std::vector<double> prefix_weights, bool metrics,
    OptionalTensor d_loss, bool d_queries, bool d_documents, bool d_negatives, bool d_positives, bool d_temperature) {
  InfoNCEParams p{};
  p.n = rows;
  p.offset = offset;
  p.dim = queries.size(1);
  p.cosine = cosine;
  p.label_smoothing = float(label_smoothing);
  p.margin = float(margin);
  p.relative = relative;
  p.hardness = ek::InfoNCEHardness(hardness);
  p.strength = float(strength);
  p.period = period;
  p.levels = int64_t(prefixes.size());
  for (size_t i = 0; i < prefixes.size(); i++) {
    p.level_end[i] = prefixes[i];
    p.level_weight[i] = float(prefix_weights[i]);
  }
  queries = ek::with_unit_stride(queries);
  documents = ek::with_unit_stride(documents);
  InfoNCEColumns &of_documents = p.columns[0], &of_queries = p.columns[1];
  of_documents.vectors = vectors_of(documents);
  of_documents.count = documents.size(0);
  of_queries.vectors = vectors_of(queries);
  of_queries.count = queries.size(0);
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
  const std::vector<int64_t> target = checked_targets(targets, p.n, of_documents.count);
  p.targets = target.data();
  std::vector<int64_t> labels_of_queries, labels_of_documents;
  if (query_labels && document_labels) {
    labels_of_queries = ek::integers(*query_labels);
    labels_of_documents = ek::integers(*document_labels);
    of_queries.labels = labels_of_queries.data();
    of_documents.labels = labels_of_documents.data();
    p.same_positive = same_positive;
  }
  const std::vector<float> document_weight = logarithms(document_weights);
  const std::vector<float> negative_weight = logarithms(negative_weights);
  if (document_weights) of_documents.log_weight = document_weight.data();
  if (negative_weights) p.negative_weight = negative_weight.data();
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
  const bool from_documents = doc_to_query || doc_to_doc, to_queries = query_to_query || doc_to_query;
  const bool asymmetric = guide_queries || document_weights || hardness != 0 || label_smoothing != 0 || metrics;
  p.hooks = query_labels || asymmetric;
  p.mutual = doc_to_query && !asymmetric && !p.same_positive && !targets && !positives && !negatives && !p.levels &&
             p.n > 0 && offset == 0 && p.n == of_queries.count;
  Tensor loss = wanted(true, p.loss, {p.n});
  Tensor row_metrics = wanted(metrics, p.metrics, {p.n, 4});
  Tensor queries_gradient = wanted(d_queries, p.d_queries, {p.n, p.dim});
  Tensor columns_gradient = wanted(d_queries && to_queries, of_queries.gradient, {of_queries.count, p.padded_dim});
  Tensor documents_gradient = wanted(d_documents, of_documents.gradient, {of_documents.count, p.padded_dim});
  Tensor negatives_gradient = wanted(d_negatives, p.d_negatives, {p.n, p.k, p.dim});
  Tensor positives_gradient = wanted(d_positives, p.d_positives, {p.n, p.dim});
  Tensor temperature_gradient = wanted(d_temperature, p.d_temperature, {p.n});
  const bool as_rows = p.mutual ? doc_to_doc : from_documents;
  Tensor anchors_gradient = wanted(d_documents && as_rows && !positives, p.d_anchors, {p.n, p.dim});
  if (p.n == 0 || p.mutual) {
    if (d_documents) torch::stable::zero_(documents_gradient);
    if (of_queries.gradient) torch::stable::zero_(columns_gradient);
  }

  // The passes and what tells a row's own column.
  std::vector<int32_t> of_target(target.begin(), target.end()), of_query(target.size()), of_blocks(target.size());
  for (size_t i = 0; i < target.size(); i++) {
    of_query[i] = int32_t(offset + int64_t(i));
    of_blocks[i] = int32_t(target[i] % period);
  }
  p.anchors = from_documents ? 2 : 1;
  p.parts = per_direction && doc_to_query ? 2 : 1;
  const auto add_pass = [&](int32_t anchors, int32_t columns, int32_t part, bool own_apart, int64_t period,
                            const std::vector<int32_t>& key) {
    const bool own_back = p.passes == 0 && p.parts == 1;
    p.pass[p.passes++] = {anchors, columns, part, own_apart, period, key.data(), nullptr, nullptr, p.mutual, own_back};
  };
  const int64_t q = std::max(of_queries.count, int64_t(1));
  add_pass(0, 0, 0, true, of_documents.count, of_target);
  if (query_to_query) add_pass(0, 1, 0, true, q, of_query);
  if (doc_to_query && !p.mutual) add_pass(1, 1, int32_t(p.parts - 1), p.parts > 1, q, of_query);
  if (doc_to_doc) add_pass(1, 0, 0, true, period, of_blocks);
  const bool by_product = document_weights || negative_weights || hardness != 0;  // how τ's gradient is summed
  p.sum_anchors[0] = (d_queries && !p.levels) || (d_temperature && by_product);
  p.sum_anchors[1] = from_documents && (p.d_anchors || p.d_positives || (d_temperature && by_product));

  int64_t columns = 0, all_columns = 0;  // with gradients; of all passes
  for (int64_t i = 0; i < p.passes; i++) {
    const InfoNCEColumns& set = p.columns[p.pass[i].columns];
    all_columns += set.count;
    if (set.gradient) columns += set.count;
  }
  const int64_t of_row = (columns > 0 ? columns : all_columns) * std::max(p.levels, int64_t(1));
  const int64_t panel =
      std::min(panel_rows(of_row, p.stride, p.levels > 0), blocks_of(p.n, ek::infonce_rows) * ek::infonce_rows);
  const int64_t groups = panel / ek::infonce_rows;
  std::vector<Tensor> scratch;
  const auto keep = [&](bool wants, float*& data, std::vector<int64_t> shape) {
    scratch.push_back(wanted(wants, data, std::move(shape)));
  };
  const ek::InfoNCEKernels& kernels = ek::variant().infonce;
  const auto multiplies = [](const InfoNCEVectors& x) { return x.dtype == ek::DType::bf16 && x.stride % 2 == 0; };
  // Not where τ's gradient comes from d_queries: rounded exponentials would show in it.
  p.paired = kernels.pairs && p.levels == 0 && !p.mutual && p.dim % 2 == 0 && !(d_temperature && by_product) &&
             multiplies(of_documents.vectors) && multiplies(of_queries.vectors) &&
             (!positives || multiplies(p.positives));
  for (int64_t set = 0; set < 2; set++) {
    InfoNCEColumns& of_set = p.columns[set];
    const bool seen = set == 0 || to_queries;
    keep(seen, of_set.unit, {of_set.count, p.stride});
    keep(seen, of_set.norm, {of_set.count});
    keep(seen && p.paired, of_set.pairs, {blocks_of(of_set.count, 2), p.padded_dim});
    keep(seen && p.paired, of_set.factor, {of_set.count});
    keep(seen && label_smoothing != 0, of_set.sum, {p.stride});
  }
  for (int64_t i = 0; i < p.passes; i++) {
    InfoNCEPass& pass = p.pass[i];
    const InfoNCEColumns& set = p.columns[pass.columns];
    if (p.levels) {
      keep(true, p.ratio, {p.levels, set.count});
      keep(d_documents || d_queries, p.column_z_dz, {p.levels, set.count});
      float* of_levels = nullptr;
      keep(true, of_levels, {groups, int64_t(sizeof(ek::InfoNCELevels) / sizeof(float))});
      p.of_levels = reinterpret_cast<ek::InfoNCELevels*>(of_levels);
      keep(d_documents || d_queries, pass.exponentials, {groups, p.levels, set.count, ek::infonce_rows});
      continue;
    }
    keep(set.gradient, pass.exponentials, {groups, set.count, ek::infonce_rows});
    keep(set.gradient && !p.mutual, pass.block_max,
         {groups, blocks_of(set.count, ek::infonce_block), ek::infonce_rows});
  }
  p.stretch = stretch_of(p);
  const int64_t stretches = p.stretch ? blocks_of(of_documents.count, p.stretch) : 0;
  keep(p.stretch && (p.levels ? d_queries : p.sum_anchors[0]), p.d_query_parts, {stretches, panel, p.stride});
  if (!p.levels) {
    float* of_stretches = nullptr;
    keep(true, of_stretches, {stretches, groups, int64_t(sizeof(ek::InfoNCEStretch) / sizeof(float))});
    p.of_stretches = reinterpret_cast<ek::InfoNCEStretch*>(of_stretches);
  }
  for (int64_t kind = 0; kind < p.anchors; kind++) {
    keep(true, p.unit_anchors[kind], {panel, p.stride});
    keep(p.paired, p.anchor_pairs[kind], {panel / 2, p.padded_dim});
    keep(p.paired, p.anchor_factor[kind], {panel});
  }
  float* of_rows = nullptr;
  keep(true, of_rows, {9, panel});
  for (int64_t part = 0; part < 2; part++) {
    p.row_max[part] = of_rows + (4 * part + 0) * panel;
    p.row_scale[part] = of_rows + (4 * part + 1) * panel;
    p.row_spread[part] = of_rows + (4 * part + 2) * panel;
    p.row_share[part] = of_rows + (4 * part + 3) * panel;
  }
  p.positive_scale = of_rows + 8 * panel;
  if (p.mutual) {
    for (float** data : {&p.rate, &p.positive, &p.pair}) keep(true, *data, {p.n});
    for (int64_t kind = 0; kind < 2; kind++) {
      keep(true, p.row_sums[kind], {3, p.n});
      keep(true, p.column_sums[kind], {3, p.n});
      keep(true, p.tile_sums[kind], {groups, 3, p.n});
      keep(true, p.anchor_max[kind], {p.n});
      keep(true, p.anchor_scale[kind], {p.n});
    }
  }

  if (guide_queries && guide_documents) {
    p.guide_dim = guide_queries->size(1);
    p.guide_stride = ek::infonce_stride(p.guide_dim);
    const Tensor guides[2] = {ek::with_unit_stride(*guide_documents), ek::with_unit_stride(*guide_queries)};
    for (int64_t set = 0; set < 2; set++) {
      const int64_t count = p.columns[set].count;
      float* unit = nullptr;
      keep(true, unit, {count, p.guide_stride});
      p.columns[set].guide = unit;
      const InfoNCEVectors vectors = vectors_of(guides[set]);
      ek::for_tasks(blocks_of(count, ek::infonce_block), count * p.guide_dim, 0, [&](int64_t block, float*) {
        kernels.guide(p, vectors, block * ek::infonce_block, std::min((block + 1) * ek::infonce_block, count), unit);
      });
    }
  }
  for (int64_t set = 0; set < 2; set++) {
    if (!p.columns[set].unit) continue;
    const int64_t count = p.columns[set].count;
    ek::for_tasks(blocks_of(count, ek::infonce_block), count * p.dim, 0,
                  [&](int64_t block, float*) { kernels.normalise(p, set, block); });
    if (!p.columns[set].sum) continue;
    ek::for_tasks(1, 0, p.stride, [&](int64_t, float* part) { kernels.column_sum(p, set, part); });
  }
  const int64_t blocks = blocks_of(of_documents.count, ek::infonce_block);
  if (p.levels) {
    ek::for_tasks(blocks, of_documents.count * p.dim, 0,
                  [&](int64_t block, float*) { kernels.prefix_ratios(p, block); });
  }
  if (p.mutual) run_mutual(p, kernels, panel);
  for (p.panel_begin = 0; !p.mutual && p.panel_begin < p.n; p.panel_begin = p.panel_end) {
    p.panel_end = std::min(p.panel_begin + panel, p.n);
    const int64_t in_panel = p.panel_end - p.panel_begin, work = in_panel * all_columns * p.dim;
    const int64_t in_groups = blocks_of(in_panel, ek::infonce_rows), space_of_group = ek::infonce_scratch_floats(p);
    if (p.stretch && !p.levels) {
      ek::for_tasks(stretches * in_groups, work, space_of_group, [&](int64_t task, float* space) {
        kernels.rows_stretch(p, task % in_groups, task / in_groups, space);
      });
    }
    const auto rows_kernel = p.levels ? kernels.prefix_rows : p.stretch ? kernels.rows_merge : kernels.rows;
    ek::for_tasks(in_groups, work, space_of_group, [&](int64_t group, float* space) { rows_kernel(p, group, space); });
    if (p.levels && (d_queries || d_documents)) {
      const int64_t tiles = p.levels * ek::infonce_rows * ek::infonce_block;
      ek::for_tasks(stretches, work, tiles,
                    [&](int64_t stretch, float* space) { kernels.prefix_columns(p, stretch, space); });
      ek::for_tasks(d_queries ? in_groups : 0, work, 0,
                    [&](int64_t group, float*) { kernels.prefix_queries(p, group); });
    }
    if (p.levels) continue;
    for (int64_t set = 0; set < 2; set++) {
      if (!p.columns[set].gradient) continue;
      ek::for_tasks(blocks_of(p.columns[set].count, ek::infonce_block), work, ek::infonce_rows * ek::infonce_block,
                    [&](int64_t block, float* space) { kernels.columns(p, set, block, space); });
    }
  }
  if (p.d_anchors) kernels.add_anchors(p);
  return {loss,
          row_metrics,
          queries_gradient,
          columns_gradient,
          documents_gradient,
          negatives_gradient,
          positives_gradient,
          temperature_gradient};
}

STABLE_TORCH_LIBRARY_IMPL(embedkern, CPU, library) { EK_IMPL(library, "info_nce", info_nce); }

}  // namespace
