// Tensors to AttentionParams, and the checks that need values; nothing else.
#include <algorithm>

#include "../cpu/variants.h"
#include "parallel.h"
#include "tensors.h"

namespace {

using ek::AttentionParams;
using ek::AttentionSequence;
using ek::OptionalTensor;
using ek::Strided;
using ek::Tensor;

bool packed(const Tensor& x) { return x.dim() == 3; }

// (B, H, L, ·) or (T, H, ·)
Strided strided(const Tensor& x) {
  void* data = const_cast<void*>(x.const_data_ptr());
  if (packed(x)) return {data, 0, x.stride(1), x.stride(0)};
  return {data, x.stride(0), x.stride(1), x.stride(2)};
}

// A tensor with one value for each row: (B, H, L) or (T, H).
Strided strided_rows(const Tensor& x) {
  void* data = const_cast<void*>(x.const_data_ptr());
  if (x.dim() == 2) return {data, 0, x.stride(1), x.stride(0)};
  return {data, x.stride(0), x.stride(1), x.stride(2)};
}

// A tensor that broadcasts to (B, H, Lq, Lk).
ek::ScoreGrid grid(const Tensor& x) {
  const int64_t missing = 4 - x.dim();
  const auto stride = [&](int64_t dim) {
    return dim < missing || x.size(dim - missing) == 1 ? 0 : x.stride(dim - missing);
  };
  return {const_cast<void*>(x.const_data_ptr()), stride(0), stride(1), stride(2), stride(3)};
}

// A tensor that broadcasts to (B, H, L, 1), or to (T, H, 1).
Strided broadcast(const Tensor& x, bool is_packed) {
  const int64_t missing = (is_packed ? 3 : 4) - x.dim();
  const auto stride = [&](int64_t dim) {
    return dim < missing || x.size(dim - missing) == 1 ? 0 : x.stride(dim - missing);
  };
  void* data = const_cast<float*>(x.const_data_ptr<float>());
  if (is_packed) return {data, 0, stride(1), stride(0)};
  return {data, stride(0), stride(1), stride(2)};
}

// An empty tensor of like's sizes but for the last, its dims in memory in the order of like's.
Tensor empty_in_order_of(const Tensor& like, int64_t last) {
  const size_t dims = size_t(like.dim());
  std::vector<int64_t> order, sizes;
  for (size_t d = 0; d + 1 < dims; d++) order.push_back(int64_t(d));
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return like.stride(a) > like.stride(b); });
  for (int64_t d : order) sizes.push_back(like.size(d));
  sizes.push_back(last);
  Tensor x = torch::stable::new_empty(like, sizes);
  ek::prefer_huge_pages(x);
  for (size_t d = 0; d < order.size(); d++) {
    const size_t at = size_t(std::find(order.begin(), order.end(), int64_t(d)) - order.begin());
    if (at == d) continue;
    x = torch::stable::transpose(x, int64_t(d), int64_t(at));
    std::swap(order[d], order[at]);
  }
  return x;
}

Tensor nothing(const Tensor& like, ek::ScalarType dtype) { return torch::stable::new_empty(like, {0}, dtype); }

// Gradients of rows, summed to the shape of the tensor that was broadcast to them: in double, in a fixed order.
Tensor reduce_rows(const Tensor& rows, const Tensor& shaped_like) {
  Tensor reduced = torch::stable::new_empty(shaped_like, ek::shape_of(shaped_like));
  const bool is_packed = rows.dim() == 2;
  const Strided from = strided_rows(rows), to = broadcast(reduced, is_packed);
  const int64_t batch = is_packed ? 1 : rows.size(0), heads = rows.size(1), length = rows.size(is_packed ? 0 : 2);
  std::vector<double> sums(static_cast<size_t>(reduced.numel()));
  for (int64_t b = 0; b < batch; b++) {
    for (int64_t h = 0; h < heads; h++) {
      const float* row = static_cast<const float*>(from.data) + b * from.stride_b + h * from.stride_h;
      double* sum = sums.data() + b * to.stride_b + h * to.stride_h;
      if (to.stride_t != 0) {
        for (int64_t t = 0; t < length; t++) sum[t * to.stride_t] += double(row[t * from.stride_t]);
        continue;
      }
      double of_rows = 0;  // in memory each would wait for the one before: 1 to 2 % of a call at L = 32
      for (int64_t t = 0; t < length; t++) of_rows += double(row[t * from.stride_t]);
      *sum += of_rows;
    }
  }
  std::copy(sums.begin(), sums.end(), static_cast<float*>(to.data));
  return reduced;
}

