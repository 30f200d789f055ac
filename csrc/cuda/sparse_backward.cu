// SPDX-License-Identifier: Apache-2.0
// Backward of the LM head over the (row, block of entries) pairs that the forward pass kept, on
// CUDA; see cpu/sparse_backward.h. Per wave of pairs (pair_lists.cuh):
//   dz            logits again, of the pairs alone
//   grad_hidden   += dz weight
//   grad_weight   = dz^T hidden, of the wave's blocks
// and before the first, grad_hidden is what the dropped masses pull to the centres of their blocks.
#include "sparse_backward.h"

#include "block_centres.cuh"
#include "pair_products.cuh"
#include "sparse_plan.cuh"

namespace spo::cuda {
namespace {

// The device arrays of a pass over some rows, and the counts in them.
template <class Real>
PairLists<Real> count_and_plan(const RowRange& tokens, const at::Tensor& dropped, int64_t blocks,
                               int64_t capacity, int most_waves, Workspace* workspace) {
  PairLists<Real> pairs{tokens, dropped.const_data_ptr<Real>(), blocks};
  pairs.within = workspace->take<int32_t>(blocks * (kRowRanges + 1));
  pairs.start = workspace->take<int64_t>(blocks + 1);
  pairs.waves = workspace->take<int64_t>(most_waves + 1);
  launch(&count_pairs<Real>, dim3(blocks_of(blocks, 32)), kPairThreads, 0, pairs);
  launch(&plan_waves<Real>, dim3(1), 32, 0, pairs, capacity, most_waves);
  return pairs;
}

template <class Multiply>
class SparseBackward {
  using Real = typename Multiply::Real;
  using Storage = typename Multiply::Storage;

 public:
  SparseBackward(const HeadArgs& args, const SelectedRows& rows, const TokenStates<Real>& states,
                 const at::Tensor& dropped, const HeadGrads& grads)
      : args_(args),
        rows_(rows),
        states_(states),
        dropped_(dropped),
        grads_(grads),
        map_(logit_map<Real>(args)),
        bias_(bias_of<Real>(args)),
        scale_(args.hidden, map_, rows.all(), states),
        depth_(args.weight.size(1)),
        vocabulary_(args.weight.size(0)) {}

  void run() {
    const int64_t most = BackwardPlan::most_split_rows(args_, sizeof(Storage));
    in_passes(rows_.most, split_hidden() ? most : rows_.most, grads_,
              [&](const BackwardPass& pass) { run_pass(pass); });
  }

 private:
  bool split_hidden() const { return args_.hidden.element_size() < int64_t(sizeof(Real)); }

  void run_pass(const BackwardPass& pass) {
    const SparsePlan plan(args_, pass, sizeof(Storage), sizeof(Real), split_hidden());
    const int64_t centres = pass.hidden_side ? plan.blocks * depth_ : 0;
    const int64_t dz = std::max(plan.capacity * kBlockEntries, plan.pull_rows * plan.pitch);
    const int64_t pair_list = plan.capacity * int64_t(sizeof(int64_t));
    Workspace workspace(
        args_.hidden,
        SparsePlan::counts_bytes(plan.blocks, plan.most_waves) + 2 * Workspace::padded(pair_list) +
            Workspace::padded(plan.low_bytes) + Workspace::padded(depth_ * sizeof(Real)) +
            Workspace::padded(centres * sizeof(Storage)) + Workspace::padded(dz * sizeof(Storage)));
    const RowRange tokens = rows_.range(pass.first, pass.count);
    pairs_ = count_and_plan<Real>(tokens, dropped_, plan.blocks, plan.capacity, plan.most_waves,
                                  &workspace);
    pairs_.row = workspace.take<int64_t>(plan.capacity);
    pairs_.offset = workspace.take<int64_t>(plan.capacity);
    low_ = workspace.take<uint8_t>(plan.low_bytes);
    Real* const mean = workspace.take<Real>(depth_);
    centres_ = workspace.take<Storage>(centres);
    dz_ = workspace.take<Storage>(dz);
    if (pass.hidden_side) {
      make_block_centres(tokens, mean);
      for (int64_t row = 0; row < pass.count; row += plan.pull_rows)
        pull_to_centres(rows_.range(pass.first + row, std::min(plan.pull_rows, pass.count - row)),
                        plan, low_ + row * depth_);
    }
    for (int wave = 0; wave < plan.most_waves; wave++) {
      launch(&list_pairs<Real>, dim3(blocks_of(plan.blocks, 32), kRowRanges), 32, 0, pairs_, wave);
      make_gradient(wave, plan);
      if (pass.hidden_side) add_hidden(wave);
      if (pass.weight_side) add_weight(wave, plan);
    }
    if (pass.hidden_side) round_hidden();
  }

