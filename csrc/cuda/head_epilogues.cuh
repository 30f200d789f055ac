// SPDX-License-Identifier: Apache-2.0
// What happens to a row of a finished tile (head_gemm.cuh): one warp per row, the columns dealt out
// to its lanes. Each has  row<kTile>(numbers, row, col0, cols, lane):  `row` counts from the first
// row of the product, col0 is the tile's first column, `cols` the columns of the product.
#pragma once
#include "head_rows.cuh"
#include "lane_statistics.cuh"

namespace spo::cuda {

// The products of one slice of the vocabulary, seen as logits.
template <class Real>
struct LogitSlice {
  LogitMap<Real> map;
  const Real* bias;  // of the whole vocabulary, or null
  RowRange tokens;
  int64_t first_entry;

  __device__ Real raw(Real product, int64_t entry) const {
    return bias ? product + bias[first_entry + entry] : product;
  }
  __device__ int64_t label(int64_t row) const {
    return tokens.list.label[tokens.first + row] - first_entry;
  }
  __device__ int64_t token(int64_t row) const { return tokens.list.token[tokens.first + row]; }
};

// The products of a slice as they were summed, kept by token; data may be null.
template <class Real>
struct KeptProducts {
  Real* data;
  int64_t pitch;
};

// Forward: (max, sum of exponentials) of the row's entries other than the label, and the label's
// product.
template <class Real>
struct StatisticsEpilogue {
  LogitSlice<Real> slice;
  bool entropy;
  BlockStats<Real>* stats;  // [rows, blocks]
  int64_t blocks;
  Real* label_raw;  // [rows]
  KeptProducts<Real> kept;

  int64_t bytes(int64_t m, int64_t n) const {  // that it moves, of a product [m, n]
    return m * (blocks * int64_t(sizeof(*stats)) + (kept.data ? n * int64_t(sizeof(Real)) : 0));
  }

  template <int kTile>
  __device__ void row(const Real* products, int64_t row, int64_t col0, int64_t cols,
                      int lane) const {
    constexpr int kEach = kTile / 32;
    const Real lowest = -std::numeric_limits<Real>::infinity();
    const int64_t label = slice.label(row) - col0;
    Real* const keep = kept.data ? kept.data + slice.token(row) * kept.pitch + col0 : nullptr;
    Real logits[kEach], slope;
#pragma unroll
    for (int e = 0; e < kEach; e++) {
      const int c = lane + e * 32;
      logits[e] = lowest;  // entries past the end, and the label, add nothing
      if (col0 + c < cols) {
        if (keep) keep[c] = products[c];
        const Real raw = slice.raw(products[c], col0 + c);
        if (c == label) {
          label_raw[row] = raw;
        } else {
          logits[e] = slice.map.unscaled(raw, &slope);
        }
      }
    }
    const BlockStats<Real> found = lane_statistics<32, kEach>(logits, slice.map, entropy);
    if (lane == 0) stats[row * blocks + col0 / kTile] = found;
  }
};

// Backward: dL/d(product), scaled by a power of two so that float16 keeps small probabilities.
template <class Real, class Storage>
struct GradientEpilogue {
  LogitSlice<Real> slice;
  TokenStates<Real> states;
  const Real* scale;  // null: 1
  Storage* dz;        // [rows, pitch]
  int64_t pitch;

  int64_t bytes(int64_t m, int64_t n) const { return m * n * int64_t(sizeof(Storage)); }

  template <int kTile>
  __device__ void row(const Real* products, int64_t row, int64_t col0, int64_t cols,
                      int lane) const {
    write<kTile>(products, row, row, false, col0, cols, lane);
  }

