// SPDX-License-Identifier: Apache-2.0
// head_kernels.h for processors with AVX2. Standard headers come before the target is switched on:
// their inline functions may be shared with code that runs on any processor.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define SPO_ISA avx2
#define SPO_VECTOR_BYTES 32
#define SPO_TILE_ROWS 6
#include "head_kernels_impl.h"

namespace spo::avx2 {
template const HeadKernels<float>& kernels<float>(const char*);
template const HeadKernels<double>& kernels<double>(const char*);
}  // namespace spo::avx2

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
