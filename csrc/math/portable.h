// SPDX-License-Identifier: Apache-2.0
// What the formulas in this folder need from the language, for the host compiler and for nvcc:
// functions that are always inlined (so that one formula compiled for several instruction sets
// never leaves a shared out-of-line copy behind) and the elementary functions of a number type. A
// number is float, double, or on the CPU a SIMD vector of them (cpu/simd.h adds Math<vector>).
#pragma once
#include <cmath>
#include <limits>

#if defined(__CUDACC__)
#define SPO_HD __host__ __device__ __forceinline__
#else
#define SPO_HD inline __attribute__((always_inline))
#endif

namespace spo {

SPO_HD bool is_finite(double value) { return value - value == 0; }

template <class T>
struct Math;

template <class Real>
struct ScalarMath {
  static SPO_HD Real exp(Real x) { return ::exp(x); }

  // tanh(x), and 1 - tanh(x)^2 without the cancellation at large |x|.
  static SPO_HD Real tanh(Real x, Real* slope) {
    const Real limit = Real(20);  // tanh is 1 to the last bit of a double beyond
    const Real clamped = x > limit ? limit : (x < -limit ? -limit : x);
    const Real em1 = ::expm1(2 * clamped);
    *slope = 4 * (em1 + 1) / ((em1 + 2) * (em1 + 2));
    return em1 / (em1 + 2);
  }
};

template <>
struct Math<float> : ScalarMath<float> {};
template <>
struct Math<double> : ScalarMath<double> {};

}  // namespace spo
