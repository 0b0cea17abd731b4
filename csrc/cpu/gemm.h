// Products of matrices inside a kernel, for variant sources. C (m, n) = or, with add, += A (m, k) · B (k, n) in
// float32: A by any strides (its elements are broadcast, so that a transposed A costs nothing), B by rows ldb apart, C
// by rows ldc apart. Operands are floats, or Pairs of bfloat16 along k: k, strides and ldb count Pairs. n must be a
// multiple of W: scratch is padded. Registers hold an MR × NV·W tile of C over KC of k. Before each tile
// meanwhile.step() may fetch memory ahead.
#pragma once
#include "simd.h"

namespace ek::EK_VARIANT {
namespace {

// 16 of AVX-512's 32 registers accumulate, 12 of AVX2's and SSE's 16. With 24 of 32 sums over 32 and 48 numbers took up
// to a tenth longer on Zen 4, which stores half a vector in a cycle.
constexpr int MR = W == 16 ? 8 : 6, NV = 2;
constexpr int NR = NV * W;

// What a finished tile gets: factor and column_factor, where they aren't null, have what each row and each column of
// A · B is multiplied by. stream: it goes past the caches to C, whose rows are aligned to vectors.
struct End {
  const float* factor = nullptr;
  bool stream = false;
  const float* column_factor = nullptr;

