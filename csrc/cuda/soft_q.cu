// SPDX-License-Identifier: Apache-2.0
// soft_q on CUDA: one running sum per sequence; backward, one from the end. A masked position
// repeats the value before it. See cpu/soft_q.cpp.
#include <ATen/Dispatch.h>

#include "../math/soft_q.h"
#include "sequences.cuh"

namespace spo::cuda {
namespace {

// logprobs, ref_logprobs, q_values [N], q0 [S]
template <class Real>
__global__ void __launch_bounds__(Teams::kMostThreads)
    soft_q_kernel(SequenceView sequences, int warps, double beta, const Real* logprobs,
                  const Real* ref_logprobs, const Real* q0, Real* q_values) {
  Team team(warps);
  if (team.sequence >= sequences.size) return;
  sequences.check(team.sequence);
  SPO_DEVICE_CHECK(is_finite(q0[team.sequence]), "q0 must be finite");
  SoftQ state{beta, static_cast<double>(q0[team.sequence])};
  double carry = 0;
  team.walk<false>(sequences.begin(team.sequence), sequences.begin(team.sequence + 1),
                   [&](int64_t i) {
                     state.log_ratio = 0;
                     if (i >= 0 && sequences.counts(i)) state.push(logprobs[i], ref_logprobs[i]);
                     state.log_ratio = team.running_sum(state.log_ratio, &carry);
                     if (i >= 0) q_values[i] = static_cast<Real>(state.q());
                   });
}

// grad_q_values, grad_logprobs [N], grad_q0 [S]
template <class Real>
__global__ void __launch_bounds__(Teams::kMostThreads)
    soft_q_backward_kernel(SequenceView sequences, int warps, double beta,
                           const Real* grad_q_values, Real* grad_logprobs, Real* grad_q0) {
  Team team(warps);
  if (team.sequence >= sequences.size) return;
  sequences.check(team.sequence);
  double carry = 0;
  team.walk<true>(sequences.begin(team.sequence), sequences.begin(team.sequence + 1),
                  [&](int64_t i) {
                    const double tail = team.running_sum(i >= 0 ? grad_q_values[i] : 0, &carry);
                    if (i >= 0)
                      grad_logprobs[i] = static_cast<Real>(sequences.counts(i) ? beta * tail : 0);
                  });
  if (team.leader()) grad_q0[team.sequence] = static_cast<Real>(carry);
}

at::Tensor soft_q_cuda(const at::Tensor& logprobs, const at::Tensor& ref_logprobs,
                       const at::Tensor& q0, double beta, const OptionalTensor& cu_seqlens,
                       const OptionalTensor& mask) {
  constexpr auto op = "soft_q";
  check_layout(op, logprobs, cu_seqlens, mask);
  check_like(op, "ref_logprobs", ref_logprobs, logprobs.sizes(), logprobs);
  check_like(op, "q0", q0, {num_sequences(logprobs, cu_seqlens)}, logprobs);
  check_positive(op, "beta", beta);
  const DeviceGuard guard(logprobs.device());
  const auto type = result_type_of(logprobs);
  const auto policy = logprobs.to(type).contiguous(),
             reference = ref_logprobs.to(type).contiguous();
  const auto start = q0.to(type).contiguous();
  const auto out = at::empty(logprobs.sizes(), logprobs.options().dtype(type));
  const Sequences sequences(op, logprobs, cu_seqlens, mask);
  const auto teams = Teams::for_sequences(sequences.view);
  AT_DISPATCH_FLOATING_TYPES(type, op, [&] {
    launch(soft_q_kernel<scalar_t>, teams.blocks, teams.threads, teams.shared_bytes(),
           sequences.view, teams.warps, beta, policy.const_data_ptr<scalar_t>(),
           reference.const_data_ptr<scalar_t>(), start.const_data_ptr<scalar_t>(),
           out.mutable_data_ptr<scalar_t>());
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor> soft_q_backward_cuda(const at::Tensor& grad_q_values,
                                                        double beta,
                                                        const OptionalTensor& cu_seqlens,
                                                        const OptionalTensor& mask) {
  constexpr auto op = "soft_q_backward";
  check_layout(op, grad_q_values, cu_seqlens, mask);
  const DeviceGuard guard(grad_q_values.device());
  const auto grad = grad_q_values.contiguous();
  const Sequences sequences(op, grad, cu_seqlens, mask);
  const auto teams = Teams::for_sequences(sequences.view);
  const auto grad_logprobs = at::empty(grad.sizes(), grad.options());
  const auto grad_q0 = at::empty({sequences.view.size}, grad.options());
  AT_DISPATCH_FLOATING_TYPES(grad.scalar_type(), op, [&] {
    launch(soft_q_backward_kernel<scalar_t>, teams.blocks, teams.threads, teams.shared_bytes(),
           sequences.view, teams.warps, beta, grad.const_data_ptr<scalar_t>(),
           grad_logprobs.mutable_data_ptr<scalar_t>(), grad_q0.mutable_data_ptr<scalar_t>());
  });
  return {grad_logprobs, grad_q0};
}

SPO_CUDA_LIBRARY(m) {
  m.impl("soft_q", &soft_q_cuda);
  m.impl("soft_q_backward", &soft_q_backward_cuda);
}

}  // namespace
}  // namespace spo::cuda