  // Into row `to` of dz; the entries other than the label may get 0.
  template <int kTile>
  __device__ void write(const Real* products, int64_t row, int64_t to, bool label_only,
                        int64_t col0, int64_t cols, int lane) const {
    const TokenGrad<Real> grad = states.of(slice.token(row));
    const int64_t label = slice.label(row) - col0;
    const Real factor = scale ? *scale : Real(1);
    Real own[kTile / 32];  // all on their way before the first is used
#pragma unroll
    for (int e = 0; e < kTile / 32; e++)
      own[e] = col0 + lane + e * 32 < cols ? products[lane + e * 32] : Real(0);
#pragma unroll
    for (int e = 0; e < kTile / 32; e++) {
      const int c = lane + e * 32;
      if (col0 + c >= cols) break;
      Real slope;
      const Real u = slice.map.unscaled(slice.raw(own[e], col0 + c), &slope);
      const Real below = slice.map.below(u, grad.top);
      const Real dlogit = c == label            ? grad.label()
                          : label_only          ? Real(0)
                          : states.grad_entropy ? grad.template other<Real, true>(below)
                                                : grad.template other<Real, false>(below);
      dz[to * pitch + col0 + c] = static_cast<Storage>(slope * dlogit * factor);
    }
  }
};

// A float of which 16 bits live in the gradient's own 16-bit storage and 8 more in `low`: the sum
// of a 16-bit gradient over many slices, within 2^-17, for one extra byte per number.
struct SplitFloat {
  static __device__ float join(uint16_t high, uint8_t low) {
    const uint32_t bits = uint32_t(high) << 16 | uint32_t(low) << 8;
    float out;
    memcpy(&out, &bits, sizeof(out));
    return out;
  }
  static __device__ void split(float value, uint16_t* high, uint8_t* low) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    if ((bits & 0x7f800000u) != 0x7f800000u) bits += 0x7f + (bits >> 8 & 1);  // to nearest even
    *high = bits >> 16, *low = bits >> 8 & 0xff;
  }
};

// grad_hidden of the slice is added to that of the slices before; the last one rounds.
template <class Real, class Out>
struct HiddenGradEpilogue {
  Out* grad;  // [all tokens, depth]
  uint8_t* low;
  RowRange tokens;
  int64_t depth;
  const Real* unscale;  // null: 1
  const Real* shrink;   // [rows] what to multiply the sum before by; null: 1
  bool first, last;

  int64_t bytes(int64_t m, int64_t n) const {
    const int64_t each = sizeof(Out), sum = each + (each < int64_t(sizeof(Real)));
    return m * n * ((first ? 0 : sum) + (last ? each : sum));
  }

  template <int kTile>
  __device__ void row(const Real* products, int64_t row, int64_t col0, int64_t cols,
                      int lane) const {
    Out* const out = grad + tokens.list.token[tokens.first + row] * depth + col0;
    uint8_t* const rest = low + row * depth + col0;
    const Real factor = unscale ? *unscale : Real(1), before = shrink ? shrink[row] : Real(1);
    Real sums[kTile / 32] = {};  // all on their way before the first is used
    if (!first) {
#pragma unroll
      for (int e = 0; e < kTile / 32; e++) {
        const int c = lane + e * 32;
        if (col0 + c >= cols) continue;
        if constexpr (sizeof(Out) == sizeof(Real)) {
          sums[e] = out[c];
        } else {
          sums[e] = SplitFloat::join(reinterpret_cast<const uint16_t*>(out)[c], rest[c]);
        }
      }
    }
#pragma unroll
    for (int e = 0; e < kTile / 32; e++) {
      const int c = lane + e * 32;
      if (col0 + c >= cols) continue;
      const Real sum = sums[e] * before + products[c] * factor;
      if (sizeof(Out) == sizeof(Real) || last) {
        out[c] = static_cast<Out>(sum);
      } else {
        SplitFloat::split(sum, reinterpret_cast<uint16_t*>(out) + c, rest + c);
      }
    }
  }
};

// grad_weight of a slice: complete after the last group of tokens, and then rounded once.
template <class Real, class Out>
struct WeightGradEpilogue {
  Out* grad;   // [entries of the slice, depth]
  Real* sums;  // [entries of the slice, depth], only with several groups
  int64_t depth;
  const Real* unscale;
  bool first, last;

  int64_t bytes(int64_t m, int64_t n) const {
    const int64_t sum = sizeof(Real);
    return m * n * ((first ? 0 : sum) + (last ? int64_t(sizeof(Out)) : sum));
  }

  template <int kTile>
  __device__ void row(const Real* products, int64_t row, int64_t col0, int64_t cols,
                      int lane) const {
    const Real factor = unscale ? *unscale : Real(1);
    for (int c = lane; c < kTile && col0 + c < cols; c += 32) {
      const int64_t at = row * depth + col0 + c;
      Real value = products[c] * factor;
      if (!first) value += sums[at];
      if (last) {
        grad[at] = static_cast<Out>(value);
      } else {
        sums[at] = value;
      }
    }
  }
};

}  // namespace spo::cuda
