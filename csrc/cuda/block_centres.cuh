// SPDX-License-Identifier: Apache-2.0
// What a sparse backward pass puts in the place of what was dropped: for grad_hidden, its mass at
// the centre of its block. A centre is the mean of the block's entries, weighted by their
// probabilities at the mean of all states, so that entries which are rare everywhere count for
// little.
#pragma once
#include "../kept.h"
#include "head_problem.cuh"

namespace spo::cuda {

constexpr int kMeanCols = 32, kMeanThreads = 256, kCentreThreads = 256;

// The mean of the listed rows of hidden: eight partial sums per column. Rows without a finite
// softmax are left out: they have no part in the gradients of others.
template <class Real>
__global__ void __launch_bounds__(kMeanThreads)
    mean_state(RowRange tokens, TokenStates<Real> states, RowsView hidden, int64_t depth,
               Real* mean) {
  __shared__ Real partial[kMeanThreads];
  const int lane = threadIdx.x % kMeanCols, part = threadIdx.x / kMeanCols;
  const int64_t k = int64_t(blockIdx.x) * kMeanCols + lane, rows = tokens.size();
  Real sum = 0;
  if (k < depth)
    for (int64_t row = part; row < rows; row += kMeanThreads / kMeanCols)
      if (std::isfinite(states.log_sum[tokens.list.token[tokens.first + row]]))
        sum += hidden.number<Real>(row, k);
  partial[threadIdx.x] = sum;
  __syncthreads();
  if (part != 0 || k >= depth) return;
  for (int p = 1; p < kMeanThreads / kMeanCols; p++) sum += partial[p * kMeanCols + lane];
  mean[k] = rows == 0 ? Real(0) : sum / rows;
}

// One block of threads per block of entries.
template <class Real, class Storage>
__global__ void __launch_bounds__(kCentreThreads)
    make_centres(LogitMap<Real> map, const Real* bias, RowsView weight, int64_t vocabulary,
                 int64_t depth, const Real* mean, Storage* centres) {
  __shared__ Real share[kBlockEntries];
  const int64_t entry0 = int64_t(blockIdx.x) * kBlockEntries, left = vocabulary - entry0;
  const int entries = left < kBlockEntries ? static_cast<int>(left) : kBlockEntries;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int w = warp; w < entries; w += kCentreThreads / 32) {
    Real product = 0, slope;
    for (int64_t k = lane; k < depth; k += 32)
      product += weight.number<Real>(entry0 + w, k) * mean[k];
    product = lanes_sum<32>(product);
    if (lane == 0) share[w] = map.unscaled(bias ? product + bias[entry0 + w] : product, &slope);
  }
  __syncthreads();
  const Real lowest = -std::numeric_limits<Real>::infinity();
  Real top = lowest, total = 0;  // each warp finds them for itself
  for (int w = lane; w < entries; w += 32) top = share[w] > top ? share[w] : top;
  top = lanes_max<32>(top);
  if (top == lowest) top = 0;  // no entry is possible
  for (int w = lane; w < entries; w += 32) total += Math<Real>::exp(map.below(share[w], top));
  total = lanes_sum<32>(total);
  __syncthreads();  // all have read the logits
  for (int w = threadIdx.x; w < entries; w += kCentreThreads)
    share[w] = total == 0 ? Real(0) : Math<Real>::exp(map.below(share[w], top)) / total;
  __syncthreads();
  for (int64_t k = threadIdx.x; k < depth; k += kCentreThreads) {
    Real sum = 0;
    for (int w = 0; w < entries; w++) sum += share[w] * weight.number<Real>(entry0 + w, k);
    centres[int64_t(blockIdx.x) * depth + k] = static_cast<Storage>(sum);
  }
}

// [rows, pitch]: what pulls a row to each centre, -g s times the mass dropped there.
template <class Real, class Storage>
__global__ void __launch_bounds__(kCentreThreads)
    make_pulls(RowRange tokens, TokenStates<Real> states, Real slope, const Real* scale,
               const Real* dropped, int64_t blocks, int64_t pitch, Storage* pulls) {
  const int64_t at = int64_t(blockIdx.x) * kCentreThreads + threadIdx.x;
  const int64_t row = at / blocks, block = at % blocks;
  if (row >= tokens.size()) return;
  const int64_t token = tokens.list.token[tokens.first + row];
  const Real mass = dropped[token * blocks + block];
  const Real pull = -slope * states.of(token).grad_logprob * (scale ? *scale : Real(1));
  pulls[row * pitch + block] = static_cast<Storage>(mass > 0 ? pull * mass : Real(0));
}

}  // namespace spo::cuda
