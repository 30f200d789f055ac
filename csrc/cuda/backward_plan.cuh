// SPDX-License-Identifier: Apache-2.0
// How the backward pass of the LM head divides its workspace on CUDA. dz of one slice of the
// vocabulary for all tokens is the largest part; a 16-bit grad_hidden needs one byte per number
// beside it (SplitFloat). Sizes affect speed and, for grad_weight, the order of sums over tokens.
// Rows are tokens, or slots on Hopper, where they are one group whatever their number.
#pragma once
#include "backward_kernels.cuh"

namespace spo::cuda {

// What one pass over a range of rows computes.
struct BackwardPass {
  int64_t first, count;
  bool hidden_side, weight_side;
};

// Both gradients in one pass if the sums of a 16-bit grad_hidden fit, which they do for `most`
// rows. If not, it is finished for one group of rows after the other, then grad_weight is made over
// all of them: one more product, but neither gradient is rounded twice.
template <class Run>
void in_passes(int64_t rows, int64_t most, const HeadGrads& grads, const Run& run) {
  const bool hidden_side = grads.hidden.defined();
  const bool weight_side = grads.weight.defined() || grads.bias.defined();
  if (!hidden_side || rows <= most) return run({0, rows, hidden_side, weight_side});
  for (int64_t first = 0; first < rows; first += most)
    run({first, std::min(most, rows - first), true, false});
  if (weight_side) run({0, rows, false, true});
}

struct BackwardPlan {
  static constexpr int64_t kSliceStep = 256, kGroupStep = 128;
  int64_t low_bytes;  // of grad_hidden's sums
  int64_t slice_entries, group_rows;
  bool weight_sums;  // several groups: grad_weight waits in arithmetic precision for the last

  BackwardPlan(const HeadArgs& args, const BackwardPass& pass, int64_t storage_bytes,
               int64_t real_bytes, bool split_hidden, bool one_group) {
    const int64_t depth = args.weight.size(1), vocabulary = args.weight.size(0);
    low_bytes = pass.hidden_side && split_hidden ? pass.count * depth : 0;
    const int64_t rest = (args.workspace_mib << 20) - low_bytes;
    slice_entries = std::min(rest / (storage_bytes * pass.count), vocabulary + kSliceStep - 1) /
                    kSliceStep * kSliceStep;
    group_rows = pass.count;
    weight_sums = false;
    if (slice_entries > 0) return;
    slice_entries = kSliceStep;
    if (one_group) return;  // 512 bytes a token: O(N)
    weight_sums = pass.weight_side;
    const int64_t sums = weight_sums ? kSliceStep * depth * real_bytes : 0;
    group_rows =
        std::max<int64_t>(rest - sums, 0) / (kSliceStep * storage_bytes) / kGroupStep * kGroupStep;
    const int64_t least = 2 * (sums + kSliceStep * kGroupStep * storage_bytes);
    TORCH_CHECK_VALUE(group_rows > 0, args.op, ": workspace_mib must be at least ",
                      (least >> 20) + 1, " for d = ", depth, ", got ", args.workspace_mib);
  }

  // Rows whose 16-bit grad_hidden may be summed in one pass: its bytes leave 3/8 of the workspace,
  // and room for the narrowest slice of dz.
  static int64_t most_split_rows(const HeadArgs& args, int64_t storage_bytes) {
    const int64_t budget = args.workspace_mib << 20, depth = args.weight.size(1);
    return std::max<int64_t>(
        std::min(budget / 8 * 5 / depth, budget / (depth + kSliceStep * storage_bytes)), 1);
  }
};

}  // namespace spo::cuda
