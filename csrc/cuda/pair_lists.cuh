// SPDX-License-Identifier: Apache-2.0
// The (row, block of entries) pairs that a sparse backward pass visits, listed by block with rows
// in order: a counting sort of which the host learns nothing. A row visits the blocks that it kept
// and the block of its label. Blocks are taken in waves, as many as the workspace holds pairs of;
// the host starts as many waves as there could be, and those past the last block find nothing to
// do.
#pragma once
#include "../kept.h"
#include "head_rows.cuh"

namespace spo::cuda {

// Beyond this many (token, block) pairs all of them are kept: the products of whole tiles are
// faster then, and what a backward pass has to be ready for stays small.
__host__ __device__ inline int64_t most_kept_pairs(int64_t tokens, int64_t blocks) {
  constexpr int64_t kMostBlocks = 64;  // per token
  return tokens * (blocks < 2 * kMostBlocks ? blocks : 2 * kMostBlocks) / 2;
}

// Rows are dealt out in ranges: one warp counts and lists a range, one lane per block.
constexpr int kRowRanges = 32, kPairThreads = 32 * kRowRanges;

template <class Real>
struct PairLists {
  RowRange tokens;
  const Real* dropped;  // [N, blocks], as the forward pass kept it
  int64_t blocks;
  int32_t* within;  // [blocks, kRowRanges + 1] pairs of the block in the ranges before
  int64_t* start;   // [blocks + 1] pairs of the blocks before
  int64_t* waves;   // [waves + 1] first block of each
  // of the wave under way, from its first pair on
  int64_t *row, *offset;  // in the list of tokens, in hidden

  __device__ bool keeps(int64_t row, int64_t block) const {
    return dropped[tokens.list.token[tokens.first + row] * blocks + block] < 0;
  }
  __device__ bool visits(int64_t row, int64_t block) const {
    return tokens.list.label[tokens.first + row] / kBlockEntries == block || keeps(row, block);
  }
  __device__ int32_t* ranges(int64_t block) const { return within + block * (kRowRanges + 1); }
  __device__ int64_t count(int64_t block) const { return ranges(block)[kRowRanges]; }
  // The first pair of a block, counted from that of its wave.
  __device__ int64_t first_pair(int wave, int64_t block) const {
    return start[block] - start[waves[wave]];
  }

  template <class Visit>
  __device__ void for_rows(int range, const Visit& visit) const {
    const int64_t size = tokens.size(), each = (size + kRowRanges - 1) / kRowRanges;
    for (int64_t row = range * each; row < (range + 1) * each && row < size; row++) visit(row);
  }
};

template <class Real>
__global__ void __launch_bounds__(kPairThreads) count_pairs(PairLists<Real> pairs) {
  __shared__ int32_t counts[kRowRanges][33];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t first = int64_t(blockIdx.x) * 32, block = first + lane;
  int32_t count = 0;
  if (block < pairs.blocks)
    pairs.for_rows(warp, [&](int64_t row) { count += pairs.visits(row, block); });
  counts[warp][lane] = count;
  __syncthreads();
  int32_t sum = counts[lane][warp];  // from here on a warp is a block, a lane a range
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int32_t before = __shfl_up_sync(kAllLanes, sum, distance);
    if (lane >= distance) sum += before;
  }
  if (first + warp >= pairs.blocks) return;
  int32_t* const ranges = pairs.ranges(first + warp);
  ranges[lane + 1] = sum;
  if (lane == 0) ranges[0] = 0;
}

// One warp. A wave ends before the block that would not fit: each two neighbours hold more than
// `capacity` pairs, which bounds their number.
template <class Real>
__global__ void __launch_bounds__(32)
    plan_waves(PairLists<Real> pairs, int64_t capacity, int most_waves) {
  const int lane = threadIdx.x;
  int64_t before = 0, wave_start = 0;
  int wave = 0;
  if (lane == 0) pairs.start[0] = 0, pairs.waves[0] = 0;
  for (int64_t first = 0; first < pairs.blocks; first += 32) {
    const int64_t block = first + lane;
    int64_t end = block < pairs.blocks ? pairs.count(block) : 0;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int64_t left = __shfl_up_sync(kAllLanes, end, distance);
      if (lane >= distance) end += left;
    }
    end += before;
    if (block < pairs.blocks) pairs.start[block + 1] = end;
    for (int i = 0; i < 32 && first + i < pairs.blocks; i++) {
      const int64_t this_end = __shfl_sync(kAllLanes, end, i);
      if (this_end - wave_start > capacity) {
        wave_start = before, wave++;
        SPO_DEVICE_CHECK(wave < most_waves, "more pairs than the forward pass may keep");
        if (lane == 0) pairs.waves[wave] = first + i;
      }
      before = this_end;
    }
  }
  for (int w = wave + 1 + lane; w <= most_waves; w += 32) pairs.waves[w] = pairs.blocks;
}

// A thread block for 32 blocks of one range, so that there are enough for every multiprocessor.
template <class Real>
__global__ void __launch_bounds__(32) list_pairs(PairLists<Real> pairs, int wave) {
  const int range = blockIdx.y;
  const int64_t block = int64_t(blockIdx.x) * 32 + threadIdx.x;
  if (block < pairs.waves[wave] || block >= pairs.waves[wave + 1]) return;
  int64_t at = pairs.first_pair(wave, block) + pairs.ranges(block)[range];
  pairs.for_rows(range, [&](int64_t row) {
    if (!pairs.visits(row, block)) return;
    pairs.row[at] = row;
    pairs.offset[at] = pairs.tokens.list.offset[pairs.tokens.first + row];
    at++;
  });
}

// The whole list goes one of two ways, the other finds no rows: everything was kept, or not.
template <class Real>
__global__ void choose_way(PairLists<Real> pairs, int64_t most, int64_t* exact, int64_t* sparse) {
  const bool all = pairs.start[pairs.blocks] > most;
  const int64_t rows = *pairs.tokens.list.count;
  *exact = all ? rows : 0, *sparse = all ? 0 : rows;
}

}  // namespace spo::cuda
