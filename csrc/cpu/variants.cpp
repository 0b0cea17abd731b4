#include "variants.h"

#include <stdexcept>

namespace ek {

#define DECLARE(variant)                   \
  namespace variant {                      \
  extern const PoolingKernels pooling;     \
  extern const AttentionKernels attention; \
  extern const InfoNCEKernels infonce;     \
  extern const GatedKernels gated;         \
  }
#define VARIANT(variant, supported) \
  {#variant, supported, variant::pooling, variant::attention, variant::infonce, variant::gated}

DECLARE(portable)
#if defined(EK_TESTS)
DECLARE(wide)
#endif
#if defined(__x86_64__)
DECLARE(avx2)
static const bool has_avx2 =
    __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
#if defined(EK_AVX512)
DECLARE(avx512)
DECLARE(avx512_bf16)
static const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
static const bool has_bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16");
#endif

static const std::vector<Variant> all = {
#if defined(EK_AVX512)
    VARIANT(avx512_bf16, has_bf16),
    VARIANT(avx512, has_avx512),
#endif
#if defined(__x86_64__)
    VARIANT(avx2, has_avx2),
#endif
    VARIANT(portable, true),
#if defined(EK_TESTS)
    VARIANT(wide, true),
#endif
};

static const Variant& find(const std::string& name) {
  for (const Variant& v : all) {
    if (v.supported && (name.empty() || name == v.name)) return v;
  }
  throw std::invalid_argument("no variant '" + name + "' on this CPU");
}

static const Variant* in_force = &find("");

const std::vector<Variant>& variants() { return all; }
const Variant& variant() { return *in_force; }
void force_variant(const std::string& name) { in_force = &find(name); }

}  // namespace ek
