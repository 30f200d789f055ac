// SPDX-License-Identifier: Apache-2.0
// head_sm90_launch.cuh without CUTLASS: the same tiles in the same order, the sums where wgmma
// leaves them, the real epilogues; only the main loop is a plain sum. So everything of the Hopper
// path but the main loop runs on the host. SPO_EMULATE_HOPPER=1 in the environment makes the ops
// take it.
#include "../../csrc/cuda/head_sm90_epilogues.cuh"
#include "../../csrc/cuda/head_sm90_tiles.cuh"

namespace spo::cuda {
namespace {

constexpr int kThreads = 256, kClusters = 3;

// Element (i, k) of an operand; zero outside, as the copy engine has it.
template <class T>
struct Operand {
  const T* data;
  int64_t pitch, rows, steps;
  bool steps_contiguous;
  float operator()(int64_t i, int64_t k) const {
    if (i >= rows || k >= steps) return 0;
    return static_cast<float>(steps_contiguous ? data[i * pitch + k] : data[k * pitch + i]);
  }
};

struct Fragment {
  static constexpr int kEach = kSm90TileCols / 4;
  float* sums;
  int lane_col;
  float& operator[](int i) const { return sums[i]; }
  int col(int i) const { return lane_col + i % 2 + i / 2 * 8; }
};

template <class T, class Epilogue>
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
          if (const float left = a(row, k); left != 0 || left != left)
            for (int i = 0; i < Fragment::kEach; i++)
              sums[i] += left * b(col0 + fragment.col(i), k);
      epilogue.row(fragment, row, col0);
    }
  }
}

template <class T, class Epilogue>
void launch_product(const Operand<T>& a, const Operand<T>& b, const TileList& tiles,
                    const Epilogue& epilogue) {
  launch(&product<T, Epilogue>, dim3(kClusters * 2), kThreads, 0, a, b, tiles, epilogue);
}

template <class T>
Operand<T> hidden_operand(const HeadArgs& args, const SlotLayout& layout, bool by_steps) {
  const int64_t depth = args.weight.size(1);
  return {args.hidden.const_data_ptr<T>() + layout.first * layout.stride, layout.stride,
          by_steps ? depth : layout.slots, by_steps ? layout.slots : depth, !by_steps};
}

template <class T>
Operand<T> weight_operand(const HeadArgs& args, int64_t first_word, int64_t words, bool by_steps) {
  const int64_t depth = args.weight.size(1), pitch = args.weight.stride(0);
  return {args.weight.const_data_ptr<T>() + first_word * pitch, pitch, by_steps ? depth : words,
          by_steps ? words : depth, !by_steps};
}

template <class T, class Epilogue>
void launch_logits(const HeadArgs& args, const Slots& slots, int64_t first_word, int64_t words,
                   const Epilogue& epilogue) {
  const SlotMap& map = slots.map();
  launch_product(hidden_operand<T>(args, slots.layout(), false),
                 weight_operand<T>(args, first_word, words, false),
                 TileList{slots.layout().slots, words, args.weight.size(1), map.pairs,
                          map.pair_count, nullptr, nullptr, nullptr},
                 epilogue);
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
  launch_product(Operand<T>{dz, pitch, count, words, true},
                 weight_operand<T>(args, first_word, words, true),
                 TileList{count, args.weight.size(1), words, map.pairs, map.pair_count, nullptr,
                          nullptr, nullptr},
                 Sm90HiddenGrad<T>{epilogue, slot_rows(slots)});
}

template <class T>
void sm90_weight_grad(const HeadArgs& args, const Slots& slots, const T* dz, int64_t pitch,
                      int64_t words, const WeightGradEpilogue<float, T>& epilogue) {
  const SlotMap& map = slots.map();
  const int64_t count = slots.layout().slots;
  launch_product(Operand<T>{dz, pitch, words, count, false},
                 hidden_operand<T>(args, slots.layout(), true),
                 TileList{words, args.weight.size(1), count, nullptr, nullptr, map.steps,
                          map.step_count, map.poisoned},
                 Sm90WeightGrad<T>{epilogue, words});
}

#define SPO_EMULATED_BACKWARD(T)                                                               \
  template void sm90_statistics<T>(const HeadArgs&, const Slots&, int64_t,                     \
                                   const StatisticsEpilogue<float>&);                          \
  template void sm90_gradient<T>(const HeadArgs&, const Slots&, int64_t,                       \
                                 const GradientEpilogue<float, T>&);                           \
  template void sm90_hidden_grad<T>(const HeadArgs&, const Slots&, const T*, int64_t, int64_t, \
                                    int64_t, const HiddenGradEpilogue<float, T>&);             \
  template void sm90_weight_grad<T>(const HeadArgs&, const Slots&, const T*, int64_t, int64_t, \
                                    const WeightGradEpilogue<float, T>&);
SPO_EMULATED_BACKWARD(c10::BFloat16)
SPO_EMULATED_BACKWARD(c10::Half)

}  // namespace spo::cuda
