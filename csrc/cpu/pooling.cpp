// Pooling on the CPU; the maths is embedkern/reference/pooling.py. Bound by memory: hidden is read once and d_hidden
// written once, in the order in which they lie.
#include "pooling.h"

#include "simd.h"

namespace ek::EK_VARIANT {
namespace {

bool visible(const PoolParams& p, int64_t row) {
  return !p.mask || p.mask[row / p.length * p.mask_stride + row % p.length];
}

template <class T>
const T* hidden_row(const PoolParams& p, int64_t row) {
  return static_cast<const T*>(p.hidden) + row / p.length * p.stride_b + row % p.length * p.stride_t;
}

// Columns of mode m's part of out, from channel c on, at most `width`.
int64_t columns(const PoolParams& p, int64_t m, int64_t c, int64_t width) {
  return most(0, least(width, p.out_channels - m * p.channels - c));
}

float denominator(const PoolSegment& s, int64_t mode) {
  const double n = double(s.count);
  switch (mode) {
    case mean: return float(n);
    case mean_sqrt_len_tokens: return float(__builtin_sqrt(n));
    case weightedmean: return float(n * (2.0 * double(s.skipped) + n + 1) / 2);  // ranks skipped + 1 … skipped + n
    default: return 1;
  }
}

// Four rows at a time: the sums are in the first-level cache, and each of them is loaded and stored once for four rows.
// The next four rows, `ahead` elements on, are asked for meanwhile: 1.4 times as fast, since the hardware's prefetcher
// stops at the end of a page. (A prefetch past the end of memory does nothing.)
template <class T>
void add_rows(float* sums, const T* const* rows, const float* weights, int n, int64_t width, int64_t ahead) {
  constexpr int64_t cache_line = 64 / int64_t(sizeof(T));
  for (int64_t c = 0; c < width; c += W) {
    for (int i = 0; c % cache_line == 0 && i < n; i++) __builtin_prefetch(rows[i] + ahead + c);
    Vec sum = load_at(sums, c, width);
    if (n == 4 && !weights) {
      sum += (load_at(rows[0], c, width) + load_at(rows[1], c, width)) +
             (load_at(rows[2], c, width) + load_at(rows[3], c, width));
    } else {
      for (int i = 0; i < n; i++) sum += (weights ? weights[i] : 1.0f) * load_at(rows[i], c, width);
    }
    store_at(sums, c, width, sum);
  }
}

// total += part, with the rounding error kept for the next addition (Kahan): long sequences lose no accuracy.
void add_part(float* total, float* error, float* part, int64_t width) {
  for (int64_t c = 0; c < width; c += W) {
    const Vec before = load_at(total, c, width);
    const Vec addend = load_at(part, c, width) - load_at(error, c, width);
    const Vec after = before + addend;
    store_at(error, c, width, (after - before) - addend);
    store_at(total, c, width, after);
    store_at(part, c, width, Vec{});
  }
}

// NaN wins, the first maximum stays.
template <class T>
void take_maximum(float* largest, int32_t* argmax, const T* row, int32_t index, int64_t width) {
  for (int64_t c = 0; c < width; c += W) {
    const Vec x = load_at(row, c, width), old = load_at(largest, c, width);
    const IVec where = (IVec)load_at(reinterpret_cast<float*>(argmax), c, width);
    const IVec wins = (where < 0) | (x > old) | ((x != x) & (old == old));
    store_at(largest, c, width, select(wins, x, old));
    const IVec index_now = (wins & (index - IVec{})) | (~wins & where);
    store_at(reinterpret_cast<float*>(argmax), c, width, (Vec)index_now);
  }
}

template <class T>
void copy_row(float* to, const T* from, int64_t width) {
  for (int64_t c = 0; c < width; c += W) store_at(to, c, width, load_at(from, c, width));
}

template <class T>
void pool_typed(const PoolParams& p, int64_t segment, int64_t block, float* scratch) {
  const PoolSegment& s = p.segment[segment];
  const int64_t c = block * pool_block, width = least(pool_block, p.channels - c);
  float* pooled = p.pooled + segment * p.out_channels + c;
  float *part = scratch, *error = scratch + pool_mode_count * pool_block;
  int32_t* argmax = p.argmax + segment * p.out_channels + c;
  bool sums = false, ranks = false, maximum = false;
  for (int64_t m = 0; m < p.modes; m++) {
    const int64_t n = columns(p, m, c, width);
    for (int64_t i = 0; i < n; i++) pooled[m * p.channels + i] = 0;
    for (int64_t i = 0; i < n; i++) part[m * pool_block + i] = error[m * pool_block + i] = 0;
    for (int64_t i = 0; p.argmax && i < n; i++) argmax[m * p.channels + i] = -1;
    sums |= p.mode[m] == mean || p.mode[m] == mean_sqrt_len_tokens || p.mode[m] == ek::sum;
    ranks |= p.mode[m] == weightedmean;
    maximum |= p.mode[m] == ek::max;
  }
  if (s.count == 0) return;

  const T* rows[4];
  float weights[4];
  int64_t seen = 0;
  int waiting = 0;
  const bool reads_all = sums || ranks || maximum;
  for (int64_t row = s.first; reads_all && row <= s.last; row++) {
    if (!visible(p, row)) continue;
    rows[waiting] = hidden_row<T>(p, row) + c;
    weights[waiting++] = float(s.skipped + ++seen);
    for (int64_t m = 0; maximum && m < p.modes; m++) {
      const int64_t n = p.mode[m] == ek::max ? columns(p, m, c, width) : 0;
      take_maximum(pooled + m * p.channels, argmax + m * p.channels, rows[waiting - 1], int32_t(row - s.start), n);
    }
    if (waiting < 4 && row < s.last) continue;
    for (int64_t m = 0; m < p.modes; m++) {
      const bool weighted = p.mode[m] == weightedmean;
      if (!weighted && p.mode[m] != mean && p.mode[m] != mean_sqrt_len_tokens && p.mode[m] != ek::sum) continue;
      const int64_t n = columns(p, m, c, width);
      add_rows(part + m * pool_block, rows, weighted ? weights : nullptr, waiting, n, 4 * p.stride_t);
      if (seen % 64 == 0 || row == s.last) {
        add_part(pooled + m * p.channels, error + m * pool_block, part + m * pool_block, n);
      }
    }
    waiting = 0;
  }
  for (int64_t m = 0; m < p.modes; m++) {
    const int64_t n = columns(p, m, c, width);
    float* x = pooled + m * p.channels;
    if (p.mode[m] == cls) copy_row(x, hidden_row<T>(p, s.first) + c, n);
    if (p.mode[m] == lasttoken) copy_row(x, hidden_row<T>(p, s.last) + c, n);
    const float divisor = denominator(s, p.mode[m]);
    if (divisor == 1) continue;
    for (int64_t i = 0; i < n; i++) x[i] /= divisor;
  }
}

float dot(const float* a, const float* b, int64_t n) {
  Vec sums{};
  for (int64_t i = 0; i < n; i += W) sums += load_at(a, i, n) * load_at(b, i, n);
  return sum_lanes(sums);
}

// out = x / max(|x|, eps); a zero vector stays one with eps = 0 too
template <class T>
void normalize_typed(const PoolParams& p, int64_t segment) {
  const int64_t n = p.out_channels;
  const float* x = p.pooled + segment * n;
  T* out = static_cast<T*>(p.out) + segment * n;
  float divisor = 1;
  if (p.normalize) {
    const float norm = __builtin_sqrtf(dot(x, x, n));
    divisor = norm < p.eps ? p.eps : norm;  // this way round NaN stays NaN
    if (divisor == 0) divisor = 1;
  }
  for (int64_t i = 0; i < n; i += W) store_at(out, i, n, load_at(x, i, n) / divisor);
}

// Through the normalisation, d_x = (d_out - x (x · d_out) / |x|²) / |x|, or d_out / eps where eps is larger.
template <class T>
void d_pooled_typed(const PoolParams& p, int64_t segment) {
  const PoolSegment& s = p.segment[segment];
  const int64_t n = p.out_channels;
  const T* d_out = static_cast<const T*>(p.d_out) + segment * p.d_out_stride;
  const float* x = p.pooled + segment * n;
  float* d_x = p.d_pooled + segment * n;
  if (s.count == 0) {
    for (int64_t i = 0; i < n; i++) d_x[i] = 0;
    return;
  }
  copy_row(d_x, d_out, n);
  if (p.normalize) {
    const float norm = __builtin_sqrtf(dot(x, x, n));
    float divisor = norm < p.eps ? p.eps : norm;
    if (divisor == 0) divisor = 1;
    const float along = norm < p.eps || norm == 0 ? 0 : dot(x, d_x, n) / norm / norm;
    for (int64_t i = 0; i < n; i += W) {
      store_at(d_x, i, n, (load_at(d_x, i, n) - along * load_at(x, i, n)) / divisor);
    }
  }
  for (int64_t m = 0; m < p.modes; m++) {
    const float divisor = denominator(s, p.mode[m]);
    float* part = d_x + m * p.channels;
    for (int64_t i = 0; divisor != 1 && i < columns(p, m, 0, p.channels); i++) part[i] /= divisor;
  }
}

// Around the cache where the row's place allows it: a plain store would first read the line from memory.
void write_row(void* to, const void* from, int64_t bytes) {
#if defined(__AVX2__)
  if (reinterpret_cast<uintptr_t>(to) % 32 == 0 && bytes % 32 == 0) {
    for (int64_t i = 0; i < bytes; i += 32) {
      const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const char*>(from) + i));
      _mm256_stream_si256(reinterpret_cast<__m256i*>(static_cast<char*>(to) + i), x);
    }
    return;
  }
#endif
  __builtin_memcpy(to, from, bytes);
}

