// What every binding does with tensors: pointers and dtypes for params, checks of the values that tracing can't see.
#pragma once
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "stable.h"

namespace ek {

// std::invalid_argument arrives in Python as ValueError, unless it is thrown inside a parallel region.
[[noreturn]] inline void refuse(const std::string& message) { throw std::invalid_argument(message); }

inline DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: refuse("dtype must be float32, bfloat16 or float16");
  }
}

inline std::vector<int64_t> shape_of(const Tensor& x) { return {x.sizes().begin(), x.sizes().end()}; }

// The one copy the contract allows: of a tensor whose last stride is not 1.
inline Tensor with_unit_stride(const Tensor& x) {
  return x.dim() == 0 || x.stride(x.dim() - 1) == 1 || x.size(x.dim() - 1) <= 1 ? x : torch::stable::contiguous(x);
}

// int32 or int64, any stride, copied out: there are few of them.
inline std::vector<int64_t> integers(const Tensor& x) {
  const Tensor dense = torch::stable::contiguous(x);
  std::vector<int64_t> values(static_cast<size_t>(dense.numel()));
  for (size_t i = 0; i < values.size(); i++) {
    values[i] =
        x.scalar_type() == ScalarType::Int ? dense.const_data_ptr<int32_t>()[i] : dense.const_data_ptr<int64_t>()[i];
  }
  return values;
}

// lengths (B,), each in [0, longest]
inline std::vector<int64_t> checked_lengths(const char* name, const Tensor& lengths, int64_t longest) {
  std::vector<int64_t> values = integers(lengths);
  for (size_t b = 0; b < values.size(); b++) {
    if (values[b] < 0 || values[b] > longest) {
      refuse(std::string(name) + "[" + std::to_string(b) + "] must be in [0, " + std::to_string(longest) + "], got " +
             std::to_string(values[b]));
    }
  }
  return values;
}

// cu_seqlens (B + 1,): starts at 0, never decreases, ends at the number of tokens
inline std::vector<int64_t> checked_cu_seqlens(const char* name, const Tensor& cu_seqlens, int64_t tokens) {
  std::vector<int64_t> values = integers(cu_seqlens);
  if (values.front() != 0) refuse(std::string(name) + " must start at 0, got " + std::to_string(values.front()));
  for (size_t b = 1; b < values.size(); b++) {
    if (values[b] < values[b - 1]) {
      refuse(std::string(name) + " must not decrease, got " + std::to_string(values[b - 1]) + " then " +
             std::to_string(values[b]) + " at [" + std::to_string(b) + "]");
    }
  }
  if (values.back() != tokens) {
    refuse(std::string(name) + " must end at the number of tokens, " + std::to_string(tokens) + ", got " +
           std::to_string(values.back()));
  }
  return values;
}

// For a tensor about to be written. glibc maps large ones anew each time, or gives back what lies at the heap's end,
// and every page costs a fault: 50 MB 20 ms, attention's 100 MB at D = 64 a sixth of its time. There are 512 times
// fewer huge ones, where the system gives them to those who ask.
inline void prefer_huge_pages(const Tensor& x) {
#if defined(MADV_HUGEPAGE)
  const uintptr_t page = 4096, begin = reinterpret_cast<uintptr_t>(x.const_data_ptr());
  const uintptr_t end = begin + static_cast<uintptr_t>(x.numel()) * x.element_size();
  const uintptr_t first = (begin + page - 1) / page * page, last = end / page * page;
  if (end - begin >= (4 << 20)) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)x;
#endif
}

}  // namespace ek
