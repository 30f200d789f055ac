// SPDX-License-Identifier: Apache-2.0
// The epilogues of head_epilogues.cuh on the sums of head_sm90.cuh: row(fragment, row, col0) is
// called by the four lanes that share a row, each with its 64 of the 256 columns, in pairs of
// neighbours. Rows are slots (head_sm90.h), or entries for grad_weight.
#pragma once
#include "head_sm90.h"

namespace spo::cuda {

template <class T>
__device__ __forceinline__ uint32_t pack_pair(float first, float second) {
  const T pair[2] = {static_cast<T>(first), static_cast<T>(second)};
  uint32_t bits;
  memcpy(&bits, pair, sizeof(bits));
  return bits;
}

struct SlotRows {
  const int64_t* place;
  int64_t slots;
  __device__ int64_t operator()(int64_t slot) const { return slot < slots ? place[slot] : -1; }
};

struct Sm90Statistics {
  StatisticsEpilogue<float> base;
  SlotRows rows;
  int64_t entries;

  template <class Fragment>
  __device__ void row(const Fragment& z, int64_t slot, int64_t col0) const {
    const float lowest = -std::numeric_limits<float>::infinity();
    const int64_t row = rows(slot), label = row < 0 ? -1 : base.slice.label(row) - col0;
    const int left =
        entries - col0 < kSm90TileCols ? static_cast<int>(entries - col0) : kSm90TileCols;
    float* const keep = base.kept.data && row >= 0
                            ? base.kept.data + base.slice.token(row) * base.kept.pitch + col0
                            : nullptr;
    float slope;
#pragma unroll
    for (int i = 0; i < Fragment::kEach; i++) {
      const int c = z.col(i);
      float logit = lowest;  // entries past the end, and the label, add nothing
      if (c < left) {
        if (keep) keep[c] = z[i];
        const float raw = base.slice.raw(z[i], col0 + c);
        if (c == label) {
          base.label_raw[row] = raw;
        } else {
          logit = base.slice.map.unscaled(raw, &slope);
        }
      }
      z[i] = logit;
    }
    const auto found = lane_statistics<4, Fragment::kEach>(z, base.slice.map, base.entropy);
    if (row >= 0 && threadIdx.x % 4 == 0)
      base.stats[row * base.blocks + col0 / kSm90TileCols] = found;
  }
};

// Slots that do not count get zeros: grad_weight sums over all slots of a step.
template <class T>
struct Sm90Gradient {
  GradientEpilogue<float, T> base;
  SlotRows rows;
  int64_t entries;

  template <class Fragment>
  __device__ void row(const Fragment& z, int64_t slot, int64_t col0) const {
    if (slot >= rows.slots) return;
    const int64_t row = rows(slot), label = row < 0 ? -1 : base.slice.label(row) - col0;
    TokenGrad<float> grad = {};
    if (row >= 0) grad = base.states.of(base.slice.token(row));
    const float factor = base.scale ? *base.scale : 1.f, label_grad = grad.label();
    const int left = row < 0                          ? 0
                     : entries - col0 < kSm90TileCols ? static_cast<int>(entries - col0)
                                                      : kSm90TileCols;
    const auto dz = [&](int i) {
      const int c = z.col(i);
      if (c >= left) return 0.f;
      float slope;
      const auto& map = base.slice.map;
      const float below = map.below(map.unscaled(base.slice.raw(z[i], col0 + c), &slope), grad.top);
      const float other = grad.template other<float, true>(below);  // without entropy: adds 0
      return slope * (c == label ? label_grad : other) * factor;
    };
    T* const out = base.dz + slot * base.pitch + col0;
#pragma unroll
    for (int i = 0; i < Fragment::kEach; i += 2)
      *reinterpret_cast<uint32_t*>(out + z.col(i)) = pack_pair<T>(dz(i), dz(i + 1));
  }
};

template <class T>
struct Sm90HiddenGrad {
  HiddenGradEpilogue<float, T> base;
  SlotRows rows;

  template <class Fragment>
  __device__ void row(const Fragment& sums, int64_t slot, int64_t col0) const {
    const int64_t row = rows(slot);
    if (row < 0) return;
    const float factor = base.unscale ? *base.unscale : 1.f;
    const float before = base.shrink ? base.shrink[row] : 1.f;
    T* const out = base.grad + base.tokens.list.token[base.tokens.first + row] * base.depth + col0;
    uint8_t* const low = base.low + slot * base.depth + col0;
#pragma unroll
    for (int i = 0; i < Fragment::kEach; i += 2) {
      const int c = sums.col(i);
      if (col0 + c >= base.depth) continue;
      auto* const high_pair = reinterpret_cast<uint32_t*>(out + c);
      auto* const low_pair = reinterpret_cast<uint16_t*>(low + c);
      float first = sums[i] * factor, second = sums[i + 1] * factor;
      if (!base.first) {
        const uint32_t high = *high_pair;
        const uint16_t rest = *low_pair;
        first += before * SplitFloat::join(high & 0xffff, rest & 0xff);
        second += before * SplitFloat::join(high >> 16, rest >> 8);
      }
      if (base.last) {
        *high_pair = pack_pair<T>(first, second);
      } else {
        uint16_t high[2];
        uint8_t rest[2];
        SplitFloat::split(first, &high[0], &rest[0]);
        SplitFloat::split(second, &high[1], &rest[1]);
        *high_pair = uint32_t(high[1]) << 16 | high[0];
        *low_pair = static_cast<uint16_t>(rest[1] << 8 | rest[0]);
      }
    }
  }
};

template <class T>
struct Sm90WeightGrad {
  WeightGradEpilogue<float, T> base;
  int64_t entries;

  template <class Fragment>
  __device__ void row(const Fragment& sums, int64_t entry, int64_t col0) const {
    if (entry >= entries) return;
    const float factor = base.unscale ? *base.unscale : 1.f;
    T* const out = base.grad + entry * base.depth + col0;
#pragma unroll
    for (int i = 0; i < Fragment::kEach; i += 2) {
      const int c = sums.col(i);
      if (col0 + c < base.depth)
        *reinterpret_cast<uint32_t*>(out + c) =
            pack_pair<T>(sums[i] * factor, sums[i + 1] * factor);
    }
  }
};

}  // namespace spo::cuda
