// SPDX-License-Identifier: Apache-2.0
// The prompt value of the group objective: the mean of r - beta R over the sequences of one prompt,
// or over the others of them.
#pragma once
#include <ATen/ops/empty_like.h>

#include <array>

#include "../loss_args.h"
#include "loss_walk.cuh"

namespace spo::cuda {

// gains [S]: r - beta R of every sequence with a token; num_tokens [S].
template <class Real>
__global__ void __launch_bounds__(Teams::kMostThreads)
    gains_kernel(SequenceView sequences, int warps, LossArrays<Real> d, double* gains,
                 int64_t* num_tokens) {
  Team team(warps);
  if (team.sequence >= sequences.size) return;
  SequenceWalk<Real> walk(sequences, d, team);
  walk.run([&](int64_t i, SoftQ& state) {
    if (i < 0 || i != walk.last) return;
    state.pay(d.paid_at(i));
    gains[team.sequence] = d.gain(team.sequence, state);
  });
  if (team.leader()) num_tokens[team.sequence] = walk.num_tokens;
}

// q0 and residual (cpu/cumulative_loss.cpp) of every sequence from its group: one thread adds up
// the members in their order. S^2 steps in all, S in a row: some 0.2 ms for 32768 sequences,
// nothing for a batch of hundreds.
template <class Real>
__global__ void group_baseline_kernel(int64_t size, const int64_t* groups, const double* gains,
                                      const int64_t* num_tokens, bool leave_one_out,
                                      const Real* rewards, Real* q0, double* residual) {
  const int64_t s = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (s >= size) return;
  const int64_t group = groups[s];
  const bool live = num_tokens[s] > 0;
  double all = 0, others = 0;
  int64_t members = 0;
  for (int64_t other = 0; other < size; other++) {
    if (groups[other] != group || num_tokens[other] == 0) continue;
    all += gains[other], members++;
    if (other != s) others += gains[other];
  }
  double mean = members > 0 ? all / members : 0;
  if (live && leave_one_out && members > 1) mean = others / (members - 1);
  q0[s] = static_cast<Real>(mean);
  residual[s] = mean - (live ? gains[s] : double(rewards[s]));
}

// Of the group objective, each [S]: q0, and residual in double.
template <class Real>
std::array<at::Tensor, 2> group_baseline(const Sequences& sequences, const Teams& teams,
                                         const LossArrays<Real>& data, const LossArgs& args) {
  const int64_t size = sequences.view.size;
  const auto labels = args.groups->to(at::kLong).contiguous();
  const auto options = args.logprobs.options().dtype(args.type());
  const auto gains = at::empty({size}, options.dtype(at::kDouble));
  const auto num_tokens = at::empty({size}, options.dtype(at::kLong));
  const auto q0 = at::empty({size}, options), residual = at::empty_like(gains);
  launch(gains_kernel<Real>, teams.blocks, teams.threads, teams.shared_bytes(), sequences.view,
         teams.warps, data, gains.template mutable_data_ptr<double>(),
         num_tokens.template mutable_data_ptr<int64_t>());
  launch(group_baseline_kernel<Real>, static_cast<unsigned>((size + 127) / 128), 128, 0, size,
         labels.template const_data_ptr<int64_t>(), gains.template const_data_ptr<double>(),
         num_tokens.template const_data_ptr<int64_t>(), args.leave_one_out, data.rewards,
         q0.template mutable_data_ptr<Real>(), residual.template mutable_data_ptr<double>());
  return {q0, residual};
}

}  // namespace spo::cuda
