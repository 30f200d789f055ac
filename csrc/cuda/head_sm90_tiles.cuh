// SPDX-License-Identifier: Apache-2.0
// The order in which the blocks of a Hopper product take its tiles; no CUTLASS in it.
#pragma once
#include "head_sm90.h"

namespace spo::cuda {

// The tiles of one product. Row tiles come in pairs, one for each block of a cluster; `pairs` and
// `steps` are lists of the ones to compute, null meaning all.
struct TileList {
  int64_t m, n, k;
  const int32_t *pairs, *pair_count, *steps, *step_count;
  const int32_t* skip;  // if not null and not zero: nothing to do

  // Pairs whose rows of A stay in the L2 cache together while the column tiles pass by.
  static constexpr int kTogether = 8;

  __device__ int num_pairs() const {
    return pairs ? *pair_count : static_cast<int>((m + kSm90PairRows - 1) / kSm90PairRows);
  }
  __device__ int num_cols() const {
    return static_cast<int>((n + kSm90TileCols - 1) / kSm90TileCols);
  }
  __device__ int num_steps() const {
    return steps ? *step_count : static_cast<int>((k + kSm90Steps - 1) / kSm90Steps);
  }
  __device__ int64_t size() const { return int64_t(num_pairs()) * num_cols(); }

  struct Tile {
    int row, col;  // in tiles
  };
  __device__ Tile tile(int64_t index, int rank) const {
    const int64_t band = int64_t(kTogether) * num_cols();
    const int first = static_cast<int>(index / band) * kTogether;
    const int left = num_pairs() - first, width = left < kTogether ? left : kTogether;
    const int within = static_cast<int>(index % band);
    const int pair = first + within % width;
    return {(pairs ? pairs[pair] : pair) * 2 + rank, within / width};
  }
};

// Positions along k, as CUTLASS's main loop wants them.
struct StepIterator {
  const int32_t* list;
  int at;
  __device__ int operator*() const { return list ? list[at] : at; }
  __device__ StepIterator& operator++() { return ++at, *this; }
};

}  // namespace spo::cuda
