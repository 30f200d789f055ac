// SPDX-License-Identifier: Apache-2.0
// What every kernel, on every device, checks before it allocates or computes anything. A message
// names the op, the argument, what it must be and what it got. Wrong kinds raise TypeError, wrong
// shapes and numbers ValueError, wrong labels IndexError.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace spo {

using OptionalTensor = std::optional<at::Tensor>;

// hidden x weight -> log-probabilities of targets (see spo_ops.cpp for shapes).
struct HeadArgs {
  const char* op;
  at::Tensor hidden, weight, targets;
  OptionalTensor bias;
  double temperature, logit_scale;
  std::optional<double> softcap;
  int64_t ignore_index, workspace_mib;
  double max_dropped_mass = 0;  // forward, if it keeps what is dropped
};

// logprobs, entropy, top, log_sum [, kept] (spo_ops.cpp).
using LogitsOutputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using HeadOutputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

void check_head(const HeadArgs& args);
void check_logits(const char* op, const at::Tensor& logits, const at::Tensor& targets,
                  double temperature);
// grad_logprobs / grad_entropy of a backward pass: shaped like logprobs, if given.
void check_grads(const char* op, const OptionalTensor& grad_logprobs,
                 const OptionalTensor& grad_entropy, const at::Tensor& logprobs);
// logits may be overwritten with its gradient: no element is another one too.
void check_writable(const char* op, const at::Tensor& logits);
// Host only: every target is ignore_index or in [0, vocabulary).
void check_target_values(const char* op, const at::Tensor& targets, int64_t vocabulary,
                         int64_t ignore_index);

// Sequences inside `tokens`: the rows of [B, T], or [N] cut at cu_seqlens.
void check_layout(const char* op, const at::Tensor& tokens, const OptionalTensor& cu_seqlens,
                  const OptionalTensor& mask);
int64_t num_sequences(const at::Tensor& tokens, const OptionalTensor& cu_seqlens);
// Host only: cu_seqlens starts at 0, never falls and ends at N.
void check_cu_seqlens_values(const char* op, const at::Tensor& cu_seqlens, int64_t num_tokens);

// The type in which per-token results come out: double for double, else float.
inline at::ScalarType result_type_of(const at::Tensor& t) {
  return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

void check_positive(const char* op, const char* name, double value);
void check_like(const char* op, const char* name, const at::Tensor& tensor, at::IntArrayRef shape,
                const at::Tensor& other);

}  // namespace spo
