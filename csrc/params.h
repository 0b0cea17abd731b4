// Plain structs, one per kernel family: the seam between torch and the kernels. Sizes and strides count elements, and
// every last dimension has stride 1. Nothing above this file knows a tile, nothing below it knows a tensor.
#pragma once
#include <cstdint>

namespace ek {

enum class DType : int32_t { f32, bf16, f16 };

enum PoolMode : int64_t { cls, lasttoken, max, mean, mean_sqrt_len_tokens, weightedmean, sum };
constexpr int pool_mode_count = 7;

// The visible rows among [start, end), less the first `skipped` of them: `count` rows, from `first` to `last`.
struct PoolSegment {
  int64_t start, end, skipped;
  int64_t first, last, count;
};

// out[s] = normalise(concatenation over modes of the pooled rows of segment s, cut to out_channels). hidden is seen as
// flat rows: row r lies at hidden + (r / length) * stride_b + (r % length) * stride_t.
struct PoolParams {
  int64_t segments, rows, length, channels, out_channels;  // packed batches: length = rows
  int64_t modes;
  const int64_t* mode;  // (modes), PoolMode
  DType dtype;          // of hidden, out, d_out and d_hidden
  const void* hidden;
  int64_t stride_b, stride_t;
  PoolSegment* segment;  // (segments); on a GPU the first kernel fills it
  const bool* mask;      // (rows / length, length), rows mask_stride apart; null: every row is visible
  int64_t mask_stride;
  bool normalize;
  float eps;
  void* out;          // (segments, out_channels)
  float* pooled;      // (segments, out_channels), before the normalisation
  int32_t* argmax;    // (segments, out_channels), row of the maximum relative to start, -1: none; null without max
  const void* d_out;  // (segments, out_channels), rows d_out_stride apart
  int64_t d_out_stride;
  float* d_pooled;                // (segments, out_channels): d_out through normalisation and denominators
  const int64_t* chunk_segments;  // the segments that touch a chunk of pool_chunk rows, ascending: those of chunk i
  const int64_t* chunk_offset;    // are chunk_segments[chunk_offset[i]] … chunk_segments[chunk_offset[i + 1] - 1]
  void* d_hidden;                 // (rows, channels), contiguous
};
constexpr int64_t pool_chunk = 64;  // rows of d_hidden that one task writes

// Where element (b, h, t, 0) of a tensor lies: data + b * stride_b + h * stride_h + t * stride_t. Packed batches have
// b = 0 and t counted over all sequences. data null: there is none, or it isn't wanted.
struct Strided {
  void* data;
  int64_t stride_b, stride_h, stride_t;
};

// Where element (b, h, i, j) of what broadcasts to scores (B, H, Lq, Lk) lies, as in Strided.
struct ScoreGrid {
  void* data;
  int64_t stride_b, stride_h, stride_t, stride_k;
};

// Queries [q_start, q_start + q_length) of batch entry b; of its keys [k_start, k_start + k_length), `visible` are
// seen: k_start + key[j], or without a list k_start + k_first + j.
struct AttentionSequence {
  int64_t b, q_start, q_length, k_start, k_length;
  int64_t visible, k_first;
  const int32_t* key;
  const float* hidden = nullptr;  // (k_length), not 0 for keys that aren't seen after all; null: all visible ones are
  // The backward pass of a few long sequences runs in `splits` parts of their rows. Each writes its gradients of key
  // and value to `partial` (splits, kv_heads, 2, attention_partial_floats), to be summed in order.
  int64_t splits = 1;
  float* partial = nullptr;
};

// out = dropout(softmax(z / temperature)) · v, and lse, over each row's visible keys, z = cap(scale · q·kᵀ) + bias +
// relative_bias. With any option, from mask to dropout, no sequence has a list of keys.
struct AttentionParams {
  int64_t heads, kv_heads, dim, dim_v;
  DType dtype;  // of query, key, value, out and their gradients
  bool large;   // results are larger than the caches, and their rows aligned to 64 bytes
  Strided query, key, value, out;
  Strided temperature, scale, lse;  // float; without data the number below
  float temperature_number, scale_number;
  ScoreGrid mask;              // bool: which keys a row attends to
  ScoreGrid bias;              // float
  const float* relative_bias;  // (heads, 2 reach + 1), by the distance of the key from the row's position; or null
  int64_t reach;
  int64_t window_left = -1, window_right = -1;  // keys to either side of the row's position; -1: no bound
  float softcap;                                // 0: none
  double dropout_p;
  uint64_t seed;
  Strided row_number;    // without data: the row's number for dropout
  Strided d_out, d_lse;  // d_lse float
  Strided d_query, d_key, d_value;
  Strided d_temperature, d_scale;  // float, one for each row
  ScoreGrid d_bias;  // double and zeros at first, as what follows; d_bias_slot elements between the slots of tasks
  int64_t d_bias_slot;
  double* d_relative_bias;  // (slots, heads, 2 reach + 1)
};

static inline bool adjusts_scores(const AttentionParams& p) {
  return p.mask.data || p.bias.data || p.relative_bias || p.window_left >= 0 || p.window_right >= 0 || p.softcap > 0 ||
         p.dropout_p > 0;
}

// Vectors (rows, dim) of one of InfoNCE's inputs; data is null where there is none.
struct InfoNCEVectors {
  const void* data;
  DType dtype;
  int64_t stride;  // between rows
};

// A set of vectors that rows see: the documents, or the queries where a direction has them as columns.
struct InfoNCEColumns {
  InfoNCEVectors vectors;
  int64_t count;
  const int64_t* labels;    // (count); null: no labels
  const float* guide;       // (count, guide_stride), unit vectors; null: no guide
  const float* log_weight;  // (count), of each as a negative; null: no weights
  float* gradient;          // (count, padded_dim); null where it isn't wanted
  float* unit;              // (count, stride): d̂
  float* norm;              // (count)
  float* sum;               // (stride): Σ_j d̂_j; null without smoothing
  float* pairs;             // ((count + 1) / 2, padded_dim): where products take Pairs, those of rows 2j and 2j + 1
  float* factor;            // (count): with pairs, d̂ is this times the vector
};

// Rows' queries, or their positive documents, against a set of columns. Column j is a row's own if j ≡ its key modulo
// period: what is apart, out of the sum, or else stays whatever labels and guide say.
struct InfoNCEPass {
  int32_t anchors;  // 0: queries, 1: the positives
  int32_t columns;  // 0: documents, 1: queries
  int32_t part;     // of the softmaxes
  bool own_apart;
  int64_t period;
  const int32_t* key;   // (n)
  float* exponentials;  // (groups, count, infonce_rows): exp(z - block_max), 0 where hidden; null without gradient
  float* block_max;     // (groups, blocks of count, infonce_rows)
  // Of a mutual call: are columns anchors of a direction back, and does a row's own pair count on that way?
  bool back, own_back;
};

enum InfoNCEHardness : int64_t { no_hardness, in_batch_negatives, hard_negatives, all_negatives };

constexpr int64_t infonce_levels = 8;  // prefixes that one call takes
// Of a group of rows: csrc/cpu/infonce.h
struct InfoNCELevels;
struct InfoNCEStretch;

// loss[i] = log Σ_j exp z_ij - z_i,targets[i], z_ij = sim(q_i, d_j) / τ_i + constants, and the gradients of
// Σ_i d_loss[i] · loss[i]. Rows are taken panel by panel: between `rows` and `columns` stand a panel's exponentials.
struct InfoNCEParams {
  int64_t n, k, dim;  // rows, negatives of each
  int64_t offset;     // row i is query offset + i
  bool cosine;
  InfoNCEColumns columns[2];
  InfoNCEVectors positives;
  InfoNCEVectors negatives;  // (n, k, dim), queries negatives_stride apart
  int64_t negatives_stride;
  const int64_t* targets;      // (n), each a document
  const float* temperature;    // (n), temperature_stride apart
  int64_t temperature_stride;  // 0 or 1
  int64_t passes, anchors, parts;
  InfoNCEPass pass[4];  // the first: queries and documents
  bool hooks;           // something changes a logit or is counted: without, a tile is its product
  bool same_positive;   // a column with the row's label is a positive too; or else it is left out
  float label_smoothing;
  int64_t guide_dim, guide_stride;
  float margin;
  bool relative;
  InfoNCEHardness hardness;
  float strength;
  int64_t period;                // documents j ≡ targets[i] modulo this are of row i's query
  const float* negative_weight;  // (n, k), log; null: no weights
  // Matryoshka: the weighted sum of losses over prefixes; 0: the whole vectors alone.
  int64_t levels;
  int64_t level_end[infonce_levels];  // ascending, whole vectors but for the last, dim
  float level_weight[infonce_levels];
  float* ratio;              // (levels, m): what makes a document's unit vector's prefix one
  float* column_z_dz;        // (levels, m): Σ_i dz_ij z_ij
  InfoNCELevels* of_levels;  // (groups)
  // Every pair of vectors at once for both directions: row i is query i and document i; of kinds, queries and these.
  bool mutual;
  float* rate;             // (n): 1 / τ
  float* positive;         // (n): the positives' similarity
  float* pair;             // (n): the loss's derivative by it
  float* row_sums[2];      // (3, n) of a kind as rows: max z, Σ exp(z - max), Σ exp(z - max) (z - max)
  float* column_sums[2];   // the same as columns that are anchors
  float* tile_sums[2];     // (groups, 3, n): what each group of a panel adds to column_sums
  float* anchor_max[2];    // (n), of the softmax of a kind's anchors
  float* anchor_scale[2];  // (n): d_loss / τ / Σ exp(z - anchor_max)
  const float* d_loss;     // (n); null without any gradient
  float* loss;             // (n)
  float* metrics;  // (n, 4) or null: does nothing beat the positive, its similarity, Σ and number of the negatives'
  // Gradients beside the columns', null where they aren't wanted, contiguous.
  float* d_queries;      // (n, dim), as rows
  float* d_anchors;      // (n, dim), of documents[targets] as rows
  float* d_negatives;    // (n, k, dim)
  float* d_positives;    // (n, dim)
  float* d_temperature;  // (n), of each row's own τ
  bool sum_anchors[2];   // is Σ_j dz_ij d̂_j wanted?
  // Scratch. `stride` is between rows of unit vectors.
  int64_t padded_dim, stride;
  // Of a panel: rows panel_begin to panel_end. Groups of infonce_rows of them stand together.
  int64_t panel_begin, panel_end;
  float* unit_anchors[2];  // (panel, stride): q̂ / τ, and the positives'
  bool paired;  // products take Pairs of the vectors themselves, bfloat16, and factors make unit vectors of them
  float* anchor_pairs[2];   // (panel / 2, padded_dim): of rows 2i and 2i + 1
  float* anchor_factor[2];  // (panel): q̂ / τ is this times the vector
  float* row_max[2];        // (panel) of each softmax
  float* row_scale[2];      // (panel): d_loss / Σ_j exp(z_ij - row_max)
  float* row_spread[2];     // (panel): d_loss times the target weight of each visible column
  float* row_share[2];      // (panel): the same, in addition, of each column with the row's label
  float* positive_scale;    // (panel): the derivative by the positive's z
  // Where a task is a stretch of documents; with few rows, one of a group.
  int64_t stretch;               // documents, whole blocks; 0: a group's task is all of them
  float* d_query_parts;          // (stretches, panel, stride): each one's say on d_queries
  InfoNCEStretch* of_stretches;  // (stretches, groups); null with prefixes
};

// The gated unit g = a · gelu(gate) of rows u = [a, gate], gelu(x) = x · Φ(x).
struct GatedParams {
  int64_t rows, width;
  bool wide;      // everything is float64, not float32
  const void* u;  // (rows, 2 · width), rows u_stride apart
  int64_t u_stride;
  const int64_t* ends;      // (pieces): the row after each piece's last; pieces follow each other from row 0
  void* sums;               // (pieces, width): Σ g of a piece's rows
  const void* d_g;          // (sequences, width): of every row of a sequence
  const int64_t* sequence;  // (rows): the row of d_g
  void* d_u;                // (rows, 2 · width)
  void* d_bias;             // (2 · width): Σ d_u
};

}  // namespace ek
