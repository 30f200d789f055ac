// SPDX-License-Identifier: Apache-2.0
// The softmax statistics of one row, dealt out to lanes: reductions whose order never changes.
#pragma once
#include "../math/logit_map.h"
#include "../math/logsumexp.h"
#include "launch.cuh"

namespace spo::cuda {

// What the forward pass of a token leaves; entropy may be null.
template <class Real>
struct TokenOutputs {
  Real *logprobs, *entropy, *top, *log_sum;

  __device__ void write(int64_t token, const TokenSoftmax& softmax) const {
    logprobs[token] = static_cast<Real>(softmax.logprob);
    top[token] = static_cast<Real>(softmax.top);
    log_sum[token] = static_cast<Real>(softmax.log_sum);
    if (entropy) entropy[token] = static_cast<Real>(softmax.entropy);
  }
};

// Butterflies over groups of kLanes lanes: each lane gets the same result.
template <int kLanes, class Real>
__device__ Real lanes_max(Real x) {
#pragma unroll
  for (int d = kLanes / 2; d > 0; d /= 2) x = ::fmax(__shfl_xor_sync(kAllLanes, x, d), x);
  return x;
}

template <int kLanes, class Real>
__device__ Real lanes_sum(Real x) {
#pragma unroll
  for (int d = kLanes / 2; d > 0; d /= 2) x += __shfl_xor_sync(kAllLanes, x, d);
  return x;
}

// Statistics of one block of unscaled logits, kEach of them in each of kLanes lanes; -inf adds
// nothing.
template <int kLanes, int kEach, class Real, class Logits>
__device__ BlockStats<Real> lane_statistics(const Logits& logits, const LogitMap<Real>& map,
                                            bool entropy) {
  const Real lowest = -std::numeric_limits<Real>::infinity();
  Real top = lowest;
#pragma unroll
  for (int e = 0; e < kEach; e++) top = ::fmax(logits[e], top);  // passes over a NaN
  top = lanes_max<kLanes>(top);
  const Real base = top == lowest ? Real(0) : top;  // all -inf: exp(-inf - 0) is 0
  Real sum = 0, weighted = 0;
  const auto add = [&](auto with_entropy) {
#pragma unroll
    for (int e = 0; e < kEach; e++) {
      const Real below = map.template below<Real>(logits[e], base),
                 exponential = Math<Real>::exp(below);
      sum += exponential;
      if (with_entropy && !(exponential == 0)) weighted += exponential * below;
    }
  };
  entropy ? add(std::true_type{}) : add(std::false_type{});
  return {top, lanes_sum<kLanes>(sum), entropy ? lanes_sum<kLanes>(weighted) : Real(0)};
}

// Adds the lanes' parts, neighbour to neighbour, to lane 0's total; other lanes' are of no use.
__device__ inline void merge_lanes(LogSumExp mine, double outer, LogSumExp* total) {
  for (int distance = 1; distance < 32; distance *= 2) {
    const BlockStats<double> next{__shfl_down_sync(kAllLanes, mine.max, distance),
                                  __shfl_down_sync(kAllLanes, mine.sum, distance),
                                  __shfl_down_sync(kAllLanes, mine.weighted, distance)};
    mine.merge(next, outer);
  }
  total->merge(BlockStats<double>{mine.max, mine.sum, mine.weighted}, outer);
}

}  // namespace spo::cuda
