// SPDX-License-Identifier: Apache-2.0
// head_sm90_launch.cuh without CUTLASS: the same tiles in the same order, the sums where wgmma
// leaves them, the real epilogues; only the main loop is a plain sum. So everything of the Hopper
// path but the main loop runs on the host. SPO_EMULATE_HOPPER=1 in the environment makes the ops
// take it.
#include "../../csrc/cuda/head_sm90_products.cuh"

namespace spo::cuda {
namespace {

constexpr int kThreads = 256, kClusters = 3;

// Element (i, k) of an operand; zero outside, as the copy engine has it.
template <class T, Along kAlong>
float element(const Operand<T>& operand, int64_t i, int64_t k, int64_t outputs, int64_t steps) {
  if (i >= outputs || k >= steps) return 0;
  const int64_t pitch = operand.pitch;
  return static_cast<float>(operand.data[kAlong == Along::kStep ? i * pitch + k : k * pitch + i]);
}

struct Fragment {
  static constexpr int kEach = kSm90TileCols / 4;
  float* sums;
  int lane_col;
  float& operator[](int i) const { return sums[i]; }
  int col(int i) const { return lane_col + i % 2 + i / 2 * 8; }
};

template <class T, Along kA, Along kB, class Epilogue>
__global__ void product(Operand<T> a, Operand<T> b, TileList tiles, Epilogue epilogue) {
  if (tiles.skip && *tiles.skip) return;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int64_t index = blockIdx.x / 2; index < tiles.size(); index += kClusters) {
    const auto tile = tiles.tile(index, blockIdx.x % 2);
    const int64_t col0 = int64_t(tile.col) * kSm90TileCols;
    for (int half = 0; half < 2; half++) {
      const int64_t row =
          int64_t(tile.row) * kSm90TileRows + warp / 4 * 64 + warp % 4 * 16 + lane / 4 + half * 8;
      float sums[Fragment::kEach] = {};
      const Fragment fragment{sums, lane % 4 * 2};
      for (StepIterator step{tiles.steps, 0}; step.at < tiles.num_steps(); ++step)
        for (int64_t k = int64_t(*step) * kSm90Steps; k < (int64_t(*step) + 1) * kSm90Steps; k++)
          if (const float left = element<T, kA>(a, row, k, tiles.m, tiles.k);
              left != 0 || left != left)
            for (int i = 0; i < Fragment::kEach; i++)
              sums[i] += left * element<T, kB>(b, col0 + fragment.col(i), k, tiles.n, tiles.k);
      epilogue.row(fragment, row, col0);
    }
  }
}

}  // namespace

template <class T, Along kA, Along kB, class Epilogue>
void launch_product(const Operand<T>& a, const Operand<T>& b, const TileList& tiles,
                    int64_t most_pairs, const Epilogue& epilogue) {
  TORCH_CHECK(most_pairs >= tiles.num_pairs(), "more row tiles than the grid was made for");
  launch(&product<T, kA, kB, Epilogue>, dim3(kClusters * 2), kThreads, 0, a, b, tiles, epilogue);
}

SPO_INSTANTIATE_SM90(c10::BFloat16)
SPO_INSTANTIATE_SM90(c10::Half)

}  // namespace spo::cuda
