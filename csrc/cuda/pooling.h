// All that a binding compiled by g++ sees of the CUDA side: no CUDA header, a stream is a plain pointer.
#pragma once
#include "../params.h"

namespace ek::cuda {

// Values on the device, int32 or int64; data null: not given.
struct Integers {
  const void* data;
  bool wide;  // int64
};

// Where the segments lie. The first kernel turns this into PoolParams::segment, and clamps values out of range there:
// an error would cost a synchronisation. Without cu_seqlens and spans, segment s is the sequence s of a padded batch.
struct PoolPlaces {
  Integers lengths;     // (segments)
  Integers cu_seqlens;  // (segments + 1)
  Integers skip;        // (segments)
  Integers spans;       // (segments, 2)
};

constexpr int64_t pool_modes_limit = 32;  // they travel in the kernels' arguments

// PoolParams with device pointers, but for `mode`; chunk_segments and chunk_offset are the CPU's. Null, or CUDA's
// error.
const char* pool_forward(const PoolParams& p, const PoolPlaces& places, void* stream);
const char* pool_backward(const PoolParams& p, const PoolPlaces& places, void* stream);

}  // namespace ek::cuda
