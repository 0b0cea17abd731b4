#pragma once
#include "../params.h"

namespace ek {

// A (sequence, key/value head) has group · q_length rows: query head after query head. They are cut into chunks, each
// a task of the forward pass, and chunks into blocks whose scores, whole rows, are held in a panel.
constexpr int64_t attention_chunk = 768;
constexpr int64_t attention_panel_floats = 32768;

// An odd number of cache lines: columns of a panel spread over all sets of the first-level cache.
static inline int64_t attention_stride(int64_t keys) { return (keys + 15) / 16 * 16 | 16; }

static inline int64_t attention_block(int64_t keys, int64_t rows) {
  const int64_t fit = attention_panel_floats / attention_stride(keys) / 24 * 24;
  const int64_t block = fit < 24 ? 24 : fit > 192 ? 192 : fit;
  return rows < block ? rows : block;
}

static inline int64_t attention_scratch_floats(const AttentionParams& p, int64_t keys, int64_t rows, bool backward) {
  const int64_t stride = attention_stride(keys), block = attention_block(keys, rows) + 16;
  const int64_t dims = p.dim + p.dim_v + 32;
  return dims * (stride + block) + block * (stride + 24) +  // forward
         (backward ? dims * (stride + block) + dims * stride + block * stride : 0) +
         (backward && p.dtype == DType::bf16 ? dims * (stride + block) + block * stride : 0) +  // Pairs
         (adjusts_scores(p) ? stride + (backward ? 2 * block * stride : 0) : 0) + 1024;
}

// The key/value heads [first, end) of `count` sequences, `step` apart: all their rows, or one chunk of them,
// in the backward pass one of `splits`. Tasks that run at the same time have different slots for the gradients that
// sequences share.
struct AttentionTask {
  const AttentionSequence* s;
  int64_t count, step, slot, chunk, first, end;
};

// The parts of a sequence's backward pass: more than one where there are few tasks and many rows. Not by the number of
// threads, so that results don't depend on it.
static inline int64_t attention_splits(int64_t sequences, int64_t kv_heads, int64_t rows) {
  const int64_t wanted = (rows + attention_chunk - 1) / attention_chunk, most = 64 / (sequences * kv_heads + 1) + 1;
  return wanted < most ? (wanted < 1 ? 1 : wanted) : most;
}

// Of one part, head and gradient.
static inline int64_t attention_partial_floats(const AttentionParams& p, int64_t keys) {
  const int64_t dim = p.dim > p.dim_v ? p.dim : p.dim_v;
  return keys * ((dim + 15) / 16 * 16);
}

struct AttentionKernels {  // next: what this thread will probably run next, or null
  void (*forward)(const AttentionParams&, const AttentionTask&, const AttentionTask* next, float* scratch);
  void (*backward)(const AttentionParams&, const AttentionTask&, const AttentionTask* next, float* scratch);
  // The gradients of a split sequence's keys and values, of one head.
  void (*sum_parts)(const AttentionParams&, const AttentionTask&);
};

}  // namespace ek
