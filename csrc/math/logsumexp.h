// SPDX-License-Identifier: Apache-2.0
// log softmax of one token from block statistics, in two steps that CPU and CUDA share:
//   BlockStats  over the columns j != label of one vocabulary block, in the GEMM's precision;
//   LogSumExp   the blocks merged in vocabulary order, in double, so that the sum has no bias.
// Logits are unscaled (logit_map.h) and z = outer u. The label is left out of the sum: log p =
// -softplus(log sum exp of the others - z_label) and 1 - p = -expm1(log p) keep their digits when p
// is within 1e-12 of one. What is kept of a softmax is its largest logit and, apart from it, the
// log of the sum: their total would round to the digits that a large logit leaves.
#pragma once
#include "portable.h"

namespace spo {

struct TokenSoftmax {
  double logprob;
  double top;      // the largest u, the label's included; any number near it would do
  double log_sum;  // log sum_j exp(z_j - z_top); -inf if no column is possible
  double entropy;
};

template <class Real>
struct BlockStats {
  Real max;       // max_j u_j; -inf if no column counts
  Real sum;       // sum_j exp(z_j - z_max)
  Real weighted;  // sum_j exp(z_j - z_max) (z_j - z_max), only for the entropy

  // The probability of the block's columns.
  SPO_HD double mass(const TokenSoftmax& token, double outer) const {
    return sum == 0 ? 0. : sum * ::exp(outer * (max - token.top) - token.log_sum);
  }
};

struct LogSumExp {
  double max = -std::numeric_limits<double>::infinity();
  double sum = 0;
  double weighted = 0;

  template <class Real>
  SPO_HD void merge(const BlockStats<Real>& block, double outer) {
    if (block.sum == 0) return;  // nothing but -inf: exp(-inf - -inf) would be NaN
    if (sum == 0) {
      max = block.max, sum = block.sum, weighted = block.weighted;
      return;
    }
    const double top = block.max > max ? double(block.max) : max;
    const double mine = outer * (max - top), theirs = outer * (block.max - top);  // one is 0
    const double keep = ::exp(mine), take = ::exp(theirs);
    weighted = keep * (weighted + mine * sum) + take * (block.weighted + theirs * block.sum);
    sum = keep * sum + take * block.sum;
    max = top;
  }

  // log sum_j exp(z_j - z_at).
  SPO_HD double above(double at, double outer) const {
    return outer * (max - at) + (sum == 0 ? 0. : ::log(sum));
  }

  // Everything about the token, given its label's unscaled logit.
  SPO_HD TokenSoftmax finish(double label, double outer) const {
    const double margin = above(label, outer);
    const double tail = ::log1p(::exp(margin > 0 ? -margin : margin));
    TokenSoftmax out;
    out.logprob = margin > 0 ? -margin - tail : -tail;
    out.top = label > max ? label : max;
    out.log_sum = tail + (margin > 0 ? above(out.top, outer) : outer * (label - out.top));
    if (sum == 0 && label == max) out.log_sum = max;  // all -inf: no softmax, but known why
    const double label_p = ::exp(out.logprob);
    out.entropy = label_p == 0 ? 0 : -label_p * out.logprob;
    if (sum != 0) {
      const double log_share = outer * (max - out.top) - out.log_sum;
      out.entropy -= ::exp(log_share) * (weighted + log_share * sum);
    }
    return out;
  }
};

// What the backward pass knows about one token: grad_* are the upstream gradients.
template <class Real>
struct TokenGrad {
  Real top, log_sum, logprob, entropy;
  Real grad_logprob, grad_entropy;

  // dL/dz_j of a column that is not the label, z_j - z_top given:  -p_j (g + g_H (log p_j + H)).
  template <class T, bool kEntropy>
  SPO_HD T other(T below_top) const {
    const T log_p = below_top - log_sum;
    const T p = Math<T>::exp(log_p);
    if (!kEntropy) return -p * grad_logprob;
    const T grad = -p * (grad_logprob + grad_entropy * (log_p + entropy));
    return p == T{} ? T{} : grad;  // a logit of -inf: 0 * -inf; written so that a NaN stays
  }

  // dL/dz of the label:  g (1 - p) - g_H p (log p + H).
  SPO_HD Real label() const {
    const Real p = Math<Real>::exp(logprob);
    const Real entropy_part = p == 0 ? Real(0) : grad_entropy * p * (logprob + entropy);
    return -grad_logprob * Real(::expm1(logprob)) - entropy_part;
  }
};

}  // namespace spo
