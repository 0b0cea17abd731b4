#pragma once
#include "../params.h"

namespace ek {

constexpr int64_t gated_block = 256;  // columns of g that one task has

struct GatedKernels {
  void (*sums)(const GatedParams&, int64_t piece, int64_t block);  // u -> sums
  void (*d_u)(const GatedParams&, int64_t block);                  // u, d_g -> d_u, d_bias
};

}  // namespace ek
