// SPDX-License-Identifier: Apache-2.0
// Forward of an LM head that is not trained: log-probabilities and, from the same logits,
//   J = dlogprob/dhidden = (1 - p_y) s_y W_y - sum_{v != y} p_v s_v W_v,   s = dz/draw
// The sum runs along with the softmax: its terms are exp(z - m) with the largest logit m so far,
// and when m grows, what has been summed shrinks. The log-probabilities are those of the plain
// forward to the last bit.
#pragma once
#include "head_tiles.h"

namespace spo {

template <class Real>
class HeadJacobian : HeadTiles<Real> {
  using Base = HeadTiles<Real>;
  using Base::args_, Base::rows_, Base::kernels_, Base::map_, Base::depth_, Base::vocabulary_;
  using typename Base::Buffers;

 public:
  HeadJacobian(const HeadArgs& args, const Rows& rows)
      : Base(args, rows),
        softmax_(rows.size()),
        label_logit_(rows.size()),
        label_slope_(rows.size()) {}

  // `jacobian` is zero on entry.
  void run(const TokenOutputs<Real>& outputs, const at::Tensor& jacobian) {
    const auto out = jacobian.view({-1, depth_});
    const int64_t rows = rows_.size();
    const int64_t group = is_sum_type<Real>(out) ? rows : std::min(rows, this->most_sum_rows());
    for (int64_t first = 0; first < rows; first += group)
      pass(first, std::min(group, rows - first), outputs, out);
  }

 private:
  void pass(int64_t first, int64_t count, const TokenOutputs<Real>& outputs,
            const at::Tensor& out) {
    const bool rounded = !is_sum_type<Real>(out);
    Buffers b(args_, kernels_, count, {true, false, false, true, rounded ? count * depth_ : 0});
    b.allocate();
    const auto sums = this->sum_rows(b.hidden_sums, first, count, out);
    for (int64_t col = 0; col < vocabulary_; col += b.slice_cols) {
      const int64_t cols = std::min(b.slice_cols, vocabulary_ - col);
      this->pack_entries(b, col, cols, true);
      for (int64_t row = 0; row < count; row += b.group_rows) {
        const int64_t rows = std::min(b.group_rows, count - row);
        if (col == 0 || count > b.group_rows) this->pack_tokens(b, first + row, rows, false);
        add_rows(b, first + row, rows, col, cols, sums.data() + row);
      }
    }
    finish(first, count, outputs, sums.data());
    if (rounded)
      write_rows(b.hidden_sums, count, out, [&](int64_t i) { return rows_.token[first + i]; });
  }

  void add_rows(const Buffers& b, int64_t first, int64_t rows, int64_t slice, int64_t cols,
                Real* const* sums) {
    parallel_tasks(panels(rows, b.row_chunk), [&](TaskQueue& queue) {
      std::vector<Real> tile(b.row_chunk * kBlockCols), logits(kBlockCols);
      for (int64_t chunk; queue.take(&chunk);) {
        const int64_t row = chunk * b.row_chunk, count = std::min(b.row_chunk, rows - row);
        for (int64_t block = 0; block * kBlockCols < cols; block++) {
          const int64_t col = slice + block * kBlockCols;
          const int64_t entries = std::min(kBlockCols, vocabulary_ - col);
          this->logits_tile(b, row, count, block, entries, tile.data());
          const auto bias = bias_block<Real>(args_.bias, col, entries);
          for (int64_t i = 0; i < count; i++)
            weigh(first + row + i, col,
                  {tile.data() + i * kBlockCols, args_.bias ? bias.data() : nullptr, entries,
                   this->label_in(first + row + i, col, entries)},
                  logits.data(), sums[row + i]);
          this->add_products(b, count, block, entries, tile.data(), sums + row);
        }
      }
    });
  }

  // Adds the block to the token's softmax and replaces its products by s exp(z - m).
  void weigh(int64_t row, int64_t col, const LogitRow<Real>& block, Real* logits, Real* sum) {
    if (block.label >= 0)
      map_.unscaled(block.logits[block.label] + (block.bias ? block.bias[block.label] : Real(0)),
                    &label_slope_[row]);
    std::copy_n(block.logits, kBlockCols, logits);
    const auto stats = kernels_.statistics({logits, block.bias, block.cols, block.label}, map_,
                                           false, &label_logit_[row]);
    LogSumExp& softmax = softmax_[row];
    const double before = softmax.max;
    softmax.merge(stats, map_.outer);
    const bool any = softmax.sum != 0;
    if (col > 0 && softmax.max > before && any) {
      const Real shrink = static_cast<Real>(std::exp(map_.outer * (before - softmax.max)));
      for (int64_t k = 0; k < depth_; k++) sum[k] *= shrink;
    }
    const Real top = any ? static_cast<Real>(softmax.max) : Real(0);
    kernels_.gradient(block, map_, false, {top, 0, 0, 0, -1, 0});  // the label's term is 0
  }

  void finish(int64_t first, int64_t count, const TokenOutputs<Real>& outputs,
              Real* const* sums) const {
    at::parallel_for(0, count, 16, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t row = first + i;
        const LogSumExp& others = softmax_[row];
        const TokenSoftmax token = others.finish(label_logit_[row], map_.outer);
        outputs.write(rows_.token[row], token);
        const Real label = label_slope_[row] * static_cast<Real>(-std::expm1(token.logprob));
        const Real scale =
            others.sum == 0 ? 0 : std::exp(map_.outer * (others.max - token.top) - token.log_sum);
        subtract_from_label(rows_.label[row], label, scale, sums[i]);
      }
    });
  }

  // sum = label W_y - scale sum
  void subtract_from_label(int64_t entry, Real label, Real scale, Real* sum) const {
    const at::Tensor& weight = args_.weight;
    SPO_DISPATCH_STORAGE(weight.scalar_type(), "token_logprobs", [&] {
      const scalar_t* w = weight.const_data_ptr<scalar_t>() + entry * weight.stride(0);
      for (int64_t k = 0; k < depth_; k++)
        sum[k] = label * static_cast<Real>(w[k * weight.stride(1)]) - scale * sum[k];
    });
  }

  std::vector<LogSumExp> softmax_;  // of the entries other than the label, up to the block reached
  std::vector<double> label_logit_;
  std::vector<Real> label_slope_;
};

}  // namespace spo
