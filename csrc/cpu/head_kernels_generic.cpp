// SPDX-License-Identifier: Apache-2.0
// head_kernels.h for any processor (16-byte vectors: SSE2, NEON), and the choice among the
// instruction sets.
#define SPO_ISA generic
#define SPO_VECTOR_BYTES 16
#define SPO_TILE_ROWS 6
#include "head_kernels_impl.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace spo {

#if defined(__x86_64__)
namespace avx2 {
template <class Real>
const HeadKernels<Real>& kernels(const char*);
}
namespace avx512 {
template <class Real>
const HeadKernels<Real>& kernels(const char*);
}
#endif

namespace {

bool supports(const std::string& isa) {
#if defined(__x86_64__)
  if (isa == "avx512")
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (isa == "avx2") return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return isa == "generic";
}

std::string choose_isa() {
  if (const char* asked = std::getenv("SPO_CPU_ISA")) {
    if (supports(asked)) return asked;
    throw std::runtime_error(
        std::string("SPO_CPU_ISA must be avx512, avx2 or generic and supported "
                    "by this processor, got ") +
        asked);
  }
  return supports("avx512") ? "avx512" : supports("avx2") ? "avx2" : "generic";
}

}  // namespace

template <class Real>
const HeadKernels<Real>& head_kernels() {
  static const std::string isa = choose_isa();
#if defined(__x86_64__)
  if (isa == "avx512") return avx512::kernels<Real>("avx512");
  if (isa == "avx2") return avx2::kernels<Real>("avx2");
#endif
  return generic::kernels<Real>("generic");
}

template const HeadKernels<float>& head_kernels<float>();
template const HeadKernels<double>& head_kernels<double>();

}  // namespace spo
