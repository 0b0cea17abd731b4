// What the CUDA kernels share: float values of every dtype, 16-byte loads and stores, sums over a block. nvcc compiles
// kernels for the GPU; in the tests g++ compiles the same source over csrc/tests/host_cuda.h, included before it.
#pragma once
#include <cstdint>
#include <cstring>
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace ek::cuda {

using Bf16 = __nv_bfloat16;
using F16 = __half;

constexpr int warps = 8, threads = 32 * warps;  // of a block, in every kernel

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(Bf16 x) { return __bfloat162float(x); }
__device__ inline float to_float(F16 x) { return __half2float(x); }

template <class T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline Bf16 from_float<Bf16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ inline F16 from_float<F16>(float x) {
  return __float2half_rn(x);
}

__host__ __device__ inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
__host__ __device__ inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
__host__ __device__ inline int64_t clamp(int64_t x, int64_t low, int64_t high) { return least(most(x, low), high); }
__host__ __device__ inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// 16 bytes of T as they lie in memory: four registers until a value is needed.
template <class T>
struct Pack {
  static constexpr int size = 16 / sizeof(T);
  uint4 bits;

  __device__ T value(int i) const {
    T values[size];
    memcpy(values, &bits, 16);
    return values[i];
  }
  __device__ float operator[](int i) const { return to_float(value(i)); }
};

__device__ inline bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// The first n of a pack's values, the others 0. WHOLE: n is all of them and `from` is aligned.
template <bool WHOLE, class T>
__device__ Pack<T> load(const T* from, int n) {
  Pack<T> pack;
  if constexpr (WHOLE) {
    pack.bits = *reinterpret_cast<const uint4*>(from);
  } else {
    T values[Pack<T>::size];
#pragma unroll
    for (int i = 0; i < Pack<T>::size; i++) values[i] = i < n ? from[i] : from_float<T>(0);
    memcpy(&pack.bits, values, 16);
  }
  return pack;
}

template <class T>
__device__ void store(T* to, const float (&x)[Pack<T>::size], int n) {
  T values[Pack<T>::size];
#pragma unroll
  for (int i = 0; i < Pack<T>::size; i++) values[i] = from_float<T>(x[i]);
  if (n == Pack<T>::size && is_aligned(to)) {
    uint4 bits;
    memcpy(&bits, values, 16);
    *reinterpret_cast<uint4*>(to) = bits;
  } else {
#pragma unroll
    for (int i = 0; i < Pack<T>::size; i++) {
      if (i < n) to[i] = values[i];
    }
  }
}

// Each x[i] becomes its sum over the block, added in one fixed order. One call a kernel: it has one barrier.
template <int N>
__device__ void sum_over_block(float (&x)[N]) {
  __shared__ float warp_sums[N][warps];
  for (int i = 0; i < N; i++) {
    for (int step = 16; step > 0; step /= 2) x[i] += __shfl_xor_sync(~0u, x[i], step);
    if (threadIdx.x % 32 == 0) warp_sums[i][threadIdx.x / 32] = x[i];
  }
  __syncthreads();
  for (int i = 0; i < N; i++) {
    x[i] = 0;
    for (int warp = 0; warp < warps; warp++) x[i] += warp_sums[i][warp];
  }
}

}  // namespace ek::cuda
