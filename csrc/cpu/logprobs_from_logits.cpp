// SPDX-License-Identifier: Apache-2.0
// Log-probabilities from logits that already exist: one read forward, one read and one write
// backward, with the block statistics and the gradient of the LM head, row by row.
#include <ATen/OpMathType.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "head_problem.h"

namespace spo {
namespace {

constexpr int64_t kRowGrain = 4;

// Calls use(first column, LogitRow) for every block of one row of logits, copied to arithmetic
// precision.
template <class Real, class Storage, class Use>
void for_each_block(const Storage* row, int64_t stride, int64_t vocabulary, int64_t label,
                    const Use& use) {
  Real block[kBlockCols] = {};
  for (int64_t col = 0; col < vocabulary; col += kBlockCols) {
    const int64_t cols = std::min(kBlockCols, vocabulary - col);
    for (int64_t j = 0; j < cols; j++) block[j] = static_cast<Real>(row[(col + j) * stride]);
    const bool inside = label >= col && label < col + cols;
    use(col, LogitRow<Real>{block, nullptr, cols, inside ? label - col : -1});
  }
}

LogitsOutputs logprobs_from_logits_cpu(const at::Tensor& logits, const at::Tensor& targets,
                                       double temperature, int64_t ignore_index,
                                       bool return_entropy,
                                       bool /*inplace_backward: autograd's choice*/) {
  constexpr auto op = "logprobs_from_logits";
  const int64_t vocabulary = logits.dim() ? logits.size(-1) : 0;
  check_logits(op, logits, targets, temperature);
  check_target_values(op, targets, vocabulary, ignore_index);
  const auto options =
      logits.options().dtype(logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  const auto column = [&] { return at::zeros(targets.sizes(), options); };
  const auto logprobs = column(), top = column(), log_sum = column();
  const auto entropy = at::zeros(return_entropy ? targets.sizes() : at::IntArrayRef{0}, options);
  SPO_DISPATCH_STORAGE(logits.scalar_type(), op, [&] {
    using Real = at::opmath_type<scalar_t>;
    const auto map = LogitMap<Real>::make(temperature, 1, 0);
    const auto& kernels = head_kernels<Real>();
    const scalar_t* data = logits.const_data_ptr<scalar_t>();
    const Rows rows = collect_rows(logits, targets,
                                   [&](int64_t, int64_t label) { return label != ignore_index; });
    const TokenOutputs<Real> out{data_of<Real>(logprobs),
                                 return_entropy ? data_of<Real>(entropy) : nullptr,
                                 data_of<Real>(top), data_of<Real>(log_sum)};
    at::parallel_for(0, rows.size(), kRowGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        LogSumExp others;
        double label_logit = 0;
        for_each_block<Real>(
            data + rows.offset[i], logits.stride(-1), vocabulary, rows.label[i],
            [&](int64_t, const LogitRow<Real>& block) {
              others.merge(kernels.statistics(block, map, return_entropy, &label_logit), map.outer);
            });
        out.write(rows.token[i], others.finish(label_logit, map.outer));
      }
    });
  });
  return {logprobs, entropy, top, log_sum};
}

// Writes dL/dlogits to `out`, which may be `logits` itself: a block is read before it is written.
// Ignored rows get zero, even where a logit is NaN.
template <class Storage>
void backward_rows(const at::Tensor& out, const at::Tensor& logits, const at::Tensor& targets,
                   const TokenState& state, double temperature, int64_t ignore_index) {
  using Real = at::opmath_type<Storage>;
  const auto map = LogitMap<Real>::make(temperature, 1, 0);
  const auto& kernels = head_kernels<Real>();
  const auto all = [](int64_t, int64_t) { return true; };
  const Rows from = collect_rows(logits, targets, all), to = collect_rows(out, targets, all);
  const bool entropy = state.grad_entropy.has_value();
  at::parallel_for(0, from.size(), kRowGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const Storage* row = logits.const_data_ptr<Storage>() + from.offset[i];
      Storage* row_out = out.mutable_data_ptr<Storage>() + to.offset[i];
      const bool live = from.label[i] != ignore_index && state.needs_gradient<Real>(i);
      const TokenGrad<Real> token = state.grad_of<Real>(i);
      for_each_block<Real>(row, logits.stride(-1), logits.size(-1), live ? from.label[i] : -1,
                           [&](int64_t col, const LogitRow<Real>& block) {
                             if (live) kernels.gradient(block, map, entropy, token);
                             for (int64_t j = 0; j < block.cols; j++)
                               row_out[(col + j) * out.stride(-1)] =
                                   live ? static_cast<Storage>(block.logits[j]) : Storage(0);
                           });
    }
  });
}

void backward_into(const at::Tensor& out, const OptionalTensor& grad_logprobs,
                   const OptionalTensor& grad_entropy, const at::Tensor& logits,
                   const at::Tensor& targets, const at::Tensor& logprobs, const at::Tensor& entropy,
                   const at::Tensor& top, const at::Tensor& log_sum, double temperature,
                   int64_t ignore_index) {
  constexpr auto op = "logprobs_from_logits_backward";
  check_logits(op, logits, targets, temperature);
  check_grads(op, grad_logprobs, grad_entropy, logprobs);
  check_target_values(op, targets, logits.size(-1), ignore_index);
  const TokenState state(grad_logprobs, grad_entropy, logprobs, entropy, top, log_sum);
  SPO_DISPATCH_STORAGE(logits.scalar_type(), op, [&] {
    backward_rows<scalar_t>(out, logits, targets, state, temperature, ignore_index);
  });
}

at::Tensor logprobs_from_logits_backward_cpu(const OptionalTensor& grad_logprobs,
                                             const OptionalTensor& grad_entropy,
                                             const at::Tensor& logits, const at::Tensor& targets,
                                             const at::Tensor& logprobs, const at::Tensor& entropy,
                                             const at::Tensor& top, const at::Tensor& log_sum,
                                             double temperature, int64_t ignore_index) {
  const auto out = at::empty(logits.sizes(), logits.options());
  backward_into(out, grad_logprobs, grad_entropy, logits, targets, logprobs, entropy, top, log_sum,
                temperature, ignore_index);
  return out;
}

void logprobs_from_logits_backward_inplace_cpu(
    const OptionalTensor& grad_logprobs, const OptionalTensor& grad_entropy, at::Tensor& logits,
    const at::Tensor& targets, const at::Tensor& logprobs, const at::Tensor& entropy,
    const at::Tensor& top, const at::Tensor& log_sum, double temperature, int64_t ignore_index) {
  check_writable("logprobs_from_logits_backward_", logits);
  backward_into(logits, grad_logprobs, grad_entropy, logits, targets, logprobs, entropy, top,
                log_sum, temperature, ignore_index);
  logits.unsafeGetTensorImpl()->bump_version();  // whoever saved these logits must notice
}

TORCH_LIBRARY_IMPL(spo, CPU, m) {
  m.impl("logprobs_from_logits", &logprobs_from_logits_cpu);
  m.impl("logprobs_from_logits_backward", &logprobs_from_logits_backward_cpu);
  m.impl("logprobs_from_logits_backward_", &logprobs_from_logits_backward_inplace_cpu);
}

}  // namespace
}  // namespace spo
