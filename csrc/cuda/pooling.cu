// No torch header: nvcc builds it whatever torch is installed.
#include "pooling.cuh"
#include "pooling.h"

namespace ek::cuda {
namespace {

// Launches kernels one after the other on a stream, and keeps the first error.
struct OnStream {
  cudaStream_t stream;
  mutable cudaError_t error = cudaSuccess;

  template <class... Parameters>
  void operator()(void (*kernel)(Parameters...), int64_t blocks, const Parameters&... arguments) const {
    if (error != cudaSuccess) return;
    if (blocks > INT32_MAX) {
      error = cudaErrorInvalidConfiguration;
      return;
    }
    kernel<<<unsigned(blocks), threads, 0, stream>>>(arguments...);
    error = cudaGetLastError();
  }
  const char* message() const { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }
};

}  // namespace

const char* pool_forward(const PoolParams& p, const PoolPlaces& places, void* stream) {
  const OnStream launch{static_cast<cudaStream_t>(stream)};
  forward(p, places, launch);
  return launch.message();
}

const char* pool_backward(const PoolParams& p, const PoolPlaces& places, void* stream) {
  const OnStream launch{static_cast<cudaStream_t>(stream)};
  backward(p, places, launch);
  return launch.message();
}

}  // namespace ek::cuda
