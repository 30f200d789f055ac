// SPDX-License-Identifier: Apache-2.0
// Body of head_kernels.h for one instruction set. The including file sets SPO_ISA (a namespace),
// SPO_VECTOR_BYTES and SPO_TILE_ROWS, and has turned the instruction set on.
#pragma once
#include "head_kernels.h"
#include "simd.h"

namespace spo {

template <>
struct Math<Vector<float, SPO_VECTOR_BYTES>::type>
    : VectorMath<float, Vector<float, SPO_VECTOR_BYTES>::type> {};
template <>
struct Math<Vector<double, SPO_VECTOR_BYTES>::type>
    : VectorMath<double, Vector<double, SPO_VECTOR_BYTES>::type> {};

namespace SPO_ISA {

template <class Real>
struct Kernel {
  using V = typename Vector<Real, SPO_VECTOR_BYTES>::type;
  using Unaligned = typename Vector<Real, SPO_VECTOR_BYTES>::unaligned;
  static constexpr int kLanes = SPO_VECTOR_BYTES / sizeof(Real);
  static constexpr int kTileRows = SPO_TILE_ROWS;
  static constexpr int kPanelCols = 2 * kLanes;

  static SPO_HD V load(const Real* p) { return *reinterpret_cast<const Unaligned*>(p); }
  static SPO_HD void store(Real* p, V v) { *reinterpret_cast<Unaligned*>(p) = v; }

