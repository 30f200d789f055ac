// SPDX-License-Identifier: Apache-2.0
// How the backward pass of the LM head divides its workspace: a group of rows times a slice of the
// vocabulary. Sizes affect speed only; the groups are whole depth steps so that even grad_weight's
// order of sums does not depend on them.
#pragma once
#include "head_problem.h"

namespace spo {

constexpr int64_t kDepthRange = 256;  // columns of hidden in one grad_weight task: C stays in L2

struct HeadGrads {
  at::Tensor hidden, weight;  // undefined where not wanted; hidden as [tokens, d]
  at::Tensor bias;            // in double
};

// What one pass over the rows computes, whether from logits of its own making, and the float sums
// it needs beside 16-bit gradients.
struct BackwardWork {
  bool hidden_side, weight_side, weight_sums, recompute;
  int64_t hidden_sums;
};

template <class Real>
struct BackwardBuffers {
  BackwardBuffers(const HeadArgs& args, const HeadKernels<Real>& kernels, int64_t rows,
                  const BackwardWork& work)
      : work(work), depth(args.hidden.size(-1)), kernels(kernels) {
    const int64_t budget = (args.workspace_mib << 20) / int64_t(sizeof(Real)) - work.hidden_sums;
    row_chunk = row_chunk_for<Real>(rows);
    slice_cols = std::min<int64_t>(panels(args.weight.size(0), kBlockCols), 4) * kBlockCols;
    while (slice_cols > kBlockCols && (fixed_size() > budget / 2 || groups_fitting(budget) == 0))
      slice_cols -= kBlockCols;
    group_rows = groups_fitting(budget) * kDepthStep;
    // Half as much again: a third of the workspace may hold the sums of grad_hidden.
    const int64_t least = (fixed_size() + kDepthStep * row_size()) * 3 / 2 * sizeof(Real);
    TORCH_CHECK_VALUE(group_rows > 0, args.op, ": workspace_mib must be at least ",
                      (least >> 20) + 1, " for d = ", depth, ", got ", args.workspace_mib);
    group_rows = std::min(group_rows, rows);
  }

  void allocate() {
    const int64_t tile_rows = panels(group_rows, kernels.tile_rows) * kernels.tile_rows;
    workspace_.emplace(std::vector<int64_t>{
        work.recompute ? tile_rows * depth : 0, work.weight_side ? group_rows * padded_depth() : 0,
        work.recompute ? slice_cols * depth : 0, work.hidden_side ? slice_cols * padded_depth() : 0,
        group_rows * dz_cols(), work.weight_sums ? slice_cols * depth : 0, work.hidden_sums});
    Real** const arrays[] = {&hidden_rows, &hidden_cols, &weight_rows, &weight_cols,
                             &dz,          &weight_sums, &hidden_sums};
    for (size_t i = 0; i < std::size(arrays); i++) *arrays[i] = workspace_->array(i);
    if (!work.weight_sums) weight_sums = nullptr;
  }

  int64_t padded_depth() const { return panels(depth, kernels.panel_cols) * kernels.panel_cols; }
  int64_t padded_block() const { return panels(kBlockCols, kernels.tile_rows) * kernels.tile_rows; }
  Real* weight_block(int64_t block) const {
    return weight_cols + block * kBlockCols * padded_depth();
  }
  Real* dz_block(int64_t block) const { return dz + block * group_rows * padded_block(); }

  const BackwardWork work;
  const int64_t depth;
  const HeadKernels<Real>& kernels;
  int64_t group_rows, slice_cols, row_chunk;
  Real *hidden_rows, *hidden_cols;  // panels of the group's rows, for z and for grad_weight
  Real *weight_rows, *weight_cols;  // panels of the slice's entries, for z and for grad_hidden
  Real* dz;                         // left factor of grad_weight: [blocks][panels of tile_rows
                                    // entries][group_rows][tile_rows]
  Real* weight_sums;                // float sums of a 16-bit grad_weight, else null
  Real* hidden_sums;                // float sums of a 16-bit grad_hidden

 private:
  int64_t dz_cols() const {
    return work.weight_side ? slice_cols / kBlockCols * padded_block() : 0;
  }
  int64_t row_size() const {  // numbers per row of a group
    return (work.recompute ? depth : 0) + (work.weight_side ? padded_depth() : 0) + dz_cols();
  }
  int64_t fixed_size() const {  // numbers whatever the group: entries, tiles
    const int64_t per_col = (work.recompute ? depth : 0) + (work.hidden_side ? padded_depth() : 0) +
                            (work.weight_sums ? depth : 0);
    return slice_cols * per_col + at::get_num_threads() * row_chunk * kBlockCols +
           kernels.tile_rows * depth;
  }
  int64_t groups_fitting(int64_t budget) const {            // in depth steps of rows
    const int64_t each = std::max<int64_t>(row_size(), 1);  // 0: nothing is packed per row
    return std::max<int64_t>(budget - fixed_size(), 0) / each / kDepthStep;
  }

  std::optional<Workspace<Real>> workspace_;
};

}  // namespace spo
