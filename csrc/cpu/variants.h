// The kernels, once per instruction set that CMakeLists.txt builds them for.
#pragma once
#include <string>
#include <vector>

#include "attention.h"
#include "gated.h"
#include "infonce.h"
#include "pooling.h"

namespace ek {

struct Variant {
  std::string name;
  bool supported;  // by this CPU
  const PoolingKernels& pooling;
  const AttentionKernels& attention;
  const InfoNCEKernels& infonce;
  const GatedKernels& gated;
};

const std::vector<Variant>& variants();       // best first
const Variant& variant();                     // the one in force
void force_variant(const std::string& name);  // for tests; "" is the best one again

}  // namespace ek
