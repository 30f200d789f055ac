// SPDX-License-Identifier: Apache-2.0
// What sparse_backward.h reads: rows of hidden gathered from lists, single rows and entries in
// their own type, the mass that each row dropped, and the centres of blocks.
#pragma once
#include "head_tiles.h"

namespace spo {

template <class Real>
class SparseTiles : protected HeadTiles<Real> {
  using Base = HeadTiles<Real>;

 public:
  static int64_t row_chunk() {
    const int64_t tile = head_kernels<Real>().tile_rows;
    return std::max<int64_t>(112 / tile, 1) * tile;
  }

 protected:
  using Base::args_, Base::rows_, Base::kernels_, Base::map_, Base::depth_, Base::vocabulary_;
  static constexpr int64_t kGather = kBlockCols;  // numbers of a gathered row that lie together

  SparseTiles(const HeadArgs& args, const Rows& rows, const TokenState& state, const Real* dropped)
      : Base(args, rows),
        state_(state),
        dropped_(dropped),
        blocks_(panels(vocabulary_, kBlockCols)),
        padded_depth_(panels(depth_, kernels_.panel_cols) * kernels_.panel_cols) {}

  const Real* mass_of(int64_t token) const { return dropped_ + token * blocks_; }
  int64_t entries_of(int64_t block) const {
    return std::min(kBlockCols, vocabulary_ - block * kBlockCols);
  }
  int64_t padded_gather() const { return panels(depth_, kGather) * kGather; }

  // Rows of hidden side by side, [kGather numbers][row][kGather]: copies of whole pieces, which a
  // left factor of layout kBlock can be read from.
  void gather_pieces(const int32_t* list, int64_t rows, Real* out) const {
    const int64_t stride = args_.hidden.stride(-1);
    SPO_DISPATCH_STORAGE(args_.hidden.scalar_type(), "token_logprobs_backward", [&] {
      const scalar_t* data = args_.hidden.template const_data_ptr<scalar_t>();
      for (int64_t i = 0; i < rows; i++) {
        const scalar_t* row = data + rows_.offset[list[i]];
        for (int64_t k0 = 0; k0 < depth_; k0 += kGather) {
          Real* to = out + k0 * rows + i * kGather;
          const int64_t end = std::min(kGather, depth_ - k0);
          for (int64_t k = 0; k < end; k++) to[k] = static_cast<Real>(row[(k0 + k) * stride]);
        }
      }
    });
  }

  // Numbers [k, k + cols) of rows of hidden as a right factor: [panels of
  // columns][row][panel_cols].
  void gather_panels(const int32_t* list, int64_t rows, int64_t first, int64_t cols,
                     Real* out) const {
    const int64_t stride = args_.hidden.stride(-1), width = kernels_.panel_cols;
    SPO_DISPATCH_STORAGE(args_.hidden.scalar_type(), "token_logprobs_backward", [&] {
      const scalar_t* data = args_.hidden.template const_data_ptr<scalar_t>();
      for (int64_t i = 0; i < rows; i++) {
        const scalar_t* row = data + rows_.offset[list[i]] + first * stride;
        for (int64_t k0 = 0; k0 < cols; k0 += width) {
          Real* to = out + k0 * rows + i * width;
          const int64_t end = std::min(width, cols - k0);
          for (int64_t k = 0; k < end; k++) to[k] = static_cast<Real>(row[(k0 + k) * stride]);
          for (int64_t k = end; k < width; k++) to[k] = 0;
        }
      }
    });
  }

  // visit(numbers, stride) of an entry of weight or a row of hidden in its own type.
  template <class Visit>
  void for_entry(int64_t entry, const Visit& visit) const {
    const at::Tensor& weight = args_.weight;
    SPO_DISPATCH_STORAGE(weight.scalar_type(), "token_logprobs_backward", [&] {
      visit(weight.template const_data_ptr<scalar_t>() + entry * weight.stride(0),
            weight.stride(1));
    });
  }
  template <class Visit>
  void for_row(int64_t row, const Visit& visit) const {
    const at::Tensor& hidden = args_.hidden;
    SPO_DISPATCH_STORAGE(hidden.scalar_type(), "token_logprobs_backward", [&] {
      visit(hidden.template const_data_ptr<scalar_t>() + rows_.offset[row], hidden.stride(-1));
    });
  }

