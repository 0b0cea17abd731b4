// The one door to torch: its stable headers, never ATen. For binding sources only.
#pragma once

// One binary for torch 2.11 and newer. As a compiler flag it would stop the pybind11 headers of torch 2.11.
#define TORCH_TARGET_VERSION 0x020b000000000000ULL
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../params.h"
#include "signatures.h"

namespace ek {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::headeronly::ScalarType;

inline std::string word(Type<Tensor>) { return "Tensor"; }

}  // namespace ek

#define EK_IMPL(library, name, kernel) (library.impl(name, TORCH_BOX(&kernel)), ek::record(name, &kernel))
