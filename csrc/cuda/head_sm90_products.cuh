// SPDX-License-Identifier: Apache-2.0
// The three products on Hopper as operands, tiles and epilogues. What multiplies them is left to
// launch_product: head_sm90_launch.cuh has the kernel, cuda_emulation/hopper.cpp a plain sum, so
// that everything here is tested on the host.
#pragma once
#include "head_sm90_epilogues.cuh"
#include "head_sm90_tiles.cuh"

namespace spo::cuda {

// Along which of its two dimensions a matrix is contiguous: the steps of the sum, or the output.
enum class Along { kStep, kOutput };

// The other dimension's numbers are `pitch` apart. Sizes are those of the TileList.
template <class T>
struct Operand {
  const T* data;
  int64_t pitch;
};

// Computes `tiles` of a [m, k] times b [n, k] and hands their rows to the epilogue.
template <class T, Along kA, Along kB, class Epilogue>
void launch_product(const Operand<T>& a, const Operand<T>& b, const TileList& tiles,
                    int64_t most_pairs, const Epilogue& epilogue);

template <class T, Along kA, Along kB, class Epilogue>
void multiply(const Operand<T>& a, const Operand<T>& b, const TileList& tiles,
              const Epilogue& epilogue) {
  launch_log.bytes +=
      (tiles.m + tiles.n) * tiles.k * int64_t(sizeof(T)) + epilogue.base.bytes(tiles.m, tiles.n);
  if (launch_log.dry) {  // no address, no descriptor of a copy
    launch_log.add();
  } else {
    launch_product<T, kA, kB>(a, b, tiles, blocks_of(tiles.m, kSm90PairRows), epilogue);
  }
}

template <class T>
Operand<T> hidden_operand(const HeadArgs& args, const SlotLayout& layout) {
  return {args.hidden.const_data_ptr<T>() + layout.first * layout.stride, layout.stride};
}

template <class T>
Operand<T> weight_operand(const HeadArgs& args, int64_t first_entry) {
  const int64_t pitch = args.weight.stride(0);
  return {args.weight.const_data_ptr<T>() + first_entry * pitch, pitch};
}

template <class T, class Epilogue>
void launch_logits(const HeadArgs& args, const Slots& slots, int64_t first_entry, int64_t entries,
                   const Epilogue& epilogue) {
  const SlotMap& map = slots.map();
  const int64_t count = slots.layout().slots;
  multiply<T, Along::kStep, Along::kStep>(hidden_operand<T>(args, slots.layout()),
                                          weight_operand<T>(args, first_entry),
                                          TileList{count, entries, args.weight.size(1), map.pairs,
                                                   map.pair_count, nullptr, nullptr, nullptr},
                                          epilogue);
}

// run(capped): a softcap has kernels of its own, which the others would have to carry along.
template <class Run>
void with_softcap(const LogitMap<float>& map, const Run& run) {
  map.capped ? run(std::true_type{}) : run(std::false_type{});
}

inline SlotRows slot_rows(const Slots& slots) { return {slots.map().place, slots.layout().slots}; }

template <class T>
void sm90_statistics(const HeadArgs& args, const Slots& slots, int64_t entries,
                     const StatisticsEpilogue<float>& epilogue) {
  with_softcap(epilogue.slice.map, [&](auto capped) {
    launch_logits<T>(args, slots, epilogue.slice.first_entry, entries,
                     Sm90Statistics<capped>{epilogue, slot_rows(slots), entries});
  });
}

template <class T>
void sm90_gradient(const HeadArgs& args, const Slots& slots, int64_t entries,
                   const GradientEpilogue<float, T>& epilogue) {
  with_softcap(epilogue.slice.map, [&](auto capped) {
    launch_logits<T>(args, slots, epilogue.slice.first_entry, entries,
                     Sm90Gradient<T, capped>{epilogue, slot_rows(slots), entries});
  });
}

template <class T>
void sm90_hidden_grad(const HeadArgs& args, const Slots& slots, const T* dz, int64_t pitch,
                      int64_t first_entry, int64_t entries,
                      const HiddenGradEpilogue<float, T>& epilogue) {
  const SlotMap& map = slots.map();
  const int64_t count = slots.layout().slots;
  multiply<T, Along::kStep, Along::kOutput>({dz, pitch}, weight_operand<T>(args, first_entry),
                                            TileList{count, args.weight.size(1), entries, map.pairs,
                                                     map.pair_count, nullptr, nullptr, nullptr},
                                            Sm90HiddenGrad<T>{epilogue, slot_rows(slots)});
}

template <class T>
void sm90_weight_grad(const HeadArgs& args, const Slots& slots, const T* dz, int64_t pitch,
                      int64_t entries, const WeightGradEpilogue<float, T>& epilogue) {
  const SlotMap& map = slots.map();
  multiply<T, Along::kOutput, Along::kOutput>(
      {dz, pitch}, hidden_operand<T>(args, slots.layout()),
      TileList{entries, args.weight.size(1), slots.layout().slots, nullptr, nullptr, map.steps,
               map.step_count, map.poisoned},
      Sm90WeightGrad<T>{epilogue, entries});
}

#define SPO_INSTANTIATE_SM90(T)                                                                \
  template void sm90_statistics<T>(const HeadArgs&, const Slots&, int64_t,                     \
                                   const StatisticsEpilogue<float>&);                          \
  template void sm90_gradient<T>(const HeadArgs&, const Slots&, int64_t,                       \
                                 const GradientEpilogue<float, T>&);                           \
  template void sm90_hidden_grad<T>(const HeadArgs&, const Slots&, const T*, int64_t, int64_t, \
                                    int64_t, const HiddenGradEpilogue<float, T>&);             \
  template void sm90_weight_grad<T>(const HeadArgs&, const Slots&, const T*, int64_t, int64_t, \
                                    const WeightGradEpilogue<float, T>&);

}  // namespace spo::cuda
