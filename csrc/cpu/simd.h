// Vectors of W floats in GCC's vector extensions: one source for every instruction set. For variant sources only, so
// everything lies in an anonymous namespace inside EK_VARIANT: the linker may never share it between variants.
#pragma once
#include <cstdint>
#include <utility>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "../params.h"

#define EK_INLINE inline __attribute__((always_inline))

namespace ek::EK_VARIANT {
namespace {

#if defined(EK_LANES)
constexpr int W = EK_LANES;  // the tests' way to run 16 lanes on any CPU
#elif defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;  // SSE2, NEON
#endif

// aligned(4): a row starts anywhere. may_alias: it is how memory of any type is read.
typedef float Vec __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef int32_t IVec __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef uint32_t UVec __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef uint16_t HVec __attribute__((vector_size(2 * W), aligned(2), may_alias));

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};
// Two Bf16, the first in the lower half: what dot products of bfloat16 take. A Vec holds W of them.
struct __attribute__((packed, aligned(2), may_alias)) Pair {
  uint32_t bits;
};

// Returns `call`, in which T is the type of elements of this DType.
#define BY_DTYPE(dtype, call) \
  switch (dtype) {            \
    case DType::f32: {        \
      using T = float;        \
      return call;            \
    }                         \
    case DType::bf16: {       \
      using T = Bf16;         \
      return call;            \
    }                         \
    case DType::f16: {        \
      using T = F16;          \
      return call;            \
    }                         \
  }

EK_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
EK_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
EK_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

EK_INLINE Vec splat(float x) { return x - Vec{}; }
EK_INLINE Vec select(IVec mask, Vec a, Vec b) { return mask ? a : b; }
// b where one is NaN. Of a constant GCC 12 makes a comparison and a blend.
#if defined(__AVX512F__) && !defined(EK_LANES)
EK_INLINE Vec larger(Vec a, Vec b) { return (Vec)_mm512_max_ps((__m512)a, (__m512)b); }
#elif defined(__AVX2__) && !defined(EK_LANES)
EK_INLINE Vec larger(Vec a, Vec b) { return (Vec)_mm256_max_ps((__m256)a, (__m256)b); }
#else
EK_INLINE Vec larger(Vec a, Vec b) { return a > b ? a : b; }
#endif

EK_INLINE float sum_lanes(Vec x) {
  float sum = 0;
  for (int lane = 0; lane < W; lane++) sum += x[lane];
  return sum;
}

EK_INLINE float max_lanes(Vec x) {
  float largest = x[0];
  for (int lane = 1; lane < W; lane++) largest = x[lane] > largest ? x[lane] : largest;
  return largest;
}

EK_INLINE Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
EK_INLINE void store(float* p, Vec x) { *reinterpret_cast<Vec*>(p) = x; }

// Past the caches, p aligned to a whole vector; fence() before another thread may read it.
#if defined(EK_LANES)
EK_INLINE void stream(float* p, Vec x) { store(p, x); }
EK_INLINE void fence() {}
#elif defined(__AVX512F__)
EK_INLINE void stream(float* p, Vec x) { _mm512_stream_ps(p, (__m512)x); }
EK_INLINE void fence() { _mm_sfence(); }
#elif defined(__AVX2__)
EK_INLINE void stream(float* p, Vec x) { _mm256_stream_ps(p, (__m256)x); }
EK_INLINE void fence() { _mm_sfence(); }
#else
EK_INLINE void stream(float* p, Vec x) { store(p, x); }
EK_INLINE void fence() {}
#endif

EK_INLINE Vec load(const Bf16* p) {
  const HVec bits = *reinterpret_cast<const HVec*>(p);
  return (Vec)(__builtin_convertvector(bits, UVec) << 16);
}

EK_INLINE UVec bf16_bits(Vec x) {  // to the nearest, ties to even, as torch does; a NaN stays one
  const UVec bits = (UVec)x;
  const UVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const UVec quiet_nan = (bits >> 16) | 0x40;
  const UVec is_nan = (UVec)(x != x);
  return (is_nan & quiet_nan) | (~is_nan & rounded);
}
EK_INLINE void store(Bf16* p, Vec x) { *reinterpret_cast<HVec*>(p) = __builtin_convertvector(bf16_bits(x), HVec); }

EK_INLINE Vec load(const Pair* p) {
  typedef float Unaligned __attribute__((vector_size(4 * W), aligned(2), may_alias));
  return *reinterpret_cast<const Unaligned*>(p);
}
EK_INLINE Vec broadcast(const float& x) { return splat(x); }
EK_INLINE Vec broadcast(const Pair& x) { return (Vec)(UVec{} + x.bits); }

// multiply_add<float>: sum + a · b. multiply_add<Pair>: sum + the two products of each lane's Pairs. side_by_side: lane
// i's numbers as a Pair; in_a_row: first's numbers as Pairs of neighbours, then second's.
template <class Operand>
EK_INLINE Vec multiply_add(Vec sum, Vec a, Vec b) {
  return sum + a * b;
}
#if defined(__AVX512BF16__) && !defined(EK_LANES)
constexpr bool has_pairs = true;
template <>
EK_INLINE Vec multiply_add<Pair>(Vec sum, Vec a, Vec b) {
  // With the intrinsic GCC 12 stores a tile's sums to the stack in every step: half the rate.
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
}
EK_INLINE Vec in_a_row(Vec first, Vec second) { return (Vec)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first); }
EK_INLINE Vec side_by_side(Vec first, Vec second) {
  const UVec halves = (UVec)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)first));
  return (Vec)(halves | (UVec)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)second)) << 16);
}
#else
#if defined(EK_LANES)  // slow, but what runs above is tested on any CPU
constexpr bool has_pairs = true;
#else
constexpr bool has_pairs = false;  // float32 products of what is converted are faster
#endif
template <>
EK_INLINE Vec multiply_add<Pair>(Vec sum, Vec a, Vec b) {
  const Vec low = (Vec)((UVec)a << 16) * (Vec)((UVec)b << 16);
  return sum + low + (Vec)((UVec)a & 0xffff0000) * (Vec)((UVec)b & 0xffff0000);
}
EK_INLINE Vec in_a_row(Vec first, Vec second) {
  Bf16 row[2 * W];
  store(row, first);
  store(row + W, second);
  return load(reinterpret_cast<const Pair*>(row));
}
EK_INLINE Vec side_by_side(Vec first, Vec second) { return (Vec)(bf16_bits(first) | bf16_bits(second) << 16); }
#endif

