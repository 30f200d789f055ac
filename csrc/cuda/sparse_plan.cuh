// SPDX-License-Identifier: Apache-2.0
// How the sparse backward pass divides its workspace on CUDA. dz of one wave of (row, block) pairs
// takes what is left beside the block centres, the lists, and the low bytes of a 16-bit
// grad_hidden.
#pragma once
#include "backward_plan.cuh"
#include "pair_lists.cuh"

namespace spo::cuda {

struct SparsePlan {
  int64_t blocks, pitch;  // of the vocabulary; of the pulls to centres, a multiple of 16 bytes
  int64_t low_bytes;
  int64_t capacity;  // pairs of a wave: never fewer than one block can have, by decree O(N)
  int most_waves;
  int64_t pull_rows;  // at a time, where dz will be

  SparsePlan(const HeadArgs& args, const BackwardPass& pass, int64_t storage_bytes,
             int64_t real_bytes, bool split_hidden)
      : blocks(blocks_of(args.weight.size(0), kBlockEntries)), pitch(blocks_of(blocks, 8) * 8) {
    const int64_t depth = args.weight.size(1), tokens = args.targets.numel();
    low_bytes = pass.hidden_side && split_hidden ? pass.count * depth : 0;
    const int64_t centres = pass.hidden_side ? depth * (blocks * storage_bytes + real_bytes) : 0;
    const int64_t pair_bytes = kBlockEntries * storage_bytes + 2 * int64_t(sizeof(int64_t));
    const int64_t rest = (args.workspace_mib << 20) - low_bytes - centres - counts_bytes(blocks, 0);
    const int64_t most = std::min(most_kept_pairs(tokens, blocks) + tokens, pass.count * blocks);
    capacity = std::clamp(rest / pair_bytes, pass.count, std::max(most, pass.count));
    most_waves = static_cast<int>(2 * most / (capacity + 1) + 1);
    pull_rows = std::max<int64_t>(capacity * kBlockEntries / pitch, 1);
  }

  // Of the arrays that count pairs (PairLists).
  static int64_t counts_bytes(int64_t blocks, int waves) {
    return Workspace::padded(blocks * (kRowRanges + 1) * int64_t(sizeof(int32_t))) +
           Workspace::padded((blocks + 1) * int64_t(sizeof(int64_t))) +
           Workspace::padded((waves + 1) * int64_t(sizeof(int64_t)));
  }
};

}  // namespace spo::cuda
