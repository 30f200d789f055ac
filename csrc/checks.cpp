// SPDX-License-Identifier: Apache-2.0
#include "checks.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/ops/ne.h>
#include <c10/util/Exception.h>

#include <cmath>

namespace spo {
namespace {

bool is_index(const at::Tensor& t) {
  return t.scalar_type() == at::kLong || t.scalar_type() == at::kInt;
}

void check_float(const char* op, const char* name, const at::Tensor& t) {
  const auto type = t.scalar_type();
  TORCH_CHECK_TYPE(
      type == at::kFloat || type == at::kDouble || type == at::kHalf || type == at::kBFloat16, op,
      ": ", name, " must be float32, float64, float16 or bfloat16, got ", type);
}

void check_device(const char* op, const char* name, const at::Tensor& t, const at::Tensor& other) {
  TORCH_CHECK_VALUE(t.device() == other.device(), op, ": ", name, " must be on ", other.device(),
                    " like the first argument, got ", t.device());
}

void check_targets(const char* op, const at::Tensor& targets, const at::Tensor& rows) {
  TORCH_CHECK_TYPE(is_index(targets), op, ": targets must be int64 or int32, got ",
                   targets.scalar_type());
  const auto leading = rows.sizes().slice(0, rows.dim() - 1);
  TORCH_CHECK_VALUE(targets.sizes() == leading, op, ": targets must have shape ", leading,
                    ", one label per row, got ", targets.sizes());
  check_device(op, "targets", targets, rows);
}

}  // namespace

void check_head(const HeadArgs& a) {
  check_float(a.op, "hidden", a.hidden);
  check_float(a.op, "weight", a.weight);
  TORCH_CHECK_VALUE(a.hidden.dim() >= 1, a.op, ": hidden must be [.., d], got a scalar");
  TORCH_CHECK_VALUE(a.weight.dim() == 2 && a.weight.size(1) == a.hidden.size(-1), a.op,
                    ": weight must be [V, d] with d = ", a.hidden.size(-1), " like hidden, got ",
                    a.weight.sizes());
  TORCH_CHECK_VALUE(a.weight.size(0) > 0 && a.weight.size(1) > 0, a.op,
                    ": weight must have at least one row and one column, got ", a.weight.sizes());
  check_device(a.op, "weight", a.weight, a.hidden);
  const bool wide = a.hidden.scalar_type() == at::kDouble;
  TORCH_CHECK_TYPE(wide == (a.weight.scalar_type() == at::kDouble), a.op,
                   ": weight must be float64 exactly when hidden is, got hidden ",
                   a.hidden.scalar_type(), " and weight ", a.weight.scalar_type());
  check_targets(a.op, a.targets, a.hidden);
  if (a.bias) {
    check_float(a.op, "bias", *a.bias);
    check_like(a.op, "bias", *a.bias, {a.weight.size(0)}, a.hidden);
  }
  check_positive(a.op, "temperature", a.temperature);
  TORCH_CHECK_VALUE(std::isfinite(a.logit_scale) && a.logit_scale != 0, a.op,
                    ": logit_scale must be a finite number other than 0, got ", a.logit_scale);
  if (a.softcap) check_positive(a.op, "softcap", *a.softcap);
  TORCH_CHECK_VALUE(a.max_dropped_mass >= 0 && a.max_dropped_mass < 1, a.op,
                    ": max_dropped_mass must be in [0, 1), got ", a.max_dropped_mass);
  TORCH_CHECK_VALUE(a.workspace_mib > 0, a.op, ": workspace_mib must be > 0, got ",
                    a.workspace_mib);
}

void check_logits(const char* op, const at::Tensor& logits, const at::Tensor& targets,
                  double temperature) {
  check_float(op, "logits", logits);
  TORCH_CHECK_VALUE(logits.dim() >= 1 && logits.size(-1) > 0, op,
                    ": logits must be [.., V] with V > 0, got ", logits.sizes());
  check_targets(op, targets, logits);
  check_positive(op, "temperature", temperature);
}

void check_grads(const char* op, const OptionalTensor& grad_logprobs,
                 const OptionalTensor& grad_entropy, const at::Tensor& logprobs) {
  if (grad_logprobs) check_like(op, "grad_logprobs", *grad_logprobs, logprobs.sizes(), logprobs);
  if (grad_entropy) check_like(op, "grad_entropy", *grad_entropy, logprobs.sizes(), logprobs);
}

void check_writable(const char* op, const at::Tensor& logits) {
  TORCH_CHECK_VALUE(at::has_internal_overlap(logits) != at::MemOverlap::Yes, op,
                    ": logits must not overlap itself (an expanded tensor does) to take its own "
                    "gradient, got strides ",
                    logits.strides());
}

void check_target_values(const char* op, const at::Tensor& targets, int64_t vocabulary,
                         int64_t ignore_index) {
  const auto flat = targets.to(at::kLong).contiguous();
  const int64_t* label = flat.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < flat.numel(); i++)
    TORCH_CHECK_INDEX(label[i] == ignore_index || (label[i] >= 0 && label[i] < vocabulary), op,
                      ": targets must be in [0, ", vocabulary, ") or ignore_index ", ignore_index,
                      ", got ", label[i], " at position ", i);
}

