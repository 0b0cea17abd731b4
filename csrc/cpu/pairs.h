// Operands of bfloat16 products: Pairs along the summed dimension. For variant sources only.
#pragma once
#include "simd.h"

namespace ek::EK_VARIANT {
namespace {

// Rows of `dim` numbers → Pairs of first and second (null: zeros), zeros up to `columns`, whole vectors.
inline void pair_two(const Bf16* first, const Bf16* second, int64_t dim, float* to, int64_t columns) {
  for (int64_t c = 0; c < columns; c += W) {
    const UVec low = first && c < dim ? (UVec)load_at(first, c, dim) >> 16 : UVec{};
    const UVec high = second && c < dim ? (UVec)load_at(second, c, dim) : UVec{};
    store(to + c, (Vec)(low | high));
  }
}

// Rows (n, dim), `stride` apart → Pairs of row 2i and row 2i + 1 at row i, `columns` apart: what a product over rows
// reads. After an odd row come zeros.
inline void pair_rows(const Bf16* x, int64_t stride, int64_t n, int64_t dim, float* to, int64_t columns) {
  for (int64_t i = 0; i < n; i += 2, x += 2 * stride, to += columns) {
    pair_two(x, i + 1 < n ? x + stride : nullptr, dim, to, columns);
  }
}

// Floats (m, n), rows ld apart, each times its factor (null: 1) → Pairs of row 2i and row 2i + 1, rows ld apart.
inline void pair_scores(const float* x, int64_t m, int64_t n, int64_t ld, const float* factor, float* to) {
  for (int64_t i = 0; i < m; i += 2, x += 2 * ld, to += ld) {
    const bool alone = i + 1 == m;
    const float first = factor ? factor[i] : 1, second = alone ? 0 : factor ? factor[i + 1] : 1;
    for (int64_t j = 0; j < n; j += W) {
      store(to + j, side_by_side(load(x + j) * first, alone ? Vec{} : load(x + ld + j) * second));
    }
  }
}

// Floats (m, n), rows ld apart → Pairs of neighbours, rows to_ld apart; `to` may be x. excess, where it isn't null,
// gets what rounding adds to each row's sum.
inline void pair_neighbours(const float* x, int64_t m, int64_t n, int64_t ld, float* excess, float* to, int64_t to_ld) {
  for (int64_t i = 0; i < m; i++) {
    Vec total{};
    for (int64_t j = 0; j < n; j += 2 * W) {
      const Vec first = load(x + i * ld + j), second = j + W < n ? load(x + i * ld + j + W) : Vec{};
      const Vec pairs = in_a_row(first, second);
      store(to + i * to_ld + j / 2, pairs);
      const Vec rounded = (Vec)((UVec)pairs << 16) + (Vec)((UVec)pairs & 0xffff0000);
      if (excess) total += rounded - (first + second);
    }
    if (excess) excess[i] += sum_lanes(total);
  }
}

}  // namespace
}  // namespace ek::EK_VARIANT
