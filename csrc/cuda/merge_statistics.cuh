// SPDX-License-Identifier: Apache-2.0
// Block statistics into log-probabilities: one warp per row merges the blocks in vocabulary order,
// in double.
#pragma once
#include "head_problem.cuh"

namespace spo::cuda {

constexpr int kMergeThreads = 256;
constexpr int kMergeBlocks = 32;  // merged as a tree by the lanes of a warp, then one after another

// Adds the statistics of one slice to `running`; after the last slice, everything about the token.
template <class Real>
__global__ void __launch_bounds__(kMergeThreads)
    merge_statistics(RowRange tokens, const BlockStats<Real>* stats, int64_t pitch, int64_t blocks,
                     LogitMap<Real> map, const Real* label_raw, LogSumExp* running, bool first,
                     bool last, TokenOutputs<Real> out) {
  const int64_t row = int64_t(blockIdx.x) * (kMergeThreads / 32) + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (row >= tokens.size()) return;
  LogSumExp total;
  if (!first) total = running[row];
  for (int64_t block = 0; block < blocks; block += kMergeBlocks) {
    LogSumExp mine;
    if (block + lane < blocks) mine.merge(stats[row * pitch + block + lane], map.outer);
    merge_lanes(mine, map.outer, &total);
  }
  if (lane != 0) return;  // only lane 0 has merged the blocks in order
  if (!last) {
    running[row] = total;
    return;
  }
  Real slope;
  const Real label = map.unscaled(label_raw[row], &slope);
  out.write(tokens.list.token[tokens.first + row], total.finish(label, map.outer));
}

template <class Real>
void launch_merge(const RowRange& tokens, const BlockStats<Real>* stats, int64_t pitch,
                  int64_t blocks, const LogitMap<Real>& map, const Real* label_raw,
                  LogSumExp* running, bool first, bool last, const TokenOutputs<Real>& out) {
  launch(&merge_statistics<Real>, dim3(blocks_of(tokens.most, kMergeThreads / 32)), kMergeThreads,
         0, tokens, stats, pitch, blocks, map, label_raw, running, first, last, out);
}

}  // namespace spo::cuda
