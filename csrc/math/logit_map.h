// SPDX-License-Identifier: Apache-2.0
// From the product h.w + bias (raw) to the logit z that enters the softmax:
//   x = logit_scale * raw;   x = softcap * tanh(x / softcap) if capped;   z = x / temperature.
// The constants are folded in double once, so that each logit is rounded as rarely as possible.
#pragma once
#include "portable.h"

namespace spo {

template <class Real>
struct LogitMap {
  Real inner;  // capped: logit_scale / softcap
  Real outer;  // capped: softcap / temperature; else logit_scale / temperature
  bool capped;

  static LogitMap make(double temperature, double logit_scale, double softcap_or_zero) {
    if (softcap_or_zero == 0) return {Real(1), Real(logit_scale / temperature), false};
    return {Real(logit_scale / softcap_or_zero), Real(softcap_or_zero / temperature), true};
  }

  bool is_identity() const { return !capped && outer == 1; }

  // The logit; *slope receives dz/draw.
  template <class T>
  SPO_HD T logit(T raw, T* slope) const {
    if (!capped) {
      *slope = outer - T{};  // T{} is zero: a vector takes the scalar in every lane
      return raw * outer;
    }
    const T bounded = Math<T>::tanh(raw * inner, slope);
    *slope = *slope * (inner * outer);
    return bounded * outer;
  }
};

}  // namespace spo