// A gradient that several tasks add to, each in its slot, and their sum in the order of the slots.
struct Slots {
  std::vector<double> sums;  // (count, numel)

  Slots(int64_t count, const OptionalTensor& of) : sums(of ? size_t(count * of->numel()) : 0) {}

  Tensor sum(const Tensor& like, const Tensor& shaped_like) const {
    Tensor sum = torch::stable::new_empty(like, ek::shape_of(shaped_like), ek::ScalarType::Float);
    float* to = static_cast<float*>(sum.mutable_data_ptr());
    const size_t size = size_t(sum.numel());
    for (size_t i = 0; i < size; i++) {
      double of_slots = 0;
      for (size_t slot = i; slot < sums.size(); slot += size) of_slots += sums[slot];
      to[i] = float(of_slots);
    }
    return sum;
  }
};

// Whether the smallest of these doesn't fit a core's caches.
bool is_large(std::initializer_list<Tensor> results) {
  return std::all_of(results.begin(), results.end(), [](const Tensor& x) {
    const bool aligned = reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 64 == 0;
    return x.numel() == 0 || (x.numel() * int64_t(x.element_size()) >= 8 << 20 && aligned);
  });
}

struct Options {
  OptionalTensor key_lengths, key_mask, cu_seqlens_q, cu_seqlens_k, mask, bias, relative_bias, temperature;
  double temperature_number;
  OptionalTensor scale;
  double scale_number;
  bool causal;
  int64_t window_left, window_right;
  double softcap, dropout_p;
  OptionalTensor seed;
};
#define OPTIONS                                                                                                  \
  OptionalTensor key_lengths, OptionalTensor key_mask, OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k, \
      OptionalTensor mask, OptionalTensor bias, OptionalTensor relative_bias, OptionalTensor temperature,        \
      double temperature_number, OptionalTensor scale, double scale_number, bool causal, int64_t window_left,    \
      int64_t window_right, double softcap, double dropout_p, OptionalTensor seed
#define OPTION_NAMES                                                                                \
  {key_lengths, key_mask,           cu_seqlens_q, cu_seqlens_k, mask,   bias,        relative_bias, \
   temperature, temperature_number, scale,        scale_number, causal, window_left, window_right,  \
   softcap,     dropout_p,          seed}

// An AttentionParams with what its pointers point to.
struct Attention : AttentionParams {
  std::vector<AttentionSequence> sequences;
  std::vector<int32_t> keys;
  std::vector<float> hidden_keys;
  std::vector<std::vector<float>> partials;

  Attention(const Tensor& q, const Tensor& k, const Tensor& v, const Options& options) : AttentionParams{} {
    heads = q.size(1);
    kv_heads = k.size(1);
    dim = q.size(q.dim() - 1);
    dim_v = v.size(v.dim() - 1);
    dtype = ek::dtype_of(q);
    query = strided(q);
    key = strided(k);
    value = strided(v);
    temperature_number = float(options.temperature_number);
    scale_number = float(options.scale_number);
    rows_or_number(options.temperature, packed(q), temperature, temperature_number);
    rows_or_number(options.scale, packed(q), scale, scale_number);
    if (options.mask) mask = grid(*options.mask);
    if (options.bias) bias = grid(*options.bias);
    if (options.relative_bias) {
      relative_bias = options.relative_bias->const_data_ptr<float>();
      reach = options.relative_bias->size(1) / 2;
    }
    window_left = options.window_left;
    window_right = options.causal ? 0 : options.window_right;
    softcap = float(options.softcap);
    dropout_p = options.dropout_p;
    if (options.seed) seed = uint64_t(*options.seed->const_data_ptr<int64_t>());
    row_number = packed(q) ? Strided{nullptr, 0, 1, heads} : Strided{nullptr, heads * q.size(2), q.size(2), 1};
    if (packed(q)) {
      find_packed(q, k, *options.cu_seqlens_q, options.cu_seqlens_k);
    } else {
      find_padded(q, k, options.key_lengths, options.key_mask);
    }
    // The most work first. Sequences of the same size stay in their order.
    std::stable_sort(sequences.begin(), sequences.end(), [](const AttentionSequence& a, const AttentionSequence& b) {
      return (a.visible + 1) * a.q_length > (b.visible + 1) * b.q_length;
    });
  }

