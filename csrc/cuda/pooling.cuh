// Pooling on a GPU; the maths is embedkern/reference/pooling.py. Bound by memory: hidden is read once and d_hidden
// written once. No atomics and one order of additions: the same bits every time.
//
//   find_segments   a warp per segment              lengths, cu_seqlens, skip, spans, mask -> segment
//   pool_rows       a block per segment and slab    hidden -> pooled, argmax
//   normalize       a block per segment             pooled -> out
//   d_normalize     a block per segment             d_out, pooled -> d_pooled
//   d_rows          a block per rows and slab       d_pooled, argmax -> d_hidden
#pragma once
#include "device.cuh"
#include "pooling.h"

namespace ek::cuda {

// PoolParams::mode lies on the host; these are the modes that out_channels leaves, as an argument of the kernels.
struct PoolModes {
  int32_t count;
  uint8_t mode[pool_modes_limit];
};

__device__ inline double denominator(const PoolSegment& s, int mode) {
  const double n = double(s.count);
  switch (mode) {
    case PoolMode::mean: return n;
    case PoolMode::mean_sqrt_len_tokens: return sqrt(n);
    case PoolMode::weightedmean: return n * (2.0 * double(s.skipped) + n + 1) / 2;  // ranks skipped + 1 … skipped + n
    default: return 1;
  }
}

// ------------------------------------------------------------------------------------------------ rows and segments

// Bit i: row + i is visible and before end. For whole warps, the same in all lanes.
__device__ inline uint64_t visible_bits(const PoolParams& p, int64_t row, int64_t end) {
  const int64_t left = end - row;
  if (!p.mask) return left <= 0 ? 0 : left >= 64 ? ~0ull : (1ull << left) - 1;
  const int lane = threadIdx.x % 32;
  const bool low = lane < left && p.mask[row + lane];
  const bool high = lane + 32 < left && p.mask[row + lane + 32];
  const uint64_t low_bits = __ballot_sync(~0u, low);
  return low_bits | uint64_t(__ballot_sync(~0u, high)) << 32;
}

__device__ inline int64_t at(const Integers& values, int64_t i) {
  return values.wide ? static_cast<const int64_t*>(values.data)[i] : static_cast<const int32_t*>(values.data)[i];
}

// [start, end) of segment s, inside [0, rows) whatever the values are
__device__ inline PoolSegment bounds(const PoolParams& p, const PoolPlaces& places, int64_t s) {
  PoolSegment found{};
  if (places.spans.data) {
    found.start = clamp(at(places.spans, 2 * s), 0, p.rows);
    found.end = clamp(at(places.spans, 2 * s + 1), found.start, p.rows);
  } else if (places.cu_seqlens.data) {
    found.start = clamp(at(places.cu_seqlens, s), 0, p.rows);
    found.end = clamp(at(places.cu_seqlens, s + 1), found.start, p.rows);
  } else {
    found.start = s * p.length;
    found.end = found.start + (places.lengths.data ? clamp(at(places.lengths, s), 0, p.length) : p.length);
  }
  if (places.skip.data) found.skipped = clamp(at(places.skip, s), 0, found.end - found.start);
  return found;
}

__global__ void __launch_bounds__(threads) find_segments(const PoolParams p, const PoolPlaces places) {
  const int64_t index = int64_t(blockIdx.x) * warps + threadIdx.x / 32;
  if (index >= p.segments) return;
  PoolSegment s = bounds(p, places, index);
  if (!p.mask) {
    s.count = s.end - s.start - s.skipped;
    s.first = s.start + s.skipped;
    s.last = s.end - 1;
  } else {
    constexpr int at_once = 4;  // words whose loads don't wait for each other
    int64_t rank = 0;           // visible rows so far
    s.first = s.start, s.last = s.start - 1;
    for (int64_t row = s.start; row < s.end; row += 64 * at_once) {
      uint64_t words[at_once];
#pragma unroll
      for (int i = 0; i < at_once; i++) words[i] = visible_bits(p, row + 64 * i, s.end);
#pragma unroll
      for (int i = 0; i < at_once; i++) {
        uint64_t seen = words[i];
        const int64_t ranks = __popcll(seen);
        if (rank <= s.skipped && s.skipped < rank + ranks) {  // the first row that counts is here
          for (int64_t r = rank; r < s.skipped; r++) seen &= seen - 1;
          s.first = row + 64 * i + __ffsll(seen) - 1;
        }
        if (seen) s.last = row + 64 * i + 63 - __clzll(seen);
        rank += ranks;
      }
    }
    s.count = most(0, rank - s.skipped);
  }
  if (threadIdx.x % 32 == 0) p.segment[index] = s;
}

// ---------------------------------------------------------------------------------------------------------- forward

// A block of pool_rows takes a slab of columns: 16 lanes × 16 bytes, two cache lines of each row, so that a few dozen
// segments fill a GPU. Its 16 groups of lanes share the rows; a lane has the loads of 4 of them under way.
constexpr int slab_lanes = 16, groups = threads / slab_lanes, rows_at_once = 4, tile = groups * rows_at_once;
static_assert(tile == 64, "visible_bits covers a tile");
constexpr int chunk_tiles = 16;  // a lane adds 64 rows in float, then these sums in double: long sums stay accurate

enum Statistic : int { no_statistic = 0, sums = 1, weighted_sums = 2, maxima = 4, every_statistic = 7 };

// NaN wins, then the larger value, then the earlier row. A row of -1 is none.
__device__ inline bool beats(float x, int32_t row, float y, int32_t other) {
  if (row < 0 || other < 0) return other < 0;
  if (x != x || y != y) return x != x && (y == y || row < other);
  return x > y || (x == y && row < other);
}

// Where a flat row of hidden lies. EVEN: all rows asked for are stride_t apart, and hidden is shifted to make that so;
// else it takes a division a row.
template <bool EVEN>
__device__ int64_t place(const PoolParams& p, int64_t row) {
  return EVEN ? row * p.stride_t : row / p.length * p.stride_b + row % p.length * p.stride_t;
}

// What each group of lanes has found in each column of the slab.
template <int STATISTICS, int COLUMNS>
struct Found {
  double sum[STATISTICS & sums ? groups : 1][COLUMNS];
  double weighted[STATISTICS & weighted_sums ? groups : 1][COLUMNS];
  float largest[STATISTICS & maxima ? groups : 1][COLUMNS];
  int32_t row_of_largest[STATISTICS & maxima ? groups : 1][COLUMNS];
};

// What a lane gathers for its V columns, in registers; at the end of each chunk it goes to the lane's own places in
// Found.
template <int STATISTICS, int V>
struct Gathered {
  float sum[V]{}, weighted[V]{}, largest[V]{};
  int32_t row_of_largest[V];

