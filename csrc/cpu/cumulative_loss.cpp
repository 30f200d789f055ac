// SPDX-License-Identifier: Apache-2.0
// The loss of every sequence as a function of its soft-Q values, sum_t w_t phi(Q_t, target_t),
// where a terminal objective has weight only at the last token. Sums are in double. Backward walks
// the sequence again, leaves dphi/dQ_t at each token and turns them into dL/dlog pi(a_t) by a
// reverse cumulative sum.
#include <torch/library.h>

#include <unordered_map>

#include "../loss_args.h"
#include "sequences.h"

namespace spo {
namespace {

template <class Real>
struct Loss : LossData<Real> {
  explicit Loss(const LossArgs& a)
      : LossData<Real>(a), sequences(a.logprobs, a.cu_seqlens, a.mask) {}
  const Sequences sequences;
};

// One sequence, walked token by token. visit(i, q, last): position, Q_t, whether it is the last
// token.
template <class Real>
class SequenceWalk {
 public:
  SequenceWalk(const Loss<Real>& data, int64_t s) : data_(data), s_(s), state_(data.start(s)) {
    for (int64_t i = data.sequences.begin(s); i < data.sequences.begin(s + 1); i++)
      if (data.sequences.counts(i)) num_tokens++, last_ = i;
  }

  template <class Visit>
  void run(const Visit& visit) {
    for (int64_t i = data_.sequences.begin(s_); i <= last_; i++) {
      if (!data_.sequences.counts(i)) continue;
      data_.push(&state_, i);
      visit(i, state_.q(), i == last_);
      if (i == last_) terminal_q = state_.q();
      state_.pay(data_.paid_at(i));
    }
  }

  double log_ratio() const { return state_.log_ratio; }
  double gain() const { return data_.gain(s_, state_); }
  double last_reward() const { return data_.paid_at(last_); }

  int64_t num_tokens = 0;
  double terminal_q = 0;

