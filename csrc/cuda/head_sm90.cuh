// SPDX-License-Identifier: Apache-2.0
// One kernel for the three products of the LM head on Hopper. The main loop is CUTLASS's: a warp
// feeds tiles of both operands through the copy engine, two warp groups multiply them (wgmma) with
// float sums in registers. Around it: blocks that stay and take tile after tile (persistent), row
// tiles and sum steps from lists on the device, and an epilogue that reads the sums where they are.
// A cluster of two blocks shares every tile of B. A number's sum runs over k in one fixed order,
// wherever its row lies.
#pragma once
#include <cutlass/arch/reg_reconfig.h>
#include <cutlass/cutlass.h>
#include <cute/tensor.hpp>
#include <cutlass/gemm/dispatch_policy.hpp>
#include <cutlass/pipeline/pipeline.hpp>
// Of the collectives just the one that is used: their common header takes minutes to compile.
#include <cutlass/gemm/collective/builders/sm90_gmma_builder.inl>
#include <cutlass/gemm/collective/collective_builder_decl.hpp>
#include <cutlass/gemm/collective/collective_mma_decl.hpp>
#include <cutlass/gemm/collective/sm90_mma_tma_gmma_ss_warpspecialized.hpp>

#include "head_sm90_tiles.cuh"

namespace spo::cuda {

using cute::_;

template <class T, class LayoutA, class LayoutB>
struct Sm90Gemm {
  using TileShape =
      cute::Shape<cute::Int<kSm90TileRows>, cute::Int<kSm90TileCols>, cute::Int<kSm90Steps>>;
  using Cluster = cute::Shape<cute::_2, cute::_1, cute::_1>;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, T, LayoutA, 8, T, LayoutB, 8, float,
      TileShape, Cluster, cutlass::gemm::collective::StageCountAutoCarveout<2048>,
      cutlass::gemm::KernelTmaWarpSpecializedCooperative>::CollectiveOp;
  using Pipeline = typename Mainloop::MainloopPipeline;

  struct Shared {
    typename Mainloop::TensorStorage tensors;
    typename Mainloop::PipelineStorage pipeline;
  };
  static constexpr int kThreads = 384, kConsumers = 256;
  static constexpr int kSharedBytes = sizeof(Shared);
};

// One thread's numbers in one row of a tile: number i lies in column col(i).
template <class Sums>
struct RowFragment {
  static constexpr int kEach = kSm90TileCols / 4;  // four lanes share a row
  Sums& sums;
  int half;  // a thread holds two rows
  int lane_col;

  __device__ float& operator[](int i) const {
    return sums(cute::make_coord(i % 2, half, i / 2), 0, 0);
  }
  __device__ int col(int i) const { return lane_col + i % 2 + i / 2 * 8; }
};

// The file is compiled for every architecture of the build; those before Hopper have no clusters
// and refuse the attribute.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define SPO_CLUSTER_OF_TWO
#else
#define SPO_CLUSTER_OF_TWO __cluster_dims__(2, 1, 1)
#endif

template <class Gemm, class Epilogue>
__global__ void SPO_CLUSTER_OF_TWO __launch_bounds__(Gemm::kThreads, 1)
    sm90_product(__grid_constant__ const typename Gemm::Mainloop::Params params,
                 __grid_constant__ const TileList tiles,
                 __grid_constant__ const Epilogue epilogue) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Mainloop = typename Gemm::Mainloop;
  using Pipeline = typename Gemm::Pipeline;
  auto& shared = *shared_memory<typename Gemm::Shared>();
  if (tiles.skip && *tiles.skip) return;  // every block alike

  const int group = cutlass::canonical_warp_group_idx(), warp = cutlass::canonical_warp_idx_sync();
  const int rank = static_cast<int>(cute::block_rank_in_cluster());
  const bool producer = group == 0;
  if (warp == 0 && cute::elect_one_sync()) Mainloop::prefetch_tma_descriptors(params);

  typename Pipeline::Params setup;
  setup.role = producer ? Pipeline::ThreadCategory::Producer : Pipeline::ThreadCategory::Consumer;
  setup.is_leader = threadIdx.x % cutlass::NumThreadsPerWarpGroup == 0;
  setup.num_consumers = Gemm::kConsumers;
  setup.transaction_bytes = params.tma_transaction_bytes;
  Pipeline pipeline(shared.pipeline, setup, typename Gemm::Cluster{});
  cute::cluster_arrive_relaxed();
  cute::cluster_wait();  // both blocks see the barriers before either uses them

  Mainloop mainloop;
  const int steps = tiles.num_steps();
  const int64_t clusters = gridDim.x / 2, size = tiles.size();
  if (producer) {
    cutlass::arch::warpgroup_reg_dealloc<40>();
    if (warp != 0) return;
    const auto shape = cute::make_shape(int32_t(tiles.m), int32_t(tiles.n), int32_t(tiles.k), 1);
    const auto inputs = mainloop.load_init(shape, params);
    auto state = cutlass::make_producer_start_state<Pipeline>();
    for (int64_t index = blockIdx.x / 2; index < size; index += clusters) {
      const auto tile = tiles.tile(index, rank);
      mainloop.load(params, pipeline, state, inputs, cute::make_coord(tile.row, tile.col, _, 0),
                    StepIterator{tiles.steps, 0}, steps, threadIdx.x % 32, rank, shared.tensors);
      state.advance(steps);
    }
    mainloop.load_tail(pipeline, state);
  } else {
    cutlass::arch::warpgroup_reg_alloc<232>();
    const int thread = threadIdx.x - cutlass::NumThreadsPerWarpGroup;
    typename Mainloop::TiledMma tiled_mma;
    const auto tile_shape = cute::take<0, 2>(typename Gemm::TileShape{});
    auto sums = cute::partition_fragment_C(tiled_mma, tile_shape);
    const auto where =
        tiled_mma.get_thread_slice(thread).partition_C(cute::make_identity_tensor(tile_shape));
    typename Mainloop::PipelineState state;
    for (int64_t index = blockIdx.x / 2; index < size; index += clusters) {
      const auto tile = tiles.tile(index, rank);
      if (steps > 0) {
        mainloop.mma(pipeline, state, sums, steps, thread, shared.tensors, params);
        mainloop.mma_tail(pipeline, state, steps);
        state.advance(steps);
      } else {
        cute::clear(sums);
      }
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const auto first = where(cute::make_coord(0, half, 0), 0, 0);
        const int64_t row = int64_t(tile.row) * kSm90TileRows + cute::get<0>(first);
        epilogue.row(RowFragment<decltype(sums)>{sums, half, static_cast<int>(cute::get<1>(first))},
                     row, int64_t(tile.col) * kSm90TileCols);
      }
    }
  }
#else
  CUDA_KERNEL_ASSERT(false && "this kernel is for sm_90a alone");
#endif
}

}  // namespace spo::cuda
