// Tensors on a GPU to PoolParams. No value is looked at here: that would wait for the GPU. The kernels clamp them.
#if EK_CUDA
#include "../cuda/pooling.h"
#include "cuda_stream.h"
#include "pooling.h"

namespace {

using ek::OptionalTensor;
using ek::Tensor;

// The call with memory for its segments, which the first kernel finds.
struct Pooling : ek::PoolCall {
  ek::cuda::PoolPlaces places{};
  std::vector<Tensor> held;

  Pooling(const Tensor& like, const std::vector<int64_t>& shape, const OptionalTensor& lengths,
          const OptionalTensor& mask_tensor, const OptionalTensor& cu_seqlens, const OptionalTensor& skip,
          const OptionalTensor& spans, std::vector<int64_t> modes_wanted, int64_t columns, bool normalized,
          double epsilon)
      : PoolCall(shape, std::move(modes_wanted), columns, normalized, epsilon) {
    if (modes > ek::cuda::pool_modes_limit) {
      ek::refuse("mode must name at most " + std::to_string(ek::cuda::pool_modes_limit) + " modes on a GPU, got " +
                 std::to_string(modes));
    }
    if (mask_tensor) take_mask(torch::stable::contiguous(*mask_tensor));  // one byte a row: cheaper than a division
    places = {integers(lengths), integers(cu_seqlens), integers(skip), integers(spans)};
    segments = spans ? spans->size(0) : cu_seqlens ? cu_seqlens->size(0) - 1 : shape[0];
    static_assert(sizeof(ek::PoolSegment) % sizeof(int64_t) == 0);
    constexpr int64_t words = sizeof(ek::PoolSegment) / sizeof(int64_t);
    held.push_back(torch::stable::new_empty(like, {segments, words}, ek::ScalarType::Long));
    segment = static_cast<ek::PoolSegment*>(held.back().mutable_data_ptr());
  }

  ek::cuda::Integers integers(const OptionalTensor& x) {
    if (!x) return {};
    held.push_back(torch::stable::contiguous(*x));
    return {held.back().const_data_ptr(), x->scalar_type() == ek::ScalarType::Long};
  }
};

std::tuple<Tensor, Tensor, Tensor> forward(Tensor hidden, OptionalTensor lengths, OptionalTensor mask,
                                           OptionalTensor cu_seqlens, OptionalTensor skip, OptionalTensor spans,
                                           std::vector<int64_t> modes, int64_t out_channels, bool normalize,
                                           double eps) {
  hidden = ek::with_unit_stride(hidden);
  Pooling p(hidden, ek::shape_of(hidden), lengths, mask, cu_seqlens, skip, spans, std::move(modes), out_channels,
            normalize, eps);
  p.read(hidden);
  const ek::PoolResults results(p, hidden);
  ek::on_cuda_stream("pool", hidden, [&](void* stream) { return ek::cuda::pool_forward(p, p.places, stream); });
  return {results.out, results.pooled, results.argmax};
}

Tensor backward(Tensor d_out, Tensor pooled, Tensor argmax, std::vector<int64_t> shape, OptionalTensor lengths,
                OptionalTensor mask, OptionalTensor cu_seqlens, OptionalTensor skip, OptionalTensor spans,
                std::vector<int64_t> modes, int64_t out_channels, bool normalize, double eps) {
  d_out = ek::with_unit_stride(d_out);
  Pooling p(d_out, shape, lengths, mask, cu_seqlens, skip, spans, std::move(modes), out_channels, normalize, eps);
  const ek::PoolGradients gradients(p, shape, d_out, pooled, argmax);
  ek::on_cuda_stream("pool", d_out, [&](void* stream) { return ek::cuda::pool_backward(p, p.places, stream); });
  return gradients.d_hidden;
}

STABLE_TORCH_LIBRARY_IMPL(embedkern, CUDA, library) {
  EK_IMPL(library, "pool_forward", forward);
  EK_IMPL(library, "pool_backward", backward);
}

}  // namespace
#endif