  __device__ Gathered() {
    for (int i = 0; i < V; i++) row_of_largest[i] = -1;
  }
  template <class T>
  __device__ void add(const Pack<T>& x, float rank, int32_t row) {
#pragma unroll
    for (int i = 0; i < V; i++) {
      if constexpr (STATISTICS & sums) sum[i] += x[i];
      if constexpr (STATISTICS & weighted_sums) weighted[i] += rank * x[i];
      if constexpr (STATISTICS & maxima) {
        if (beats(x[i], row, largest[i], row_of_largest[i])) largest[i] = x[i], row_of_largest[i] = row;
      }
    }
  }
  template <int COLUMNS>
  __device__ void end_chunk(Found<STATISTICS, COLUMNS>& found, bool is_first) {
    const int group = threadIdx.x / slab_lanes, column = threadIdx.x % slab_lanes * V;
#pragma unroll
    for (int i = 0; i < V; i++) {
      if constexpr (STATISTICS & sums) {
        double& total = found.sum[group][column + i];
        total = (is_first ? 0 : total) + double(sum[i]), sum[i] = 0;
      }
      if constexpr (STATISTICS & weighted_sums) {
        double& total = found.weighted[group][column + i];
        total = (is_first ? 0 : total) + double(weighted[i]), weighted[i] = 0;
      }
      if constexpr (STATISTICS & maxima) {
        found.largest[group][column + i] = largest[i];
        found.row_of_largest[group][column + i] = row_of_largest[i];
      }
    }
  }
};

// FAST: the segment's rows lie evenly, and each lane has a whole pack of each or, beyond the last column, nothing.
template <bool FAST, int STATISTICS, class T>
__device__ void gather(Found<STATISTICS, slab_lanes * Pack<T>::size>& found, const PoolParams& p, const PoolSegment& s,
                       const T* hidden, int64_t c, int n) {
  Gathered<STATISTICS, Pack<T>::size> mine;
  const int group = threadIdx.x / slab_lanes;
  int64_t rank = s.skipped;  // of the last row before the tile
  int tiles = 0;
  for (int64_t row = s.first; row <= s.last; row += tile) {
    const uint64_t seen = visible_bits(p, row, s.last + 1);
    const uint64_t reads = n > 0 ? seen : 0;        // lanes beyond the last column only help to vote
    constexpr int batch = FAST ? rows_at_once : 1;  // single values take a register each
#pragma unroll 1
    for (int first = 0; first < rows_at_once; first += batch) {
      Pack<T> x[batch];
#pragma unroll
      for (int i = 0; i < batch; i++) {
        const int j = (first + i) * groups + group;
        if (reads >> j & 1) x[i] = load<FAST>(hidden + place<FAST>(p, row + j) + c, n);
      }
#pragma unroll
      for (int i = 0; i < batch; i++) {
        const int j = (first + i) * groups + group;
        if (reads >> j & 1) mine.add(x[i], float(rank + __popcll(seen << (63 - j))), int32_t(row + j - s.start));
      }
    }
    rank += __popcll(seen);
    if (++tiles % chunk_tiles == 0) mine.end_chunk(found, tiles == chunk_tiles);
  }
  mine.end_chunk(found, tiles < chunk_tiles);
}

template <class T, int STATISTICS>
__global__ void __launch_bounds__(threads, STATISTICS == every_statistic ? 2 : 3)
    pool_rows(const PoolParams p, const __grid_constant__ PoolModes modes) {
  constexpr int V = Pack<T>::size, columns = slab_lanes * V;
  const int64_t width = least(p.channels, p.out_channels);
  const unsigned slabs = unsigned(divide_up(width, columns));
  const int64_t segment = blockIdx.x / slabs, slab = int64_t(blockIdx.x % slabs) * columns;
  const PoolSegment s = p.segment[segment];

  const T* hidden = static_cast<const T*>(p.hidden);
  __shared__ Found<STATISTICS, columns> found;
  if (STATISTICS && s.count) {
    const int64_t c = slab + threadIdx.x % slab_lanes * V, sequence = s.first / p.length;
    const int n = c < width ? int(least(V, p.channels - c)) : 0;
    const bool even = p.stride_b == p.length * p.stride_t || s.last / p.length == sequence;
    const bool packs = is_aligned(hidden) && p.channels % V == 0 && p.stride_t % V == 0 && p.stride_b % V == 0;
    if (even && packs) {
      gather<true, STATISTICS>(found, p, s, hidden + sequence * (p.stride_b - p.length * p.stride_t), c, n);
    } else {
      gather<false, STATISTICS>(found, p, s, hidden, c, n);
    }
  }
  __syncthreads();

  // From here on a thread has one column.
  const int column = threadIdx.x;
  const int64_t c = slab + column;
  if (column >= columns || c >= width) return;
  double sum = 0, weighted = 0;
  float largest = 0;
  int32_t row_of_largest = -1;
  for (int group = 0; STATISTICS && s.count && group < groups; group++) {
    if constexpr (STATISTICS & sums) sum += found.sum[group][column];
    if constexpr (STATISTICS & weighted_sums) weighted += found.weighted[group][column];
    if constexpr (STATISTICS & maxima) {
      const float x = found.largest[group][column];
      const int32_t row = found.row_of_largest[group][column];
      if (beats(x, row, largest, row_of_largest)) largest = x, row_of_largest = row;
    }
  }

  for (int m = 0; m < modes.count && m * p.channels + c < p.out_channels; m++) {
    const int mode = modes.mode[m];
    double x = 0;
    if (s.count) {
      switch (mode) {
        case PoolMode::cls: x = to_float(hidden[place<false>(p, s.first) + c]); break;
        case PoolMode::lasttoken: x = to_float(hidden[place<false>(p, s.last) + c]); break;
        case PoolMode::max: x = largest; break;
        case PoolMode::weightedmean: x = weighted / denominator(s, mode); break;
        default: x = sum / denominator(s, mode);
      }
    }
    const int64_t i = segment * p.out_channels + m * p.channels + c;
    p.pooled[i] = float(x);
    if (p.argmax) p.argmax[i] = mode == PoolMode::max ? row_of_largest : -1;
    if (!p.normalize) static_cast<T*>(p.out)[i] = from_float<T>(float(x));
  }
}

// What x is divided by: max(|x|, eps). This way round NaN stays NaN, and a zero vector stays one with eps = 0 too.
__device__ inline float divisor(float norm, float eps) {
  const float larger = norm < eps ? eps : norm;
  return larger == 0 ? 1 : larger;
}

template <class T>
__global__ void __launch_bounds__(threads) normalize(const PoolParams p) {
  const int64_t row = blockIdx.x * p.out_channels;
  float squares[1]{};
  for (int64_t i = threadIdx.x; i < p.out_channels; i += threads) squares[0] += p.pooled[row + i] * p.pooled[row + i];
  sum_over_block(squares);
  const float by = divisor(sqrtf(squares[0]), p.eps);
  T* out = static_cast<T*>(p.out) + row;
  for (int64_t i = threadIdx.x; i < p.out_channels; i += threads) out[i] = from_float<T>(p.pooled[row + i] / by);
}

// --------------------------------------------------------------------------------------------------------- backward

// Through the denominators and the normalisation,
// d_x = (d_out - x (x · d_out) / |x|²) / |x|, or d_out / eps where eps is larger.
template <class T>
__global__ void __launch_bounds__(threads) d_normalize(const PoolParams p, const __grid_constant__ PoolModes modes) {
  const PoolSegment s = p.segment[blockIdx.x];
  const float* x = p.pooled + blockIdx.x * p.out_channels;
  const T* d_out = static_cast<const T*>(p.d_out) + blockIdx.x * p.d_out_stride;
  float* d_x = p.d_pooled + blockIdx.x * p.out_channels;

  float by = 1, along = 0;
  if (p.normalize) {
    float dots[2]{};  // |x|², x · d_out
    for (int64_t i = threadIdx.x; i < p.out_channels; i += threads) {
      dots[0] += x[i] * x[i];
      dots[1] += x[i] * to_float(d_out[i]);
    }
    sum_over_block(dots);
    const float norm = sqrtf(dots[0]);
    by = divisor(norm, p.eps);
    along = norm < p.eps || norm == 0 ? 0 : dots[1] / norm / norm;
  }
  for (int m = 0; m < modes.count; m++) {
    const float n = float(denominator(s, modes.mode[m]));
    const int64_t end = least(p.out_channels, (m + 1) * p.channels);
    for (int64_t i = m * p.channels + threadIdx.x; i < end; i += threads) {
      const float d = p.normalize ? (to_float(d_out[i]) - along * x[i]) / by : to_float(d_out[i]);
      d_x[i] = s.count ? d / n : 0;
    }
  }
}

// N values of 4 bytes; beyond the first n, 0
template <int N, class S>
__device__ void load_values(S (&x)[N], const S* from, int n) {
  if (n == N && is_aligned(from)) {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      const uint4 bits = *reinterpret_cast<const uint4*>(from + i);
      memcpy(x + i, &bits, 16);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; i++) x[i] = i < n ? from[i] : 0;
  }
}

