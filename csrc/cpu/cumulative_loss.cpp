// SPDX-License-Identifier: Apache-2.0
// The loss of every sequence as a function of its soft-Q values, sum_t w_t phi(Q_t, target_t),
// where a terminal objective has weight only at the last token. Sums are in double. Backward walks
// the sequence again, leaves dphi/dQ_t at each token and turns them into dL/dlog pi(a_t) by a
// reverse cumulative sum.
#include <torch/library.h>

#include <unordered_map>

#include "../math/point_loss.h"
#include "../math/soft_q.h"
#include "loss_args.h"

namespace spo {
namespace {

// One sequence, walked token by token. visit(i, q, last): position, Q_t, whether it is the last
// token.
template <class Real>
class SequenceWalk {
 public:
  SequenceWalk(const LossData<Real>& data, int64_t s) : data_(data), s_(s) {
    for (int64_t i = data.sequences.begin(s); i < data.sequences.begin(s + 1); i++)
      if (data.sequences.counts(i)) num_tokens++, last_ = i;
    state_ = SoftQ{data.beta, data.q0 ? double(data.q0[s]) : 0};
  }

  template <class Visit>
  void run(const Visit& visit) {
    if (data_.summed_reference) state_.push(0, data_.ref_logprobs[s_]);
    for (int64_t i = data_.sequences.begin(s_); i <= last_; i++) {
      if (!data_.sequences.counts(i)) continue;
      state_.push(data_.logprobs[i], data_.summed_reference ? 0 : data_.ref_logprobs[i]);
      visit(i, state_.q(), i == last_);
      if (i == last_) terminal_q = state_.q();
      if (data_.token_rewards) state_.pay(data_.token_rewards[i]);
    }
  }

  double log_ratio() const { return state_.log_ratio; }
  // What the last Q must equal: the reward of the sequence and of its last token.
  double terminal_target() const {
    return data_.rewards[s_] + (data_.token_rewards ? data_.token_rewards[last_] : 0);
  }
  double residual_without_q0() const {
    return data_.rewards[s_] + state_.paid - data_.beta * log_ratio();
  }

  int64_t num_tokens = 0;
  double terminal_q = 0;

