// SPDX-License-Identifier: Apache-2.0
// Backward of the LM head over the (row, block of entries) pairs that the forward pass did not drop
// (drop_blocks.h): per block, the rows that kept it are gathered and multiplied densely.
//   dz            logits again, of the pairs alone
//   grad_hidden   += dz weight,  one range of rows and of d per task, blocks in order
//   grad_weight   += dz^T hidden,  one block and range of d per task
// A label in a block that its row dropped has its two exact terms added by themselves. What was
// dropped pulls on grad_hidden as if it lay at the centre of its block: the error is then the
// dropped mass times the spread of the block's entries, not their length.
#pragma once
#include "pair_lists.h"
#include "sparse_buffers.h"
#include "sparse_tiles.h"

namespace spo {

template <class Real>
class SparseBackward : SparseTiles<Real> {
  using Base = SparseTiles<Real>;
  using Base::args_, Base::rows_, Base::kernels_, Base::map_, Base::depth_, Base::vocabulary_;
  using Base::state_, Base::dropped_, Base::blocks_, Base::padded_depth_, Base::kGather;

 public:
  // `dropped`: [N, blocks] as the forward pass kept it.
  SparseBackward(const HeadArgs& args, const Rows& rows, const TokenState& state,
                 const Real* dropped, const HeadGrads& grads)
      : Base(args, rows, state, dropped), grads_(grads) {}

  // Whether anything was dropped (keep_all_if_most).
  bool applies() const {
    for (const int64_t token : rows_.token)
      for (int64_t b = 0; b < blocks_; b++)
        if (this->mass_of(token)[b] >= 0) return true;
    return false;
  }

  void run() {
    this->in_passes(grads_, [&](auto... range_and_sides) { pass(range_and_sides...); });
  }

 private:
  using Buffers = SparseBuffers<Real>;

  void pass(int64_t first, int64_t count, bool hidden_side, bool weight_side) {
    Buffers b(args_, rows_.size(), this->work_of(grads_, count, hidden_side, weight_side, true),
              this->row_chunk());
    b.allocate();
    const bool rounded = b.work.hidden_sums > 0;
    std::vector<Real*> hidden_out;
    if (hidden_side) {
      hidden_out = this->sum_rows(b.hidden_sums, first, count, grads_.hidden);
      pull_to_centres(b, first, hidden_out);
    }
    Real* const* out = hidden_side ? hidden_out.data() - first : nullptr;  // by row
    for (int64_t slice = 0; slice < blocks_; slice += b.slice_blocks) {
      PairLists lists(std::min(b.slice_blocks, blocks_ - slice));
      if (b.weight_sums) std::fill_n(b.weight_sums, lists.blocks() * kBlockCols * depth_, Real(0));
      for (int64_t row = first; row < first + count;) {
        const int64_t from = row;
        row = lists.fill(rows_, dropped_, blocks_, slice, row, first + count, b.capacity);
        pack_slice(b, slice, lists);
        make_gradient(b, slice, lists);
        if (hidden_side) add_hidden(b, slice, lists, from, row, out);
        if (weight_side) add_weight(b, slice, lists);
      }
      if (b.weight_sums) {
        const int64_t entry = slice * kBlockCols;
        write_rows(b.weight_sums, std::min(lists.blocks() * kBlockCols, vocabulary_ - entry),
                   grads_.weight, [&](int64_t v) { return entry + v; });
      }
    }
    if (rounded)
      write_rows(b.hidden_sums, count, grads_.hidden,
                 [&](int64_t i) { return rows_.token[first + i]; });
  }

  // -g s times the dropped masses of a row, times the centre of each block.
  void pull_to_centres(const Buffers& b, int64_t first, const std::vector<Real*>& out) const {
    if (map_.capped) return;  // there s differs from entry to entry
    const int64_t count = static_cast<int64_t>(out.size()), chunk = this->row_chunk();
    this->make_centres(this->mean_row(first, count), b.centres);
    parallel_tasks(panels(count, chunk), [&](TaskQueue& queue) {
      std::vector<Real> masses(chunk * kBlockCols);
      for (int64_t task; queue.take(&task);) {
        const int64_t row = task * chunk, rows = std::min(chunk, count - row);
        for (int64_t block = 0; block < blocks_; block += kBlockCols) {
          const int64_t blocks = std::min(kBlockCols, blocks_ - block);
          for (int64_t i = 0; i < rows; i++) {
            const int64_t token = rows_.token[first + row + i];
            const Real pull =
                -map_.plain_slope() * state_.template grad_of<Real>(token).grad_logprob;
            for (int64_t j = 0; j < blocks; j++) {
              const Real mass = this->mass_of(token)[block + j];
              masses[i * kBlockCols + j] = mass > 0 ? pull * mass : Real(0);
            }
          }
          kernels_.gemm({rows, depth_, blocks, Left::kBlock, masses.data(),
                         kernels_.tile_rows * kBlockCols, b.centres + block * kernels_.panel_cols,
                         blocks_ * kernels_.panel_cols, out.data() + row, true});
        }
      }
    });
  }

