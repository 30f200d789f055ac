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

LossTensors cumulative_loss_cuda(const at::Tensor& logprobs, const at::Tensor& ref_logprobs,
                                 const OptionalTensor& rewards, const OptionalTensor& q0,
                                 c10::string_view objective, double beta, double delta,
                                 const OptionalTensor& groups, bool leave_one_out,
                                 const OptionalTensor& advantages, const OptionalTensor& q_targets,
                                 const OptionalTensor& q_weights,
                                 const OptionalTensor& token_rewards, const OptionalTensor& weights,
                                 const OptionalTensor& cu_seqlens, const OptionalTensor& mask) {
  constexpr auto op = "loss";
  const LossArgs args{op,
                      logprobs,
                      ref_logprobs,
                      rewards,
                      q0,
                      objective_of(op, objective),
                      beta,
                      delta,
                      groups,
                      advantages,
                      q_targets,
                      q_weights,
                      token_rewards,
                      weights,
                      cu_seqlens,
                      mask};
  args.check();
  const DeviceGuard guard(logprobs.device());
  const Sequences sequences(op, logprobs, cu_seqlens, mask);
  const auto teams = Teams::for_sequences(sequences.view);
  const auto options = logprobs.options().dtype(args.type());
  const auto column = [&](bool wanted) { return at::empty({wanted ? args.size() : 0}, options); };
  const auto loss = column(true), terminal_q = column(true), log_ratio = column(true),
             used_q0 = column(true), residual = column(args.has_residual());
  const auto num_tokens = at::empty({args.size()}, options.dtype(at::kLong));
  AT_DISPATCH_FLOATING_TYPES(args.type(), op, [&] {
    LossData<scalar_t> data(args);
    std::array<at::Tensor, 2> baseline;
    if (data.objective == Objective::kGroup) {
      baseline = group_baseline<scalar_t>(sequences, teams, data, *groups, leave_one_out, options);
      data.q0 = baseline[0].template const_data_ptr<scalar_t>();
      data.residuals = baseline[1].template const_data_ptr<double>();
    }
    launch(cumulative_loss_kernel<scalar_t>, teams.blocks, teams.threads, teams.shared_bytes(),
           sequences.view, teams.warps, LossArrays<scalar_t>(data),
           LossOutputs<scalar_t>(loss, terminal_q, log_ratio, used_q0, residual, num_tokens));
  });
  return {loss, terminal_q, log_ratio, used_q0, residual, num_tokens};
}

std::tuple<at::Tensor, at::Tensor> cumulative_loss_backward_cuda(
    const at::Tensor& grad_loss, const at::Tensor& logprobs, const at::Tensor& ref_logprobs,
    const OptionalTensor& rewards, const OptionalTensor& q0, c10::string_view objective,
    double beta, double delta, const OptionalTensor& advantages, const OptionalTensor& q_targets,
    const OptionalTensor& q_weights, const OptionalTensor& token_rewards,
    const OptionalTensor& weights, const OptionalTensor& cu_seqlens, const OptionalTensor& mask) {
  constexpr auto op = "loss_backward";
  const LossArgs args{op,
                      logprobs,
                      ref_logprobs,
                      rewards,
                      q0,
                      objective_of(op, objective),
                      beta,
                      delta,
                      {},
                      advantages,
                      q_targets,
                      q_weights,
                      token_rewards,
                      weights,
                      cu_seqlens,
                      mask};
  args.check();
  check_like(op, "grad_loss", grad_loss, {num_sequences(logprobs, cu_seqlens)}, logprobs);
  const DeviceGuard guard(logprobs.device());
  const Sequences sequences(op, logprobs, cu_seqlens, mask);
  const auto teams = Teams::for_sequences(sequences.view);
  const auto upstream = grad_loss.to(args.type()).contiguous();
  const auto options = logprobs.options().dtype(args.type());
  const auto grad_logprobs = at::empty(logprobs.sizes(), options),
             grad_q0 = at::empty({sequences.view.size}, options),
             slopes = at::empty({q_targets ? logprobs.numel() : 0}, options.dtype(at::kDouble));
  AT_DISPATCH_FLOATING_TYPES(args.type(), op, [&] {
    const LossData<scalar_t> data(args);
    launch(cumulative_loss_backward_kernel<scalar_t>, teams.blocks, teams.threads,
           teams.shared_bytes(), sequences.view, teams.warps, LossArrays<scalar_t>(data),
           upstream.const_data_ptr<scalar_t>(), slopes.mutable_data_ptr<double>(),
           grad_logprobs.mutable_data_ptr<scalar_t>(), grad_q0.mutable_data_ptr<scalar_t>());
  });
  return {grad_logprobs.to(logprobs.scalar_type()), grad_q0};
}

SPO_CUDA_LIBRARY(m) {
  m.impl("cumulative_loss", &cumulative_loss_cuda);
  m.impl("cumulative_loss_backward", &cumulative_loss_backward_cuda);
}

}  // namespace
}  // namespace spo::cuda
