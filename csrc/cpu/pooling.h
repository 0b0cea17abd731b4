#pragma once
#include "../params.h"

namespace ek {

constexpr int64_t pool_block = 1024;                                       // channels that one task pools
constexpr int64_t pool_scratch_floats = 2 * pool_mode_count * pool_block;  // of one task of `pool`

struct PoolingKernels {
  void (*pool)(const PoolParams&, int64_t segment, int64_t block, float* scratch);  // hidden -> pooled, argmax
  void (*normalize)(const PoolParams&, int64_t segment);                            // pooled -> out
  void (*d_pooled)(const PoolParams&, int64_t segment);                             // d_out -> d_pooled
  void (*d_hidden)(const PoolParams&, int64_t chunk, float* scratch);  // d_pooled -> d_hidden; 2 · channels floats
};

}  // namespace ek