 private:
  const Loss<Real>& data_;
  const int64_t s_;
  int64_t last_ = -1;
  SoftQ state_;
};

// The group objective. q0: the mean of r - beta R over a sequence's group, or over the others in
// it. residual: Q_T - r with it, before it is rounded; alone in its group, a sequence is its own
// baseline, and this is exactly 0.
template <class Real>
struct Baseline {
  std::vector<Real> q0;
  std::vector<double> residual;
};

template <class Real>
Baseline<Real> group_baseline(const Loss<Real>& d, const at::Tensor& groups, bool leave_one_out) {
  struct Group {
    double sum = 0, after = 0;
    int64_t size = 0;
  };
  const int64_t size = d.sequences.size();
  const int64_t* group = groups.const_data_ptr<int64_t>();
  std::unordered_map<int64_t, Group> totals;
  std::vector<double> gain(size, 0), others(size, 0);
  std::vector<bool> live(size, false);
  for (int64_t s = 0; s < size; s++) {
    SequenceWalk<Real> walk(d, s);
    if (walk.num_tokens == 0) continue;
    walk.run([](int64_t, double, bool) {});
    Group& g = totals[group[s]];
    live[s] = true, gain[s] = walk.gain(), others[s] = g.sum;
    g.sum += gain[s], g.size++;
  }
  Baseline<Real> out{std::vector<Real>(size, 0), std::vector<double>(size, 0)};
  for (int64_t s = size - 1; s >= 0; s--) {
    Group& g = totals[group[s]];
    double mean = g.size > 0 ? g.sum / g.size : 0;
    if (live[s] && leave_one_out && g.size > 1) mean = (others[s] + g.after) / (g.size - 1);
    if (live[s]) g.after += gain[s];
    out.q0[s] = mean;
    out.residual[s] = mean - (live[s] ? gain[s] : d.rewards[s]);
  }
  return out;
}

template <class Real>
void loss_of_sequence(const Loss<Real>& d, int64_t s, const LossOutputs<Real>& out) {
  SequenceWalk<Real> walk(d, s);
  double loss = 0;
  walk.run([&](int64_t i, double q, bool last) {
    if (d.objective == Objective::kAdvantage)
      loss += d.advantage_loss(s, i, walk.num_tokens).value;
    else if (d.objective != Objective::kLinear)
      loss += d.token_value(s, i, q, last);
  });
  const bool empty = walk.num_tokens == 0;
  if (d.objective == Objective::kLinear) loss = -walk.log_ratio();
  out.loss[s] = empty ? 0 : d.weight_of(s) * loss;
  out.log_ratio[s] = empty ? 0 : walk.log_ratio();
  out.used_q0[s] = d.q0_of(s);
  out.terminal_q[s] = empty ? out.used_q0[s] : Real(walk.terminal_q);
  if (d.has_residual())
    out.residual[s] =
        empty ? d.residual(s, d.q0_of(s), 0) : d.residual(s, walk.terminal_q, walk.last_reward());
  out.num_tokens[s] = walk.num_tokens;
}

template <class Real>
void gradient_of_sequence(const Loss<Real>& d, int64_t s, double upstream, Real* grad_logprobs,
                          Real* grad_q0) {
  SequenceWalk<Real> walk(d, s);
  const double scale = upstream * d.weight_of(s);
  const int64_t first = d.sequences.begin(s), end = d.sequences.begin(s + 1);
  std::vector<double> slopes(end - first, 0);  // dphi/dQ at each position of the sequence
  double from_q0 = 0;
  walk.run([&](int64_t i, double q, bool last) {
    double& slope = slopes[i - first];
    if (d.objective == Objective::kAdvantage) {
      slope = d.advantage_loss(s, i, walk.num_tokens).slope;
      if (!d.advantages) from_q0 += slope / walk.num_tokens;
    } else if (d.objective != Objective::kLinear) {
      slope = d.token_loss(s, i, q, last).slope;
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

// What only a host can read without a wait.
template <class Real>
void check_values(const LossArgs& a, const Loss<Real>& d) {
  const auto check = [&](bool allowed, const char* must, double value, int64_t position) {
    TORCH_CHECK_VALUE(allowed, a.op, ": ", must, ", got ", value, " at position ", position);
  };
  const bool per_token = d.q_targets || d.q_weights || d.token_rewards || d.advantage_per_token;
  for (int64_t s = 0; s < d.sequences.size(); s++) {
    check_sequence(d, s, check);
    if (per_token)
      SequenceWalk<Real>(d, s).run(
          [&](int64_t i, double, bool last) { check_token(d, i, last, check); });
  }
}

// Whether a shape that could be per token or per sequence means the same as either.
void check_readings(const LossArgs& a) {
  const auto offsets = a.cu_seqlens->to(at::kLong).contiguous();
  const int64_t *at = offsets.const_data_ptr<int64_t>(), size = a.size();
  bool one_each = true;
  for (int64_t s = 0; s < size; s++) one_each &= at[s + 1] - at[s] == 1;
  const auto check = [&](const char* name, bool ambiguous) {
    TORCH_CHECK_VALUE(one_each || !ambiguous, a.op, ": ", name, " must be [1, ", size,
                      "] if it is per token, or [", size,
                      ", 1] if it is per sequence, where there are as many tokens as sequences "
                      "and not one each, got [",
                      size, "]");
  };
  check("ref_logprobs", a.ambiguous_reference());
  check("advantages", a.ambiguous_advantages());
}

LossTensors cumulative_loss_cpu(const LossArgs& args) {
  args.check();
  if (args.cu_seqlens) check_cu_seqlens_values(args.op, *args.cu_seqlens, args.logprobs.numel());
  const auto tensors = empty_loss(args);
  AT_DISPATCH_FLOATING_TYPES(args.type(), "loss", [&] {
    Loss<scalar_t> data(args);
    if (data.ambiguous) check_readings(args);
    check_values(args, data);
    Baseline<scalar_t> baseline;
    if (data.objective == Objective::kGroup) {
      const auto groups = args.groups->to(at::kLong).contiguous();
      baseline = group_baseline(data, groups, args.leave_one_out);
      data.q0 = baseline.q0.data(), data.residuals = baseline.residual.data();
    }
    const LossOutputs<scalar_t> out(tensors);
    data.sequences.for_each([&](int64_t s) { loss_of_sequence(data, s, out); });
  });
  return tensors;
}

LossGrads cumulative_loss_backward_cpu(const at::Tensor& grad_loss, const LossArgs& args) {
  args.check();
  if (args.cu_seqlens) check_cu_seqlens_values(args.op, *args.cu_seqlens, args.logprobs.numel());
  check_like(args.op, "grad_loss", grad_loss, {args.size()}, args.logprobs);
  const auto upstream = grad_loss.to(args.type()).contiguous();
  const auto options = args.logprobs.options().dtype(args.type());
  const auto grad_logprobs = at::empty(args.logprobs.sizes(), options),
             grad_q0 = at::empty({args.size()}, options);
  AT_DISPATCH_FLOATING_TYPES(args.type(), "loss", [&] {
    const Loss<scalar_t> data(args);
    data.sequences.for_each([&](int64_t s) {
      gradient_of_sequence(data, s, upstream.const_data_ptr<scalar_t>()[s],
                           grad_logprobs.mutable_data_ptr<scalar_t>(),
                           grad_q0.mutable_data_ptr<scalar_t>());
    });
  });
  return {grad_logprobs.to(args.logprobs.scalar_type()), grad_q0};
}

TORCH_LIBRARY_IMPL(spo, CPU, m) {
  m.impl("cumulative_loss", &LossOp::forward<cumulative_loss_cpu>);
  m.impl("cumulative_loss_backward", &LossOp::backward<cumulative_loss_backward_cpu>);
}

}  // namespace
}  // namespace spo
