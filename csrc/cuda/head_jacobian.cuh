// SPDX-License-Identifier: Apache-2.0
// Forward of an LM head that is not trained, on CUDA: log-probabilities and, from the same logits,
//   J = dlogprob/dhidden = (1 - p_y) s_y W_y - sum_{v != y} p_v s_v W_v,   s = dz/draw
// Slice by slice of the vocabulary: the products leave statistics and stay in the workspace; the
// row's largest logit so far, m, makes them s exp(z - m), which weight multiplies into the sum in
// the place of J; where m has grown, the sum before is shrunk in the same step. The
// log-probabilities are those of the plain forward to the last bit: blocks are merged in the same
// groups.
#pragma once
#include "../kept.h"
#include "backward_kernels.cuh"
#include "merge_statistics.cuh"

namespace spo::cuda {

constexpr int kJacobianThreads = 256;

// The row's largest logit after one more slice, and what exp(-m) of the sum before turns into.
template <class Real>
__global__ void __launch_bounds__(kJacobianThreads)
    raise_tops(RowRange tokens, const BlockStats<Real>* stats, int64_t blocks, int64_t pitch,
               LogitMap<Real> map, Real* tops, Real* shrink) {
  const int64_t row = int64_t(blockIdx.x) * (kJacobianThreads / 32) + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (row >= tokens.size()) return;
  Real* const top = tops + tokens.list.token[tokens.first + row];
  const Real before = *top;
  Real largest = before;
  for (int64_t block = lane; block < blocks; block += 32) {
    const Real found = stats[row * pitch + block].max;
    largest = found > largest ? found : largest;
  }
  largest = lanes_max<32>(largest);
  if (lane == 0) *top = largest, shrink[row] = Math<Real>::exp(map.below(before, largest));
}

// From the sum of s exp(z - m) W to J. One block per row.
template <class Real, class Out>
__global__ void __launch_bounds__(kJacobianThreads)
    finish_jacobian(RowRange tokens, const int64_t* low_row, LogitMap<Real> map, RowsView weight,
                    const Real* label_raw, const Real* tops, TokenOutputs<Real> softmax,
                    int64_t depth, const uint8_t* low, Out* jacobian) {
  const int64_t row = blockIdx.x;
  if (row >= tokens.size()) return;
  const int64_t token = tokens.list.token[tokens.first + row];
  Real slope;
  map.unscaled(label_raw[row], &slope);
  const Real label = -slope * Real(::expm1(softmax.logprobs[token]));
  const Real scale =
      Math<Real>::exp(map.below(tops[token], softmax.top[token]) - softmax.log_sum[token]);
  const int64_t entry = tokens.list.label[tokens.first + row];
  Out* const out = jacobian + token * depth;
  for (int64_t k = threadIdx.x; k < depth; k += kJacobianThreads) {
    Real sum;
    if constexpr (sizeof(Out) == sizeof(Real)) {
      sum = out[k];
    } else {
      const uint8_t rest = low[(low_row ? low_row[row] : row) * depth + k];
      sum = SplitFloat::join(reinterpret_cast<const uint16_t*>(out)[k], rest);
    }
    out[k] = static_cast<Out>(label * weight.number<Real>(entry, k) - scale * sum);
  }
}

template <class Multiply>
class HeadJacobian {
  using Real = typename Multiply::Real;
  using Storage = typename Multiply::Storage;
  static constexpr bool kOnHopper = kHopperBuilt && !std::is_same_v<Real, Storage>;

 public:
  // `jacobian`, like hidden, is zero on entry.
  HeadJacobian(const HeadArgs& args, const SelectedRows& rows, const TokenOutputs<Real>& out,
               const at::Tensor& jacobian)
      : args_(args),
        rows_(rows),
        out_(out),
        jacobian_(jacobian),
        map_(logit_map<Real>(args)),
        bias_(bias_of<Real>(args)),
        depth_(args.weight.size(1)),
        vocabulary_(args.weight.size(0)) {
    if constexpr (kOnHopper)
      if (const auto layout = hopper_layout(args))
        slots_.emplace(args, *layout, rows.list, rows.most);
    const int64_t budget = args.workspace_mib << 20;
    const int64_t bytes = (sizeof(Real) + sizeof(Storage)) * num_rows();
    const int64_t step = kMergeBlocks * tile();
    slice_ = std::clamp<int64_t>(budget / bytes / kSliceStep, 1, step / kSliceStep) * kSliceStep;
    while (step % slice_ != 0) slice_ -= kSliceStep;  // merges are of whole steps
  }