  // One element is a number: what rows have of it is found once, not row by row.
  static void rows_or_number(const OptionalTensor& x, bool is_packed, Strided& of_rows, float& number) {
    if (!x) return;
    if (x->numel() == 1) {
      number = *x->const_data_ptr<float>();
    } else {
      of_rows = broadcast(*x, is_packed);
    }
  }

  void find_packed(const Tensor& q, const Tensor& k, const Tensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k) {
    const std::vector<int64_t> of_q = ek::checked_cu_seqlens("cu_seqlens_q", cu_seqlens_q, q.size(0));
    const std::vector<int64_t> of_k =
        cu_seqlens_k ? ek::checked_cu_seqlens("cu_seqlens_k", *cu_seqlens_k, k.size(0)) : of_q;
    for (size_t b = 0; b + 1 < of_q.size(); b++) {
      const int64_t n = of_k[b + 1] - of_k[b];
      sequences.push_back({0, of_q[b], of_q[b + 1] - of_q[b], of_k[b], n, n, 0, nullptr});
    }
  }

  void find_padded(const Tensor& q, const Tensor& k, const OptionalTensor& key_lengths,
                   const OptionalTensor& key_mask) {
    const int64_t batch = q.size(0), len_k = k.size(2);
    std::vector<int64_t> n(size_t(batch), len_k);
    if (key_lengths) n = ek::checked_lengths("key_lengths", *key_lengths, len_k);
    for (int64_t b = 0; b < batch; b++) {
      sequences.push_back({b, 0, q.size(2), 0, len_k, n[size_t(b)], 0, nullptr});
    }
    if (!key_mask) return;
    keys.resize(size_t(batch * len_k));
    const bool* mask = key_mask->const_data_ptr<bool>();
    for (AttentionSequence& s : sequences) {
      int32_t* seen = keys.data() + s.b * len_k;
      int64_t count = 0;
      for (int64_t j = 0; j < s.visible; j++) {
        if (mask[s.b * key_mask->stride(0) + j * key_mask->stride(1)]) seen[count++] = int32_t(j);
      }
      s.visible = count;
      s.k_first = count ? seen[0] : 0;
      if (count && seen[count - 1] - seen[0] != count - 1) s.key = seen;  // holes: not just a first and a count
    }
    if (ek::adjusts_scores(*this)) fill_holes(len_k);
  }

  // Options count keys, so that holes take part, hidden.
  void fill_holes(int64_t len_k) {
    hidden_keys.assign(keys.size(), 1);
    for (AttentionSequence& s : sequences) {
      if (!s.key) continue;
      float* hidden = hidden_keys.data() + s.b * len_k;
      for (int64_t i = 0; i < s.visible; i++) hidden[s.key[i]] = 0;
      s.visible = s.key[s.visible - 1] - s.k_first + 1;
      s.key = nullptr;
      s.hidden = hidden;
    }
  }

  int64_t rows(const AttentionSequence& s) const { return kv_heads ? heads / kv_heads * s.q_length : 0; }

  // Of one task of the forward or the backward pass.
  int64_t scratch(bool backward) const {
    int64_t floats = 0;
    for (const AttentionSequence& s : sequences) {
      floats = std::max(floats, ek::attention_scratch_floats(*this, s.visible, rows(s), backward));
    }
    return floats;
  }

  // A task takes as many heads, so that it can fetch the next one's rows early, as leave each thread its share.
  int64_t heads_at_once(int64_t parts) const {
    const int64_t threads = int64_t(torch::stable::get_num_threads());
    return std::max<int64_t>(1, std::min(kv_heads, kv_heads * parts / (16 * threads)));
  }

