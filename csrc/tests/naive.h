// What the C++ tests share: each supported variant in turn, and comparisons that NaN fails.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../cpu/variants.h"

namespace naive {

inline int failures = 0;

inline void report(const std::string& name, bool right) {
  std::printf("%s: %s\n", name.c_str(), right ? "right" : "WRONG");
  failures += !right;
}

inline std::vector<float> random(size_t n, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(n);
  for (float& value : values) value = normal(generator);
  return values;
}

// In bfloat16, cut off; `values` are the same numbers afterwards.
inline std::vector<uint16_t> as_bf16(std::vector<float>& values) {
  std::vector<uint16_t> halves(values.size());
  for (size_t i = 0; i < values.size(); i++) {
    uint32_t bits;
    std::memcpy(&bits, &values[i], 4);
    halves[i] = uint16_t(bits >> 16);
    bits &= 0xffff0000;
    std::memcpy(&values[i], &bits, 4);
  }
  return halves;
}

inline void from_bf16(const std::vector<uint16_t>& halves, std::vector<float>& values) {
  for (size_t i = 0; i < halves.size(); i++) {
    const uint32_t bits = uint32_t(halves[i]) << 16;
    std::memcpy(&values[i], &bits, 4);
  }
}

inline bool close(double got, double wanted, double tolerance = 1e-5) {
  return std::abs(got - wanted) <= tolerance * (1 + std::abs(wanted));
}

template <class Test>
int for_variants(const Test& test) {
  for (const ek::Variant& variant : ek::variants()) {
    if (variant.supported) {
      test(variant);
    } else {
      std::printf("%s: SKIPPED, this CPU lacks it\n", variant.name.c_str());
    }
  }
  return failures != 0;
}

}  // namespace naive
