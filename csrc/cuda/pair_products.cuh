// SPDX-License-Identifier: Apache-2.0
// The products of a sparse backward pass, block of entries by block, over the pairs of one wave
// (pair_lists.cuh): the same tiles and epilogues as the exact pass, with rows gathered from lists.
#pragma once
#include "head_problem.cuh"
#include "pair_lists.cuh"

namespace spo::cuda {

// What a product of one wave works on.
template <class Real, class Storage>
struct Wave {
  PairLists<Real> pairs;
  int number;
  RowsView hidden;         // of the pairs
  RowsView weight;         // of all entries
  const Storage* dz_data;  // [pairs, kBlockEntries]
  int64_t depth, vocabulary;

  __device__ RowsView dz() const {
    return {dz_data, c10::CppTypeToScalarType<Storage>::value, nullptr, kBlockEntries, 1, true};
  }
  __device__ int64_t entries(int64_t block) const {
    const int64_t left = vocabulary - block * kBlockEntries;
    return left < kBlockEntries ? left : kBlockEntries;
  }
};

// dz of a block's pairs: z again, then dL/d(product). A row that only its label brought here gets
// nothing for the other entries.
template <class Real, class Storage>
struct PairGradients {
  Wave<Real, Storage> wave;
  GradientEpilogue<Real, Storage> epilogue;  // of the whole vocabulary

  __device__ Product product(int64_t block, int64_t first, int64_t count) const {
    return {wave.hidden.from(first),
            wave.weight.from(block * kBlockEntries),
            count,
            wave.entries(block),
            wave.depth,
            {},
            false};
  }
  template <int kTile>
  __device__ void row(const Real* products, int64_t block, int64_t pair, int64_t first,
                      int64_t col0, int lane) const {
    GradientEpilogue<Real, Storage> own = epilogue;
    own.slice.first_entry += block * kBlockEntries;
    const int64_t row = wave.pairs.row[first + pair];
    own.template write<kTile>(products, row, first + pair, !wave.pairs.keeps(row, block), col0,
                              wave.entries(block), lane);
  }
};

// Rows of grad_weight: complete, since a block's pairs are all in one wave.
template <class Real, class Storage, class Out>
struct PairWeightGrads {
  Wave<Real, Storage> wave;
  WeightGradEpilogue<Real, Out> epilogue;  // of the whole vocabulary

  __device__ Product product(int64_t block, int64_t first, int64_t count) const {
    return {wave.dz().from(first),
            wave.hidden.from(first),
            count == 0 ? 0 : wave.entries(block),
            wave.depth,
            count,
            {},
            true};
  }
  template <int kTile>
  __device__ void row(const Real* products, int64_t block, int64_t entry, int64_t, int64_t col0,
                      int lane) const {
    epilogue.template row<kTile>(products, block * kBlockEntries + entry, col0, wave.depth, lane);
  }
};

// The tiles of every block, dealt out to as many thread blocks as the device holds.
template <class Multiply, RowIs kA, RowIs kB, class Products>
__global__ void __launch_bounds__(kGemmThreads) multiply_pairs(Products products) {
  using Real = typename Multiply::Real;
  constexpr int kTile = Multiply::kTile, kPitch = Multiply::kPitch;
  const auto& wave = products.wave;
  Real* const tile = shared_memory<Real>();
  const int64_t end = wave.pairs.waves[wave.number + 1];
  int64_t index = blockIdx.x, before = 0;  // of this thread block's next tile; tiles passed by
  for (int64_t block = wave.pairs.waves[wave.number]; block < end; block++) {
    const int64_t first = wave.pairs.first_pair(wave.number, block);
    const Product product = products.product(block, first, wave.pairs.count(block));
    const int64_t cols = (product.n + kTile - 1) / kTile;
    const int64_t tiles = (product.m + kTile - 1) / kTile * cols;
    for (; index < before + tiles; index += gridDim.x) {
      const int64_t row0 = (index - before) / cols * kTile, col0 = (index - before) % cols * kTile;
      Multiply::template run<kA, kB>(product, row0, col0);
      for (int r = threadIdx.x / 32; r < kTile && row0 + r < product.m; r += kGemmThreads / 32)
        products.template row<kTile>(tile + r * kPitch, block, row0 + r, first, col0,
                                     threadIdx.x % 32);
      __syncthreads();  // the tile's memory is used again
    }
    before += tiles;
  }
}

// grad_hidden += dz weight: a thread block owns some columns of some ranges of rows, and takes the
// vocabulary in order.
template <class Multiply, class Epilogue>
__global__ void __launch_bounds__(kGemmThreads)
    add_pairs_to_hidden(Wave<typename Multiply::Real, typename Multiply::Storage> wave,
                        int ranges_each, Epilogue epilogue) {
  constexpr int kTile = Multiply::kTile, kPitch = Multiply::kPitch;
  const auto& pairs = wave.pairs;
  const auto* const tile = shared_memory<typename Multiply::Real>();
  const int64_t col0 = int64_t(blockIdx.x) * kTile, end = pairs.waves[wave.number + 1];
  const int range = blockIdx.y * ranges_each;
  for (int64_t block = pairs.waves[wave.number]; block < end; block++) {
    const int32_t from = pairs.ranges(block)[range], to = pairs.ranges(block)[range + ranges_each];
    const int64_t first = pairs.first_pair(wave.number, block) + from;
    const Product product{wave.dz().from(first),
                          wave.weight.from(block * kBlockEntries),
                          to - from,
                          wave.depth,
                          wave.entries(block),
                          {},
                          false};
    for (int64_t row0 = 0; row0 < product.m; row0 += kTile) {
      Multiply::template run<RowIs::kOutput, RowIs::kStep>(product, row0, col0);
      for (int r = threadIdx.x / 32; r < kTile && row0 + r < product.m; r += kGemmThreads / 32)
        epilogue.template row<kTile>(tile + r * kPitch, pairs.row[first + row0 + r], col0,
                                     wave.depth, threadIdx.x % 32);
      __syncthreads();  // the sums are there for the next block, and the tile's memory is free
    }
  }
}

// One block of threads per block of entries, a thread per entry.
template <class Real, class Storage>
__global__ void __launch_bounds__(kBlockEntries)
    add_pairs_to_bias(Wave<Real, Storage> wave, const Real* unscale, double* grad) {
  const int64_t block = blockIdx.x;
  const auto& pairs = wave.pairs;
  if (block < pairs.waves[wave.number] || block >= pairs.waves[wave.number + 1]) return;
  if (threadIdx.x >= wave.entries(block)) return;
  const Storage* dz =
      wave.dz_data + pairs.first_pair(wave.number, block) * kBlockEntries + threadIdx.x;
  double sum = 0;
  for (int64_t i = 0; i < pairs.count(block); i++)
    sum += static_cast<double>(dz[i * kBlockEntries]);
  grad[block * kBlockEntries + threadIdx.x] += sum * (unscale ? double(*unscale) : 1.0);
}

// A 16-bit gradient, split while it was summed, is rounded.
template <class Out>
__global__ void __launch_bounds__(kPairThreads)
    round_split_rows(RowRange tokens, int64_t depth, const uint8_t* low, Out* grad) {
  const int64_t at = int64_t(blockIdx.x) * kPairThreads + threadIdx.x;
  const int64_t row = at / depth, k = at % depth;
  if (row >= tokens.size()) return;
  Out* const out = grad + tokens.list.token[tokens.first + row] * depth + k;
  uint16_t high;
  memcpy(&high, out, sizeof(high));
  *out = static_cast<Out>(SplitFloat::join(high, low[at]));
}

}  // namespace spo::cuda
