#pragma once
#include "../params.h"

namespace ek {

// A tile is infonce_rows queries by infonce_block documents. 48 is a multiple of the product's MR and NR with AVX2, 24
// of both kinds of variants' tiles stay whole; with D = 384 a tile, its documents, queries and d_queries take 380 KB,
// so that the second-level cache holds them through both products.
constexpr int64_t infonce_rows = 48;
constexpr int64_t infonce_block = 128;

// Between rows of the kernels' own matrices: whole vectors, and an odd number of cache lines, or rows of D = 256, 512,
// … would all fall into the same few sets of the cache.
constexpr int64_t infonce_stride(int64_t dim) { return ((dim + 15) / 16 | 1) * 16; }

// One task's of `rows`.
constexpr int64_t infonce_scratch_floats(int64_t dim, int64_t negatives) {
  return infonce_rows * (dim + 2 * infonce_stride(dim) + negatives + infonce_block) + 2 * infonce_stride(dim);
}

struct InfoNCEKernels {
  void (*documents)(const InfoNCEParams&, int64_t block);             // documents -> unit_documents, document_norm
  void (*document_sum)(const InfoNCEParams&, float* scratch);         // stride floats
  void (*rows)(const InfoNCEParams&, int64_t group, float* scratch);  // the losses of a group of infonce_rows queries,
                                                                      // and every gradient but the documents'
  void (*d_documents)(const InfoNCEParams&, int64_t block, float* scratch);  // what the panel adds to d_documents;
};  // infonce_rows · infonce_block floats

}  // namespace ek