  void make_block_centres(const RowRange& tokens, Real* mean) const {
    if (map_.capped) return;  // dlogit/dproduct differs from entry to entry: nothing is pulled
    launch(&mean_state<Real>, dim3(blocks_of(depth_, kMeanCols)), kMeanThreads, 0, tokens, states_,
           hidden_rows(args_.hidden, tokens), depth_, mean);
    launch(&make_centres<Real, Storage>, dim3(pairs_.blocks), kCentreThreads, 0, map_,
           data_or_null<Real>(bias_), weight_rows(args_.weight, 0), vocabulary_, depth_, mean,
           centres_);
  }

  // The first sum of grad_hidden.
  void pull_to_centres(const RowRange& tokens, const SparsePlan& plan, uint8_t* low) const {
    if (!map_.capped)
      launch(&make_pulls<Real, Storage>, dim3(blocks_of(tokens.most * plan.blocks, kCentreThreads)),
             kCentreThreads, 0, tokens, states_, map_.plain_slope(), scale_.factor(),
             pairs_.dropped, plan.blocks, plan.pitch, dz_);
    constexpr auto kType = c10::CppTypeToScalarType<Storage>::value;
    const RowsView pulls{dz_, kType, nullptr, plan.pitch, 1, true};
    const RowsView centres{centres_, kType, nullptr, depth_, 1, depth_ % 8 == 0};
    with_output<Multiply>(grads_.hidden, [&](auto* grad) {
      launch_gemm<Multiply, RowIs::kOutput, RowIs::kStep>(
          {pulls, centres, tokens.most, depth_, map_.capped ? 0 : plan.blocks, tokens, false},
          hidden_epilogue(grad, tokens, low, true));
    });
  }

  template <class Out>
  HiddenGradEpilogue<Real, Out> hidden_epilogue(Out* grad, const RowRange& tokens, uint8_t* low,
                                                bool first) const {
    return {grad, low, tokens, depth_, scale_.inverse(), nullptr, first, false};
  }

  Wave<Real, Storage> wave(int number) const {
    const RowsView hidden{
        args_.hidden.const_data_ptr(), args_.hidden.scalar_type(),      pairs_.offset, 1,
        args_.hidden.stride(-1),       rows_start_aligned(args_.hidden)};
    return {pairs_, number, hidden, weight_rows(args_.weight, 0), dz_, depth_, vocabulary_};
  }

  // Thread blocks for a product of at most `tiles` tiles: two fit on a multiprocessor.
  static dim3 grid(int64_t tiles) { return dim3(std::min<int64_t>(tiles, 2 * multiprocessors())); }
  static int64_t tiles(int64_t rows, int64_t cols) {
    return blocks_of(rows, Multiply::kTile) * blocks_of(cols, Multiply::kTile);
  }

  void make_gradient(int number, const SparsePlan& plan) const {
    using Products = PairGradients<Real, Storage>;
    const Products products{wave(number),
                            {{map_, data_or_null<Real>(bias_), pairs_.tokens, 0},
                             states_,
                             scale_.factor(),
                             dz_,
                             kBlockEntries}};
    launch(&multiply_pairs<Multiply, RowIs::kOutput, RowIs::kOutput, Products>,
           grid(tiles(plan.capacity, kBlockEntries) + plan.blocks), kGemmThreads,
           Multiply::kSharedBytes, products);
  }

