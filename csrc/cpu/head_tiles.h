// SPDX-License-Identifier: Apache-2.0
// The steps that everything which multiplies probabilities by weight shares on the CPU: a slice of
// the vocabulary packed twice, a tile of logits, and the tile's product with weight.
#pragma once
#include "backward_buffers.h"

namespace spo {

template <class Real>
class HeadTiles {
 protected:
  using Buffers = BackwardBuffers<Real>;

  HeadTiles(const HeadArgs& args, const Rows& rows)
      : args_(args),
        rows_(rows),
        kernels_(head_kernels<Real>()),
        map_(logit_map<Real>(args)),
        depth_(args.hidden.size(-1)),
        vocabulary_(args.weight.size(0)) {}

  // Rows whose float sums may take a third of the workspace.
  int64_t most_sum_rows() const {
    return std::max<int64_t>((args_.workspace_mib << 20) / sizeof(Real) / 3 / depth_, 1);
  }

  // pass(first, count, hidden_side, weight_side) over all rows, once if the workspace allows. Where
  // the float sums of grad_hidden do not fit, it is finished for one group of rows after the other,
  // then grad_weight is made over all rows. One more product, but neither gradient is rounded
  // twice.
  template <class Pass>
  void in_passes(const HeadGrads& grads, const Pass& pass) const {
    const bool hidden_side = grads.hidden.defined();
    const bool weight_side = grads.weight.defined() || grads.bias.defined();
    const bool rounded = hidden_side && !is_sum_type<Real>(grads.hidden);
    const int64_t rows = rows_.size(), group = most_sum_rows();
    if (!rounded || rows <= group) return pass(int64_t(0), rows, hidden_side, weight_side);
    for (int64_t first = 0; first < rows; first += group)
      pass(first, std::min(group, rows - first), true, false);
    if (weight_side) pass(int64_t(0), rows, false, true);
  }

  // What one of those passes computes.
  BackwardWork work_of(const HeadGrads& grads, int64_t count, bool hidden_side, bool weight_side,
                       bool recompute) const {
    const bool rounded = hidden_side && !is_sum_type<Real>(grads.hidden);
    const bool weight_sums =
        weight_side && grads.weight.defined() && !is_sum_type<Real>(grads.weight);
    return {hidden_side, weight_side, weight_sums, recompute, rounded ? count * depth_ : 0};
  }

  // Where the sums of rows [first, first + count) go: `out` [tokens, d] itself if it has the type
  // of the sums, else `sums`, from which write_rows() rounds them.
  std::vector<Real*> sum_rows(Real* sums, int64_t first, int64_t count,
                              const at::Tensor& out) const {
    const bool direct = is_sum_type<Real>(out);
    if (!direct) std::fill_n(sums, count * depth_, Real(0));
    std::vector<Real*> rows(count);
    for (int64_t i = 0; i < count; i++)
      rows[i] = direct ? data_of<Real>(out) + rows_.token[first + i] * depth_ : sums + i * depth_;
    return rows;
  }

  // Entries [col, col + cols) for the logits, and for the products with weight: there one set of
  // panels per block, since blocks are multiplied one by one.
  void pack_entries(const Buffers& b, int64_t col, int64_t cols, bool hidden_side) const {
    const auto entries = MatrixView::of_weight(args_.weight);
    if (b.work.recompute) pack_rows(entries, col, cols, depth_, kernels_.panel_cols, b.weight_rows);
    if (!hidden_side) return;
    for (int64_t block = 0; block * kBlockCols < cols; block++)
      pack_cols(entries, col + block * kBlockCols, std::min(kBlockCols, cols - block * kBlockCols),
                depth_, kernels_.panel_cols, b.weight_block(block));
  }

  void pack_tokens(const Buffers& b, int64_t first, int64_t rows, bool weight_side) const {
    const auto tokens = MatrixView::of_rows(args_.hidden, rows_);
    if (b.work.recompute) pack_rows(tokens, first, rows, depth_, kernels_.tile_rows, b.hidden_rows);
    if (weight_side) pack_cols(tokens, first, rows, depth_, kernels_.panel_cols, b.hidden_cols);
  }

  // Products of the packed rows [row, row + rows) with a packed block of `cols` entries.
  void logits_tile(const Buffers& b, int64_t row, int64_t rows, int64_t block, int64_t cols,
                   Real* tile) const {
    std::vector<Real*> out(rows);
    for (int64_t i = 0; i < rows; i++) out[i] = tile + i * kBlockCols;
    kernels_.gemm({rows, cols, depth_, Left::kPanel, b.hidden_rows + row * depth_,
                   depth_ * kernels_.tile_rows, b.weight_rows + block * kBlockCols * depth_,
                   depth_ * kernels_.panel_cols, out.data(), false});
  }

  // out += tile times the packed block of `entries` entries.
  void add_products(const Buffers& b, int64_t rows, int64_t block, int64_t entries,
                    const Real* tile, Real* const* out) const {
    kernels_.gemm({rows, depth_, entries, Left::kBlock, tile, kernels_.tile_rows * kBlockCols,
                   b.weight_block(block), entries * kernels_.panel_cols, out, true});
  }

  // The token's label as a column of the block at `col`, or -1.
  int64_t label_in(int64_t row, int64_t col, int64_t cols) const {
    const int64_t label = rows_.label[row] - col;
    return label >= 0 && label < cols ? label : -1;
  }

  const HeadArgs& args_;
  const Rows& rows_;
  const HeadKernels<Real>& kernels_;
  const LogitMap<Real> map_;
  const int64_t depth_, vocabulary_;
};

}  // namespace spo