  EK_INLINE End from_row(int64_t i) const { return {factor ? factor + i : nullptr, stream, column_factor}; }
  EK_INLINE End from_column(int64_t j) const { return {factor, stream, column_factor ? column_factor + j : nullptr}; }
};

struct Nothing {
  EK_INLINE void step() {}
};

template <int mr, int nv, bool add, class Operand>
EK_INLINE void gemm_tile(int64_t k, const Operand* a, int64_t a_row, int64_t a_col, const Operand* b, int64_t ldb,
                         float* c, int64_t ldc, const End& end) {
  Vec sums[mr][nv];
#pragma GCC unroll 16
  for (int i = 0; i < mr; i++)
#pragma GCC unroll 4
    for (int j = 0; j < nv; j++) sums[i][j] = Vec{};
  for (int64_t l = 0; l < k; l++) {
    Vec row[nv];
#pragma GCC unroll 4
    for (int j = 0; j < nv; j++) row[j] = load(b + l * ldb + j * W);
#pragma GCC unroll 16
    for (int i = 0; i < mr; i++) {
      const Vec element = broadcast(a[i * a_row + l * a_col]);
#pragma GCC unroll 4
      for (int j = 0; j < nv; j++) sums[i][j] = multiply_add<Operand>(sums[i][j], element, row[j]);
    }
  }
  if (end.factor) {
#pragma GCC unroll 16
    for (int i = 0; i < mr; i++)
#pragma GCC unroll 4
      for (int j = 0; j < nv; j++) sums[i][j] *= end.factor[i];
  }
  if (end.column_factor) {
#pragma GCC unroll 16
    for (int i = 0; i < mr; i++)
#pragma GCC unroll 4
      for (int j = 0; j < nv; j++) sums[i][j] *= load(end.column_factor + j * W);
  }
  if (!add && end.stream) {
#pragma GCC unroll 16
    for (int i = 0; i < mr; i++)
#pragma GCC unroll 4
      for (int j = 0; j < nv; j++) stream(c + i * ldc + j * W, sums[i][j]);
    return;
  }
#pragma GCC unroll 16
  for (int i = 0; i < mr; i++)
#pragma GCC unroll 4
    for (int j = 0; j < nv; j++) {
      float* at = c + i * ldc + j * W;
      store(at, add ? load(at) + sums[i][j] : sums[i][j]);  // added last: a sum over blocks of k rounds less
    }
}

// The rows that remain below whole tiles: mr counts down to the m that is left.
template <int mr, int nv, bool add, class Operand>
EK_INLINE void gemm_rows(int64_t m, int64_t k, const Operand* a, int64_t a_row, int64_t a_col, const Operand* b,
                         int64_t ldb, float* c, int64_t ldc, const End& end) {
  if constexpr (mr > 0) {
    if (m == mr) return gemm_tile<mr, nv, add>(k, a, a_row, a_col, b, ldb, c, ldc, end);
    gemm_rows<mr - 1, nv, add>(m, k, a, a_row, a_col, b, ldb, c, ldc, end);
  }
}

template <int nv, bool add, class Operand, class Meanwhile>
void gemm_columns(int64_t m, int64_t k, const Operand* a, int64_t a_row, int64_t a_col, const Operand* b, int64_t ldb,
                  float* c, int64_t ldc, const End& end, Meanwhile& meanwhile) {
  // A tile of few rows waits for its own sums and takes as long as a whole one: 8 = 4 + 4 rows, not 6 + 2.
  const int64_t rest = m % MR, whole = m - rest - (m > MR && rest > 0 && rest <= MR / 3 ? MR : 0);
  int64_t i = 0;
  for (; i < whole; i += MR) {
    meanwhile.step();
    gemm_tile<MR, nv, add>(k, a + i * a_row, a_row, a_col, b, ldb, c + i * ldc, ldc, end.from_row(i));
  }
  while (i < m) {
    const int64_t rows = m - i < MR ? m - i : (m - i + 1) / 2;
    meanwhile.step();
    gemm_rows<MR - 1, nv, add>(rows, k, a + i * a_row, a_row, a_col, b, ldb, c + i * ldc, ldc, end.from_row(i));
    i += rows;
  }
}

template <int nv, class Operand, class Meanwhile>
EK_INLINE void gemm_part(bool add, int64_t m, int64_t k, const Operand* a, int64_t a_row, int64_t a_col,
                         const Operand* b, int64_t ldb, float* c, int64_t ldc, const End& end, Meanwhile& meanwhile) {
  if (add) {
    gemm_columns<nv, true>(m, k, a, a_row, a_col, b, ldb, c, ldc, end, meanwhile);
  } else {
    gemm_columns<nv, false>(m, k, a, a_row, a_col, b, ldb, c, ldc, end, meanwhile);
  }
}

// Long sums are sums of partial sums: as accurate as a blocked library's, and B's strip of KC rows stays in the cache.
constexpr int64_t KC = 128;

// About how often a product of A (m, k) and B (k, n) calls step().
EK_INLINE int64_t gemm_tiles(int64_t m, int64_t n, int64_t k) {
  return (m + MR - 1) / MR * ((n + NR - 1) / NR) * ((k + KC - 1) / KC);
}

template <class Operand, class Meanwhile>
void gemm(bool add, int64_t m, int64_t n, int64_t k, const Operand* a, int64_t a_row, int64_t a_col, const Operand* b,
          int64_t ldb, float* c, int64_t ldc, const End& end, Meanwhile& meanwhile) {
  for (int64_t l = 0; l < k || (l == 0 && !add); l += KC) {
    const int64_t depth = least(KC, k - l);
    const Operand *a_l = a + l * a_col, *b_l = b + l * ldb;
    for (int64_t j = 0; j < n; j += NR) {
      if (n - j < NR) {
        for (; j < n; j += W)
          gemm_part<1>(add || l > 0, m, depth, a_l, a_row, a_col, b_l + j, ldb, c + j, ldc, end.from_column(j),
                       meanwhile);
      } else {
        gemm_part<NV>(add || l > 0, m, depth, a_l, a_row, a_col, b_l + j, ldb, c + j, ldc, end.from_column(j),
                      meanwhile);
      }
    }
  }
}

template <class Operand>
void gemm(bool add, int64_t m, int64_t n, int64_t k, const Operand* a, int64_t a_row, int64_t a_col, const Operand* b,
          int64_t ldb, float* c, int64_t ldc) {
  Nothing nothing;
  gemm(add, m, n, k, a, a_row, a_col, b, ldb, c, ldc, {}, nothing);
}

}  // namespace
}  // namespace ek::EK_VARIANT
