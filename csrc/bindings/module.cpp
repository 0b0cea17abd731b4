// What Python may ask that is no operator. No torch header here, and nothing of pybind11 that costs seconds to compile.
#include <pybind11/pybind11.h>

#include "../cpu/variants.h"
#include "signatures.h"

namespace py = pybind11;

static py::dict variants() {  // name -> does this CPU support it; best first
  py::dict supported;
  for (const ek::Variant& variant : ek::variants()) supported[py::str(variant.name)] = variant.supported;
  return supported;
}

static py::list kernels() {
  py::list all;
  for (const auto& [name, signature] : ek::kernels()) all.append(py::make_tuple(name, signature));
  return all;
}

PYBIND11_MODULE(_native, m) {
  m.def("kernels", &kernels);
  m.def("variants", &variants);
  m.def("variant", [] { return ek::variant().name; });
  m.def("force_variant", &ek::force_variant, py::arg("name") = "");
  m.attr("has_cuda") = bool(EK_CUDA);  // from setup.py
}
