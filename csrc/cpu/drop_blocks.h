// SPDX-License-Identifier: Apache-2.0
// Which vocabulary blocks a token's gradient may do without: smallest first, as long as the
// probability left out stays within a bound. No other choice drops more blocks.
#pragma once
#include <algorithm>
#include <utility>
#include <vector>

#include "../kept.h"

namespace spo {

// On entry the mass of every block, on return kKeptBlock for those that are not dropped. A NaN is
// never dropped.
template <class Real>
void drop_blocks(Real* mass, int64_t blocks, double bound) {
  const Real always = static_cast<Real>(bound / blocks);  // all of these together fit
  double dropped = 0;
  std::vector<std::pair<Real, int64_t>> candidates;
  for (int64_t b = 0; b < blocks; b++) {
    if (mass[b] <= always) {
      dropped += mass[b];
      continue;
    }
    if (mass[b] <= bound) candidates.emplace_back(mass[b], b);
    mass[b] = kKeptBlock;
  }
  std::sort(candidates.begin(), candidates.end());
  for (const auto& [m, b] : candidates) {
    if (dropped + m > bound) return;
    dropped += m, mass[b] = m;
  }
}

// Gathering rows costs more than it saves where nearly all pairs stay: then all of them do. Of the
// rows at `tokens` in [.., blocks].
template <class Real>
void keep_all_if_most(Real* mass, const std::vector<int64_t>& tokens, int64_t blocks) {
  constexpr double kMost = 0.9;
  int64_t kept = 0;
  for (const int64_t token : tokens)
    for (int64_t b = 0; b < blocks; b++) kept += mass[token * blocks + b] < 0;
  if (kept <= kMost * tokens.size() * blocks) return;
  for (const int64_t token : tokens) std::fill_n(mass + token * blocks, blocks, Real(kKeptBlock));
}

}  // namespace spo