// gradient += what segment s gives to a row of this rank
void add_gradient(const PoolParams& p, int64_t segment, int64_t row, float rank, float* gradient) {
  const PoolSegment& s = p.segment[segment];
  for (int64_t m = 0; m < p.modes; m++) {
    const int64_t mode = p.mode[m], n = columns(p, m, 0, p.channels);
    if ((mode == cls && row != s.first) || (mode == lasttoken && row != s.last)) continue;
    const float* d_x = p.d_pooled + segment * p.out_channels + m * p.channels;
    const float weight = mode == weightedmean ? rank : 1;
    const float* argmax = reinterpret_cast<const float*>(p.argmax + segment * p.out_channels + m * p.channels);
    for (int64_t c = 0; c < n; c += W) {
      Vec d = weight * load_at(d_x, c, n);
      if (mode == ek::max) d = select((IVec)load_at(argmax, c, n) == int32_t(row - s.start), d, Vec{});
      store_at(gradient, c, n, load_at(gradient, c, n) + d);
    }
  }
}

// How many visible rows a segment has before a row; asked for rows in order, it counts on from the last one.
struct RankBefore {
  int64_t segment = -1, row = 0, rank = 0;

  int64_t operator()(const PoolParams& p, int64_t of, int64_t before) {
    if (!p.mask) return before - p.segment[of].start;
    if (segment != of) segment = of, row = p.segment[of].start, rank = 0;
    for (; row < before; row++) rank += visible(p, row);
    return rank;
  }
};