  // An entry of weight times a vector of depth_ numbers.
  template <class T>
  Real product(int64_t entry, const T* numbers, int64_t stride) const {
    constexpr int64_t kChains = 16;  // side by side, for the vector units
    Real sums[kChains] = {};
    for_entry(entry, [&](const auto* w, int64_t w_stride) {
      for (int64_t k0 = 0; k0 < depth_; k0 += kChains)
        for (int64_t k = k0; k < std::min(k0 + kChains, depth_); k++)
          sums[k - k0] +=
              static_cast<Real>(w[k * w_stride]) * static_cast<Real>(numbers[k * stride]);
    });
    Real total = 0;
    for (const Real sum : sums) total += sum;
    return total;
  }

  // dL/d(product) of a label whose block was dropped.
  Real label_gradient(int64_t row) const {
    Real slope, raw = 0;
    if (map_.capped) raw = label_product(row);
    map_.unscaled(raw, &slope);
    return slope * state_.template grad_of<Real>(rows_.token[row]).label();
  }

  Real label_product(int64_t row) const {
    const int64_t entry = rows_.label[row];
    Real sum = args_.bias ? bias_block<Real>(args_.bias, entry, 1)[0] : Real(0);
    for_row(row, [&](const auto* h, int64_t stride) { sum += product(entry, h, stride); });
    return sum;
  }

  // The mean of hidden over rows [first, first + count). Rows without a finite softmax are left
  // out: they have no part in the gradients of others.
  std::vector<Real> mean_row(int64_t first, int64_t count) const {
    std::vector<Real> mean(depth_);
    parallel_tasks(panels(depth_, kDepthRange), [&](TaskQueue& queue) {
      for (int64_t task; queue.take(&task);) {
        const int64_t begin = task * kDepthRange, end = std::min(begin + kDepthRange, depth_);
        for (int64_t row = first; row < first + count; row++) {
          if (!std::isfinite(state_.template grad_of<Real>(rows_.token[row]).log_sum)) continue;
          for_row(row, [&](const auto* h, int64_t stride) {
            for (int64_t k = begin; k < end; k++) mean[k] += static_cast<Real>(h[k * stride]);
          });
        }
        for (int64_t k = begin; k < end; k++) mean[k] /= count;
      }
    });
    return mean;
  }

  // The centre of every block: its entries weighted by their probabilities at the state `at`, so
  // that entries which are rare everywhere count for little. As a right factor: [panels of
  // d][block][panel_cols].
  void make_centres(const std::vector<Real>& at, Real* centres) const {
    const int64_t width = kernels_.panel_cols;
    parallel_tasks(blocks_, [&](TaskQueue& queue) {
      std::vector<Real> weights(kBlockCols), sum(padded_depth_);
      for (int64_t block; queue.take(&block);) {
        const int64_t col = block * kBlockCols, cols = entries_of(block);
        const auto bias = bias_block<Real>(args_.bias, col, cols);
        Real top = -std::numeric_limits<Real>::infinity(), total = 0, slope;
        for (int64_t v = 0; v < cols; v++) {
          const Real raw = product(col + v, at.data(), 1) + (args_.bias ? bias[v] : Real(0));
          weights[v] = map_.unscaled(raw, &slope);
          top = std::max(top, weights[v]);
        }
        if (top == -std::numeric_limits<Real>::infinity()) top = 0;  // no entry is possible
        for (int64_t v = 0; v < cols; v++)
          total += weights[v] = std::exp(map_.below(weights[v], top));
        std::fill(sum.begin(), sum.end(), Real(0));
        for (int64_t v = 0; v < cols; v++)
          for_entry(col + v, [&](const auto* w, int64_t stride) {
            const Real share = total == 0 ? Real(0) : weights[v] / total;
            for (int64_t k = 0; k < depth_; k++) sum[k] += share * static_cast<Real>(w[k * stride]);
          });
        for (int64_t k = 0; k < padded_depth_; k++)
          centres[(k / width * blocks_ + block) * width + k % width] = sum[k];
      }
    });
  }

  const TokenState& state_;
  const Real* const dropped_;  // [N, blocks] as the forward pass kept it
  const int64_t blocks_, padded_depth_;
};

}  // namespace spo
