// Which kernels of pooling run for a call, on what grid. How they are launched is the caller's: on a stream, or in the
// tests on the CPU.
#pragma once
#include "pooling.cuh"

namespace ek::cuda {

inline PoolModes needed_modes(const PoolParams& p) {
  PoolModes modes{int32_t(least(p.modes, divide_up(p.out_channels, p.channels))), {}};
  for (int m = 0; m < modes.count; m++) modes.mode[m] = uint8_t(p.mode[m]);
  return modes;
}

inline int needed_statistics(const PoolModes& modes) {
  int needed = no_statistic;
  for (int m = 0; m < modes.count; m++) {
    const int mode = modes.mode[m];
    if (mode == PoolMode::cls || mode == PoolMode::lasttoken) continue;
    needed |= mode == PoolMode::max ? maxima : mode == PoolMode::weightedmean ? weighted_sums : sums;
  }
  return needed;
}

// launch(kernel, blocks, arguments…) runs a kernel; T is the dtype of hidden.
template <class T, class Launch>
void launch_forward(const PoolParams& p, const PoolPlaces& places, const Launch& launch) {
  if (p.segments == 0 || p.out_channels == 0) return;
  const PoolModes modes = needed_modes(p);
  const int64_t blocks = p.segments * divide_up(least(p.channels, p.out_channels), slab_lanes * Pack<T>::size);
  launch(find_segments, divide_up(p.segments, warps), p, places);
  switch (needed_statistics(modes)) {
    case no_statistic: launch(pool_rows<T, no_statistic>, blocks, p, modes); break;
    case sums: launch(pool_rows<T, sums>, blocks, p, modes); break;
    case weighted_sums: launch(pool_rows<T, weighted_sums>, blocks, p, modes); break;
    case maxima: launch(pool_rows<T, maxima>, blocks, p, modes); break;
    default: launch(pool_rows<T, every_statistic>, blocks, p, modes);
  }
  if (p.normalize) launch(normalize<T>, p.segments, p);
}

template <class T, class Launch>
void launch_backward(const PoolParams& p, const PoolPlaces& places, const Launch& launch) {
  if (p.rows == 0 || p.channels == 0) return;
  const PoolModes modes = needed_modes(p);
  const Layout layout = places.spans.data ? Layout::spans : places.cu_seqlens.data ? Layout::packed : Layout::padded;
  if (p.segments > 0) {
    launch(find_segments, divide_up(p.segments, warps), p, places);
    launch(d_normalize<T>, p.segments, p, modes);
  }
  const int64_t blocks = divide_up(p.rows, block_rows) * divide_up(p.channels, 32 * Pack<T>::size);
  launch(d_rows<T>, blocks, p, modes, layout);
}

// run(T) with T a value of the dtype
template <class Run>
void for_dtype(DType dtype, const Run& run) {
  switch (dtype) {
    case DType::f32: return run(float{});
    case DType::bf16: return run(Bf16{});
    case DType::f16: return run(F16{});
  }
}

template <class Launch>
void forward(const PoolParams& p, const PoolPlaces& places, const Launch& launch) {
  for_dtype(p.dtype, [&](auto value) { launch_forward<decltype(value)>(p, places, launch); });
}

template <class Launch>
void backward(const PoolParams& p, const PoolPlaces& places, const Launch& launch) {
  for_dtype(p.dtype, [&](auto value) { launch_backward<decltype(value)>(p, places, launch); });
}

}  // namespace ek::cuda
