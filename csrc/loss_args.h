// SPDX-License-Identifier: Apache-2.0
// The arguments of the cumulative loss as tensors: checked once, then read as arrays of one type.
#pragma once
#include <ATen/ops/empty.h>

#include <string_view>
#include <vector>

#include "checks.h"
#include "loss_arrays.h"

namespace spo {

inline Objective objective_of(const char* op, std::string_view name) {
  if (name == "squared") return Objective::kSquared;
  if (name == "cross_entropy") return Objective::kCrossEntropy;
  if (name == "advantage") return Objective::kAdvantage;
  if (name == "group") return Objective::kGroup;
  if (name == "linear") return Objective::kLinear;
  TORCH_CHECK_VALUE(false, op,
                    ": objective must be squared, cross_entropy, advantage, group or linear, got ",
                    name);
}

// The arguments that both passes share, in the order of the schemas (spo_ops.cpp).
struct LossArgs {
  at::Tensor logprobs, ref_logprobs;
  OptionalTensor rewards, q0;
  c10::string_view objective_name;
  double beta, delta;
  OptionalTensor groups;
  bool leave_one_out;
  OptionalTensor advantages, q_targets, q_weights, token_rewards, weights, cu_seqlens, mask;
  const char* op;
  Objective objective = objective_of(op, objective_name);

  at::ScalarType type() const { return result_type_of(logprobs); }
  int64_t size() const { return num_sequences(logprobs, cu_seqlens); }

  // Per token: shaped like logprobs, or packed [1, N]. Per sequence: [S] or [S, 1]. Where N = S,
  // the two with one dimension less look alike, and are only taken if they mean the same.
  bool per_token(const at::Tensor& t) const {
    return t.sizes() == logprobs.sizes() ||
           (cu_seqlens && t.sizes() == at::IntArrayRef{1, logprobs.numel()});
  }
  bool looks_like_both(const at::Tensor& t) const {
    return cu_seqlens && t.dim() == 1 && per_token(t) && t.numel() == size();
  }
  bool may_be_summed() const { return objective != Objective::kAdvantage && !q_targets; }
  bool ambiguous_reference() const { return may_be_summed() && looks_like_both(ref_logprobs); }
  bool ambiguous_advantages() const { return advantages && looks_like_both(*advantages); }
  bool summed_reference() const { return !per_token(ref_logprobs); }
  bool advantage_per_token() const { return advantages && per_token(*advantages); }
  bool has_residual() const { return rewards && objective != Objective::kAdvantage; }

  void check() const {
    check_layout(op, logprobs, cu_seqlens, mask);
    check_positive(op, "beta", beta);
    check_positive(op, "delta", delta);
    const auto has_shape = [&](const char* name, const OptionalTensor& t, at::IntArrayRef shape) {
      if (!t) return;
      check_like(op, name, *t, shape, logprobs);
      TORCH_CHECK_TYPE(!t->is_complex(), op, ": ", name, " must be real, got ", t->scalar_type());
    };
    const auto per_token = [&](const char* name, const OptionalTensor& t) {
      has_shape(name, t, logprobs.sizes());
    };
    const auto per_sequence = [&](const char* name, const OptionalTensor& t) {
      has_shape(name, t, {size()});
    };
    const auto either = [&](const char* name, const at::Tensor& t) {
      const bool column = t.dim() == 2 && t.sizes() == at::IntArrayRef{size(), 1};
      has_shape(name, t, this->per_token(t) || column ? t.sizes() : at::IntArrayRef{size()});
    };
    either("ref_logprobs", ref_logprobs);
    if (advantages) either("advantages", *advantages);
    TORCH_CHECK_VALUE(may_be_summed() || !summed_reference(), op,
                      ": ref_logprobs must be per token for this objective, got one per sequence");
    per_sequence("rewards", rewards), per_sequence("q0", q0), per_sequence("weights", weights);
    per_sequence("groups", groups);
    TORCH_CHECK_TYPE(!groups || at::isIntegralType(groups->scalar_type(), false), op,
                     ": groups must be integers, got ", groups->scalar_type());
    per_token("q_targets", q_targets), per_token("q_weights", q_weights);
    per_token("token_rewards", token_rewards);
  }
};

// LossArgs as contiguous arrays, and the tensors that own them.
template <class Real>
struct LossData : LossArrays<Real> {
  explicit LossData(const LossArgs& a) {
    this->objective = a.objective, this->beta = a.beta, this->delta = a.delta;
    this->summed_reference = a.summed_reference();
    this->advantage_per_token = a.advantage_per_token();
    this->ambiguous = a.ambiguous_reference() || a.ambiguous_advantages();
    this->logprobs = read(a.logprobs), this->ref_logprobs = read(a.ref_logprobs);
    this->rewards = read(a.rewards), this->q0 = read(a.q0), this->weights = read(a.weights);
    this->advantages = read(a.advantages), this->q_targets = read(a.q_targets);
    this->q_weights = read(a.q_weights), this->token_rewards = read(a.token_rewards);
  }

 private:
  const Real* read(const OptionalTensor& t) {
    if (!t) return nullptr;
    kept_.push_back(t->to(c10::CppTypeToScalarType<Real>::value).contiguous());
    return kept_.back().template const_data_ptr<Real>();
  }
  std::vector<at::Tensor> kept_;
};

// loss, terminal_q, log_ratio, used_q0, residual, num_tokens (spo_ops.cpp).
using LossTensors =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
// grad_logprobs, grad_q0.
using LossGrads = std::tuple<at::Tensor, at::Tensor>;

// Each [S]; no residual where the objective has none.
inline LossTensors empty_loss(const LossArgs& a) {
  const auto options = a.logprobs.options().dtype(a.type());
  const auto column = [&] { return at::empty({a.size()}, options); };
  return {column(),
          column(),
          column(),
          column(),
          at::empty({a.has_residual() ? a.size() : 0}, options),
          at::empty({a.size()}, options.dtype(at::kLong))};
}

template <class Real>
struct LossOutputs {
  explicit LossOutputs(const LossTensors& tensors)
      : loss(std::get<0>(tensors).mutable_data_ptr<Real>()),
        terminal_q(std::get<1>(tensors).mutable_data_ptr<Real>()),
        log_ratio(std::get<2>(tensors).mutable_data_ptr<Real>()),
        used_q0(std::get<3>(tensors).mutable_data_ptr<Real>()),
        residual(std::get<4>(tensors).mutable_data_ptr<Real>()),
        num_tokens(std::get<5>(tensors).mutable_data_ptr<int64_t>()) {}
  Real *loss, *terminal_q, *log_ratio, *used_q0, *residual;
  int64_t* num_tokens;
};

// Kernels of LossArgs as the dispatcher calls them: m.impl(name, &LossOp::forward<kernel>).
template <class... Fields>
struct LossCalls {
  template <LossTensors (*kernel)(const LossArgs&)>
  static LossTensors forward(Fields... fields) {
    return kernel(LossArgs{fields..., "loss"});
  }
  template <LossGrads (*kernel)(const at::Tensor& grad_loss, const LossArgs&)>
  static LossGrads backward(const at::Tensor& grad_loss, Fields... fields) {
    return kernel(grad_loss, LossArgs{fields..., "loss_backward"});
  }
};
using LossOp =
    LossCalls<const at::Tensor&, const at::Tensor&, const OptionalTensor&, const OptionalTensor&,
              c10::string_view, double, double, const OptionalTensor&, bool, const OptionalTensor&,
              const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
              const OptionalTensor&, const OptionalTensor&, const OptionalTensor&>;

}  // namespace spo
