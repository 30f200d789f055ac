// SPDX-License-Identifier: Apache-2.0
// launch_product on Hopper: operands as the copy engine wants them, one launch.
// Included by one file per number type, which compile side by side.
#pragma once
#include "head_sm90.cuh"
#include "head_sm90_products.cuh"

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

// CUTLASS names layouts after a BLAS call: A is [m, k], B is [k, n], row-major or column-major.
template <Along kAlong>
using LayoutA = std::conditional_t<kAlong == Along::kStep, cutlass::layout::RowMajor,
                                   cutlass::layout::ColumnMajor>;
template <Along kAlong>
using LayoutB = std::conditional_t<kAlong == Along::kStep, cutlass::layout::ColumnMajor,
                                   cutlass::layout::RowMajor>;

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

}  // namespace

template <class T, Along kA, Along kB, class Epilogue>
void launch_product(const Operand<T>& a, const Operand<T>& b, const TileList& tiles,
                    int64_t most_pairs, const Epilogue& epilogue) {
  using Element = typename CutlassType<T>::type;
  using Gemm = Sm90Gemm<Element, LayoutA<kA>, LayoutB<kB>>;
  using Mainloop = typename Gemm::Mainloop;
  const auto shape = cute::make_shape(static_cast<int32_t>(tiles.m), static_cast<int32_t>(tiles.n),
                                      static_cast<int32_t>(tiles.k), 1);
  const typename Mainloop::Arguments arguments{
      reinterpret_cast<const Element*>(a.data), stride_of<typename Mainloop::StrideA>(a.pitch),
      reinterpret_cast<const Element*>(b.data), stride_of<typename Mainloop::StrideB>(b.pitch)};
  const auto params = Mainloop::to_underlying_arguments(shape, arguments, nullptr);
  const int64_t clusters =
      std::min<int64_t>(multiprocessors() / 2, most_pairs * blocks_of(tiles.n, kSm90TileCols));
  launch(&sm90_product<Gemm, Epilogue>, dim3(static_cast<unsigned>(clusters * 2)), Gemm::kThreads,
         Gemm::kSharedBytes, params, tiles, epilogue);
}

}  // namespace spo::cuda
