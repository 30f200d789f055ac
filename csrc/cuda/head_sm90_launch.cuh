// SPDX-License-Identifier: Apache-2.0
// The host side of the Hopper kernels: operands as the copy engine wants them, one launch each.
// Included by one file per number type, which compile side by side.
#pragma once
#include "head_sm90.cuh"
#include "head_sm90_epilogues.cuh"

namespace spo::cuda {
namespace {

template <class T>
struct CutlassType;
template <>
struct CutlassType<c10::BFloat16> {
  using type = cutlass::bfloat16_t;
};
template <>
struct CutlassType<c10::Half> {
  using type = cutlass::half_t;
};

using KMajorA = cutlass::layout::RowMajor;
using MMajorA = cutlass::layout::ColumnMajor;
using KMajorB = cutlass::layout::ColumnMajor;
using NMajorB = cutlass::layout::RowMajor;

// A matrix of two dimensions of which one is contiguous, the other `pitch` numbers apart.
template <class T>
struct Operand {
  const T* data;
  int64_t pitch;
};

template <class Stride>
Stride stride_of(int64_t pitch) {  // the dynamic one of the first two strides
  Stride stride{};
  if constexpr (cute::is_static_v<cute::remove_cvref_t<decltype(cute::get<0>(stride))>>) {
    cute::get<1>(stride) = pitch;
  } else {
    cute::get<0>(stride) = pitch;
  }
  return stride;
}

template <class T, class LayoutA, class LayoutB, class Epilogue>
void launch_product(const Operand<T>& a, const Operand<T>& b, const TileList& tiles,
                    int64_t most_pairs, const Epilogue& epilogue) {
  using Element = typename CutlassType<T>::type;
  using Gemm = Sm90Gemm<Element, LayoutA, LayoutB>;
  using Mainloop = typename Gemm::Mainloop;
  const auto shape = cute::make_shape(static_cast<int32_t>(tiles.m), static_cast<int32_t>(tiles.n),
                                      static_cast<int32_t>(tiles.k), 1);
  const typename Mainloop::Arguments arguments{
      reinterpret_cast<const Element*>(a.data), stride_of<typename Mainloop::StrideA>(a.pitch),
      reinterpret_cast<const Element*>(b.data), stride_of<typename Mainloop::StrideB>(b.pitch)};
  const auto params = Mainloop::to_underlying_arguments(shape, arguments, nullptr);
  const int64_t clusters =
      std::min<int64_t>(at::cuda::getCurrentDeviceProperties()->multiProcessorCount / 2,
                        most_pairs * blocks_of(tiles.n, kSm90TileCols));
  launch(&sm90_product<Gemm, Epilogue>, dim3(static_cast<unsigned>(clusters * 2)), Gemm::kThreads,
         Gemm::kSharedBytes, params, tiles, epilogue);
}

template <class T>
Operand<T> hidden_operand(const HeadArgs& args, const SlotLayout& layout) {
  return {args.hidden.const_data_ptr<T>() + layout.first * layout.stride, layout.stride};
}

template <class T>
Operand<T> weight_operand(const HeadArgs& args, int64_t first_word) {
  const int64_t pitch = args.weight.stride(0);
  return {args.weight.const_data_ptr<T>() + first_word * pitch, pitch};
}

template <class T, class Epilogue>
void launch_logits(const HeadArgs& args, const Slots& slots, int64_t first_word, int64_t words,
                   const Epilogue& epilogue) {
  const SlotMap& map = slots.map();
  const int64_t count = slots.layout().slots;
  launch_product<T, KMajorA, KMajorB>(hidden_operand<T>(args, slots.layout()),
                                      weight_operand<T>(args, first_word),
                                      TileList{count, words, args.weight.size(1), map.pairs,
                                               map.pair_count, nullptr, nullptr, nullptr},
                                      blocks_of(count, kSm90PairRows), epilogue);
}

SlotRows slot_rows(const Slots& slots) { return {slots.map().place, slots.layout().slots}; }

}  // namespace

template <class T>
void sm90_statistics(const HeadArgs& args, const Slots& slots, int64_t words,
                     const StatisticsEpilogue<float>& epilogue) {
  launch_logits<T>(args, slots, epilogue.slice.first_word, words,
                   Sm90Statistics{epilogue, slot_rows(slots), words});
}

template <class T>
void sm90_gradient(const HeadArgs& args, const Slots& slots, int64_t words,
                   const GradientEpilogue<float, T>& epilogue) {
  launch_logits<T>(args, slots, epilogue.slice.first_word, words,
                   Sm90Gradient<T>{epilogue, slot_rows(slots), words});
}

template <class T>
void sm90_hidden_grad(const HeadArgs& args, const Slots& slots, const T* dz, int64_t pitch,
                      int64_t first_word, int64_t words,
                      const HiddenGradEpilogue<float, T>& epilogue) {
  const SlotMap& map = slots.map();
  const int64_t count = slots.layout().slots;
  launch_product<T, KMajorA, NMajorB>({dz, pitch}, weight_operand<T>(args, first_word),
                                      TileList{count, args.weight.size(1), words, map.pairs,
                                               map.pair_count, nullptr, nullptr, nullptr},
                                      blocks_of(count, kSm90PairRows),
                                      Sm90HiddenGrad<T>{epilogue, slot_rows(slots)});
}

template <class T>
void sm90_weight_grad(const HeadArgs& args, const Slots& slots, const T* dz, int64_t pitch,
                      int64_t words, const WeightGradEpilogue<float, T>& epilogue) {
  const SlotMap& map = slots.map();
  launch_product<T, MMajorA, NMajorB>(
      {dz, pitch}, hidden_operand<T>(args, slots.layout()),
      TileList{words, args.weight.size(1), slots.layout().slots, nullptr, nullptr, map.steps,
               map.step_count, map.poisoned},
      blocks_of(words, kSm90PairRows), Sm90WeightGrad<T>{epilogue, words});
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
