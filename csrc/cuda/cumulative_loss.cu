// SPDX-License-Identifier: Apache-2.0
// The cumulative loss on CUDA: every sequence is walked by a team of warps (sequences.cuh) with
// the formulas of loss_arrays.h. Where each token has its own target, the backward pass leaves
// dphi/dQ in a scratch array [N] of doubles before it sums them from the end.
#include <ATen/Dispatch.h>

#include <array>

#include "../loss_args.h"
#include "group_q0.cuh"

namespace spo::cuda {
namespace {

template <class Real>
__global__ void __launch_bounds__(Teams::kMostThreads)
    cumulative_loss_kernel(SequenceView sequences, int warps, LossArrays<Real> d,
                           LossOutputs<Real> out) {
  Team team(warps);
  const int64_t s = team.sequence;
  if (s >= sequences.size) return;
  SequenceWalk<Real> walk(sequences, d, team);
  check_values(d, walk, sequences, team);
  double loss = 0;
  if (team.leader()) {  // what a sequence without a token leaves
    out.num_tokens[s] = walk.num_tokens;
    out.used_q0[s] = static_cast<Real>(d.q0_of(s));
    if (walk.num_tokens == 0) {
      out.loss[s] = out.log_ratio[s] = 0, out.terminal_q[s] = out.used_q0[s];
      if (d.has_residual()) out.residual[s] = static_cast<Real>(d.residual(s, d.q0_of(s), 0));
    }
  }
  walk.run([&](int64_t i, const SoftQ& state) {
    if (d.sums_tokens()) {
      const double value = i < 0 ? 0
                           : d.objective == Objective::kAdvantage
                               ? d.advantage_loss(s, i, walk.num_tokens).value
                               : d.token_value(s, i, state.q(), i == walk.last);
      team.add(value, &loss);
    }
    if (i < 0 || i != walk.last) return;
    out.terminal_q[s] = static_cast<Real>(state.q());
    out.log_ratio[s] = static_cast<Real>(state.log_ratio);
    if (d.has_residual())
      out.residual[s] = static_cast<Real>(d.residual(s, state.q(), d.paid_at(i)));
    if (d.sums_tokens()) return;
    const double terminal =
        d.objective == Objective::kLinear ? -state.log_ratio : d.token_value(s, i, state.q(), true);
    out.loss[s] = static_cast<Real>(d.weight_of(s) * terminal);
  });
  if (d.sums_tokens() && team.leader() && walk.num_tokens > 0)
    out.loss[s] = static_cast<Real>(d.weight_of(s) * loss);
}

// dphi/dQ of one token, or dphi/dA for the advantage objective.
template <class Real>
__device__ double slope_of(const LossArrays<Real>& d, const SequenceWalk<Real>& walk, int64_t s,
                           int64_t i, const SoftQ& state) {
  if (d.objective == Objective::kLinear) return 0;
  if (d.objective == Objective::kAdvantage) return d.advantage_loss(s, i, walk.num_tokens).slope;
  return d.token_loss(s, i, state.q(), i == walk.last).slope;
}

// slopes [N]: scratch, only with per-token targets.
template <class Real>
__global__ void __launch_bounds__(Teams::kMostThreads)
    cumulative_loss_backward_kernel(SequenceView sequences, int warps, LossArrays<Real> d,
                                    const Real* grad_loss, double* slopes, Real* grad_logprobs,
                                    Real* grad_q0) {
  Team team(warps);
  const int64_t s = team.sequence;
  if (s >= sequences.size) return;
  SequenceWalk<Real> walk(sequences, d, team);
  const double scale = double(grad_loss[s]) * d.weight_of(s);
  const bool advantage = d.objective == Objective::kAdvantage;
  double own = 0, total = 0;  // slopes met by this lane; of the whole sequence
  walk.run([&](int64_t i, const SoftQ& state) {
    const double slope = i >= 0 ? slope_of(d, walk, s, i, state) : 0;
    if (d.q_targets && i >= 0) slopes[i] = slope;
    if (advantage && i >= 0) grad_logprobs[i] = static_cast<Real>(d.beta * slope * scale);
    if (d.sums_tokens())
      team.add(advantage ? (d.advantages ? 0 : slope / walk.num_tokens) : slope, &total);
    else
      own += slope;
  });
  if (!d.sums_tokens()) team.add(own, &total);  // one lane has met the last token
  if (team.leader()) grad_q0[s] = static_cast<Real>(total * scale);
  team.sync();  // the slopes are read by other lanes than those that wrote them
  double carry = 0;
  team.walk<true>(walk.begin, walk.end, [&](int64_t i) {
    const bool counts = i >= 0 && sequences.counts(i);
    double tail = total;
    if (d.q_targets) tail = team.running_sum(counts ? slopes[i] : 0, &carry);
    if (i < 0 || (advantage && counts)) return;
    const double grad = d.objective == Objective::kLinear ? -scale : d.beta * tail * scale;
    grad_logprobs[i] = static_cast<Real>(counts ? grad : 0);
  });
}

LossTensors cumulative_loss_cuda(const LossArgs& args) {
  args.check();
  const DeviceGuard guard(args.logprobs.device());
  const Sequences sequences(args.op, args.logprobs, args.cu_seqlens, args.mask);
  const auto teams = Teams::for_sequences(sequences.view);
  const auto tensors = empty_loss(args);
  AT_DISPATCH_FLOATING_TYPES(args.type(), "loss", [&] {
    LossData<scalar_t> data(args);
    std::array<at::Tensor, 2> baseline;
    if (data.objective == Objective::kGroup) {
      baseline = group_baseline<scalar_t>(sequences, teams, data, args);
      data.q0 = baseline[0].template const_data_ptr<scalar_t>();
      data.residuals = baseline[1].template const_data_ptr<double>();
    }
    launch(cumulative_loss_kernel<scalar_t>, teams.blocks, teams.threads, teams.shared_bytes(),
           sequences.view, teams.warps, LossArrays<scalar_t>(data), LossOutputs<scalar_t>(tensors));
  });
  return tensors;
}

LossGrads cumulative_loss_backward_cuda(const at::Tensor& grad_loss, const LossArgs& args) {
  args.check();
  check_like(args.op, "grad_loss", grad_loss, {args.size()}, args.logprobs);
  const DeviceGuard guard(args.logprobs.device());
  const Sequences sequences(args.op, args.logprobs, args.cu_seqlens, args.mask);
  const auto teams = Teams::for_sequences(sequences.view);
  const auto upstream = grad_loss.to(args.type()).contiguous();
  const auto options = args.logprobs.options().dtype(args.type());
  const int64_t scratch = args.q_targets ? args.logprobs.numel() : 0;
  const auto grad_logprobs = at::empty(args.logprobs.sizes(), options),
             grad_q0 = at::empty({args.size()}, options),
             slopes = at::empty({scratch}, options.dtype(at::kDouble));
  AT_DISPATCH_FLOATING_TYPES(args.type(), "loss", [&] {
    const LossData<scalar_t> data(args);
    launch(cumulative_loss_backward_kernel<scalar_t>, teams.blocks, teams.threads,
           teams.shared_bytes(), sequences.view, teams.warps, LossArrays<scalar_t>(data),
           upstream.const_data_ptr<scalar_t>(), slopes.mutable_data_ptr<double>(),
           grad_logprobs.mutable_data_ptr<scalar_t>(), grad_q0.mutable_data_ptr<scalar_t>());
  });
  return {grad_logprobs.to(args.logprobs.scalar_type()), grad_q0};
}

SPO_CUDA_LIBRARY(m) {
  m.impl("cumulative_loss", &LossOp::forward<cumulative_loss_cuda>);
  m.impl("cumulative_loss_backward", &LossOp::backward<cumulative_loss_backward_cuda>);
}

}  // namespace
}  // namespace spo::cuda