  std::vector<ek::AttentionTask> forward_tasks() const {
    std::vector<ek::AttentionTask> parts, tasks;
    for (const AttentionSequence& s : sequences) {
      for (int64_t i = 0; i * ek::attention_chunk < rows(s); i++) parts.push_back({&s, 1, 1, 0, i, 0, kv_heads});
    }
    const int64_t at_once = heads_at_once(int64_t(parts.size()));
    for (ek::AttentionTask task : parts) {
      for (task.first = 0; task.first < kv_heads; task.first += at_once) {
        task.end = std::min(task.first + at_once, kv_heads);
        tasks.push_back(task);
      }
    }
    return tasks;
  }

  // Where sequences share a gradient, every groups-th of them is one task's, and where heads do, all of them.
  std::vector<ek::AttentionTask> backward_tasks(int64_t groups, bool shared_by_heads) const {
    const int64_t count = int64_t(sequences.size());
    const int64_t at_once = shared_by_heads ? std::max<int64_t>(1, kv_heads) : heads_at_once(groups);
    std::vector<ek::AttentionTask> tasks;
    for (int64_t i = 0; i < groups; i++) {
      for (int64_t chunk = 0; chunk < sequences[size_t(i)].splits; chunk++) {
        for (int64_t first = 0; first < kv_heads; first += at_once) {
          tasks.push_back({&sequences[size_t(i)], (count - i + groups - 1) / groups, groups, i, chunk, first,
                           std::min(first + at_once, kv_heads)});
        }
      }
    }
    return tasks;
  }

  // Splits the sequences whose parts would leave threads idle.
  void split() {
    const int64_t count = int64_t(sequences.size());
    for (AttentionSequence& s : sequences) {
      s.splits = ek::attention_splits(count, kv_heads, rows(s));
      if (s.splits == 1) continue;
      partials.emplace_back(size_t(s.splits * kv_heads * 2 * ek::attention_partial_floats(*this, s.visible)));
      s.partial = partials.back().data();
    }
  }

  std::vector<ek::AttentionTask> split_heads() const {
    std::vector<ek::AttentionTask> tasks;
    for (const AttentionSequence& s : sequences) {
      for (int64_t h = 0; s.partial && h < kv_heads; h++) tasks.push_back({&s, 1, 1, 0, 0, h, h + 1});
    }
    return tasks;
  }

  int64_t work() const {
    int64_t products = 0;
    for (const AttentionSequence& s : sequences) products += (s.visible + 1) * s.q_length * heads * (dim + dim_v);
    return products;
  }
};

template <class Kernel>
void run(const Attention& p, Kernel kernel, const std::vector<ek::AttentionTask>& tasks, int64_t work,
         int64_t scratch_floats) {
  const int64_t count = int64_t(tasks.size()), threads = int64_t(torch::stable::get_num_threads());
  ek::for_tasks(count, work, scratch_floats, [&](int64_t i, float* scratch) {
    kernel(p, tasks[size_t(i)], i + threads < count ? &tasks[size_t(i + threads)] : nullptr, scratch);
  });
}

