// SPDX-License-Identifier: Apache-2.0
// log softmax of one token from block statistics, in two steps that CPU and CUDA share:
//   BlockStats  over the columns j != label of one vocabulary block, in the GEMM's precision;
//   LogSumExp   the blocks merged in vocabulary order, in double, so that lse has no bias.
// The label is left out of the sum: log p = -softplus(lse_others - z_label) and 1 - p = -expm1(log
// p) keep their digits when p is within 1e-12 of one, where z_label - lse would round to zero.
#pragma once
#include "portable.h"

namespace spo {

template <class Real>
struct BlockStats {
  Real max;       // max_j z_j; -inf if no column counts
  Real sum;       // sum_j exp(z_j - max)
  Real weighted;  // sum_j exp(z_j - max) (z_j - max), only for the entropy

  // The probability of the block's columns.
  SPO_HD double mass(double lse) const { return sum == 0 ? 0. : sum * ::exp(max - lse); }
};

struct TokenSoftmax {
  double logprob;
  double lse;
  double entropy;
};

struct LogSumExp {
  double max = -std::numeric_limits<double>::infinity();
  double sum = 0;
  double weighted = 0;

  template <class Real>
  SPO_HD void merge(const BlockStats<Real>& block) {
    if (block.sum == 0) return;  // nothing but -inf: exp(-inf - -inf) would be NaN
    if (sum == 0) {
      max = block.max, sum = block.sum, weighted = block.weighted;
      return;
    }
    const double top = block.max > max ? double(block.max) : max;
    const double mine = max - top, theirs = block.max - top;  // both <= 0, one is 0
    const double keep = ::exp(mine), take = ::exp(theirs);
    weighted = keep * (weighted + mine * sum) + take * (block.weighted + theirs * block.sum);
    sum = keep * sum + take * block.sum;
    max = top;
  }

  // Everything about the token, given its label's logit.
  SPO_HD TokenSoftmax finish(double label_logit) const {
    const double others = sum == 0 ? max : max + ::log(sum);
    const double margin = others - label_logit;
    const double tail = ::log1p(::exp(margin > 0 ? -margin : margin));
    TokenSoftmax out;
    out.logprob = margin > 0 ? -margin - tail : -tail;
    out.lse = (margin > 0 ? others : label_logit) + tail;
    const double label_p = ::exp(out.logprob);
    out.entropy = label_p == 0 ? 0 : -label_p * out.logprob;
    if (sum != 0) out.entropy -= ::exp(max - out.lse) * (weighted + (max - out.lse) * sum);
    return out;
  }
};

// What the backward pass knows about one token: grad_* are the upstream gradients.
template <class Real>
struct TokenGrad {
  Real lse, logprob, entropy;
  Real grad_logprob, grad_entropy;

  // dL/dz_j of a column that is not the label:  -p_j (g + g_H (log p_j + H)).
  template <class T, bool kEntropy>
  SPO_HD T other(T logit) const {
    const T log_p = logit - lse;
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
