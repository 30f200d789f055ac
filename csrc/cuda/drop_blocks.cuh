// SPDX-License-Identifier: Apache-2.0
// Which vocabulary blocks a token's gradient may do without, on CUDA: as cpu/drop_blocks.h, with
// the largest mass that is dropped found by bisection. While the forward pass runs, the place of
// each mass holds the log sum exp of its block, relative to a logit of the token that the first
// slices show.
#pragma once
#include "lane_statistics.cuh"
#include "pair_lists.cuh"

namespace spo::cuda {

constexpr int kDropThreads = 256, kCountThreads = 1024;

// Log sum exp of the logits of every token and block of one slice, the label's aside, above the
// token's base. A block of entries is `tiles_each` tiles of the product. One warp per token.
template <class Real>
__global__ void __launch_bounds__(kDropThreads)
    block_logsumexps(RowRange tokens, const BlockStats<Real>* stats, Real outer, int64_t tiles,
                     int tiles_each, int64_t slice_blocks, int64_t blocks, Real* bases, Real* out) {
  const int64_t row = int64_t(blockIdx.x) * (kDropThreads / 32) + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (row >= tokens.size()) return;
  const int64_t token = tokens.list.token[tokens.first + row];
  stats += row * tiles;
  const Real lowest = -std::numeric_limits<Real>::infinity();
  Real base = bases[token];
  if (base == lowest) {  // no entry was possible in the slices before
    for (int64_t tile = lane; tile < tiles; tile += 32)
      base = stats[tile].max > base ? stats[tile].max : base;
    base = lanes_max<32>(base);
    if (lane == 0) bases[token] = base;
  }
  for (int64_t block = lane; block < slice_blocks; block += 32) {
    LogSumExp sum;
    for (int64_t tile = block * tiles_each; tile < (block + 1) * tiles_each && tile < tiles; tile++)
      sum.merge(stats[tile], outer);
    out[token * blocks + block] = sum.sum == 0 ? lowest : static_cast<Real>(sum.above(base, outer));
  }
}

// One warp per token: log sum exp -> mass, or kKeptBlock. No other choice drops more, but for
// blocks of equal mass and what lies within 2^-20 of the threshold.
template <class Real>
__global__ void __launch_bounds__(kDropThreads)
    drop_blocks(RowRange tokens, TokenOutputs<Real> softmax, Real outer, const Real* bases,
                int64_t blocks, double bound, Real* dropped, int64_t* kept) {
  constexpr int kHalvings = 20;
  const int64_t row = int64_t(blockIdx.x) * (kDropThreads / 32) + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (row >= tokens.size()) return;
  const int64_t token = tokens.list.token[tokens.first + row];
  Real* const mass = dropped + token * blocks;
  const Real lowest = -std::numeric_limits<Real>::infinity();
  const Real below = outer * (bases[token] - softmax.top[token]) - softmax.log_sum[token];
  for (int64_t b = lane; b < blocks; b += 32)
    mass[b] = mass[b] == lowest ? Real(0) : Math<Real>::exp(mass[b] + below);
  const auto fits = [&](double threshold) {
    double sum = 0;
    for (int64_t b = lane; b < blocks; b += 32)
      if (mass[b] <= threshold) sum += mass[b];
    return lanes_sum<32>(sum) <= bound;
  };
  double low = bound / blocks, high = bound;  // all blocks of the first together fit
  if (fits(high)) low = high;
  for (int i = 0; i < kHalvings && low < high; i++) {
    const double middle = (low + high) / 2;
    (fits(middle) ? low : high) = middle;
  }
  int64_t count = 0;
  for (int64_t b = lane; b < blocks; b += 32) {
    if (mass[b] <= low) continue;  // a NaN is kept
    mass[b] = kKeptBlock, count++;
  }
  count = lanes_sum<32>(count);
  if (lane == 0) kept[row] = count;
}

// One block: whether all tokens together kept too many pairs.
__global__ void __launch_bounds__(kCountThreads)
    count_kept(RowRange tokens, const int64_t* kept, int64_t blocks, int32_t* keep_all) {
  __shared__ int64_t of_warp[kCountThreads / 32];
  int64_t count = 0;
  for (int64_t row = threadIdx.x; row < tokens.size(); row += kCountThreads) count += kept[row];
  count = lanes_sum<32>(count);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = count;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kCountThreads / 32; w++) count += of_warp[w];
  *keep_all = count > most_kept_pairs(tokens.size(), blocks);
}

template <class Real>
__global__ void __launch_bounds__(kDropThreads)
    keep_all_blocks(RowRange tokens, const int32_t* keep_all, int64_t blocks, Real* dropped) {
  const int64_t at = int64_t(blockIdx.x) * kDropThreads + threadIdx.x, row = at / blocks;
  if (*keep_all == 0 || row >= tokens.size()) return;
  dropped[tokens.list.token[tokens.first + row] * blocks + at % blocks] = kKeptBlock;
}

template <class Real>
void launch_block_logsumexps(const RowRange& tokens, const BlockStats<Real>* stats, Real outer,
                             int64_t tiles, int64_t tile, int64_t entries, int64_t blocks,
                             Real* bases, Real* out) {
  launch(&block_logsumexps<Real>, dim3(blocks_of(tokens.most, kDropThreads / 32)), kDropThreads, 0,
         tokens, stats, outer, tiles, static_cast<int>(kBlockEntries / tile),
         blocks_of(entries, kBlockEntries), blocks, bases, out);
}

// After the last slice.
template <class Real>
void launch_drop_blocks(const HeadArgs& args, const SelectedRows& rows,
                        const TokenOutputs<Real>& softmax, Real outer, const Real* bases,
                        int64_t blocks, Real* dropped) {
  const auto counts = blank({rows.most + 1}, args.targets.options().dtype(at::kLong));
  int64_t* const kept = counts.mutable_data_ptr<int64_t>();
  auto* const keep_all = reinterpret_cast<int32_t*>(kept + rows.most);
  launch(&drop_blocks<Real>, dim3(blocks_of(rows.most, kDropThreads / 32)), kDropThreads, 0,
         rows.all(), softmax, outer, bases, blocks, dropping_bound(args), dropped, kept);
  launch(&count_kept, dim3(1), kCountThreads, 0, rows.all(), kept, blocks, keep_all);
  launch(&keep_all_blocks<Real>, dim3(blocks_of(rows.most * blocks, kDropThreads)), kDropThreads, 0,
         rows.all(), keep_all, blocks, dropped);
}

}  // namespace spo::cuda
