// Tensors to GatedParams.
#include "../cpu/variants.h"
#include "parallel.h"
#include "tensors.h"

namespace {

using ek::ScalarType;
using ek::Tensor;

int64_t blocks(const ek::GatedParams& p) { return (p.width + ek::gated_block - 1) / ek::gated_block; }

ek::GatedParams params(const Tensor& u) {  // unit stride
  if (u.scalar_type() != ScalarType::Float && u.scalar_type() != ScalarType::Double) {
    ek::refuse("u must be float32 or float64");
  }
  ek::GatedParams p{};
  p.rows = u.size(0), p.width = u.size(1) / 2, p.wide = u.scalar_type() == ScalarType::Double;
  p.u = u.const_data_ptr(), p.u_stride = u.stride(0);
  return p;
}

Tensor sums(Tensor u, std::vector<int64_t> ends) {
  u = ek::with_unit_stride(u);
  ek::GatedParams p = params(u);
  const int64_t pieces = int64_t(ends.size());
  for (int64_t i = 0, last = 0; i < pieces; last = ends[size_t(i++)]) {
    if (ends[size_t(i)] < last || ends[size_t(i)] > p.rows) ek::refuse("ends must ascend up to the number of rows");
  }
  const Tensor out = torch::stable::new_empty(u, {pieces, p.width});
  p.ends = ends.data(), p.sums = out.mutable_data_ptr();
  const ek::GatedKernels& kernels = ek::variant().gated;
  ek::for_tasks(pieces * blocks(p), p.rows * p.width, 0,
                [&](int64_t i, float*) { kernels.sums(p, i / blocks(p), i % blocks(p)); });
  return out;
}

std::tuple<Tensor, Tensor> backward(Tensor u, Tensor d_g, Tensor sequences) {
  u = ek::with_unit_stride(u), d_g = torch::stable::contiguous(d_g);
  ek::GatedParams p = params(u);
  if (d_g.scalar_type() != u.scalar_type() || d_g.size(1) != p.width)
    ek::refuse("d_g must be (sequences, F), of u's dtype");
  const std::vector<int64_t> sequence = ek::integers(sequences);
  if (int64_t(sequence.size()) != p.rows) ek::refuse("sequences must have a number for each row of u");
  for (int64_t s : sequence) {
    if (s < 0 || s >= d_g.size(0)) ek::refuse("sequences must be rows of d_g");
  }
  const Tensor d_u = torch::stable::new_empty(u, {p.rows, 2 * p.width});
  const Tensor d_bias = torch::stable::new_empty(u, {2 * p.width});
  ek::prefer_huge_pages(d_u);
  p.d_g = d_g.const_data_ptr(), p.sequence = sequence.data();
  p.d_u = d_u.mutable_data_ptr(), p.d_bias = d_bias.mutable_data_ptr();
  const ek::GatedKernels& kernels = ek::variant().gated;
  ek::for_tasks(blocks(p), p.rows * p.width, 0, [&](int64_t block, float*) { kernels.d_u(p, block); });
  return {d_u, d_bias};
}

STABLE_TORCH_LIBRARY_IMPL(embedkern, CPU, library) {
  EK_IMPL(library, "gated_sums", sums);
  EK_IMPL(library, "gated_backward", backward);
}

}  // namespace