void check_layout(const char* op, const at::Tensor& tokens, const OptionalTensor& cu_seqlens,
                  const OptionalTensor& mask) {
  check_float(op, "logprobs", tokens);
  if (cu_seqlens) {
    TORCH_CHECK_VALUE(tokens.dim() == 1, op,
                      ": logprobs must be packed [N] when cu_seqlens is given, got ",
                      tokens.sizes());
    TORCH_CHECK_TYPE(is_index(*cu_seqlens), op, ": cu_seqlens must be int64 or int32, got ",
                     cu_seqlens->scalar_type());
    TORCH_CHECK_VALUE(cu_seqlens->dim() == 1 && cu_seqlens->numel() >= 1, op,
                      ": cu_seqlens must be [S + 1], got ", cu_seqlens->sizes());
    check_device(op, "cu_seqlens", *cu_seqlens, tokens);
  } else {
    TORCH_CHECK_VALUE(tokens.dim() == 2, op,
                      ": logprobs must be padded [B, T], or packed [N] with cu_seqlens, got ",
                      tokens.sizes(), " without cu_seqlens");
  }
  if (mask) {
    TORCH_CHECK_TYPE(mask->scalar_type() == at::kBool, op, ": mask must be bool, got ",
                     mask->scalar_type());
    check_like(op, "mask", *mask, tokens.sizes(), tokens);
  }
}

int64_t num_sequences(const at::Tensor& tokens, const OptionalTensor& cu_seqlens) {
  return cu_seqlens ? cu_seqlens->numel() - 1 : tokens.size(0);
}

void check_cu_seqlens_values(const char* op, const at::Tensor& cu_seqlens, int64_t num_tokens) {
  const auto offsets = cu_seqlens.to(at::kLong).contiguous();
  const int64_t* at = offsets.const_data_ptr<int64_t>();
  const int64_t last = offsets.numel() - 1;
  TORCH_CHECK_VALUE(at[0] == 0, op, ": cu_seqlens must start at 0, got ", at[0]);
  for (int64_t s = 0; s < last; s++)
    TORCH_CHECK_VALUE(at[s] <= at[s + 1], op, ": cu_seqlens must not fall, got ", at[s], " then ",
                      at[s + 1], " at position ", s + 1);
  TORCH_CHECK_VALUE(at[last] == num_tokens, op, ": cu_seqlens must end at the number of tokens ",
                    num_tokens, ", got ", at[last]);
}

void check_positive(const char* op, const char* name, double value) {
  TORCH_CHECK_VALUE(std::isfinite(value) && value > 0, op, ": ", name,
                    " must be a finite number > 0, got ", value);
}

void check_like(const char* op, const char* name, const at::Tensor& tensor, at::IntArrayRef shape,
                const at::Tensor& other) {
  TORCH_CHECK_VALUE(tensor.sizes() == shape, op, ": ", name, " must have shape ", shape, ", got ",
                    tensor.sizes());
  check_device(op, name, tensor, other);
}

}  // namespace spo