  // The blocks that some row kept.
  void pack_slice(const Buffers& b, int64_t slice, const PairLists& lists) const {
    const auto entries = MatrixView::of_weight(args_.weight);
    for (int64_t block = 0; block < lists.blocks(); block++) {
      if (lists.rows[block].empty()) continue;
      const int64_t entry = (slice + block) * kBlockCols, count = this->entries_of(slice + block);
      pack_rows(entries, entry, count, depth_, kernels_.panel_cols, weight_rows(b, block));
      if (b.work.hidden_side)
        pack_cols(entries, entry, count, depth_, kernels_.panel_cols, weight_cols(b, block));
    }
  }

  Real* weight_rows(const Buffers& b, int64_t block) const {
    return b.weight_rows + block * kBlockCols * depth_;
  }
  Real* weight_cols(const Buffers& b, int64_t block) const {
    return b.weight_cols + block * kBlockCols * padded_depth_;
  }
  // Of a block's pairs: [panels of tile_rows entries][rows][tile_rows].
  Real* dz_panels(const Buffers& b, const PairLists& lists, int64_t block) const {
    return b.dz_panels + lists.start[block] * b.padded_block;
  }

  void make_gradient(const Buffers& b, int64_t slice, const PairLists& lists) const {
    const auto pieces = lists.pieces(this->row_chunk());
    parallel_tasks(pieces.size(), [&](TaskQueue& queue) {
      std::vector<Real> gathered(this->row_chunk() * this->padded_gather());
      std::vector<Real*> out(this->row_chunk());
      for (int64_t task; queue.take(&task);) {
        const auto [block, first, rows] = pieces[task];
        const int32_t* list = lists.rows[block].data() + first;
        const int64_t col = (slice + block) * kBlockCols, cols = this->entries_of(slice + block);
        Real* const dz = b.dz + (lists.start[block] + first) * kBlockCols;
        for (int64_t i = 0; i < rows; i++) out[i] = dz + i * kBlockCols;
        this->gather_pieces(list, rows, gathered.data());
        for (int64_t k = 0; k < depth_; k += kGather)
          kernels_.gemm({rows, cols, std::min(kGather, depth_ - k), Left::kBlock,
                         gathered.data() + k * rows, kernels_.tile_rows * kGather,
                         weight_rows(b, block) + k * kernels_.panel_cols,
                         depth_ * kernels_.panel_cols, out.data(), k > 0});
        const auto bias = bias_block<Real>(args_.bias, col, cols);
        for (int64_t i = 0; i < rows; i++)
          kernels_.gradient({out[i], args_.bias ? bias.data() : nullptr, cols,
                             this->label_in(list[i], col, cols)},
                            map_, false, state_.template grad_of<Real>(rows_.token[list[i]]));
        if (b.work.weight_side)
          kernels_.transpose_block(dz, rows,
                                   dz_panels(b, lists, block) + first * kernels_.tile_rows,
                                   static_cast<int64_t>(lists.rows[block].size()));
      }
    });
  }

