// SPDX-License-Identifier: Apache-2.0
// The cumulative Q-parameterisation (SPO, arXiv 2503.05453):
//   A_t = beta (log pi(a_t) - log pi_ref(a_t)),   Q_t = Q_0 + sum_{i<=t} A_i - sum_{i<t} r_i
// and its gradient: dL/dlog pi(a_t) = beta sum_{s>=t} dL/dQ_s, a reverse cumulative sum.
#pragma once
#include "portable.h"

namespace spo {

SPO_HD double advantage(double logprob, double ref_logprob, double beta) {
  return beta * (logprob - ref_logprob);
}

// Walks along one sequence: push every token in order, read q() after each.
struct SoftQ {
  double beta;
  double q0;
  double log_ratio = 0;  // summed before it is scaled: exactly 0 at equal weights
  double paid = 0;

  SPO_HD void push(double logprob, double ref_logprob) { log_ratio += logprob - ref_logprob; }
  SPO_HD void pay(double token_reward) { paid += token_reward; }  // counts from the next token on
  SPO_HD double q() const { return q0 + beta * log_ratio - paid; }
};

}  // namespace spo