#if defined(__AVX512F__)
EK_INLINE Vec load(const F16* p) { return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
EK_INLINE void store(F16* p, Vec x) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__AVX2__)
EK_INLINE Vec load(const F16* p) { return (Vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
EK_INLINE void store(F16* p, Vec x) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
}
#else
// float16's exponent is rebased by a multiplication, which makes its subnormals right as well.
EK_INLINE Vec load(const F16* p) {
  const UVec bits = __builtin_convertvector(*reinterpret_cast<const HVec*>(p), UVec);
  const UVec magnitude = (bits & 0x7fff) << 13;
  const Vec finite = (Vec)magnitude * 0x1p112f;
  const UVec special = magnitude | 0x7f800000;
  const UVec is_special = (UVec)((bits & 0x7c00) == 0x7c00);
  return (Vec)(((is_special & special) | (~is_special & (UVec)finite)) | (bits & 0x8000) << 16);
}
EK_INLINE void store(F16* p, Vec x) {
  const UVec bits = (UVec)x, sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  const UVec normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Adding 0.5 shifts a subnormal's bits to the end of the significand, rounded by the addition itself.
  const UVec subnormal = (UVec)((Vec)magnitude + 0.5f) - 0x3f000000;
  const UVec is_subnormal = (UVec)((IVec)magnitude < 0x38800000), overflows = (UVec)((IVec)magnitude >= 0x477ff000);
  const UVec is_nan = (UVec)((IVec)magnitude > 0x7f800000);
  UVec half = (is_subnormal & subnormal) | (~is_subnormal & normal);
  half = (overflows & 0x7c00) | (~overflows & half);
  half = (is_nan & 0x7e00) | (~is_nan & half);
  *reinterpret_cast<HVec*>(p) = __builtin_convertvector(half | sign, HVec);
}
#endif

// The first n < W elements; the other lanes are 0 and nothing beyond is read or written.
template <class T>
EK_INLINE Vec load_first(const T* p, int64_t n) {
  T padded[W] = {};
  for (int64_t i = 0; i < n; i++) padded[i] = p[i];
  return load(padded);
}

template <class T>
EK_INLINE void store_first(T* p, Vec x, int64_t n) {
  T padded[W];
  store(padded, x);
  for (int64_t i = 0; i < n; i++) p[i] = padded[i];
}

// A whole vector at p + i, or what is left of n elements.
template <class T>
EK_INLINE Vec load_at(const T* p, int64_t i, int64_t n) {
  return i + W <= n ? load(p + i) : load_first(p + i, n - i);
}
template <class T>
EK_INLINE void store_at(T* p, int64_t i, int64_t n, Vec x) {
  if (i + W <= n) {
    store(p + i, x);
  } else {
    store_first(p + i, x, n - i);
  }
}

// e^x for -88 <= x <= 88, at -88 exactly 0, NaN for NaN; error < 1 ulp of normal numbers.
// x = n ln 2 + r with |r| <= ln 2 / 2, and a polynomial for e^r (Cephes' expf coefficients).
EK_INLINE Vec exp_within_88(Vec x) {
  const Vec shifted = x * 1.44269504f + (0x1.8p23f + 127);  // n + 127 in the low bits
  const Vec n = shifted - (0x1.8p23f + 127);
  const Vec r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Vec y = 1.9875691500e-4f * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.0f;
  return y * (Vec)((UVec)shifted << 23);  // times 2^n, 0 for n = -127
}

// e^x for x <= 88, 0 below -87.33 (float32's smallest normal number), NaN for NaN; error < 1 ulp.
EK_INLINE Vec exp(Vec x) { return select(x < -87.33654f, Vec{}, exp_within_88(x)); }

// ln x for normal x > 0, NaN for NaN; error < 1 ulp. x = 2^n (1 + f) with 1 + f in [√½, √2) (Cephes' logf
// coefficients).
EK_INLINE Vec log(Vec x) {
  const IVec bits = (IVec)x, n = (bits - 0x3f3504f3) >> 23;
  const Vec f = (Vec)(bits - (n << 23)) - 1.0f, e = __builtin_convertvector(n, Vec), square = f * f;
  Vec y = 7.0376836292e-2f * f - 1.1514610310e-1f;
  y = y * f + 1.1676998740e-1f;
  y = y * f - 1.2420140846e-1f;
  y = y * f + 1.4249322787e-1f;
  y = y * f - 1.6668057665e-1f;
  y = y * f + 2.0000714765e-1f;
  y = y * f - 2.4999993993e-1f;
  y = y * f + 3.3333331174e-1f;
  y = y * f * square + e * -2.12194440e-4f - 0.5f * square;
  return select(x != x, x, f + y + e * 0.693359375f);
}

// Of the 2 × 2 blocks of `step` lanes that a and b make up: the upper row, or the lower one, of the transposed.
template <int step, int... lane>
EK_INLINE Vec upper(Vec a, Vec b, std::integer_sequence<int, lane...>) {
  return __builtin_shufflevector(a, b, (lane & step ? W + lane - step : lane)...);
}
template <int step, int... lane>
EK_INLINE Vec lower(Vec a, Vec b, std::integer_sequence<int, lane...>) {
  return __builtin_shufflevector(a, b, (lane & step ? W + lane : lane + step)...);
}

// W vectors as a W × W matrix: blocks of W / 2 lanes first, down to single ones.
template <int step = W / 2>
EK_INLINE void transpose(Vec* x) {
  constexpr std::make_integer_sequence<int, W> lanes;
#pragma GCC unroll 16
  for (int i = 0; i < W; i++) {
    if (i & step) continue;
    const Vec a = x[i], b = x[i + step];
    x[i] = upper<step>(a, b, lanes);
    x[i + step] = lower<step>(a, b, lanes);
  }
  if constexpr (step > 1) transpose<step / 2>(x);
}

}  // namespace
}  // namespace ek::EK_VARIANT
