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
      for (int64_t t = 0; t < length; t++) sum[t * to.stride_t] += double(row[t * from.stride_t]);
    }
  }
  std::copy(sums.begin(), sums.end(), static_cast<float*>(to.data));
  return reduced;
}

// An AttentionParams with what its pointers point to.
struct Attention : AttentionParams {
  std::vector<AttentionSequence> sequences;
  std::vector<int32_t> keys;

  Attention(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& key_lengths,
            const OptionalTensor& key_mask, const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
            const OptionalTensor& temperature_tensor, double temperature_given, const OptionalTensor& scale_tensor,
            double scale_given)
      : AttentionParams{} {
    heads = q.size(1);
    kv_heads = k.size(1);
    dim = q.size(q.dim() - 1);
    dim_v = v.size(v.dim() - 1);
    dtype = ek::dtype_of(q);
    query = strided(q);
    key = strided(k);
    value = strided(v);
    if (temperature_tensor) temperature = broadcast(*temperature_tensor, packed(q));
    if (scale_tensor) scale = broadcast(*scale_tensor, packed(q));
    temperature_number = float(temperature_given);
    scale_number = float(scale_given);
    if (packed(q)) {
      find_packed(q, k, *cu_seqlens_q, cu_seqlens_k);
    } else {
      find_padded(q, k, key_lengths, key_mask);
    }
    // The most work first. Sequences of the same size stay in their order.
    std::stable_sort(sequences.begin(), sequences.end(), [](const AttentionSequence& a, const AttentionSequence& b) {
      return (a.visible + 1) * a.q_length > (b.visible + 1) * b.q_length;
    });
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
  }

  int64_t longest() const {
    int64_t n = 0;
    for (const AttentionSequence& s : sequences) n = std::max(n, s.visible);
    return n;
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

  // Every key/value head of every sequence, by chunks of its rows or whole. A task takes as many heads, so that it can
  // fetch the next one's rows early, as leave each thread its share.
  std::vector<ek::AttentionTask> tasks(bool by_chunks) const {
    std::vector<ek::AttentionTask> parts, all;
    for (const AttentionSequence& s : sequences) {
      const int64_t chunks = by_chunks ? (rows(s) + ek::attention_chunk - 1) / ek::attention_chunk : 1;
      for (int64_t i = 0; i < chunks; i++) parts.push_back({&s, i, 0, kv_heads});
    }
    const int64_t threads = int64_t(torch::stable::get_num_threads()), count = int64_t(parts.size());
    const int64_t at_once = std::max<int64_t>(1, std::min(kv_heads, kv_heads * count / (16 * threads)));
    for (const ek::AttentionTask& part : parts) {
      for (int64_t first = 0; first < kv_heads; first += at_once) {
        all.push_back({part.s, part.chunk, first, std::min(first + at_once, kv_heads)});
      }
    }
    return all;
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

std::tuple<Tensor, Tensor> forward(Tensor query, Tensor key, Tensor value, OptionalTensor key_lengths,
                                   OptionalTensor key_mask, OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k,
                                   OptionalTensor temperature, double temperature_number, OptionalTensor scale,
                                   double scale_number) {
  query = ek::with_unit_stride(query);
  key = ek::with_unit_stride(key);
  value = ek::with_unit_stride(value);
  Attention p(query, key, value, key_lengths, key_mask, cu_seqlens_q, cu_seqlens_k, temperature, temperature_number,
              scale, scale_number);
  Tensor out = empty_in_order_of(query, p.dim_v);
  std::vector<int64_t> shape(query.sizes().begin(), query.sizes().end() - 1);
  Tensor lse = torch::stable::new_empty(query, shape, ek::ScalarType::Float);
  p.out = strided(out);
  p.lse = strided_rows(lse);

  run(p, ek::variant().attention.forward, p.tasks(true), p.work(), p.scratch(false));
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(Tensor d_out, OptionalTensor d_lse, Tensor query,
                                                            Tensor key, Tensor value, OptionalTensor key_lengths,
                                                            OptionalTensor key_mask, OptionalTensor cu_seqlens_q,
                                                            OptionalTensor cu_seqlens_k, OptionalTensor temperature,
                                                            double temperature_number, OptionalTensor scale,
                                                            double scale_number, bool need_query, bool need_key,
                                                            bool need_value, bool need_temperature, bool need_scale) {
  d_out = ek::with_unit_stride(d_out);
  query = ek::with_unit_stride(query);
  key = ek::with_unit_stride(key);
  value = ek::with_unit_stride(value);
  Attention p(query, key, value, key_lengths, key_mask, cu_seqlens_q, cu_seqlens_k, temperature, temperature_number,
              scale, scale_number);
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

  run(p, ek::variant().attention.backward, p.tasks(false), p.work() * 3, p.scratch(true));
  if (need_temperature) d_temperature = reduce_rows(d_temperature, *temperature);
  if (need_scale) d_scale = reduce_rows(d_scale, *scale);
  return {d_query, d_key, d_value, d_temperature, d_scale};
}

STABLE_TORCH_LIBRARY_IMPL(embedkern, CPU, library) {
  EK_IMPL(library, "attention_forward", forward);
  EK_IMPL(library, "attention_backward", backward);
}

}  // namespace
