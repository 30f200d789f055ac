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

// Columns that a tile has, of those up to `end`.
__device__ inline int columns_left(int64_t end, int64_t col0) {
  return end - col0 < kSm90TileCols ? static_cast<int>(end - col0) : kSm90TileCols;
}

// Pair p of a lane's numbers lies at [4 p]: one pointer serves them all, with constant distances.
template <class T>
__device__ uint32_t* lane_pairs(T* row, int lane_col) {
  return reinterpret_cast<uint32_t*>(row + lane_col);
}

// Pairs of this lane among `left` columns, an even number of them.
__device__ inline int pairs_left(int left, int lane_col) { return (left - lane_col + 7) / 8; }

// One row of logits of a tile. What few tiles need (a bias, a label, an edge) is a pass of its own
// over the numbers, so that the others only step over it.
template <bool kCapped>
struct Sm90Row {
  LogitMap<float> map;
  const float* bias;     // of the tile's first column, or null
  int row, label, left;  // label: -1 if it is not in the tile

  __device__ Sm90Row(const LogitSlice<float>& slice, int64_t row_, int64_t entries, int64_t col0)
      : map(slice.map),
        bias(slice.bias ? slice.bias + slice.first_entry + col0 : nullptr),
        row(static_cast<int>(row_)),
        label(-1),
        left(columns_left(entries, col0)) {
    map.capped = kCapped;  // known to the compiler
    const int64_t column = row < 0 ? -1 : slice.label(row) - col0;
    if (column >= 0 && column < left) label = static_cast<int>(column);
  }

  // The number in column `label`, for the lane that has it; then what to put in its place.
  template <class Fragment>
  __device__ float at_label(const Fragment& z) const {
    float found = 0;
#pragma unroll
    for (int i = 0; i < Fragment::kEach; i++)
      if (z.col(i) == label) found = z[i];
    return found;
  }
  template <class Fragment>
  __device__ void set_label(const Fragment& z, float value) const {
    if (label < 0) return;
#pragma unroll
    for (int i = 0; i < Fragment::kEach; i++)
      if (z.col(i) == label) z[i] = value;
  }
  template <class Fragment>
  __device__ bool has_label(const Fragment& z) const {
    return label >= 0 && label / 2 % 4 * 2 == z.lane_col;
  }

  template <class Fragment>
  __device__ void add_bias(const Fragment& z) const {
    if (!bias) return;
#pragma unroll
    for (int i = 0; i < Fragment::kEach; i++)
      if (z.col(i) < left) z[i] += bias[z.col(i)];
  }

  template <class Fragment>
  __device__ static void fill_from(int end, float value, const Fragment& z) {
    if (end >= kSm90TileCols) return;
#pragma unroll
    for (int i = 0; i < Fragment::kEach; i++)
      if (z.col(i) >= end) z[i] = value;
  }
};

template <bool kCapped>
struct Sm90Statistics {
  StatisticsEpilogue<float> base;
  SlotRows rows;
  int64_t entries;

  template <class Fragment>
  __device__ void row(const Fragment& z, int64_t slot, int64_t col0) const {
    const float lowest = -std::numeric_limits<float>::infinity();
    const Sm90Row<kCapped> own(base.slice, rows(slot), entries, col0);
    if (base.kept.data && own.row >= 0) keep(z, own, col0);
    own.add_bias(z);
    if (own.has_label(z)) base.label_raw[own.row] = own.at_label(z);
    float slope;
#pragma unroll
    for (int i = 0; i < Fragment::kEach; i++) z[i] = own.map.unscaled(z[i], &slope);
    own.set_label(z, lowest);  // adds nothing
    own.fill_from(own.left, lowest, z);
    const auto found = lane_statistics<4, Fragment::kEach>(z, own.map, base.entropy);
    if (own.row >= 0 && threadIdx.x % 4 == 0)
      base.stats[int64_t(own.row) * base.blocks + col0 / kSm90TileCols] = found;
  }

 private:
  template <class Fragment>
  __device__ void keep(const Fragment& z, const Sm90Row<kCapped>& own, int64_t col0) const {
    float* const to =
        base.kept.data + base.slice.token(own.row) * base.kept.pitch + col0 + z.lane_col;
    const int mine = own.left - z.lane_col;  // columns from this lane's first on
    const bool pairs = base.kept.pitch % 2 == 0;
#pragma unroll
    for (int p = 0; p < Fragment::kEach / 2; p++) {
      if (pairs && 8 * p + 1 < mine) {
        *reinterpret_cast<float2*>(to + 8 * p) = make_float2(z[2 * p], z[2 * p + 1]);
      } else {
        if (8 * p < mine) to[8 * p] = z[2 * p];
        if (8 * p + 1 < mine) to[8 * p + 1] = z[2 * p + 1];
      }
    }
  }
};

