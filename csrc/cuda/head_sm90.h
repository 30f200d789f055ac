// SPDX-License-Identifier: Apache-2.0
// The products of the LM head on Hopper (sm_90a): see head_sm90.cuh for the kernel. This header has
// no CUTLASS in it, so that the files that use it compile quickly.
//
// The copy engine reads rows at one distance from each other, so hidden is read where it lies, rows
// that do not count included: a "slot" is such a row. Slots of ignored tokens, and those between
// the sequences of a sliced [B, T, d] tensor, cost nothing where 256 of them lie together.
#pragma once
#include "head_epilogues.cuh"

namespace spo::cuda {

// Whether this build has the Hopper kernels: CUTLASS was found, and sm_90a is among the targets.
#ifdef SPO_CUTLASS
constexpr bool kHopperBuilt = true;
#else
constexpr bool kHopperBuilt = false;
#endif

constexpr int kSm90TileRows = 128, kSm90TileCols = 256, kSm90Steps = 64;
constexpr int kSm90PairRows = 2 * kSm90TileRows;  // two blocks of a cluster share a column tile

// hidden as slots: slot i starts at data + (first + i) * stride.
struct SlotLayout {
  int64_t first, slots, stride;

  SlotLayout range(int64_t from, int64_t count) const {
    return {first + from, std::min(count, slots - from), stride};
  }
  // Whether the sm_90a kernels can serve these inputs: 16-bit numbers of one type, rows that start
  // at multiples of 16 bytes, one distance between the rows of hidden with few slots in between.
  static bool fit(const HeadArgs& args, SlotLayout* out);
};

// Which slots count. Lists are in increasing order and their lengths stay on the device.
struct SlotMap {
  const int64_t* place;               // of every slot: its index in the RowList, or -1
  const int32_t *pairs, *pair_count;  // groups of 256 slots with a token in them
  const int32_t *steps, *step_count;  // groups of 64 slots with a token in them
  const int32_t* poisoned;            // 1 if an unused slot of these steps holds an Inf or NaN
  const int64_t* slot;                // of every row of the RowList
};

// Owns a SlotMap.
class Slots {
 public:
  Slots(const HeadArgs& args, const SlotLayout& layout, const RowList& list, int64_t tokens);
  const SlotMap& map() const { return map_; }
  const SlotLayout& layout() const { return layout_; }

 private:
  SlotLayout layout_;
  at::Tensor place_, lists_, slot_;
  SlotMap map_;
};

// z of all slots in the first `entries` of the epilogue's slice, and what the epilogue makes of it.
template <class T>
void sm90_statistics(const HeadArgs& args, const Slots& slots, int64_t entries,
                     const StatisticsEpilogue<float>& epilogue);
template <class T>
void sm90_gradient(const HeadArgs& args, const Slots& slots, int64_t entries,
                   const GradientEpilogue<float, T>& epilogue);
// dz [slots, pitch] of `entries` rows of weight from first_entry on, times these rows. The
// epilogue's rows are slots.
template <class T>
void sm90_hidden_grad(const HeadArgs& args, const Slots& slots, const T* dz, int64_t pitch,
                      int64_t first_entry, int64_t entries,
                      const HiddenGradEpilogue<float, T>& epilogue);
// dz^T times hidden. Does nothing if slots are poisoned: 0 * NaN would spread.
template <class T>
void sm90_weight_grad(const HeadArgs& args, const Slots& slots, const T* dz, int64_t pitch,
                      int64_t entries, const WeightGradEpilogue<float, T>& epilogue);

}  // namespace spo::cuda
