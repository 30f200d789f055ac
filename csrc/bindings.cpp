// SPDX-License-Identifier: Apache-2.0
// The Python module spo_ext._C: importing it registers the operators; it answers how it was built.
#include <pybind11/pybind11.h>
#include <torch/version.h>

#include <string>

#include "cpu/head_kernels.h"

#ifndef SPO_VERSION
#define SPO_VERSION "unknown"
#endif
#ifndef SPO_CUDA_TOOLKIT
#define SPO_CUDA_TOOLKIT ""
#endif
#ifndef SPO_CUDA_ARCHS
#define SPO_CUDA_ARCHS ""
#endif
#ifndef SPO_CUTLASS_VERSION
#define SPO_CUTLASS_VERSION ""
#endif

namespace {

// spo_ext/_compiled.py looks for these words in the file, since with another torch it may not load.
constexpr char kBuiltWith[] = "spo_ext was built with torch " TORCH_VERSION;

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#else
  return "gcc " __VERSION__;
#endif
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["version"] = SPO_VERSION;
  info["torch"] = std::string(kBuiltWith).substr(std::string(kBuiltWith).rfind(' ') + 1);
  info["compiler"] = compiler();
  info["cpu_isa"] = spo::head_kernels<float>().isa;
  info["cuda_toolkit"] = std::string(SPO_CUDA_TOOLKIT);
  info["cuda_archs"] = std::string(SPO_CUDA_ARCHS);
  info["cutlass"] = std::string(SPO_CUTLASS_VERSION);  // empty: without the Hopper kernel
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) { m.def("build_info", &build_info); }