// Slots that do not count get zeros: grad_weight sums over all slots of a step.
template <class T, bool kCapped>
struct Sm90Gradient {
  GradientEpilogue<float, T> base;
  SlotRows rows;
  int64_t entries;

  template <class Fragment>
  __device__ void row(const Fragment& z, int64_t slot, int64_t col0) const {
    if (slot >= rows.slots) return;
    const Sm90Row<kCapped> own(base.slice, rows(slot), entries, col0);
    TokenGrad<float> grad = {};
    if (own.row >= 0) grad = base.states.of(base.slice.token(own.row));
    const float factor = base.scale ? *base.scale : 1.f;
    own.add_bias(z);
    if (kCapped || base.states.grad_entropy) {  // without entropy it adds 0
      differentiate<true>(z, own, grad, factor);
    } else {
      differentiate<false>(z, own, grad, factor);
    }
    own.fill_from(own.row < 0 ? 0 : own.left, 0.f, z);
    uint32_t* const out = lane_pairs(base.dz + slot * base.pitch + col0, z.lane_col);
#pragma unroll
    for (int i = 0; i < Fragment::kEach; i += 2) out[i * 2] = pack_pair<T>(z[i], z[i + 1]);
  }

 private:
  template <bool kEntropy, class Fragment>
  __device__ static void differentiate(const Fragment& z, const Sm90Row<kCapped>& own,
                                       const TokenGrad<float>& grad, float factor) {
    float label_dz = 0;
    if (own.has_label(z)) {
      own.map.unscaled(own.at_label(z), &label_dz);
      label_dz *= factor * grad.label();
    }
#pragma unroll
    for (int i = 0; i < Fragment::kEach; i++) {
      float slope;
      const float below = own.map.below(own.map.unscaled(z[i], &slope), grad.top);
      z[i] = slope * factor * grad.template other<float, kEntropy>(below);
    }
    own.set_label(z, label_dz);
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
    T* const out = base.grad + base.tokens.list.token[base.tokens.first + row] * base.depth + col0;
    uint8_t* const low = base.low + slot * base.depth + col0;
    const float factor = base.unscale ? *base.unscale : 1.f;
    const float before = base.shrink ? base.shrink[row] : 1.f;
    if (base.last) {
      add<true>(sums, out, low, col0, factor, before);
    } else {
      add<false>(sums, out, low, col0, factor, before);
    }
  }

 private:
  // Sums so far are fetched a batch at a time, or each pair would wait for its own.
  template <bool kLast, class Fragment>
  __device__ void add(const Fragment& sums, T* out, uint8_t* low_out, int64_t col0, float factor,
                      float before) const {
    constexpr int kBatch = 8;
    uint32_t* const high = lane_pairs(out, sums.lane_col);
    auto* const low = reinterpret_cast<uint16_t*>(low_out + sums.lane_col);
    const int pairs = pairs_left(columns_left(base.depth, col0), sums.lane_col);
#pragma unroll
    for (int begin = 0; begin < Fragment::kEach / 2; begin += kBatch) {
      if (begin >= pairs) break;
      uint32_t bits[kBatch] = {}, rest[kBatch] = {};  // zeros are a sum of nothing
      if (!base.first) {
#pragma unroll
        for (int p = 0; p < kBatch; p++)
          if (begin + p < pairs) bits[p] = high[(begin + p) * 4], rest[p] = low[(begin + p) * 4];
      }
#pragma unroll
      for (int p = 0; p < kBatch; p++) {
        if (begin + p >= pairs) continue;
        const float first = sums[2 * (begin + p)] * factor +
                            before * SplitFloat::join(bits[p] & 0xffff, rest[p] & 0xff);
        const float second = sums[2 * (begin + p) + 1] * factor +
                             before * SplitFloat::join(bits[p] >> 16, rest[p] >> 8);
        if constexpr (kLast) {
          high[(begin + p) * 4] = pack_pair<T>(first, second);
        } else {
          uint16_t upper[2];
          uint8_t lower[2];
          SplitFloat::split(first, &upper[0], &lower[0]);
          SplitFloat::split(second, &upper[1], &lower[1]);
          high[(begin + p) * 4] = uint32_t(upper[1]) << 16 | upper[0];
          low[(begin + p) * 4] = static_cast<uint16_t>(lower[1] << 8 | lower[0]);
        }
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
    uint32_t* const out = lane_pairs(base.grad + entry * base.depth + col0, sums.lane_col);
    const int pairs = pairs_left(columns_left(base.depth, col0), sums.lane_col);
#pragma unroll
    for (int p = 0; p < Fragment::kEach / 2; p++)
      if (p < pairs) out[p * 4] = pack_pair<T>(sums[2 * p] * factor, sums[2 * p + 1] * factor);
  }
};

}  // namespace spo::cuda
