// SPDX-License-Identifier: Apache-2.0
// SIMD numbers as compiler vectors (GCC and Clang), so that the formulas of math/ run on them
// unchanged and one source serves every instruction set. exp and tanh are within about one unit in
// the last place.
#pragma once
#include <cstdint>
#include <cstring>

#include "../math/portable.h"

namespace spo {

template <class Real, int kBytes>
struct Vector {
  typedef Real type __attribute__((vector_size(kBytes)));
  typedef Real unaligned __attribute__((vector_size(kBytes), aligned(alignof(Real))));
};

template <class Real>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  using Bits = int32_t;
  static constexpr int kMantissaBits = 23, kBias = 127, kTerms = 7;
  static constexpr float kLowest = -87.33654f;  // normal results only
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
};

template <>
struct ExpConstants<double> {
  using Bits = int64_t;
  static constexpr int kMantissaBits = 52, kBias = 1023, kTerms = 13;
  static constexpr double kLowest = -708.39641853226408;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLn2High = 6.93145751953125e-1, kLn2Low = 1.42860682030941723212e-6;
};

template <class Real, class V>
struct VectorMath {
  using C = ExpConstants<Real>;
  typedef typename C::Bits BitsVector __attribute__((vector_size(sizeof(V))));

  // x = n ln2 + r with |r| <= ln2 / 2: returns 2^n and exp(r) - 1 by its Taylor series.
  static SPO_HD V split(V x, V* power) {
    const V shifted = x * Real(1.4426950408889634) + C::kRound;  // n sits in the low bits
    const V n = shifted - C::kRound;
    const V r = (x - n * C::kLn2High) - n * C::kLn2Low;
    V series = V{} + factorial_inverse(C::kTerms);
#pragma GCC unroll 16
    for (int k = C::kTerms - 1; k >= 2; k--) series = series * r + factorial_inverse(k);
    BitsVector bits, round_bits;
    const V round = V{} + C::kRound;
    std::memcpy(&bits, &shifted, sizeof(V));
    std::memcpy(&round_bits, &round, sizeof(V));
    bits = (bits - round_bits + C::kBias) << C::kMantissaBits;
    std::memcpy(power, &bits, sizeof(V));
    return r + r * r * series;
  }

  static constexpr Real factorial_inverse(int k) {
    Real f = 1;
    for (int i = 2; i <= k; i++) f *= i;
    return 1 / f;
  }

  static SPO_HD V clamp(V x, Real low, Real high) {  // comparisons are false for NaN, which stays
    x = x < low ? V{} + low : x;
    return x > high ? V{} + high : x;
  }

  // For x up to 88 (709 in double); exponents of probabilities are never above 0. Below the normal
  // numbers it is 0.
  static SPO_HD V exp(V x) {
    V power;
    const V em1 = split(x < C::kLowest ? V{} + C::kLowest : x, &power);
    return x < C::kLowest ? V{} : power + power * em1;
  }

  static SPO_HD V tanh(V x, V* slope) {
    V power;
    const V tail = split(clamp(x, Real(-20), Real(20)) * 2, &power);
    const V em1 = power * tail + (power - 1);
    *slope = 4 * (em1 + 1) / ((em1 + 2) * (em1 + 2));
    return em1 / (em1 + 2);
  }
};

}  // namespace spo
