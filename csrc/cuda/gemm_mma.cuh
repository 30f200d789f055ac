// SPDX-License-Identifier: Apache-2.0
// One 128 x 128 tile of a product of 16-bit matrices on the matrix units of sm_80 and later, with
// float sums. Both operands stream through three stages of shared memory by asynchronous copies.
// Rows of shared memory are padded by 16 bytes: eight rows then start in different banks, as
// ldmatrix wants.
#pragma once
#include "head_gemm.cuh"
#include "ptx.cuh"

namespace spo::cuda {

template <class T>
struct MmaMultiply {
  using Real = float;
  using Storage = T;
  static constexpr int kTile = 128, kPitch = kTile + 4;
  static constexpr int kSteps = 32, kStages = 3;  // steps of the sum per stage
  static constexpr int kChunk = 8;                // numbers in 16 bytes
  static constexpr int kOutputPitch = kSteps + kChunk, kStepPitch = kTile + kChunk;
  static constexpr int kOperand = kTile * kOutputPitch;  // the larger of both layouts
  static constexpr int kPipelineBytes = kStages * 2 * kOperand * sizeof(T);
  static constexpr int kTileBytes = kTile * kPitch * sizeof(float);
  static constexpr int kSharedBytes = kPipelineBytes > kTileBytes ? kPipelineBytes : kTileBytes;
  // Eight warps, two along m and four along n; each 64 x 32 as 4 x 4 products of 16 x 8.
  static constexpr int kWarpRows = 64, kWarpCols = 32;

  template <RowIs kA, RowIs kB>
  static __device__ void run(const Product& p, int64_t row0, int64_t col0) {
    T* const stages = shared_memory<T>();
    const int steps = static_cast<int>((p.k + kSteps - 1) / kSteps);
    const auto load = [&](int step) {
      T* const stage = stages + step % kStages * 2 * kOperand;
      load_operand<kA>(p.a, row0, p.m, int64_t(step) * kSteps, p.k, stage);
      load_operand<kB>(p.b, col0, p.n, int64_t(step) * kSteps, p.k, stage + kOperand);
    };
    float sums[4][4][4] = {};
    for (int step = 0; step < kStages - 1; step++) {
      if (step < steps) load(step);
      cp_async_commit();
    }
    for (int step = 0; step < steps; step++) {
      cp_async_wait<kStages - 2>();
      __syncthreads();  // the stage has arrived for all, and all have left the one loaded next
      if (step + kStages - 1 < steps) load(step + kStages - 1);
      cp_async_commit();
      const T* const stage = stages + step % kStages * 2 * kOperand;
      multiply_stage<kA, kB>(stage, stage + kOperand, sums);
    }
    cp_async_wait<0>();
    __syncthreads();
    store_tile(sums);
    __syncthreads();
  }

 private:
  // kRow == kOutput: [kTile][kOutputPitch], rows are outputs; kStep: [kSteps][kStepPitch].
  template <RowIs kRow>
  static __device__ void load_operand(const RowsView& view, int64_t output0, int64_t outputs,
                                      int64_t step0, int64_t steps, T* shared) {
    constexpr bool kByOutput = kRow == RowIs::kOutput;
    constexpr int kRows = kByOutput ? kTile : kSteps, kCols = kByOutput ? kSteps : kTile;
    constexpr int kRowPitch = kByOutput ? kOutputPitch : kStepPitch;
    const int64_t row0 = kByOutput ? output0 : step0, rows = kByOutput ? outputs : steps;
    const int64_t col0 = kByOutput ? step0 : output0, cols = kByOutput ? steps : outputs;
#pragma unroll
    for (int i = threadIdx.x; i < kRows * kCols / kChunk; i += kGemmThreads) {
      const int r = i / (kCols / kChunk), c = i % (kCols / kChunk) * kChunk;
      const int64_t left = row0 + r < rows ? cols - (col0 + c) : 0;
      const int valid = left < 0 ? 0 : left < kChunk ? static_cast<int>(left) : kChunk;
      load_chunk(view, row0 + r, col0 + c, valid, shared + r * kRowPitch + c);
    }
  }

  static __device__ void load_chunk(const RowsView& view, int64_t row, int64_t col, int valid,
                                    T* shared) {
    if (valid == 0) {
      *reinterpret_cast<uint4*>(shared) = uint4{0, 0, 0, 0};
      return;
    }
    const T* from = static_cast<const T*>(view.data) + view.offset(row) + col * view.col_stride;
    if (view.vectors) {
      cp_async_16(shared, from, valid * static_cast<int>(sizeof(T)));
    } else {
      for (int i = 0; i < kChunk; i++) shared[i] = i < valid ? from[i * view.col_stride] : T(0.f);
    }
  }

  template <RowIs kA, RowIs kB>
  static __device__ void multiply_stage(const T* a, const T* b, float (&sums)[4][4][4]) {
    const int warp = threadIdx.x / 32;
    const int m0 = warp / 4 * kWarpRows, n0 = warp % 4 * kWarpCols;
#pragma unroll
    for (int k = 0; k < kSteps; k += 16) {
      uint32_t left[4][4], right[4][2];
#pragma unroll
      for (int i = 0; i < 4; i++) load_left<kA>(a, m0 + i * 16, k, left[i]);
#pragma unroll
      for (int j = 0; j < 4; j += 2) {
        uint32_t pair[4];
        load_right<kB>(b, n0 + j * 8, k, pair);
        right[j][0] = pair[0], right[j][1] = pair[1];
        right[j + 1][0] = pair[2], right[j + 1][1] = pair[3];
      }
#pragma unroll
      for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) mma_16x8x16<T>(sums[i][j], left[i], right[j]);
    }
  }

  // The 16 x 16 left factor at (m, k): its quarters in the order (0, 0), (8, 0), (0, 8), (8, 8).
  template <RowIs kRow>
  static __device__ void load_left(const T* shared, int m, int k, uint32_t (&out)[4]) {
    const int lane = threadIdx.x % 32, quarter = lane / 8, r = lane % 8;
    const int dm = quarter % 2 * 8, dk = quarter / 2 * 8;
    if constexpr (kRow == RowIs::kOutput) {
      ldmatrix_x4(out, shared + (m + dm + r) * kOutputPitch + k + dk);
    } else {
      ldmatrix_x4_trans(out, shared + (k + dk + r) * kStepPitch + m + dm);
    }
  }

  // Two 16 x 8 right factors at (k, n) and (k, n + 8): quarters (k, n) = (0, 0), (8, 0), (0, 8),
  // (8, 8).
  template <RowIs kRow>
  static __device__ void load_right(const T* shared, int n, int k, uint32_t (&out)[4]) {
    const int lane = threadIdx.x % 32, quarter = lane / 8, r = lane % 8;
    const int dk = quarter % 2 * 8, dn = quarter / 2 * 8;
    if constexpr (kRow == RowIs::kOutput) {
      ldmatrix_x4(out, shared + (n + dn + r) * kOutputPitch + k + dk);
    } else {
      ldmatrix_x4_trans(out, shared + (k + dk + r) * kStepPitch + n + dn);
    }
  }

  static __device__ void store_tile(const float (&sums)[4][4][4]) {
    float* const tile = shared_memory<float>();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int row = warp / 4 * kWarpRows + lane / 4, col = warp % 4 * kWarpCols + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int j = 0; j < 4; j++)
#pragma unroll
        for (int part = 0; part < 4; part++)
          tile[(row + i * 16 + part / 2 * 8) * kPitch + col + j * 8 + part % 2] = sums[i][j][part];
  }
};

}  // namespace spo::cuda