template <class T>
void d_hidden_typed(const PoolParams& p, int64_t chunk, float* scratch) {
  const int64_t begin = chunk * pool_chunk, end = least(begin + pool_chunk, p.rows);
  const int64_t* covering = p.chunk_segments + p.chunk_offset[chunk];
  const int64_t n_covering = p.chunk_offset[chunk + 1] - p.chunk_offset[chunk];
  float* gradient = scratch;
  T* rounded = reinterpret_cast<T*>(scratch + p.channels);
  T* d_hidden = static_cast<T*>(p.d_hidden);
  const int64_t bytes = p.channels * int64_t(sizeof(T));
  bool alike = true, ranked = false;  // do all rows of a segment get the same?
  for (int64_t m = 0; m < p.modes; m++) {
    alike &= p.mode[m] == mean || p.mode[m] == mean_sqrt_len_tokens || p.mode[m] == ek::sum;
    ranked |= p.mode[m] == weightedmean;
  }
  RankBefore rank_before;
  int64_t written = -2;  // the one segment whose gradient stands in `rounded`; -1: zeros
  for (int64_t row = begin; row < end; row++) {
    int64_t only = -1, covers = 0;
    const bool seen = visible(p, row);
    for (int64_t i = 0; seen && i < n_covering; i++) {
      const PoolSegment& s = p.segment[covering[i]];
      if (s.count && row >= s.first && row <= s.last) only = covering[i], covers++;
    }
    const int64_t wanted = covers == 0 ? -1 : covers == 1 && alike ? only : -2;
    if (wanted == -2 || wanted != written) {
      for (int64_t c = 0; c < p.channels; c++) gradient[c] = 0;
      for (int64_t i = 0; covers && i < n_covering; i++) {
        const PoolSegment& s = p.segment[covering[i]];
        if (s.count == 0 || row < s.first || row > s.last) continue;
        add_gradient(p, covering[i], row, ranked ? float(rank_before(p, covering[i], row) + 1) : 0, gradient);
      }
      for (int64_t c = 0; c < p.channels; c += W) store_at(rounded, c, p.channels, load_at(gradient, c, p.channels));
      written = wanted;
    }
    write_row(d_hidden + row * p.channels, rounded, bytes);
  }
#if defined(__AVX2__)
  _mm_sfence();  // the streamed rows are there before another thread is told so
#endif
}

void pool(const PoolParams& p, int64_t segment, int64_t block, float* scratch) {
  BY_DTYPE(p.dtype, pool_typed<T>(p, segment, block, scratch))
}
void normalize(const PoolParams& p, int64_t segment) { BY_DTYPE(p.dtype, normalize_typed<T>(p, segment)) }
void d_pooled(const PoolParams& p, int64_t segment) { BY_DTYPE(p.dtype, d_pooled_typed<T>(p, segment)) }
void d_hidden(const PoolParams& p, int64_t chunk, float* scratch) {
  BY_DTYPE(p.dtype, d_hidden_typed<T>(p, chunk, scratch))
}

}  // namespace

extern const PoolingKernels pooling;  // without this line a const is private to the file
const PoolingKernels pooling = {pool, normalize, d_pooled, d_hidden};

}  // namespace ek::EK_VARIANT
