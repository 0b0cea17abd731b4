// torch's current CUDA stream without linking to libtorch_cuda, so that a CPU torch imports the same file.
#pragma once
#include <dlfcn.h>
// stable.h stands first: it says for which torch the next header is read.
#include "stable.h"
//
#include <torch/csrc/stable/accelerator.h>

namespace ek {

using GetCudaStream = int32_t (*)(int32_t device, void** stream);

// Null where torch has not loaded that library.
inline GetCudaStream find_cuda_stream() {
  void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
  if (!library) return nullptr;
  return reinterpret_cast<GetCudaStream>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
}

// launch(stream) on the device of `like`, which the dispatcher doesn't set. It returns null, or CUDA's error.
template <class Launch>
void on_cuda_stream(const char* name, const Tensor& like, const Launch& launch) {
  static const GetCudaStream get_stream = find_cuda_stream();
  const int32_t device = like.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  STD_TORCH_CHECK(get_stream && get_stream(device, &stream) == 0, name, ": torch gives no CUDA stream");
  const char* error = launch(stream);
  STD_TORCH_CHECK(!error, name, ": ", error);
}

}  // namespace ek
