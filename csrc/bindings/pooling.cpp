// Tensors to PoolParams, and the checks that need values; nothing else.
#include "pooling.h"

#include <algorithm>

#include "../cpu/variants.h"
#include "parallel.h"

namespace {

using ek::OptionalTensor;
using ek::PoolSegment;
using ek::Tensor;

// The call with its segments, found and checked here.
struct Pooling : ek::PoolCall {
  std::vector<int64_t> chunk_segments_held, chunk_offset_held;
  std::vector<PoolSegment> segments_held;

  Pooling(const std::vector<int64_t>& shape, const OptionalTensor& lengths, const OptionalTensor& mask_tensor,
          const OptionalTensor& cu_seqlens, const OptionalTensor& skip, const OptionalTensor& spans,
          std::vector<int64_t> modes_wanted, int64_t columns, bool normalized, double epsilon)
      : PoolCall(shape, std::move(modes_wanted), columns, normalized, epsilon) {
    if (mask_tensor) take_mask(ek::with_unit_stride(*mask_tensor));
    find_segments(shape.size() == 2 ? 1 : shape[0], lengths, cu_seqlens, spans);
    if (skip) {
      const std::vector<int64_t> skipped = ek::integers(*skip);
      for (size_t s = 0; s < skipped.size(); s++) {
        if (skipped[s] < 0) ek::refuse("skip must be ≥ 0, got " + std::to_string(skipped[s]));
        segments_held[s].skipped = skipped[s];
      }
    }
    for (PoolSegment& s : segments_held) find_rows(s);
    segments = int64_t(segments_held.size());
    segment = segments_held.data();
  }

  void find_segments(int64_t batch, const OptionalTensor& lengths, const OptionalTensor& cu_seqlens,
                     const OptionalTensor& spans) {
    if (spans) {
      const std::vector<int64_t> bounds = ek::integers(*spans);
      for (size_t i = 0; i + 1 < bounds.size(); i += 2) {
        if (bounds[i] < 0 || bounds[i] > bounds[i + 1] || bounds[i + 1] > rows) {
          ek::refuse("spans[" + std::to_string(i / 2) + "] must be 0 ≤ start ≤ end ≤ " + std::to_string(rows) +
                     ", got [" + std::to_string(bounds[i]) + ", " + std::to_string(bounds[i + 1]) + ")");
        }
        segments_held.push_back({bounds[i], bounds[i + 1], 0, 0, 0, 0});
      }
    }
    if (cu_seqlens) {
      const std::vector<int64_t> bounds = ek::checked_cu_seqlens("cu_seqlens", *cu_seqlens, rows);
      for (size_t b = 0; !spans && b + 1 < bounds.size(); b++) {
        segments_held.push_back({bounds[b], bounds[b + 1], 0, 0, 0, 0});
      }
    } else if (!spans) {
      std::vector<int64_t> n(size_t(batch), length);
      if (lengths) n = ek::checked_lengths("lengths", *lengths, length);
      for (int64_t b = 0; b < batch; b++) {
        segments_held.push_back({b * length, b * length + n[size_t(b)], 0, 0, 0, 0});
      }
    }
  }

  void find_rows(PoolSegment& s) const {
    if (!mask) {
      s.count = std::max<int64_t>(0, s.end - s.start - s.skipped);
      s.first = s.start + s.skipped;
      s.last = s.end - 1;
      return;
    }
    int64_t seen = 0;
    for (int64_t row = s.start; row < s.end; row++) {
      if (!mask[row / length * mask_stride + row % length] || ++seen <= s.skipped) continue;
      if (s.count++ == 0) s.first = row;
      s.last = row;
    }
  }

  // For the backward pass: which segments touch which chunk of rows.
  void find_chunks() {
    const int64_t chunks = (rows + ek::pool_chunk - 1) / ek::pool_chunk;
    std::vector<std::vector<int64_t>> touching(static_cast<size_t>(chunks));
    for (int64_t s = 0; s < segments; s++) {
      if (segment[s].count == 0) continue;
      for (int64_t c = segment[s].first / ek::pool_chunk; c <= segment[s].last / ek::pool_chunk; c++) {
        touching[size_t(c)].push_back(s);
      }
    }
    chunk_offset_held.push_back(0);
    for (const std::vector<int64_t>& each : touching) {
      chunk_segments_held.insert(chunk_segments_held.end(), each.begin(), each.end());
      chunk_offset_held.push_back(int64_t(chunk_segments_held.size()));
    }
    chunk_segments = chunk_segments_held.data();
    chunk_offset = chunk_offset_held.data();
  }
};

std::tuple<Tensor, Tensor, Tensor> forward(Tensor hidden, OptionalTensor lengths, OptionalTensor mask,
                                           OptionalTensor cu_seqlens, OptionalTensor skip, OptionalTensor spans,
                                           std::vector<int64_t> modes, int64_t out_channels, bool normalize,
                                           double eps) {
  hidden = ek::with_unit_stride(hidden);
  Pooling p(ek::shape_of(hidden), lengths, mask, cu_seqlens, skip, spans, std::move(modes), out_channels, normalize,
            eps);
  p.read(hidden);
  const ek::PoolResults results(p, hidden);

  const ek::PoolingKernels& kernels = ek::variant().pooling;
  const int64_t blocks = (p.channels + ek::pool_block - 1) / ek::pool_block, work = p.rows * p.channels;
  ek::for_tasks(p.segments * blocks, work, ek::pool_scratch_floats,
                [&](int64_t i, float* scratch) { kernels.pool(p, i / blocks, i % blocks, scratch); });
  ek::for_tasks(p.segments, p.segments * out_channels, 0, [&](int64_t s, float*) { kernels.normalize(p, s); });
  return {results.out, results.pooled, results.argmax};
}

Tensor backward(Tensor d_out, Tensor pooled, Tensor argmax, std::vector<int64_t> shape, OptionalTensor lengths,
                OptionalTensor mask, OptionalTensor cu_seqlens, OptionalTensor skip, OptionalTensor spans,
                std::vector<int64_t> modes, int64_t out_channels, bool normalize, double eps) {
  d_out = ek::with_unit_stride(d_out);
  Pooling p(shape, lengths, mask, cu_seqlens, skip, spans, std::move(modes), out_channels, normalize, eps);
  p.find_chunks();
  const ek::PoolGradients gradients(p, shape, d_out, pooled, argmax);
  ek::prefer_huge_pages(gradients.d_hidden);

  const ek::PoolingKernels& kernels = ek::variant().pooling;
  ek::for_tasks(p.segments, p.segments * out_channels, 0, [&](int64_t s, float*) { kernels.d_pooled(p, s); });
  const int64_t chunks = int64_t(p.chunk_offset_held.size()) - 1;
  ek::for_tasks(chunks, p.rows * p.channels, 2 * (p.channels + 16),
                [&](int64_t i, float* scratch) { kernels.d_hidden(p, i, scratch); });
  return gradients.d_hidden;
}

STABLE_TORCH_LIBRARY_IMPL(embedkern, CPU, library) {
  EK_IMPL(library, "pool_forward", forward);
  EK_IMPL(library, "pool_backward", backward);
}

}  // namespace
