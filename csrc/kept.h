// SPDX-License-Identifier: Apache-2.0
// What a forward pass of the LM head keeps for its backward pass. spo_ext/strategy.py says which of
// these a call uses, and why.
#pragma once
#include <array>
#include <string_view>
#include <tuple>

#include "checks.h"

namespace spo {

enum class Keep {
  kNothing,   // [0]; the logits are computed again
  kLogits,    // [N, V] the products hidden weight^T, as they were summed
  kJacobian,  // [.., d] dlogprob/dhidden, when the head itself needs no gradient
  kDropped,   // [N, blocks of kBlockEntries] the probability, the label's aside, of each block that
              // the gradient does without; -1 for the others
};

constexpr int64_t kBlockEntries = 256;
constexpr int kKeptBlock = -1;  // in the place of a block's mass

// What a token drops stays within this: masses are rounded, and the logits have an error of their
// own.
inline double dropping_bound(const HeadArgs& args) {
  constexpr double kSlack = 1. / 4096;
  return args.max_dropped_mass * (1 - kSlack);
}

Keep keep_of(const char* op, std::string_view name);

// For the forward pass to fill: zeros where ignored tokens leave a part unwritten that is read.
at::Tensor make_kept(const HeadArgs& args, Keep keep, bool return_entropy);

// What is left of the workspace beside kept logits or masses: these are the caller's to bound, so
// never less than half.
int64_t workspace_beside(int64_t workspace_mib, Keep keep, const at::Tensor& kept);
int64_t workspace_beside(const HeadArgs& args, Keep keep);  // before they are made

// What the backward pass was given, before it works.
void check_kept(const HeadArgs& args, Keep keep, const at::Tensor& kept,
                const OptionalTensor& grad_entropy, std::array<bool, 3> needs);

// The backward pass from a kept jacobian: (grad_hidden, and nothing for weight and bias). Rows
// without upstream gradient are zero whatever they hold.
std::tuple<at::Tensor, at::Tensor, at::Tensor> jacobian_grads(const HeadArgs& args,
                                                              const at::Tensor& jacobian,
                                                              const OptionalTensor& grad_logprobs,
                                                              bool needs_hidden);

}  // namespace spo