 private:
  const LossData<Real>& data_;
  const int64_t s_;
  int64_t last_ = -1;
  SoftQ state_;
};

template <class Real>
PointLoss point_loss(const LossData<Real>& d, double q, double target) {
  return d.objective == Objective::kCrossEntropy ? cross_entropy_loss(q, target, d.beta, d.delta)
                                                 : squared_loss(q, target);
}

// The part of one token: the general form, or the terminal one at the last token.
template <class Real>
PointLoss token_loss(const LossData<Real>& d, const SequenceWalk<Real>& walk, int64_t i, double q,
                     bool last) {
  if (d.q_targets) {
    PointLoss point = point_loss(d, q, d.q_targets[i]);
    const double weight = d.q_weights ? double(d.q_weights[i]) : 1;
    return {weight * point.value, weight * point.slope};
  }
  if (!last) return {0, 0};
  return point_loss(d, q, walk.terminal_target());
}

// (A_t - target)^2 in terms of the advantage. Without targets, the gain r - Q_0 is shared evenly.
template <class Real>
PointLoss advantage_loss(const LossData<Real>& d, int64_t s, int64_t i, int64_t num_tokens) {
  const double a = advantage(d.logprobs[i], d.ref_logprobs[i], d.beta);
  if (!d.advantages) return squared_loss(a, (d.rewards[s] - d.q0[s]) / num_tokens);
  return squared_loss(a, d.advantages[d.advantage_per_token ? i : s]);
}

// Q_0 of every sequence from its group: the mean of r - beta R over the group, or over the others
// in it.
template <class Real>
std::vector<Real> group_q0(const LossData<Real>& d, const at::Tensor& groups, bool leave_one_out) {
  struct Group {
    double sum = 0;
    int64_t size = 0;
  };
  const int64_t* group = groups.const_data_ptr<int64_t>();
  std::unordered_map<int64_t, Group> totals;
  std::vector<double> gain(d.sequences.size(), 0);
  std::vector<Real> out(d.sequences.size(), 0);
  for (int64_t s = 0; s < d.sequences.size(); s++) {
    SequenceWalk<Real> walk(d, s);
    if (walk.num_tokens == 0) continue;
    walk.run([](int64_t, double, bool) {});
    gain[s] = walk.residual_without_q0();
    totals[group[s]].sum += gain[s], totals[group[s]].size++;
  }
  for (int64_t s = 0; s < d.sequences.size(); s++) {
    const auto found = totals.find(group[s]);
    if (found == totals.end()) continue;
    const Group& g = found->second;
    // Alone in its group, a sequence is its own baseline: residual 0, no gradient.
    out[s] = leave_one_out && g.size > 1 ? (g.sum - gain[s]) / (g.size - 1) : g.sum / g.size;
  }
  return out;
}

template <class Real>
void loss_of_sequence(const LossData<Real>& d, int64_t s, const LossOutputs<Real>& out) {
  SequenceWalk<Real> walk(d, s);
  double loss = 0;
  walk.run([&](int64_t i, double q, bool last) {
    if (d.objective == Objective::kAdvantage)
      loss += advantage_loss(d, s, i, walk.num_tokens).value;
    else if (d.objective != Objective::kLinear)
      loss += token_loss(d, walk, i, q, last).value;
  });
  const bool empty = walk.num_tokens == 0;
  if (d.objective == Objective::kLinear) loss = -walk.log_ratio();
  out.loss[s] = empty ? 0 : (d.weights ? d.weights[s] * loss : loss);
  out.log_ratio[s] = empty ? 0 : walk.log_ratio();
  out.used_q0[s] = d.q0 ? d.q0[s] : Real(0);
  out.terminal_q[s] = empty ? out.used_q0[s] : Real(walk.terminal_q);
  out.num_tokens[s] = walk.num_tokens;
}

template <class Real>
void gradient_of_sequence(const LossData<Real>& d, int64_t s, double upstream, Real* grad_logprobs,
                          Real* grad_q0) {
  SequenceWalk<Real> walk(d, s);
  const double scale = upstream * (d.weights ? double(d.weights[s]) : 1);
  const int64_t first = d.sequences.begin(s), end = d.sequences.begin(s + 1);
  std::vector<double> slopes(end - first, 0);  // dphi/dQ at each position of the sequence
  double from_q0 = 0;
  walk.run([&](int64_t i, double q, bool last) {
    double& slope = slopes[i - first];
    if (d.objective == Objective::kAdvantage) {
      slope = advantage_loss(d, s, i, walk.num_tokens).slope;
      if (!d.advantages) from_q0 += slope / walk.num_tokens;
    } else if (d.objective != Objective::kLinear) {
      slope = token_loss(d, walk, i, q, last).slope;
      from_q0 += slope;
    }
  });
  double tail = 0;
  for (int64_t i = end - 1; i >= first; i--) {
    const double slope = slopes[i - first];
    tail = d.objective == Objective::kAdvantage ? slope : tail + slope;
    const double to_logprob = d.objective == Objective::kLinear ? -scale : d.beta * tail * scale;
    grad_logprobs[i] = d.sequences.counts(i) ? to_logprob : 0;
  }
  grad_q0[s] = from_q0 * scale;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> cumulative_loss_cpu(
    const at::Tensor& logprobs, const at::Tensor& ref_logprobs, const OptionalTensor& rewards,
    const OptionalTensor& q0, c10::string_view objective, double beta, double delta,
    const OptionalTensor& groups, bool leave_one_out, const OptionalTensor& advantages,
    const OptionalTensor& q_targets, const OptionalTensor& q_weights,
    const OptionalTensor& token_rewards, const OptionalTensor& weights,
    const OptionalTensor& cu_seqlens, const OptionalTensor& mask) {
  LossArgs args{"cumulative_loss",
                logprobs,
                ref_logprobs,
                rewards,
                q0,
                objective_of("cumulative_loss", objective),
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
  check_loss_values(args);
  const auto options = logprobs.options().dtype(args.type());
  const int64_t size = num_sequences(logprobs, cu_seqlens);
  const auto column = [&] { return at::empty({size}, options); };
  const auto loss = column(), terminal_q = column(), log_ratio = column(), used_q0 = column();
  const auto num_tokens = at::empty({size}, options.dtype(at::kLong));
  AT_DISPATCH_FLOATING_TYPES(args.type(), "cumulative_loss", [&] {
    LossData<scalar_t> data(args);
    std::vector<scalar_t> baseline;
    if (data.objective == Objective::kGroup) {
      baseline = group_q0(data, groups->to(at::kLong).contiguous(), leave_one_out);
      data.q0 = baseline.data();
    }
    const LossOutputs<scalar_t> out(loss, terminal_q, log_ratio, used_q0, num_tokens);
    data.sequences.for_each([&](int64_t s) { loss_of_sequence(data, s, out); });
  });
  return {loss, terminal_q, log_ratio, used_q0, num_tokens};
}

std::tuple<at::Tensor, at::Tensor> cumulative_loss_backward_cpu(
    const at::Tensor& grad_loss, const at::Tensor& logprobs, const at::Tensor& ref_logprobs,
    const OptionalTensor& rewards, const OptionalTensor& q0, c10::string_view objective,
    double beta, double delta, const OptionalTensor& advantages, const OptionalTensor& q_targets,
    const OptionalTensor& q_weights, const OptionalTensor& token_rewards,
    const OptionalTensor& weights, const OptionalTensor& cu_seqlens, const OptionalTensor& mask) {
  LossArgs args{"cumulative_loss_backward",
                logprobs,
                ref_logprobs,
                rewards,
                q0,
                objective_of("cumulative_loss_backward", objective),
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
  const int64_t size = num_sequences(logprobs, cu_seqlens);
  check_like(args.op, "grad_loss", grad_loss, {size}, logprobs);
  const auto upstream = grad_loss.to(args.type()).contiguous();
  const auto options = logprobs.options().dtype(args.type());
  const auto grad_logprobs = at::empty(logprobs.sizes(), options),
             grad_q0 = at::empty({size}, options);
  AT_DISPATCH_FLOATING_TYPES(args.type(), "cumulative_loss", [&] {
    const LossData<scalar_t> data(args);
    data.sequences.for_each([&](int64_t s) {
      gradient_of_sequence(data, s, upstream.const_data_ptr<scalar_t>()[s],
                           grad_logprobs.mutable_data_ptr<scalar_t>(),
                           grad_q0.mutable_data_ptr<scalar_t>());
    });
  });
  return {grad_logprobs.to(logprobs.scalar_type()), grad_q0};
}

TORCH_LIBRARY_IMPL(spo, CPU, m) {
  m.impl("cumulative_loss", &cumulative_loss_cpu);
  m.impl("cumulative_loss_backward", &cumulative_loss_backward_cpu);
}

}  // namespace
}  // namespace spo
