// SPDX-License-Identifier: Apache-2.0
// One tile of a product in float or double on the ordinary units: for float32 and float64 inputs,
// and for mixed ones (16-bit states, float32 head), which are widened as they are read. Sums run
// in steps of 128 that are added up separately: a single chain over a long row would lose digits.
#pragma once
#include "head_gemm.cuh"

namespace spo::cuda {

template <class T>
struct SimtMultiply {
  using Real = T;
  using Storage = Real;                                       // of dz
  static constexpr int kSide = 16;                            // threads along either edge
  static constexpr int kTile = sizeof(Real) == 4 ? 128 : 64;  // of the output
  static constexpr int kPitch = kTile + 4;
  static constexpr int kSteps = 16, kChain = 128;
  static constexpr int kEach = kTile / kSide;  // outputs of a thread along either edge
  static constexpr int kOperand = kSteps * kPitch;
  static constexpr int kSharedBytes = kTile * kPitch * sizeof(Real);
  static_assert(2 * kOperand <= kTile * kPitch, "the operands lie where the tile will be");

  template <RowIs kA, RowIs kB>
  static __device__ void run(const Product& p, int64_t row0, int64_t col0) {
    Real* const a = shared_memory<Real>();
    Real* const b = a + kOperand;
    const int x = threadIdx.x % kSide, y = threadIdx.x / kSide;
    Real total[kEach][kEach] = {}, sums[kEach][kEach] = {};
    for (int64_t k = 0; k < p.k; k += kSteps) {
      load_operand<kA>(p.a, row0, p.m, k, p.k, a);
      load_operand<kB>(p.b, col0, p.n, k, p.k, b);
      __syncthreads();
#pragma unroll
      for (int step = 0; step < kSteps; step++)
#pragma unroll
        for (int i = 0; i < kEach; i++)
#pragma unroll
          for (int j = 0; j < kEach; j++)
            sums[i][j] += a[step * kPitch + y + i * kSide] * b[step * kPitch + x + j * kSide];
      __syncthreads();
      if ((k + kSteps) % kChain == 0 || k + kSteps >= p.k) {
#pragma unroll
        for (int i = 0; i < kEach; i++)
#pragma unroll
          for (int j = 0; j < kEach; j++) total[i][j] += sums[i][j], sums[i][j] = 0;
      }
    }
#pragma unroll
    for (int i = 0; i < kEach; i++)
#pragma unroll
      for (int j = 0; j < kEach; j++) a[(y + i * kSide) * kPitch + x + j * kSide] = total[i][j];
    __syncthreads();
  }

 private:
  // Into [kSteps][kPitch]; neighbouring threads read neighbouring numbers of a row.
  template <RowIs kRow>
  static __device__ void load_operand(const RowsView& view, int64_t output0, int64_t outputs,
                                      int64_t step0, int64_t steps, Real* shared) {
#pragma unroll 2
    for (int i = threadIdx.x; i < kTile * kSteps; i += kGemmThreads) {
      constexpr bool kByOutput = kRow == RowIs::kOutput;
      const int output = kByOutput ? i / kSteps : i % kTile;
      const int step = kByOutput ? i % kSteps : i / kTile;
      const bool inside = output0 + output < outputs && step0 + step < steps;
      const int64_t row = kByOutput ? output0 + output : step0 + step;
      const int64_t col = kByOutput ? step0 + step : output0 + output;
      shared[step * kPitch + output] = inside ? view.number<Real>(row, col) : Real(0);
    }
  }
};

}  // namespace spo::cuda
