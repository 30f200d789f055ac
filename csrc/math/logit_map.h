// SPDX-License-Identifier: Apache-2.0
// From the product h.w + bias (raw) to the logit z that enters the softmax:
//   x = logit_scale * raw;   x = softcap * tanh(x / softcap) if capped;   z = x / temperature.
// In two steps, z = outer u: the softmax takes differences of unscaled logits u and scales those,
// because a difference of neighbouring numbers is exact, however large they are.
#pragma once
#include <cmath>

#include "portable.h"

namespace spo {

template <class Real>
struct LogitMap {
  Real inner;  // capped: logit_scale / softcap; else the sign of logit_scale
  Real outer;  // > 0; capped: softcap / temperature; else |logit_scale| / temperature
  bool capped;

  static LogitMap make(double temperature, double logit_scale, double softcap_or_zero) {
    if (softcap_or_zero == 0)
      return {Real(logit_scale < 0 ? -1 : 1), Real(std::abs(logit_scale) / temperature), false};
    return {Real(logit_scale / softcap_or_zero), Real(softcap_or_zero / temperature), true};
  }

  // u is the product itself.
  bool is_identity() const { return !capped && inner == 1; }

  // dz/draw, where it is one number.
  SPO_HD Real plain_slope() const { return inner * outer; }

  // u; *slope receives dz/draw.
  template <class T>
  SPO_HD T unscaled(T raw, T* slope) const {
    if (!capped) {
      *slope = plain_slope() - T{};  // T{} is zero: a vector takes the scalar in every lane
      return raw * inner;
    }
    const T bounded = Math<T>::tanh(raw * inner, slope);
    *slope = *slope * plain_slope();
    return bounded;
  }

  // z - z_top, both logits unscaled.
  template <class T>
  SPO_HD T below(T unscaled, Real top) const {
    return (unscaled - top) * outer;
  }
};

}  // namespace spo
