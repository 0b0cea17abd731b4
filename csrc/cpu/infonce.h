#pragma once
#include "../params.h"

namespace ek {

// A tile is infonce_rows queries by infonce_block documents. 48 is a multiple of every variant's MR, so that the
// product's tiles stay whole; with D = 384 a tile, its documents, queries and d_queries take 380 KB, so that the
// second-level cache holds them through both products.
constexpr int64_t infonce_rows = 48;
constexpr int64_t infonce_block = 128;

// Between rows of the kernels' own matrices: whole vectors, and an odd number of cache lines, or rows of D = 256, 512,
// … would all fall into the same few sets of the cache.
constexpr int64_t infonce_stride(int64_t dim) { return ((dim + 15) / 16 | 1) * 16; }

// Of a group with prefixes: ratios, the positives' z, and what makes an exponential dz.
struct InfoNCELevels {
  float ratio[infonce_levels][infonce_rows], positive[infonce_levels][infonce_rows];
  float max[infonce_levels][infonce_rows], least[infonce_levels][infonce_rows];  // least: its exponential is 0
  float scale[infonce_levels][infonce_rows], dz_positive[infonce_levels][infonce_rows];
  float z_dz[infonce_levels][infonce_rows], norm[infonce_rows];
};

// What a stretch of documents comes to for a group of few rows.
struct InfoNCEStretch {
  float max[infonce_rows], rest[infonce_rows], moment[infonce_rows];
  float best[infonce_rows], negative_sum[infonce_rows], negative_count[infonce_rows];
};

// One task's of `rows`: what grows with the anchors, the sums that smoothing and several positives need, in stretches
// the anchors themselves, the rest.
constexpr int64_t infonce_scratch_floats(const InfoNCEParams& p) {
  const int64_t sums = p.label_smoothing != 0 || p.same_positive ? 2 : 0;
  const int64_t vectors = p.stretch ? p.stride + p.padded_dim / 2 + 1 : 0;
  return infonce_rows * (p.anchors * (p.dim + (1 + sums) * p.stride + p.guide_dim + vectors) + p.k +
                         (p.levels ? 3 : 2) * infonce_block + (p.paired ? infonce_block / 2 : 0)) +
         3 * p.stride;
}

struct InfoNCEKernels {
  void (*normalise)(const InfoNCEParams&, int64_t set, int64_t block);    // of columns -> unit, norm
  void (*column_sum)(const InfoNCEParams&, int64_t set, float* scratch);  // stride floats
  // (rows, dim) of a guide -> unit vectors, guide_stride apart
  void (*guide)(const InfoNCEParams&, const InfoNCEVectors&, int64_t begin, int64_t end, float* unit);
  void (*rows)(const InfoNCEParams&, int64_t group, float* scratch);  // the losses of a group of infonce_rows rows,
                                                                      // and every gradient but the columns'
  // The same for few rows: each stretch of documents, and then a group's end.
  void (*rows_stretch)(const InfoNCEParams&, int64_t group, int64_t stretch, float* scratch);
  void (*rows_merge)(const InfoNCEParams&, int64_t group, float* scratch);
  void (*columns)(const InfoNCEParams&, int64_t set, int64_t block, float* scratch);  // what the panel adds to theirs;
                                                                                      // infonce_rows · infonce_block
  void (*add_anchors)(const InfoNCEParams&);  // d_anchors -> the documents' gradient
  // The same with prefixes, for query_to_doc: documents -> ratio; panel by panel the losses of groups, stretches of
  // documents (infonce_levels · infonce_rows · infonce_block), and then groups' d_queries.
  void (*prefix_ratios)(const InfoNCEParams&, int64_t block);
  void (*prefix_rows)(const InfoNCEParams&, int64_t group, float* scratch);
  void (*prefix_columns)(const InfoNCEParams&, int64_t stretch, float* scratch);
  void (*prefix_queries)(const InfoNCEParams&, int64_t group);
  // A mutual call. For the losses: of a block of rows; panel by panel of each kind, groups and then columns; rows.
  void (*mutual_begin)(const InfoNCEParams&, int64_t block);
  void (*mutual_sums)(const InfoNCEParams&, int64_t kind, int64_t group, float* scratch);
  void (*mutual_merge)(const InfoNCEParams&, int64_t kind, int64_t set, int64_t block);
  void (*mutual_finish)(const InfoNCEParams&, int64_t block);
  // For the gradients: panel by panel of each kind, groups and then columns; at last the columns.
  void (*mutual_rows)(const InfoNCEParams&, int64_t kind, int64_t group, float* scratch);
  void (*mutual_columns)(const InfoNCEParams&, int64_t kind, int64_t set, int64_t block);
  void (*mutual_gradients)(const InfoNCEParams&, int64_t set, int64_t block);
  bool pairs;  // does this variant multiply bfloat16?
};

}  // namespace ek
