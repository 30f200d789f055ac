// SPDX-License-Identifier: Apache-2.0
// soft_q: one walk per sequence; backward, one reverse cumulative sum. A masked position repeats
// the value before it, so that the last column of a padded batch is the terminal Q.
#include "../math/soft_q.h"

#include <torch/library.h>

#include "sequences.h"

namespace spo {
namespace {

at::Tensor soft_q_cpu(const at::Tensor& logprobs, const at::Tensor& ref_logprobs,
                      const at::Tensor& q0, double beta, const OptionalTensor& cu_seqlens,
                      const OptionalTensor& mask) {
  constexpr auto op = "soft_q";
  check_layout(op, logprobs, cu_seqlens, mask);
  check_like(op, "ref_logprobs", ref_logprobs, logprobs.sizes(), logprobs);
  check_like(op, "q0", q0, {num_sequences(logprobs, cu_seqlens)}, logprobs);
  check_positive(op, "beta", beta);
  if (cu_seqlens) check_cu_seqlens_values(op, *cu_seqlens, logprobs.numel());
  const auto type = result_type_of(logprobs);
  const auto policy = logprobs.to(type).contiguous(),
             reference = ref_logprobs.to(type).contiguous();
  const auto start = q0.to(type).contiguous();
  const auto out = at::empty(logprobs.sizes(), logprobs.options().dtype(type));
  const Sequences sequences(logprobs, cu_seqlens, mask);
  AT_DISPATCH_FLOATING_TYPES(type, op, [&] {
    const scalar_t *p = policy.const_data_ptr<scalar_t>(),
                   *r = reference.const_data_ptr<scalar_t>();
    scalar_t* q = out.mutable_data_ptr<scalar_t>();
    for (int64_t s = 0; s < sequences.size(); s++) {
      const double value = start.const_data_ptr<scalar_t>()[s];
      TORCH_CHECK_VALUE(is_finite(value), op, ": q0 must be finite, got ", value, " at position ",
                        s);
    }
    sequences.for_each([&](int64_t s) {
      SoftQ state{beta, start.const_data_ptr<scalar_t>()[s]};
      for (int64_t i = sequences.begin(s); i < sequences.begin(s + 1); i++) {
        if (sequences.counts(i)) state.push(p[i], r[i]);
        q[i] = state.q();
      }
    });
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor> soft_q_backward_cpu(const at::Tensor& grad_q_values, double beta,
                                                       const OptionalTensor& cu_seqlens,
                                                       const OptionalTensor& mask) {
  constexpr auto op = "soft_q_backward";
  check_layout(op, grad_q_values, cu_seqlens, mask);
  if (cu_seqlens) check_cu_seqlens_values(op, *cu_seqlens, grad_q_values.numel());
  const auto grad = grad_q_values.contiguous();
  const Sequences sequences(grad, cu_seqlens, mask);
  const auto grad_logprobs = at::empty(grad.sizes(), grad.options());
  const auto grad_q0 = at::empty({sequences.size()}, grad.options());
  AT_DISPATCH_FLOATING_TYPES(grad.scalar_type(), op, [&] {
    const scalar_t* g = grad.const_data_ptr<scalar_t>();
    sequences.for_each([&](int64_t s) {
      double tail = 0;
      for (int64_t i = sequences.begin(s + 1) - 1; i >= sequences.begin(s); i--) {
        tail += g[i];
        grad_logprobs.mutable_data_ptr<scalar_t>()[i] = sequences.counts(i) ? beta * tail : 0;
      }
      grad_q0.mutable_data_ptr<scalar_t>()[s] = tail;
    });
  });
  return {grad_logprobs, grad_q0};
}

TORCH_LIBRARY_IMPL(spo, CPU, m) {
  m.impl("soft_q", &soft_q_cpu);
  m.impl("soft_q_backward", &soft_q_backward_cpu);
}

}  // namespace
}  // namespace spo
