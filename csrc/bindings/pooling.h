// What pooling's bindings on both devices share: all of PoolParams but the segments, and the results.
#pragma once
#include "tensors.h"

namespace ek {

// PoolParams with what its pointers point to.
struct PoolCall : PoolParams {
  std::vector<int64_t> modes_held;
  OptionalTensor mask_held;

  // shape of hidden: (B, L, C) or (T, C)
  PoolCall(const std::vector<int64_t>& shape, std::vector<int64_t> modes_wanted, int64_t columns, bool normalized,
           double epsilon)
      : PoolParams{}, modes_held(std::move(modes_wanted)) {
    const bool packed = shape.size() == 2;
    channels = shape.back();
    length = packed ? shape[0] : shape[1];
    rows = packed ? shape[0] : shape[0] * shape[1];
    out_channels = columns;
    modes = int64_t(modes_held.size());
    mode = modes_held.data();
    normalize = normalized;
    eps = float(epsilon);
  }

  void take_mask(const Tensor& x) {  // unit stride
    mask_held = x;
    mask = x.const_data_ptr<bool>();
    mask_stride = x.stride(0);
  }

  void read(const Tensor& x) {  // unit stride
    dtype = dtype_of(x);
    hidden = x.const_data_ptr();
    stride_t = x.stride(x.dim() - 2);
    stride_b = x.dim() == 3 ? x.stride(0) : 0;
  }

  bool takes_maximum() const {
    for (int64_t m : modes_held) {
      if (m == PoolMode::max) return true;
    }
    return false;
  }
};

// Where the forward pass writes; `segments` is known.
struct PoolResults {
  Tensor out, pooled, argmax;

  PoolResults(PoolCall& p, const Tensor& hidden)
      : out(torch::stable::new_empty(hidden, {p.segments, p.out_channels})),
        pooled(torch::stable::new_empty(hidden, {p.segments, p.out_channels}, ScalarType::Float)),
        argmax(
            torch::stable::new_empty(hidden, {p.takes_maximum() ? p.segments : 0, p.out_channels}, ScalarType::Int)) {
    p.out = out.mutable_data_ptr();
    p.pooled = pooled.mutable_data_ptr<float>();
    p.argmax = p.takes_maximum() ? argmax.mutable_data_ptr<int32_t>() : nullptr;
  }
};

// What the backward pass reads and writes.
struct PoolGradients {
  Tensor d_pooled, d_hidden;

  PoolGradients(PoolCall& p, const std::vector<int64_t>& shape, const Tensor& d_out, const Tensor& pooled,
                const Tensor& argmax)
      : d_pooled(torch::stable::new_empty(pooled, {p.segments, p.out_channels})),
        d_hidden(torch::stable::new_empty(d_out, shape)) {
    p.dtype = dtype_of(d_out);
    p.d_out = d_out.const_data_ptr();
    p.d_out_stride = d_out.stride(0);
    p.pooled = pooled.mutable_data_ptr<float>();
    p.argmax = p.takes_maximum() ? argmax.mutable_data_ptr<int32_t>() : nullptr;
    p.d_pooled = d_pooled.mutable_data_ptr<float>();
    p.d_hidden = d_hidden.mutable_data_ptr();
  }
};

}  // namespace ek
