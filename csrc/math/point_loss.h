// SPDX-License-Identifier: Apache-2.0
// phi(Q, target): the loss of one soft-Q value against its target, and its slope dphi/dQ.
//   squared        (Q - target)^2
//   cross_entropy  -y u - (1 - y) log(1 - exp(u)),   u = Q / beta,  y = exp(target / beta)
// u is the model's log-probability of success. The first term stops at u = 0 (solved, no gradient);
// the second goes on along its tangent from u = -delta, so that a failure with Q > 0 is still
// pushed down.
#pragma once
#include "portable.h"

namespace spo {

struct PointLoss {
  double value, slope;
};

SPO_HD PointLoss squared_loss(double q, double target) {
  const double residual = q - target;
  return {residual * residual, 2 * residual};
}

// log(1 - exp(u)) for u < 0 without cancellation at either end.
SPO_HD double log1mexp(double u) {
  return u > -0.6931471805599453 ? ::log(-::expm1(u)) : ::log1p(-::exp(u));
}

SPO_HD PointLoss cross_entropy_loss(double q, double target, double beta, double delta) {
  const double u = q / beta, y = ::exp(target / beta);
  const bool itself = u <= -delta;  // the failure term, before its tangent; not for a NaN
  const double edge = itself ? u : -delta;
  const double failure_slope = 1 / ::expm1(-edge);  // exp(edge) / (1 - exp(edge))
  const double failure = -log1mexp(edge) + (itself ? 0 : failure_slope * (u - edge));
  const double success = u >= 0 ? 0 : -u;  // a NaN stays a NaN
  // y is 0 or 1 for most data: a factor of exactly 0 must not meet an infinity.
  PointLoss out = {0, 0};
  if (y > 0) out.value += y * success, out.slope -= u >= 0 ? 0 : y;
  if (y < 1) out.value += (1 - y) * failure, out.slope += (1 - y) * failure_slope;
  out.slope /= beta;
  return out;
}

}  // namespace spo