  void add_hidden(int number) const {
    const int64_t cols = blocks_of(depth_, Multiply::kTile);
    int parts = 1;  // as long as thread blocks are few and a part has rows for a tile
    while (parts < kRowRanges && cols * parts < 2 * multiprocessors() &&
           pairs_.tokens.most / (2 * parts) >= Multiply::kTile)
      parts *= 2;
    with_output<Multiply>(grads_.hidden, [&](auto* grad) {
      using Out = std::remove_pointer_t<decltype(grad)>;
      launch(&add_pairs_to_hidden<Multiply, HiddenGradEpilogue<Real, Out>>, dim3(cols, parts),
             kGemmThreads, Multiply::kSharedBytes, wave(number), kRowRanges / parts,
             hidden_epilogue(grad, pairs_.tokens, low_, false));
    });
  }

  void add_weight(int number, const SparsePlan& plan) const {
    if (grads_.bias.defined())
      launch(&add_pairs_to_bias<Real, Storage>, dim3(plan.blocks), kBlockEntries, 0, wave(number),
             scale_.inverse(), grads_.bias.template mutable_data_ptr<double>());
    if (!grads_.weight.defined()) return;
    with_output<Multiply>(grads_.weight, [&](auto* grad) {
      using Out = std::remove_pointer_t<decltype(grad)>;
      using Products = PairWeightGrads<Real, Storage, Out>;
      const Products products{wave(number), {grad, nullptr, depth_, scale_.inverse(), true, true}};
      launch(&multiply_pairs<Multiply, RowIs::kStep, RowIs::kStep, Products>,
             grid(plan.blocks * tiles(kBlockEntries, depth_)), kGemmThreads, Multiply::kSharedBytes,
             products);
    });
  }

  void round_hidden() const {
    with_output<Multiply>(grads_.hidden, [&](auto* grad) {
      using Out = std::remove_pointer_t<decltype(grad)>;
      if constexpr (sizeof(Out) < sizeof(Real))
        launch(&round_split_rows<Out>, dim3(blocks_of(pairs_.tokens.most * depth_, kPairThreads)),
               kPairThreads, 0, pairs_.tokens, depth_, low_, grad);
    });
  }

  const HeadArgs& args_;
  const SelectedRows& rows_;
  const TokenStates<Real> states_;
  const at::Tensor& dropped_;
  const HeadGrads& grads_;
  const LogitMap<Real> map_;
  const at::Tensor bias_;
  const GradientScale<Multiply> scale_;
  const int64_t depth_, vocabulary_;
  // of the pass under way
  PairLists<Real> pairs_;
  uint8_t* low_;
  Storage *centres_, *dz_;
};

}  // namespace

TwoWays::TwoWays(const HeadArgs& args, const SelectedRows& rows, const at::Tensor& dropped)
    : exact(rows), sparse(rows), counts_(blank({2}, rows.storage.options())) {
  const int64_t blocks = blocks_of(args.weight.size(0), kBlockEntries), tokens = rows.most;
  int64_t* const counts = counts_.mutable_data_ptr<int64_t>();
  exact.list.count = counts, sparse.list.count = counts + 1;
  Workspace workspace(args.hidden, SparsePlan::counts_bytes(blocks, 1));
  const auto choose = [&]<class Real>(Real) {
    const auto pairs =
        count_and_plan<Real>(rows.all(), dropped, blocks, tokens * blocks, 1, &workspace);
    launch(&choose_way<Real>, dim3(1), 32, 0, pairs, most_kept_pairs(tokens, blocks) + tokens,
           counts, counts + 1);
  };
  dropped.scalar_type() == at::kDouble ? choose(0.) : choose(0.f);
}

template <class Real>
void sparse_backward(const HeadArgs& args, const SelectedRows& rows,
                     const TokenStates<Real>& states, const at::Tensor& dropped,
                     const HeadGrads& grads) {
  with_arithmetic(args, [&](auto multiply) {
    using Multiply = decltype(multiply);
    if constexpr (std::is_same_v<typename Multiply::Real, Real>)
      SparseBackward<Multiply>(args, rows, states, dropped, grads).run();
  });
}

template void sparse_backward<float>(const HeadArgs&, const SelectedRows&,
                                     const TokenStates<float>&, const at::Tensor&,
                                     const HeadGrads&);
template void sparse_backward<double>(const HeadArgs&, const SelectedRows&,
                                      const TokenStates<double>&, const at::Tensor&,
                                      const HeadGrads&);

}  // namespace spo::cuda