std::tuple<Tensor, Tensor, Tensor> forward(Tensor query, Tensor key, Tensor value, OPTIONS) {
  query = ek::with_unit_stride(query);
  key = ek::with_unit_stride(key);
  value = ek::with_unit_stride(value);
  Attention p(query, key, value, OPTION_NAMES);
  Tensor out = empty_in_order_of(query, p.dim_v);
  std::vector<int64_t> shape(query.sizes().begin(), query.sizes().end() - 1);
  Tensor lse = torch::stable::new_empty(query, shape, ek::ScalarType::Float);
  p.out = strided(out);
  p.large = is_large({out});
  p.lse = strided_rows(lse);

  run(p, ek::variant().attention.forward, p.forward_tasks(), p.work(), p.scratch(false));
  return {out, lse, nothing(query, ek::ScalarType::Float)};  // backward computes the weights anew
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients backward(Tensor d_out, OptionalTensor d_lse, OptionalTensor /*out*/, OptionalTensor /*statistics*/,
                   Tensor query, Tensor key, Tensor value, OPTIONS, bool need_query, bool need_key, bool need_value,
                   bool need_bias, bool need_relative_bias, bool need_temperature, bool need_scale) {
  d_out = ek::with_unit_stride(d_out);
  query = ek::with_unit_stride(query);
  key = ek::with_unit_stride(key);
  value = ek::with_unit_stride(value);
  Attention p(query, key, value, OPTION_NAMES);
  const std::vector<int64_t> shape(query.sizes().begin(), query.sizes().end() - 1);
  const auto wanted = [](bool needed, const Tensor& like) {
    return needed ? empty_in_order_of(like, like.size(like.dim() - 1)) : nothing(like, like.scalar_type());
  };
  const auto rows_wanted = [&](bool needed) {
    return needed ? torch::stable::new_empty(query, shape, ek::ScalarType::Float)
                  : nothing(query, ek::ScalarType::Float);
  };
  Tensor d_query = wanted(need_query, query), d_key = wanted(need_key, key), d_value = wanted(need_value, value);
  Tensor d_temperature = rows_wanted(need_temperature), d_scale = rows_wanted(need_scale);
  p.d_out = strided(d_out);
  if (d_lse) p.d_lse = strided_rows(*d_lse);
  if (need_query) p.d_query = strided(d_query);
  if (need_key) p.d_key = strided(d_key);
  if (need_value) p.d_value = strided(d_value);
  if (need_temperature) p.d_temperature = strided_rows(d_temperature);
  if (need_scale) p.d_scale = strided_rows(d_scale);

  // Slots for what sequences share: 16, but not for more than 32 MB.
  const int64_t count = int64_t(p.sequences.size());
  const bool bias_shared = need_bias && p.bias.stride_b == 0;
  int64_t groups = count;
  if (bias_shared || need_relative_bias) groups = std::min<int64_t>(groups, 16);
  if (bias_shared) groups = std::min(groups, std::max<int64_t>(2, (1 << 22) / std::max<int64_t>(1, bias->numel())));
  Slots d_bias(bias_shared ? groups : 1, need_bias ? bias : OptionalTensor());
  Slots d_relative_bias(groups, need_relative_bias ? relative_bias : OptionalTensor());
  if (need_bias) {
    int64_t strides[4] = {0, 0, 0, 0};  // contiguous, in bias's own shape
    for (int64_t d = bias->dim() - 1, stride = 1; d >= 0; stride *= bias->size(d--)) {
      strides[4 - bias->dim() + d] = bias->size(d) == 1 ? 0 : stride;
    }
    p.d_bias = {d_bias.sums.data(), strides[0], strides[1], strides[2], strides[3]};
    p.d_bias_slot = bias_shared ? bias->numel() : 0;
  }
  if (need_relative_bias) p.d_relative_bias = d_relative_bias.sums.data();
  p.large = is_large({d_query, d_key, d_value});
  if (!need_bias && !need_relative_bias) p.split();
  run(p, ek::variant().attention.backward, p.backward_tasks(groups, need_bias && p.bias.stride_h == 0), p.work() * 3,
      p.scratch(true));
  const std::vector<ek::AttentionTask> split = p.split_heads();
  ek::for_tasks(int64_t(split.size()), p.work(), 0,
                [&](int64_t i, float*) { ek::variant().attention.sum_parts(p, split[size_t(i)]); });
  if (need_temperature) d_temperature = reduce_rows(d_temperature, *temperature);
  if (need_scale) d_scale = reduce_rows(d_scale, *scale);
  return {d_query,
          d_key,
          d_value,
          need_bias ? d_bias.sum(query, *bias) : nothing(query, ek::ScalarType::Float),
          need_relative_bias ? d_relative_bias.sum(query, *relative_bias) : nothing(query, ek::ScalarType::Float),
          d_temperature,
          d_scale};
}

STABLE_TORCH_LIBRARY_IMPL(embedkern, CPU, library) {
  EK_IMPL(library, "attention_forward", forward);
  EK_IMPL(library, "attention_backward", backward);
}

}  // namespace
