// What the C++ tests share: each supported variant in turn, and comparisons that NaN fails.
#pragma once
#include <cmath>
#include <cstdio>
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
