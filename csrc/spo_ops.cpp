// SPDX-License-Identifier: Apache-2.0
// The schemas of every operator, and nothing else. Kernels register themselves in cpu/ and cuda/;
// fake kernels and autograd are in spo_ext/_ops.py. Dims: N tokens, S sequences, V vocabulary,
// d hidden; [..] stands for [N] or [B, T], alike for every tensor of one call.
#include <torch/library.h>

TORCH_LIBRARY(spo, m) {
  // hidden [.., d], weight [V, d], targets [..], bias [V] -> logprobs [..], entropy [..] or [0],
  // top and log_sum [..] of the softmax (math/logsumexp.h), and what `keep` names (kept.h)
  m.def(
      "token_logprobs(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, float "
      "temperature, float logit_scale, float? softcap, int ignore_index, bool return_entropy, "
      "int workspace_mib, str keep, float max_dropped_mass) "
      "-> (Tensor logprobs, Tensor entropy, Tensor top, Tensor log_sum, Tensor kept)");
  // needs: gradients wanted for (hidden, weight, bias); the others come back as [0]
  m.def(
      "token_logprobs_backward(Tensor? grad_logprobs, Tensor? grad_entropy, Tensor hidden, "
      "Tensor weight, Tensor targets, Tensor? bias, Tensor logprobs, Tensor entropy, Tensor top, "
      "Tensor log_sum, Tensor kept, float temperature, float logit_scale, float? softcap, int "
      "ignore_index, "
      "bool[3] needs, int workspace_mib, str keep) -> (Tensor grad_hidden, Tensor grad_weight, "
      "Tensor grad_bias)");

  // Raises where token_logprobs_backward would not find room. On the CPU alone: on CUDA it needs
  // little beside what grows with N.
  m.def(
      "check_backward_workspace(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, "
      "bool[3] needs, int workspace_mib, str keep) -> ()");

  // How many kernels this thread has started on CUDA since the last call, and how many bytes their
  // products move; from now on they are counted only, if dry. See cuda/launch.cuh.
  m.def("launch_log(bool dry) -> int[]");

  // logits [.., V], targets [..] -> logprobs [..], entropy [..] or [0], top and log_sum [..]
  m.def(
      "logprobs_from_logits(Tensor logits, Tensor targets, float temperature, int ignore_index, "
      "bool return_entropy, bool inplace_backward) -> (Tensor logprobs, Tensor entropy, Tensor "
      "top, "
      "Tensor log_sum)");
  m.def(
      "logprobs_from_logits_backward(Tensor? grad_logprobs, Tensor? grad_entropy, Tensor logits, "
      "Tensor targets, Tensor logprobs, Tensor entropy, Tensor top, Tensor log_sum, float "
      "temperature, "
      "int ignore_index) -> Tensor grad_logits");
  m.def(
      "logprobs_from_logits_backward_(Tensor? grad_logprobs, Tensor? grad_entropy, "
      "Tensor(a!) logits, Tensor targets, Tensor logprobs, Tensor entropy, Tensor top, Tensor "
      "log_sum, "
      "float temperature, int ignore_index) -> ()");

  // logprobs, ref_logprobs [..], q0 [S], cu_seqlens [S + 1] or none (then [B, T]), mask [..] ->
  // q_values [..]
  m.def(
      "soft_q(Tensor logprobs, Tensor ref_logprobs, Tensor q0, float beta, Tensor? cu_seqlens, "
      "Tensor? mask) -> Tensor q_values");
  m.def(
      "soft_q_backward(Tensor grad_q_values, float beta, Tensor? cu_seqlens, Tensor? mask) "
      "-> (Tensor grad_logprobs, Tensor grad_q0)");

  // What both passes of the loss take (loss_args.h); the backward pass knows no groups. Results per
  // sequence, [S]: loss, terminal_q, log_ratio (R), the q0 that was used, residual (Q_T minus its
  // target; [0] where the objective has none), number of tokens.
  const std::string loss_args =
      "Tensor logprobs, Tensor ref_logprobs, Tensor? rewards, Tensor? q0, str objective, "
      "float beta, float delta, Tensor? groups, bool leave_one_out, Tensor? advantages, "
      "Tensor? q_targets, Tensor? q_weights, Tensor? token_rewards, Tensor? weights, "
      "Tensor? cu_seqlens, Tensor? mask) -> (Tensor ";
  m.def(("cumulative_loss(" + loss_args +
         "loss, Tensor terminal_q, Tensor log_ratio, Tensor used_q0, Tensor residual, "
         "Tensor num_tokens)")
            .c_str());
  m.def(
      ("cumulative_loss_backward(Tensor grad_loss, " + loss_args + "grad_logprobs, Tensor grad_q0)")
          .c_str());
}