  // C[kRows, panel] (+)= A[kRows, depth] B[depth, panel]; the sums stay in registers.
  template <int kRows, Left kLayout>
  static void multiply_tile(int64_t depth, const Real* a, const Real* b, Real* const* c,
                            int64_t col, int64_t cols, bool add) {
    constexpr int64_t kRow = kLayout == Left::kPanel ? 1 : kBlockCols;
    V sums[kRows][2] = {};
    for (int64_t k = 0; k < depth; k++, a += depth_stride(kLayout), b += kPanelCols) {
      __builtin_prefetch(a + 8 * depth_stride(kLayout));
      const V left = load(b), right = load(b + kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; i++) {
        sums[i][0] += left * a[i * kRow];
        sums[i][1] += right * a[i * kRow];
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; i++) {
      Real* out = c[i] + col;
      if (cols == kPanelCols) {
        store(out, add ? load(out) + sums[i][0] : sums[i][0]);
        store(out + kLanes, add ? load(out + kLanes) + sums[i][1] : sums[i][1]);
      } else {
        Real edge[kPanelCols];
        store(edge, sums[i][0]), store(edge + kLanes, sums[i][1]);
        for (int64_t j = 0; j < cols; j++) out[j] = add ? out[j] + edge[j] : edge[j];
      }
    }
  }

  static constexpr int64_t depth_stride(Left layout) {
    return layout == Left::kPanel ? kTileRows : 1;
  }

  using MultiplyTile = void (*)(int64_t, const Real*, const Real*, Real* const*, int64_t, int64_t,
                                bool);

  template <int kRows, Left kLayout>
  static MultiplyTile pick_tile(int64_t rows) {  // the last tile may have fewer rows
    if constexpr (kRows > 1) {
      if (rows < kRows) return pick_tile<kRows - 1, kLayout>(rows);
    }
    return &multiply_tile<kRows, kLayout>;
  }

  static void gemm(const Gemm<Real>& g) {
    g.layout == Left::kPanel ? multiply<Left::kPanel>(g) : multiply<Left::kBlock>(g);
  }

  template <Left kLayout>
  static void multiply(const Gemm<Real>& g) {
    for (int64_t k = 0; k < g.depth; k += kDepthStep) {
      const int64_t depth = g.depth - k < kDepthStep ? g.depth - k : kDepthStep;
      for (int64_t col = 0; col < g.cols; col += kPanelCols) {
        const int64_t cols = g.cols - col < kPanelCols ? g.cols - col : kPanelCols;
        const Real* b = g.b + col / kPanelCols * g.b_panel + k * kPanelCols;
        for (int64_t row = 0; row < g.rows; row += kTileRows) {
          const int64_t rows = g.rows - row < kTileRows ? g.rows - row : kTileRows;
          const Real* a = g.a + row / kTileRows * g.a_tile + k * depth_stride(kLayout);
          pick_tile<kTileRows, kLayout>(rows)(depth, a, b, g.c + row, col, cols,
                                              g.accumulate || k > 0);
        }
      }
    }
  }

  static SPO_HD Real sum_of_lanes(V v) {
    Real lanes[kLanes];
    store(lanes, v);
    for (int half = kLanes / 2; half > 0; half /= 2)
      for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
  }

  static SPO_HD Real max_of_lanes(V v) {
    Real lanes[kLanes];
    store(lanes, v);
    for (int half = kLanes / 2; half > 0; half /= 2)
      for (int i = 0; i < half; i++)
        lanes[i] = lanes[i + half] > lanes[i] ? lanes[i + half] : lanes[i];
    return lanes[0];
  }

  // A logit and its bias are kept apart where they can be: a large bias takes digits from their sum
  // but not from (bias - top).
  static SPO_HD V sum_at(const Real* logits, const Real* bias, int64_t j) {
    return bias ? load(logits + j) + load(bias + j) : load(logits + j);
  }
  static SPO_HD V below_at(const Real* logits, const Real* bias, int64_t j,
                           const LogitMap<Real>& map, Real top) {
    return bias ? (load(logits + j) + (load(bias + j) - top)) * map.outer
                : map.template below<V>(load(logits + j), top);
  }

  static BlockStats<Real> statistics(const LogitRow<Real>& row, const LogitMap<Real>& map,
                                     bool entropy, double* label_logit) {
    const Real lowest = -std::numeric_limits<Real>::infinity();
    const Real* const bias = map.is_identity() ? row.bias : nullptr;
    V slope;
    if (!map.is_identity())
      for (int64_t j = 0; j < kBlockCols; j += kLanes)
        store(row.logits + j, map.template unscaled<V>(sum_at(row.logits, row.bias, j), &slope));
    for (int64_t j = row.cols; j < kBlockCols; j++) row.logits[j] = lowest;  // padding adds nothing
    if (row.label >= 0) {
      *label_logit = double(row.logits[row.label]) + (bias ? bias[row.label] : Real(0));
      row.logits[row.label] = lowest;
    }

    V top = V{} + lowest;
    for (int64_t j = 0; j < kBlockCols; j += kLanes) {
      const V u = sum_at(row.logits, bias, j);
      top = u > top ? u : top;
    }
    BlockStats<Real> out = {max_of_lanes(top), 0, 0};
    const Real base = out.max == lowest ? Real(0) : out.max;  // all -inf: exp(-inf - 0) is 0
    V sum = {}, weighted = {};
    for (int64_t j = 0; j < kBlockCols; j += kLanes) {
      const V below = below_at(row.logits, bias, j, map, base);
      const V e = Math<V>::exp(below);
      sum += e;
      if (entropy) weighted += e == V{} ? V{} : e * below;
    }
    out.sum = sum_of_lanes(sum);
    if (entropy) out.weighted = sum_of_lanes(weighted);
    return out;
  }

  template <bool kEntropy>
  static void gradient_row(const LogitRow<Real>& row, const LogitMap<Real>& map,
                           const TokenGrad<Real>& token) {
    Real label_slope = 0;
    if (row.label >= 0)
      map.template unscaled<Real>(
          row.logits[row.label] + (row.bias ? row.bias[row.label] : Real(0)), &label_slope);
    for (int64_t j = 0; j < kBlockCols; j += kLanes) {
      V slope = V{} + map.plain_slope(), below;
      if (map.is_identity()) {
        below = below_at(row.logits, row.bias, j, map, token.top);
      } else {
        const V u = map.template unscaled<V>(sum_at(row.logits, row.bias, j), &slope);
        below = map.template below<V>(u, token.top);
      }
      store(row.logits + j, slope * token.template other<V, kEntropy>(below));
    }
    if (row.label >= 0) row.logits[row.label] = label_slope * token.label();
    for (int64_t j = row.cols; j < kBlockCols; j++) row.logits[j] = 0;
  }

  static void gradient(const LogitRow<Real>& row, const LogitMap<Real>& map, bool entropy,
                       const TokenGrad<Real>& token) {
    entropy ? gradient_row<true>(row, map, token) : gradient_row<false>(row, map, token);
  }

  static void transpose_block(const Real* block, int64_t rows, Real* out, int64_t stride) {
    constexpr int kLast = kBlockCols % kTileRows;  // columns of the last, narrower panel
    for (int64_t i = 0; i < rows; i++, block += kBlockCols, out += kTileRows) {
      const Real* from = block;
      Real* to = out;
      for (int p = 0; p < kBlockCols / kTileRows; p++, from += kTileRows, to += stride * kTileRows)
        for (int j = 0; j < kTileRows; j++) to[j] = from[j];
      for (int j = 0; j < kLast; j++) to[j] = from[j];
    }
  }
};

template <class Real>
const HeadKernels<Real>& kernels(const char* isa) {
  using K = Kernel<Real>;
  static const HeadKernels<Real> table = {
      isa,          K::kTileRows,       K::kPanelCols, &K::gemm, &K::statistics,
      &K::gradient, &K::transpose_block};
  return table;
}

}  // namespace SPO_ISA
}  // namespace spo
