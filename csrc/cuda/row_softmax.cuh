// SPDX-License-Identifier: Apache-2.0
// A row of logits on the device: blocks of 256 columns, one warp per block and eight columns per
// lane, and the merge of the blocks' statistics in vocabulary order. The order of every sum is
// fixed by the number of columns alone.
#pragma once
#include "head_epilogues.cuh"

namespace spo::cuda {

constexpr int kBlockColumns = 256;

SPO_HD int64_t column_blocks(int64_t columns) {
  return (columns + kBlockColumns - 1) / kBlockColumns;
}

// How many columns of the row a block still has, and how to reach them.
template <class Storage>
struct RowPiece {
  using Element = std::remove_const_t<Storage>;
  static constexpr int kEach = kBlockColumns / 32;
  static constexpr int kVector = 16 / sizeof(Element);
  struct alignas(16) Vector {
    Element x[kVector];
  };

  Storage* first;
  int64_t stride, columns;
  bool aligned;  // stride 1, and first at a multiple of 16 bytes

  // The column of element e of a lane: neighbours lie in one load of 16 bytes, and neighbouring
  // lanes side by side.
  static __device__ int column(int lane, int e) {
    return (e / kVector * 32 + lane) * kVector + e % kVector;
  }
  __device__ bool whole() const { return aligned && columns >= kBlockColumns; }

  // Columns past the end are left as they are.
  template <class Real>
  __device__ void load(int lane, Real (&out)[kEach]) const {
    if (whole()) {
#pragma unroll
      for (int e = 0; e < kEach; e += kVector) {
        const Vector v = *reinterpret_cast<const Vector*>(first + column(lane, e));
#pragma unroll
        for (int k = 0; k < kVector; k++) out[e + k] = static_cast<Real>(v.x[k]);
      }
    } else {
#pragma unroll
      for (int e = 0; e < kEach; e++)
        if (column(lane, e) < columns) out[e] = static_cast<Real>(first[column(lane, e) * stride]);
    }
  }

  template <class Real>
  __device__ void store(int lane, const Real (&values)[kEach]) const {
    if (whole()) {
#pragma unroll
      for (int e = 0; e < kEach; e += kVector) {
        Vector v;
#pragma unroll
        for (int k = 0; k < kVector; k++) v.x[k] = static_cast<Element>(values[e + k]);
        *reinterpret_cast<Vector*>(first + column(lane, e)) = v;
      }
    } else {
#pragma unroll
      for (int e = 0; e < kEach; e++)
        if (column(lane, e) < columns)
          first[column(lane, e) * stride] = static_cast<Element>(values[e]);
    }
  }
};

// Every row of a [.., V] tensor of any strides.
template <class Storage>
struct RowsOf {
  Storage* data;
  RowOffsets offsets;
  int64_t stride, columns;

  __device__ RowPiece<Storage> piece(int64_t row, int64_t block) const {
    Storage* const first = data + offsets(row) + block * kBlockColumns * stride;
    return {first, stride, columns - block * kBlockColumns,
            stride == 1 && reinterpret_cast<uintptr_t>(first) % 16 == 0};
  }
};

// Adds the blocks to lane 0's total, in vocabulary order, by one warp: each lane merges a run of
// neighbouring blocks, then neighbouring lanes merge.
template <class Real>
__device__ void merge_blocks(const BlockStats<Real>* stats, int64_t blocks, double outer,
                             LogSumExp* total) {
  const int lane = threadIdx.x % 32;
  const int64_t run = (blocks + 31) / 32, begin = lane * run;
  LogSumExp mine;
  for (int64_t b = begin; b < begin + run && b < blocks; b++) mine.merge(stats[b], outer);
  merge_lanes(mine, outer, total);
}

}  // namespace spo::cuda