  // Rows [first, end), in ranges of rows and of d that no two tasks share.
  void add_hidden(const Buffers& b, int64_t slice, const PairLists& lists, int64_t first,
                  int64_t end, Real* const* out) const {
    const int64_t ranges = panels(depth_, kDepthRange), threads = at::get_num_threads();
    const int64_t parts = std::clamp<int64_t>(4 * threads / ranges, 1, panels(end - first, 64));
    const int64_t part_rows = panels(end - first, parts);
    parallel_tasks(parts * ranges, [&](TaskQueue& queue) {
      std::vector<Real*> at;
      for (int64_t task; queue.take(&task);) {
        const int64_t k = task % ranges * kDepthRange, cols = std::min(kDepthRange, depth_ - k);
        const int64_t from = first + task / ranges * part_rows;
        for (int64_t block = 0; block < lists.blocks(); block++) {
          const auto& list = lists.rows[block];
          const auto begin = std::lower_bound(list.begin(), list.end(), from);
          const auto stop = std::lower_bound(begin, list.end(), from + part_rows);
          const int64_t rows = stop - begin, entries = this->entries_of(slice + block);
          at.clear();
          for (auto row = begin; row != stop; row++) at.push_back(out[*row] + k);
          const Real* dz = b.dz + (lists.start[block] + (begin - list.begin())) * kBlockCols;
          if (rows > 0)
            kernels_.gemm({rows, cols, entries, Left::kBlock, dz, kernels_.tile_rows * kBlockCols,
                           weight_cols(b, block) + k * entries, entries * kernels_.panel_cols,
                           at.data(), true});
          for (const int32_t row : lists.labels[block])
            if (row >= from && row < from + part_rows) add_label_entry(row, k, cols, out[row]);
        }
      }
    });
  }

  void add_label_entry(int64_t row, int64_t first, int64_t cols, Real* out) const {
    const Real grad = this->label_gradient(row);
    this->for_entry(rows_.label[row], [&](const auto* w, int64_t stride) {
      for (int64_t k = first; k < first + cols; k++)
        out[k] += grad * static_cast<Real>(w[k * stride]);
    });
  }

  void add_weight(const Buffers& b, int64_t slice, const PairLists& lists) const {
    const int64_t ranges = panels(depth_, kDepthRange);
    parallel_tasks(lists.blocks() * ranges, [&](TaskQueue& queue) {
      std::vector<Real> gathered(kGatheredRows * kDepthRange);
      for (int64_t task; queue.take(&task);) {
        const int64_t block = task / ranges, k = task % ranges * kDepthRange;
        if (grads_.weight.defined()) add_block(b, slice, lists, block, k, gathered.data());
        if (grads_.bias.defined() && k == 0) add_bias(b, slice, lists, block);
      }
    });
  }

  // Columns [k, k + kDepthRange) of one block of grad_weight.
  void add_block(const Buffers& b, int64_t slice, const PairLists& lists, int64_t block, int64_t k,
                 Real* gathered) const {
    const int64_t entries = this->entries_of(slice + block),
                  cols = std::min(kDepthRange, depth_ - k);
    Real* const base = b.weight_sums
                           ? b.weight_sums + block * kBlockCols * depth_
                           : data_of<Real>(grads_.weight) + (slice + block) * kBlockCols * depth_;
    std::vector<Real*> out(entries);
    for (int64_t v = 0; v < entries; v++) out[v] = base + v * depth_ + k;
    const auto& list = lists.rows[block];
    const int64_t all = static_cast<int64_t>(list.size());
    for (int64_t first = 0; first < all; first += kGatheredRows) {
      const int64_t rows = std::min(kGatheredRows, all - first);
      this->gather_panels(list.data() + first, rows, k, cols, gathered);
      kernels_.gemm({entries, cols, rows, Left::kPanel,
                     dz_panels(b, lists, block) + first * kernels_.tile_rows,
                     all * kernels_.tile_rows, gathered, rows * kernels_.panel_cols, out.data(),
                     true});
    }
    for (const int32_t row : lists.labels[block]) {
      const Real grad = this->label_gradient(row);
      Real* const entry = out[rows_.label[row] - (slice + block) * kBlockCols];
      this->for_row(row, [&](const auto* h, int64_t stride) {
        for (int64_t i = 0; i < cols; i++)
          entry[i] += grad * static_cast<Real>(h[(k + i) * stride]);
      });
    }
  }

  void add_bias(const Buffers& b, int64_t slice, const PairLists& lists, int64_t block) const {
    double* const sums = data_of<double>(grads_.bias) + (slice + block) * kBlockCols;
    const Real* dz = b.dz + lists.start[block] * kBlockCols;
    for (size_t i = 0; i < lists.rows[block].size(); i++, dz += kBlockCols)
      for (int64_t v = 0; v < this->entries_of(slice + block); v++) sums[v] += dz[v];
    for (const int32_t row : lists.labels[block])
      sums[rows_.label[row] - (slice + block) * kBlockCols] += this->label_gradient(row);
  }

  const HeadGrads& grads_;
};

}  // namespace spo
