// SPDX-License-Identifier: Apache-2.0
#include "kept.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>

namespace spo {
namespace {

std::vector<int64_t> kept_shape(const HeadArgs& args, Keep keep) {
  if (keep == Keep::kLogits) return {args.targets.numel(), args.weight.size(0)};
  if (keep == Keep::kJacobian) return args.hidden.sizes().vec();
  if (keep == Keep::kDropped)
    return {args.targets.numel(), (args.weight.size(0) + kBlockEntries - 1) / kBlockEntries};
  return {0};
}

at::Tensor scale_jacobian(const at::Tensor& jacobian, const OptionalTensor& grad_logprobs) {
  if (!grad_logprobs) return at::zeros_like(jacobian, at::MemoryFormat::Contiguous);
  const auto out = at::empty_like(jacobian, at::MemoryFormat::Contiguous);
  const int64_t depth = jacobian.size(-1), rows = grad_logprobs->numel();
  const auto from = jacobian.reshape({-1, depth}), to = out.view({-1, depth});
  const auto grad = grad_logprobs->reshape({-1, 1});
  // The CPU makes products in float before it rounds them to 16 bits: 4 MiB of them at a time.
  const int64_t most = jacobian.is_cpu() ? std::max<int64_t>((1 << 20) / depth, 1) : rows;
  for (int64_t row = 0; row < rows; row += most) {
    const int64_t count = std::min(most, rows - row);
    const auto g = grad.narrow(0, row, count);
    auto part = to.narrow(0, row, count);
    at::mul_out(part, from.narrow(0, row, count), g).masked_fill_(g.eq(0), 0);
  }
  return out;
}

}  // namespace

Keep keep_of(const char* op, std::string_view name) {
  if (name == "nothing") return Keep::kNothing;
  if (name == "logits") return Keep::kLogits;
  if (name == "jacobian") return Keep::kJacobian;
  if (name == "dropped") return Keep::kDropped;
  TORCH_CHECK_VALUE(false, op, ": keep must be nothing, logits, jacobian or dropped, got ", name);
}

at::Tensor make_kept(const HeadArgs& args, Keep keep, bool return_entropy) {
  TORCH_CHECK_VALUE(keep != Keep::kJacobian || !return_entropy, args.op,
                    ": keep must not be jacobian with return_entropy, whose gradient it lacks");
  const auto shape = kept_shape(args, keep);
  if (keep == Keep::kJacobian) return at::zeros(shape, args.hidden.options());
  const auto options = args.hidden.options().dtype(result_type_of(args.hidden));
  // An ignored token drops nothing; its row is asked for by callers, though not read.
  return keep == Keep::kDropped ? at::zeros(shape, options) : at::empty(shape, options);
}

int64_t workspace_beside(int64_t workspace_mib, Keep keep, const at::Tensor& kept) {
  if (keep != Keep::kLogits && keep != Keep::kDropped) return workspace_mib;
  const int64_t taken = static_cast<int64_t>(kept.nbytes()) >> 20;
  return std::max(workspace_mib - taken, (workspace_mib + 1) / 2);
}

int64_t workspace_beside(const HeadArgs& args, Keep keep) {
  const auto options = at::TensorOptions(at::kMeta).dtype(result_type_of(args.hidden));
  return workspace_beside(args.workspace_mib, keep, at::empty(kept_shape(args, keep), options));
}

void check_kept(const HeadArgs& args, Keep keep, const at::Tensor& kept,
                const OptionalTensor& grad_entropy, std::array<bool, 3> needs) {
  check_like(args.op, "kept", kept, kept_shape(args, keep), args.hidden);
  if (keep != Keep::kJacobian) return;
  TORCH_CHECK_VALUE(!needs[1] && !needs[2] && !grad_entropy, args.op,
                    ": a kept jacobian has the gradient of logprobs in hidden and no other");
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> jacobian_grads(const HeadArgs& args,
                                                              const at::Tensor& jacobian,
                                                              const OptionalTensor& grad_logprobs,
                                                              bool needs_hidden) {
  const auto bias_type = args.bias ? args.bias->scalar_type() : at::kDouble;
  return {needs_hidden ? scale_jacobian(jacobian, grad_logprobs) : args.hidden.new_empty({0}),
          args.weight.new_empty({0}), args.weight.new_empty({0}, bias_type)};
}

}  // namespace spo
