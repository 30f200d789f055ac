// SPDX-License-Identifier: Apache-2.0
// What the kernels of the cumulative loss share: a team's walk along one sequence with the formulas
// of loss_arrays.h, and the checks of values, which only the device can read without a wait.
#pragma once
#include "../loss_arrays.h"
#include "sequences.cuh"

namespace spo::cuda {

// One sequence, walked by one team.
template <class Real>
class SequenceWalk {
 public:
  __device__ SequenceWalk(const SequenceView& sequences, const LossArrays<Real>& data, Team& team)
      : begin(sequences.begin(team.sequence)),
        end(sequences.begin(team.sequence + 1)),
        num_tokens(end - begin),
        last(end - 1),
        sequences_(sequences),
        data_(data),
        team_(team) {
    sequences.check(team.sequence);
    if (!sequences.mask) return;
    int64_t count = 0, latest = -1;
    team.walk<false>(begin, end, [&](int64_t i) {
      if (i >= 0 && sequences.counts(i)) count++, latest = i;
    });
    num_tokens = team.combine(count, [](int64_t a, int64_t b) { return a + b; });
    last = team.combine(latest, [](int64_t a, int64_t b) { return a > b ? a : b; });
  }

  // Calls visit(i, state) in all lanes together, with the state at Q_i where i >= 0 counts.
  template <class Visit>
  __device__ void run(const Visit& visit) {
    const SoftQ start = data_.start(team_.sequence);
    double carry[2] = {start.log_ratio, 0};
    team_.template walk<false>(begin, end, [&](int64_t position) {
      const int64_t i = position >= 0 && sequences_.counts(position) ? position : -1;
      SoftQ own{start.beta, start.q0};
      if (i >= 0) data_.push(&own, i);
      const double inside = scan_lanes(own.log_ratio);
      double chunk[2] = {__shfl_sync(kAllLanes, inside, 31), 0}, before[2], paid = 0;
      if (data_.token_rewards) {  // a token's reward counts from the next token on
        const double through = scan_lanes(i >= 0 ? data_.paid_at(i) : 0);
        chunk[1] = __shfl_sync(kAllLanes, through, 31);
        const double to_left = __shfl_up_sync(kAllLanes, through, 1);
        paid = team_.lane > 0 ? to_left : 0;
      }
      team_.add_chunks(chunk, before, carry);
      own.log_ratio = before[0] + inside, own.paid = before[1] + paid;
      visit(i, own);
    });
  }

  const int64_t begin, end;
  int64_t num_tokens, last;

 private:
  const SequenceView& sequences_;
  const LossArrays<Real>& data_;
  Team& team_;
};

struct DeviceCheck {
  SPO_HD void operator()(bool allowed, const char* must, double, int64_t) const {
    SPO_DEVICE_CHECK(allowed, must);
  }
};

template <class Real>
__device__ void check_values(const LossArrays<Real>& d, const SequenceWalk<Real>& walk,
                             const SequenceView& sequences, const Team& team) {
  SPO_DEVICE_CHECK(!d.ambiguous || walk.end - walk.begin == 1,
                   "ref_logprobs and advantages must be [1, N] if they are per token, or [S, 1] if "
                   "per sequence, where there are as many tokens as sequences and not one each");
  check_sequence(d, team.sequence, DeviceCheck());
  if (!d.q_targets && !d.q_weights && !d.token_rewards && !d.advantage_per_token) return;
  team.walk<false>(walk.begin, walk.end, [&](int64_t i) {
    if (i >= 0 && sequences.counts(i)) check_token(d, i, i == walk.last, DeviceCheck());
  });
}

}  // namespace spo::cuda