  void run() {
    const auto options = args_.hidden.options().dtype(c10::CppTypeToScalarType<Real>::value);
    const int64_t tokens = args_.targets.numel();
    // dL/dz with these in the place of top, log_sum, log p and the upstream gradient is s exp(z -
    // m), and 0
    // for the label.
    const auto tops = filled({tokens}, double(std::numeric_limits<Real>::lowest()), options);
    const auto zeros = filled({tokens}, 0, options), minus_ones = filled({tokens}, -1, options);
    tops_ = tops.template mutable_data_ptr<Real>();
    states_ = {zeros.template const_data_ptr<Real>(),
               nullptr,
               tops_,
               zeros.template const_data_ptr<Real>(),
               minus_ones.template const_data_ptr<Real>(),
               nullptr};
    scale_.emplace(args_.hidden, map_, rows_.all(), states_);
    const bool split = args_.hidden.element_size() < int64_t(sizeof(Real));
    const auto low = blank({split ? num_rows() * depth_ : 0}, options.dtype(at::kByte));
    low_ = split ? low.template mutable_data_ptr<uint8_t>() : nullptr;
    Workspace workspace(args_.hidden,
                        Workspace::padded(rows_.most * kMergeBlocks * sizeof(BlockStats<Real>)) +
                            Workspace::padded(rows_.most * sizeof(LogSumExp)) +
                            2 * Workspace::padded(rows_.most * sizeof(Real)) +
                            Workspace::padded(rows_.most * slice_ * sizeof(Real)) +
                            Workspace::padded(num_rows() * slice_ * sizeof(Storage)));
    stats_ = workspace.take<BlockStats<Real>>(rows_.most * kMergeBlocks);
    auto* const running = workspace.take<LogSumExp>(rows_.most);
    label_raw_ = workspace.take<Real>(rows_.most);
    shrink_ = workspace.take<Real>(rows_.most);
    products_ = workspace.take<Real>(rows_.most * slice_);
    weights_ = workspace.take<Storage>(num_rows() * slice_);
    for (int64_t entry = 0; entry < vocabulary_; entry += slice_) {
      const int64_t block = entry / tile() % kMergeBlocks;
      const int64_t entries = std::min(slice_, vocabulary_ - entry);
      const int64_t end = entry + entries, blocks = blocks_of(entries, tile());
      add_slice(entry, entries, stats_ + block, blocks);
      if (block + blocks == kMergeBlocks || end == vocabulary_)
        launch_merge(rows_.all(), stats_, kMergeBlocks, block + blocks, map_, label_raw_, running,
                     entry < kMergeBlocks * tile(), end == vocabulary_, out_);
    }
    finish();
  }

 private:
  static constexpr int64_t kSliceStep = 256;

  int64_t tile() const { return slots_ ? kSm90TileCols : Multiply::kTile; }
  int64_t num_rows() const { return slots_ ? slots_->layout().slots : rows_.most; }

  void add_slice(int64_t entry, int64_t entries, BlockStats<Real>* stats, int64_t blocks) {
    const RowRange tokens = rows_.all();
    const LogitSlice<Real> slice{map_, data_or_null<Real>(bias_), tokens, entry};
    make_statistics(entries, {slice, false, stats, kMergeBlocks, label_raw_, {products_, slice_}});
    launch(&raise_tops<Real>, dim3(blocks_of(rows_.most, kJacobianThreads / 32)), kJacobianThreads,
           0, tokens, stats, blocks, kMergeBlocks, map_, tops_, shrink_);
    launch_gradient_of_products<Real, Storage>(
        slots_ ? &*slots_ : nullptr, {products_, slice_}, entries,
        {slice, states_, scale_->factor(), weights_, slice_});
    with_output<Multiply>(jacobian_, [&](auto* sums) {
      using Out = std::remove_pointer_t<decltype(sums)>;
      add_products(entry, entries,
                   HiddenGradEpilogue<Real, Out>{sums, low_, tokens, depth_, scale_->inverse(),
                                                 shrink_, entry == 0, false});
    });
  }

  void make_statistics(int64_t entries, const StatisticsEpilogue<Real>& epilogue) const {
    if constexpr (kOnHopper) {
      if (slots_) return sm90_statistics<Storage>(args_, *slots_, entries, epilogue);
    }
    const RowRange tokens = rows_.all();
    launch_gemm<Multiply, RowIs::kOutput, RowIs::kOutput>(
        {hidden_rows(args_.hidden, tokens), weight_rows(args_.weight, epilogue.slice.first_entry),
         tokens.most, entries, depth_, tokens, false},
        epilogue);
  }

  template <class Epilogue>
  void add_products(int64_t entry, int64_t entries, const Epilogue& epilogue) const {
    if constexpr (kOnHopper) {
      if (slots_)
        return sm90_hidden_grad(args_, *slots_, weights_, slice_, entry, entries, epilogue);
    }
    const RowRange tokens = rows_.all();
    const RowsView weights{weights_, c10::CppTypeToScalarType<Storage>::value, nullptr, slice_, 1,
                           true};
    launch_gemm<Multiply, RowIs::kOutput, RowIs::kStep>(
        {weights, weight_rows(args_.weight, entry), tokens.most, depth_, entries, tokens, false},
        epilogue);
  }

  void finish() const {
    with_output<Multiply>(jacobian_, [&](auto* out) {
      using Out = std::remove_pointer_t<decltype(out)>;
      launch(&finish_jacobian<Real, Out>, dim3(rows_.most), kJacobianThreads, 0, rows_.all(),
             slots_ ? slots_->map().slot : nullptr, map_, weight_rows(args_.weight, 0), label_raw_,
             tops_, out_, depth_, low_, out);
    });
  }

  const HeadArgs& args_;
  const SelectedRows& rows_;
  const TokenOutputs<Real> out_;
  const at::Tensor& jacobian_;
  const LogitMap<Real> map_;
  const at::Tensor bias_;
  const int64_t depth_, vocabulary_;
  std::optional<Slots> slots_;  // on Hopper
  int64_t slice_;
  TokenStates<Real> states_;
  BlockStats<Real>* stats_;  // [rows, kMergeBlocks]
  Real *tops_, *label_raw_, *shrink_;
  std::optional<GradientScale<Multiply>> scale_;
  Real* products_;    // [tokens, slice]
  Storage* weights_;  // [rows, slice]
  uint8_t* low_;
};

}  // namespace spo::cuda
