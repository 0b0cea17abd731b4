// The gated unit of latent attention's feed-forward, g = a · gelu(gate), and its gradient, in one pass each.
#include "gated.h"

#include <math.h>

#include "simd.h"

namespace ek::EK_VARIANT {
namespace {

constexpr int64_t part_rows = 16;  // sums of so many rows are added up: long sums lose fewer digits

template <class T>
struct Lanes {
  using V = Vec;
  static constexpr int64_t n = W;
};
template <>
struct Lanes<double> {  // for checks of gradients: right, not fast
  using V = double;
  static constexpr int64_t n = 1;
};
EK_INLINE double load(const double* p) { return *p; }
EK_INLINE void store(double* p, double x) { *p = x; }
EK_INLINE double load_at(const double* p, int64_t i, int64_t) { return p[i]; }
EK_INLINE void store_at(double* p, int64_t i, int64_t, double x) { p[i] = x; }

// Φ(x) and its derivative φ(x). Φ(-|x|) = e^(-x²/2) · t · P(t) with t = 1 / (1 + 0.33 |x|): the minimax polynomial in
// float64 is off by 2.2e-9, and e^(-x²/2) serves φ too.
EK_INLINE void normal(Vec x, Vec& below, Vec& density) {
  const Vec e = exp(-0.5f * x * x);
  const Vec t = 1.0f / (1.0f + 0.33f * select(x < 0, -x, x));
  Vec y = 4.368919841948e-2f * t - 2.1166379009936e-1f;
  y = y * t + 3.1351380182001e-1f;
  y = y * t - 7.0673917047613e-2f;
  y = y * t + 1.7011800792118e-1f;
  y = y * t + 1.2283089556831e-1f;
  y = y * t + 1.3218580560629e-1f;
  const Vec tail = y * t * e;
  below = select(x < 0, tail, 1.0f - tail);
  density = 0.398942280f * e;
}
EK_INLINE void normal(double x, double& below, double& density) {
  below = 0.5 * ::erfc(-0.70710678118654752 * x);
  density = 0.39894228040143268 * ::exp(-0.5 * x * x);
}

template <class T>
EK_INLINE void add(T* sums, const T* x) {
  for (int64_t i = 0; i < gated_block; i += Lanes<T>::n) store(sums + i, load(sums + i) + load(x + i));
}

template <class T>
EK_INLINE void write(T* to, const T* x, int64_t n) {
  for (int64_t i = 0; i < n; i++) to[i] = x[i];
}

// sums[piece] = Σ a · gate · Φ(gate)
template <class T>
void sums_typed(const GatedParams& p, int64_t piece, int64_t block) {
  using V = typename Lanes<T>::V;
  const int64_t from = block * gated_block, n = least(gated_block, p.width - from), end = p.ends[piece];
  T sums[gated_block] = {};
  for (int64_t begin = piece ? p.ends[piece - 1] : 0; begin < end; begin += part_rows) {
    T part[gated_block] = {};
    for (int64_t row = begin; row < least(begin + part_rows, end); row++) {
      const T* a = static_cast<const T*>(p.u) + row * p.u_stride + from;
      const T* gate = a + p.width;
      for (int64_t i = 0; i < n; i += Lanes<T>::n) {
        const V x = load_at(gate, i, n);
        V below, density;
        normal(x, below, density);
        store(part + i, load(part + i) + load_at(a, i, n) * (x * below));
      }
    }
    add(sums, part);
  }
  write(static_cast<T*>(p.sums) + piece * p.width + from, sums, n);
}

// d_a = d_g · gate · Φ(gate), d_gate = d_g · a · (Φ(gate) + gate · φ(gate))
template <class T>
void d_u_typed(const GatedParams& p, int64_t block) {
  using V = typename Lanes<T>::V;
  const int64_t from = block * gated_block, n = least(gated_block, p.width - from);
  T sums[2][gated_block] = {};
  for (int64_t begin = 0; begin < p.rows; begin += part_rows) {
    T part[2][gated_block] = {};
    for (int64_t row = begin; row < least(begin + part_rows, p.rows); row++) {
      const T* a = static_cast<const T*>(p.u) + row * p.u_stride + from;
      const T* gate = a + p.width;
      const T* d_g = static_cast<const T*>(p.d_g) + p.sequence[row] * p.width + from;
      T* d_a = static_cast<T*>(p.d_u) + row * 2 * p.width + from;
      T* d_gate = d_a + p.width;
      for (int64_t i = 0; i < n; i += Lanes<T>::n) {
        const V x = load_at(gate, i, n), d = load_at(d_g, i, n);
        V below, density;
        normal(x, below, density);
        const V of_a = d * (x * below), of_gate = d * load_at(a, i, n) * (below + x * density);
        store_at(d_a, i, n, of_a);
        store_at(d_gate, i, n, of_gate);
        store(part[0] + i, load(part[0] + i) + of_a);
        store(part[1] + i, load(part[1] + i) + of_gate);
      }
    }
    add(sums[0], part[0]);
    add(sums[1], part[1]);
  }
  for (int64_t half = 0; half < 2; half++) write(static_cast<T*>(p.d_bias) + half * p.width + from, sums[half], n);
}

void sums(const GatedParams& p, int64_t piece, int64_t block) {
  return p.wide ? sums_typed<double>(p, piece, block) : sums_typed<float>(p, piece, block);
}
void d_u(const GatedParams& p, int64_t block) {
  return p.wide ? d_u_typed<double>(p, block) : d_u_typed<float>(p, block);
}

}  // namespace

extern const GatedKernels gated;  // without this line a const is private to the file
const GatedKernels gated = {sums, d_u};

}  // namespace ek::EK_VARIANT
