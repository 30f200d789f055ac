// SPDX-License-Identifier: Apache-2.0
// How the sparse backward pass divides its workspace: a slice of the vocabulary, packed, and dz of
// as many (row, block) pairs as fit beside it.
#pragma once
#include "backward_buffers.h"

namespace spo {

constexpr int64_t kMostSlice = 32;      // blocks of entries at a time
constexpr int64_t kGatheredRows = 512;  // gathered at a time for grad_weight

template <class Real>
struct SparseBuffers {
  SparseBuffers(const HeadArgs& args, int64_t rows, const BackwardWork& work, int64_t row_chunk)
      : work(work) {
    const HeadKernels<Real>& kernels = head_kernels<Real>();
    const auto padded = [](int64_t size, int64_t step) { return panels(size, step) * step; };
    const int64_t depth = args.hidden.size(-1), blocks = panels(args.weight.size(0), kBlockCols);
    const int64_t padded_depth = work.hidden_side ? padded(depth, kernels.panel_cols) : 0;
    padded_block = padded(kBlockCols, kernels.tile_rows);
    const int64_t budget = (args.workspace_mib << 20) / int64_t(sizeof(Real)) - work.hidden_sums;
    const int64_t per_block = kBlockCols * (depth + padded_depth + (work.weight_sums ? depth : 0));
    const int64_t per_pair = kBlockCols + (work.weight_side ? padded_block : 0);
    const int64_t fixed = blocks * padded_depth +
                          at::get_num_threads() * std::max(row_chunk * padded(depth, kBlockCols),
                                                           kGatheredRows * kDepthRange);
    const int64_t rest = budget - fixed;
    slice_blocks = std::clamp<int64_t>(rest / 3 / per_block, 1, std::min(kMostSlice, blocks));
    capacity = (rest - slice_blocks * per_block) / per_pair;
    const int64_t least = (fixed + per_block + row_chunk * per_pair) * 3 / 2;
    TORCH_CHECK_VALUE(capacity >= slice_blocks, args.op, ": workspace_mib must be at least ",
                      (least * sizeof(Real) >> 20) + 1, " for d = ", depth,
                      " with max_dropped_mass > 0, got ", args.workspace_mib);
    capacity = std::min(capacity, rows * slice_blocks);
    const int64_t entries = slice_blocks * kBlockCols;
    sizes_ = {entries * depth,
              entries * padded_depth,
              work.weight_sums ? entries * depth : 0,
              work.hidden_sums,
              blocks * padded_depth,
              capacity * kBlockCols,
              work.weight_side ? capacity * padded_block : 0};
  }

  void allocate() {
    workspace_.emplace(sizes_);
    Real** const arrays[] = {&weight_rows, &weight_cols, &weight_sums, &hidden_sums,
                             &centres,     &dz,          &dz_panels};
    for (size_t i = 0; i < std::size(arrays); i++) *arrays[i] = workspace_->array(i);
    if (!work.weight_sums) weight_sums = nullptr;
  }

  const BackwardWork work;
  int64_t slice_blocks, capacity;  // capacity in pairs
  int64_t padded_block;
  Real *weight_rows, *weight_cols;  // panels of the slice's blocks, for z and for grad_hidden
  Real *weight_sums, *hidden_sums;  // see BackwardBuffers
  Real* centres;                    // of all blocks, as a right factor
  Real* dz;                         // [pairs][kBlockCols]
  Real* dz_panels;                  // the same, as the left factor of grad_weight

 private:
  std::vector<int64_t> sizes_;
  std::optional<Workspace<Real>> workspace_;
};

}  // namespace spo