enum class Layout : int32_t { padded, packed, spans };

// [from, to): the segments that may touch rows [begin, end); each one is looked at more closely.
struct Candidates {
  int32_t from, to;  // a block each launched them: they fit

  __device__ Candidates(const PoolParams& p, Layout layout, int64_t begin, int64_t end)
      : from(0), to(int32_t(p.segments)) {
    if (layout == Layout::padded) {
      from = int32_t(begin / p.length);
      to = int32_t((end - 1) / p.length + 1);
    } else if (layout == Layout::packed) {  // they lie in order: the first that ends after begin, that starts at end
      from = first_where(p, [&](const PoolSegment& s) { return s.end > begin; });
      to = first_where(p, [&](const PoolSegment& s) { return s.start >= end; });
    }
  }
  template <class Predicate>
  __device__ static int32_t first_where(const PoolParams& p, const Predicate& holds) {
    int32_t low = 0, high = int32_t(p.segments);
    while (low < high) {
      const int32_t middle = low + (high - low) / 2;
      if (holds(p.segment[middle])) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    return low;
  }
};

__device__ inline int64_t count_visible(const PoolParams& p, int64_t begin, int64_t end) {
  if (!p.mask) return most(0, end - begin);
  int64_t n = 0;
  for (int64_t row = begin; row < end; row += 64) n += __popcll(visible_bits(p, row, end));
  return n;
}

// A block of d_rows writes 64 rows, 32 × 16 bytes of each. A warp takes 2 or 4 neighbouring rows at a time, as many as
// registers allow without spills: what d_pooled holds is loaded once for them.
constexpr int64_t block_rows = 64;
template <class T>
constexpr int warp_rows = 16 / Pack<T>::size;

// Bits low … high, those that there are.
__device__ inline uint32_t bits_between(int64_t low, int64_t high) {
  low = most(low, 0), high = least(high, 31);
  return low > high ? 0 : (~0u << low) & (~0u >> (31 - high));
}

// gradient += what segment `index` gives to rows [begin, begin + warp_rows<T>) and columns [c, c + V); `visible` has a
// bit for each of these rows. The same segment for a whole warp.
template <class T>
__device__ void add_gradient(float (&gradient)[warp_rows<T>][Pack<T>::size], const PoolParams& p,
                             const PoolModes& modes, int32_t index, int64_t begin, uint32_t visible, int64_t c) {
  constexpr int V = Pack<T>::size;
  const PoolSegment& s = p.segment[index];
  const int64_t first = s.first - begin, last = s.last - begin, start = s.start - begin;  // seen from these rows
  const uint32_t pooled = visible & bits_between(first, last);
  if (!pooled) return;
  for (int m = 0; m < modes.count; m++) {
    const int mode = modes.mode[m];
    const int64_t i = index * p.out_channels + m * p.channels + c;
    const int n = int(clamp(least(p.channels, p.out_channels - m * p.channels) - c, 0, V));
    float d[V];
    load_values(d, p.d_pooled + i, n);
    uint32_t rows = pooled;
    if (mode == PoolMode::cls) rows &= bits_between(first, first);
    if (mode == PoolMode::lasttoken) rows &= bits_between(last, last);
    if (mode == PoolMode::max) {
      int32_t row_of_largest[V];
      load_values(row_of_largest, p.argmax + i, n);
#pragma unroll
      for (int r = 0; r < warp_rows<T>; r++) {
#pragma unroll
        for (int v = 0; v < V; v++) {
          if ((rows >> r & 1) && row_of_largest[v] == r - int32_t(start)) gradient[r][v] += d[v];
        }
      }
      continue;
    }
    const bool ranked = mode == PoolMode::weightedmean;  // a row's weight is its rank in the segment
    const int64_t rank = ranked ? count_visible(p, s.start, begin) : 0;
    const uint32_t from_start = visible & bits_between(start, 31);
#pragma unroll
    for (int r = 0; r < warp_rows<T>; r++) {
      const float weight = ranked ? float(rank + __popc(from_start << (31 - r))) : 1;
#pragma unroll
      for (int v = 0; v < V; v++) {
        if (rows >> r & 1) gradient[r][v] += weight * d[v];
      }
    }
  }
}

template <class T>
__global__ void __launch_bounds__(threads, 3)
    d_rows(const PoolParams p, const __grid_constant__ PoolModes modes, const Layout layout) {
  constexpr int V = Pack<T>::size;
  __shared__ uint32_t votes[2][warps];  // in turn, so that one barrier is enough
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const unsigned slabs = unsigned(divide_up(p.channels, 32 * V));
  const int64_t block_begin = int64_t(blockIdx.x / slabs) * block_rows;
  const int64_t block_end = least(block_begin + block_rows, p.rows);
  const int64_t c = int64_t(blockIdx.x % slabs * 32 + lane) * V;
  const Candidates candidates(p, layout, block_begin, block_end);

  int turn = 0;
  for (int64_t row = block_begin; row < block_end; row += warps * warp_rows<T>) {
    const int64_t begin = row + warp * warp_rows<T>, end = least(begin + warp_rows<T>, p.rows);
    const uint32_t visible = uint32_t(visible_bits(p, begin, end));
    float gradient[warp_rows<T>][V]{};
    // 256 segments at a time, each thread looks whether one touches the block. Those that do are added in their order.
    for (int32_t from = candidates.from; from < candidates.to; from += threads, turn ^= 1) {
      bool touches = false;
      if (int(threadIdx.x) < candidates.to - from) {
        const PoolSegment& s = p.segment[from + int(threadIdx.x)];
        touches = s.count && s.first < block_end && s.last >= block_begin;
      }
      const uint32_t vote = __ballot_sync(~0u, touches);
      if (lane == 0) votes[turn][warp] = vote;
      __syncthreads();
      for (int w = 0; w < warps; w++) {
        for (uint32_t bits = votes[turn][w]; bits; bits &= bits - 1) {
          add_gradient<T>(gradient, p, modes, from + 32 * w + __ffs(bits) - 1, begin, visible, c);
        }
      }
    }
    T* d_hidden = static_cast<T*>(p.d_hidden) + begin * p.channels + c;
#pragma unroll
    for (int r = 0; r < warp_rows<T>; r++) {
      if (begin + r < p.rows) store(d_hidden + r * p.channels, gradient[r], int(clamp(p.channels - c, 0, V)));
    }
  }
}

// ----------------------------------------------------------------------------------------------------- what to launch

inline PoolModes needed_modes(const PoolParams& p) {
  PoolModes modes{int32_t(least(p.modes, divide_up(p.out_channels, p.channels))), {}};
  for (int m = 0; m < modes.count; m++) modes.mode[m] = uint8_t(p.mode[m]);
  return modes;
}

inline int needed_statistics(const PoolModes& modes) {
  int needed = no_statistic;
  for (int m = 0; m < modes.count; m++) {
    const int mode = modes.mode[m];
    if (mode == PoolMode::cls || mode == PoolMode::lasttoken) continue;
    needed |= mode == PoolMode::max ? maxima : mode == PoolMode::weightedmean ? weighted_sums : sums;
  }
  return needed;
}

// launch(kernel, blocks, arguments…) runs a kernel; T is the dtype of hidden.
template <class T, class Launch>
void launch_forward(const PoolParams& p, const PoolPlaces& places, const Launch& launch) {
  if (p.segments == 0 || p.out_channels == 0) return;
  const PoolModes modes = needed_modes(p);
  const int64_t blocks = p.segments * divide_up(least(p.channels, p.out_channels), slab_lanes * Pack<T>::size);
  launch(find_segments, divide_up(p.segments, warps), p, places);
  switch (needed_statistics(modes)) {
    case no_statistic: launch(pool_rows<T, no_statistic>, blocks, p, modes); break;
    case sums: launch(pool_rows<T, sums>, blocks, p, modes); break;
    case weighted_sums: launch(pool_rows<T, weighted_sums>, blocks, p, modes); break;
    case maxima: launch(pool_rows<T, maxima>, blocks, p, modes); break;
    default: launch(pool_rows<T, every_statistic>, blocks, p, modes);
  }
  if (p.normalize) launch(normalize<T>, p.segments, p);
}

template <class T, class Launch>
void launch_backward(const PoolParams& p, const PoolPlaces& places, const Launch& launch) {
  if (p.rows == 0 || p.channels == 0) return;
  const PoolModes modes = needed_modes(p);
  const Layout layout = places.spans.data ? Layout::spans : places.cu_seqlens.data ? Layout::packed : Layout::padded;
  if (p.segments > 0) {
    launch(find_segments, divide_up(p.segments, warps), p, places);
    launch(d_normalize<T>, p.segments, p, modes);
  }
  const int64_t blocks = divide_up(p.rows, block_rows) * divide_up(p.channels, 32 * Pack<T>::size);
  launch(d_rows<T>, blocks, p, modes, layout);
}

// run(T) with T a value of the dtype
template <class Run>
void for_dtype(DType dtype, const Run& run) {
  switch (dtype) {
    case DType::f32: return run(float{});
    case DType::bf16: return run(Bf16{});
    case DType::f16: return run(F16{});
  }
}

template <class Launch>
void forward(const PoolParams& p, const PoolPlaces& places, const Launch& launch) {
  for_dtype(p.dtype, [&](auto value) { launch_forward<decltype(value)>(p, places, launch); });
}

template <class Launch>
void backward(const PoolParams& p, const PoolPlaces& places, const Launch& launch) {
  for_dtype(p.dtype, [&](auto value) { launch_backward<decltype(value)>(p, places, launch); });
}

}  // namespace ek::cuda
