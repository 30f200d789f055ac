// SPDX-License-Identifier: Apache-2.0
// The arguments of the cumulative loss as arrays, and what one token contributes; read by the
// kernels of every device, which own the walk along the sequence.
#pragma once
#include <cstdint>

#include "math/point_loss.h"
#include "math/soft_q.h"

namespace spo {

enum class Objective { kSquared, kCrossEntropy, kAdvantage, kGroup, kLinear };

// Per token [N] or per sequence [S]; null where an argument is absent.
template <class Real>
struct LossArrays {
  Objective objective;
  double beta, delta;
  bool summed_reference, advantage_per_token;
  const Real *logprobs, *ref_logprobs, *rewards, *q0, *weights;
  const Real *advantages, *q_targets, *q_weights, *token_rewards;
  const double* residuals = nullptr;  // [S], of the group objective: see group_residual
  bool ambiguous = false;             // a shape is per token or per sequence: fits one token each

  // Whether every token adds to the loss, or only the last one.
  SPO_HD bool sums_tokens() const { return objective == Objective::kAdvantage || q_targets; }
  SPO_HD bool has_residual() const { return rewards && objective != Objective::kAdvantage; }
  SPO_HD double q0_of(int64_t s) const { return q0 ? double(q0[s]) : 0; }
  SPO_HD double weight_of(int64_t s) const { return weights ? double(weights[s]) : 1; }
  SPO_HD double paid_at(int64_t i) const { return token_rewards ? double(token_rewards[i]) : 0; }

  // Walks past token i of sequence s, up to its Q.
  SPO_HD SoftQ start(int64_t s) const {
    SoftQ state{beta, q0_of(s)};
    if (summed_reference) state.push(0, ref_logprobs[s]);
    return state;
  }
  SPO_HD void push(SoftQ* state, int64_t i) const {
    state->push(logprobs[i], summed_reference ? 0 : ref_logprobs[i]);
  }

  // The part of one token: the general form, or the terminal one at the last token, where Q must
  // equal the reward of the sequence and of that token.
  SPO_HD PointLoss token_loss(int64_t s, int64_t i, double q, bool last) const {
    if (q_targets) {
      const PointLoss point = point_loss(q, q_targets[i]);
      const double weight = q_weights ? double(q_weights[i]) : 1;
      return {weight * point.value, weight * point.slope};
    }
    if (!last) return {0, 0};
    return point_loss(q, rewards[s] + paid_at(i));
  }

  // For the forward pass, where the residual of the group objective is known already.
  SPO_HD double token_value(int64_t s, int64_t i, double q, bool last) const {
    return residuals && last ? residuals[s] * residuals[s] : token_loss(s, i, q, last).value;
  }

  // Q_T minus its target; as probabilities for cross_entropy, where a log-optimality may be -inf.
  SPO_HD double residual(int64_t s, double q, double last_reward) const {
    if (residuals) return residuals[s];
    const double target = rewards[s] + last_reward;
    if (objective != Objective::kCrossEntropy) return q - target;
    const double u = q / beta;
    return ::exp(u > 0 ? 0 : u) - ::exp(target / beta);
  }

  // (A_t - target)^2 in terms of the advantage. Without targets, the gain r - Q_0 is shared evenly.
  SPO_HD PointLoss advantage_loss(int64_t s, int64_t i, int64_t num_tokens) const {
    const double a = advantage(logprobs[i], ref_logprobs[i], beta);
    if (!advantages) return squared_loss(a, (double(rewards[s]) - q0[s]) / num_tokens);
    return squared_loss(a, advantages[advantage_per_token ? i : s]);
  }

  // r - beta R after the last token was paid for: the Q_0 that would leave no residual.
  SPO_HD double gain(int64_t s, const SoftQ& state) const {
    return rewards[s] + state.paid - beta * state.log_ratio;
  }

 private:
  SPO_HD PointLoss point_loss(double q, double target) const {
    return objective == Objective::kCrossEntropy ? cross_entropy_loss(q, target, beta, delta)
                                                 : squared_loss(q, target);
  }
};

// Numbers that would make a loss silently wrong. Log-probabilities are not among them: a NaN there
// comes out as a NaN. Each is told to check(whether it may be, what it must be, value, position).
template <class Real, class Check>
SPO_HD void check_sequence(const LossArrays<Real>& d, int64_t s, const Check& check) {
  const auto finite = [&](const Real* values, const char* must) {
    if (values) check(is_finite(values[s]), must, values[s], s);
  };
  if (d.objective != Objective::kCrossEntropy)
    finite(d.rewards, "rewards must be finite");
  else if (d.rewards)
    check(d.rewards[s] <= 0,
          "rewards must be log-optimalities <= 0 for cross_entropy (-inf for none)", d.rewards[s],
          s);
  if (d.objective != Objective::kGroup) finite(d.q0, "q0 must be finite");
  finite(d.weights, "weights must be finite");
  if (!d.advantage_per_token) finite(d.advantages, "advantages must be finite");
}

// Token i, which counts. A reward of -inf before the last token would leave no Q after it.
template <class Real, class Check>
SPO_HD void check_token(const LossArrays<Real>& d, int64_t i, bool last, const Check& check) {
  const auto finite = [&](const Real* values, const char* must) {
    if (values) check(is_finite(values[i]), must, values[i], i);
  };
  finite(d.q_weights, "q_weights must be finite");
  if (d.advantage_per_token) finite(d.advantages, "advantages must be finite");
  if (d.objective != Objective::kCrossEntropy) {
    finite(d.q_targets, "q_targets must be finite");
    finite(d.token_rewards, "token_rewards must be finite");
    return;
  }
  if (d.q_targets)
    check(d.q_targets[i] <= 0,
          "q_targets must be log-optimalities <= 0 for cross_entropy (-inf for none)",
          d.q_targets[i], i);
  if (d.token_rewards)
    check(d.token_rewards[i] <= 0 && (last || is_finite(d.token_rewards[i])),
          "token_rewards must be <= 0 for cross_entropy, and finite before the last token",
          d.token_rewards[i], i);
}

}  // namespace spo
