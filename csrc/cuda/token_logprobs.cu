// SPDX-License-Identifier: Apache-2.0
// Forward of the LM head on CUDA: hidden x weight -> log-probability of each target, without [N, V]
// logits. Per row and vocabulary block the product leaves (max, sum-exp) and the label's logit; one
// warp per row merges the blocks in vocabulary order, in double.
#include <ATen/ops/zeros.h>

#include "head_problem.cuh"

namespace spo::cuda {
namespace {

constexpr int kMergeThreads = 256;
constexpr int kMergeBlocks = 32;  // merged as a tree by the lanes of a warp, then one after another

// Adds the statistics of one slice to `running`; after the last slice, everything about the token.
template <class Real>
__global__ void __launch_bounds__(kMergeThreads)
    merge_statistics(RowRange tokens, const BlockStats<Real>* stats, int64_t blocks,
                     const Real* label_logit, LogSumExp* running, bool first, bool last,
                     TokenOutputs<Real> out) {
  const int64_t row = int64_t(blockIdx.x) * (kMergeThreads / 32) + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (row >= tokens.size()) return;
  LogSumExp total;
  if (!first) total = running[row];
  for (int64_t block = 0; block < blocks; block += kMergeBlocks) {
    LogSumExp mine;
    if (block + lane < blocks) mine.merge(stats[row * blocks + block + lane]);
    merge_lanes(mine, &total);
  }
  if (lane != 0) return;  // only lane 0 has merged the blocks in order
  if (!last) {
    running[row] = total;
    return;
  }
  out.write(tokens.list.token[tokens.first + row], total.finish(label_logit[row]));
}

// Rows and vocabulary blocks whose statistics fit in the workspace together. Slices are whole merge
// steps, so that the order of the merge does not depend on them. In one group, a merge step of
// every token fits by decree: that is O(N).
struct ForwardPlan {
  int64_t group_rows, slice_words;

  ForwardPlan(const HeadArgs& args, int64_t tile, int64_t stats_bytes, bool one_group) {
    const int64_t step = kMergeBlocks * tile, budget = args.workspace_mib << 20;
    const int64_t step_bytes = kMergeBlocks * stats_bytes, tokens = args.targets.numel();
    const int64_t all_steps = blocks_of(args.weight.size(0), step);
    group_rows = one_group ? tokens : std::max<int64_t>(std::min(tokens, budget / step_bytes), 1);
    slice_words = std::clamp<int64_t>(budget / (step_bytes * group_rows), 1, all_steps) * step;
  }
};

// make_statistics(tokens, words, epilogue) fills the statistics of one group and slice, in blocks
// of `tile` words.
template <class Real, class MakeStatistics>
void run_forward(const HeadArgs& args, const SelectedRows& rows, const TokenOutputs<Real>& out,
                 const ForwardPlan& plan, int64_t tile, const MakeStatistics& make_statistics) {
  const int64_t vocabulary = args.weight.size(0);
  const int64_t most_blocks = blocks_of(std::min(plan.slice_words, vocabulary), tile);
  const int64_t group = plan.group_rows;
  Workspace workspace(args.hidden,
                      Workspace::padded(group * most_blocks * sizeof(BlockStats<Real>)) +
                          Workspace::padded(group * sizeof(Real)) +
                          Workspace::padded(group * sizeof(LogSumExp)));
  auto* const stats = workspace.take<BlockStats<Real>>(group * most_blocks);
  auto* const label_logit = workspace.take<Real>(group);
  auto* const running = workspace.take<LogSumExp>(group);
  const at::Tensor bias = bias_of<Real>(args);
  for (int64_t row = 0; row < rows.most; row += group) {
    const RowRange tokens = rows.range(row, std::min(group, rows.most - row));
    for (int64_t word = 0; word < vocabulary; word += plan.slice_words) {
      const int64_t words = std::min(plan.slice_words, vocabulary - word);
      const int64_t blocks = blocks_of(words, tile);
      const LogitSlice<Real> slice{logit_map<Real>(args), data_or_null<Real>(bias), tokens, word};
      make_statistics(
          tokens, words,
          StatisticsEpilogue<Real>{slice, out.entropy != nullptr, stats, blocks, label_logit});
      launch(&merge_statistics<Real>, dim3(blocks_of(tokens.most, kMergeThreads / 32)),
             kMergeThreads, 0, tokens, stats, blocks, label_logit, running, word == 0,
             word + words == vocabulary, out);
    }
  }
}

template <class Multiply>
void forward_with(const HeadArgs& args, const TokenOutputs<typename Multiply::Real>& out) {
  using Real = typename Multiply::Real;
  const SelectedRows rows(args, KeepRow<Real>{args.ignore_index, false, {}});
  if constexpr (kHopperBuilt && !std::is_same_v<Real, typename Multiply::Storage>) {
    if (const auto layout = hopper_layout(args)) {
      const Slots slots(args, *layout, rows.list, rows.most);
      const ForwardPlan plan(args, kSm90TileCols, sizeof(BlockStats<float>), true);
      return run_forward<float>(
          args, rows, out, plan, kSm90TileCols,
          [&](const RowRange&, int64_t words, const StatisticsEpilogue<float>& epilogue) {
            sm90_statistics<typename Multiply::Storage>(args, slots, words, epilogue);
          });
    }
  }
  const ForwardPlan plan(args, Multiply::kTile, sizeof(BlockStats<Real>), false);
  run_forward<Real>(
      args, rows, out, plan, Multiply::kTile,
      [&](const RowRange& tokens, int64_t words, const StatisticsEpilogue<Real>& epilogue) {
        launch_gemm<Multiply, RowIs::kOutput, RowIs::kOutput>(
            {hidden_rows(args.hidden, tokens), weight_rows(args.weight, epilogue.slice.first_word),
             tokens.most, words, args.weight.size(1), tokens, false},
            epilogue);
      });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> token_logprobs_cuda(
    const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets,
    const OptionalTensor& bias, double temperature, double logit_scale,
    std::optional<double> softcap, int64_t ignore_index, bool return_entropy,
    int64_t workspace_mib) {
  const HeadArgs args{"token_logprobs", hidden,      weight,  targets,      bias,
                      temperature,      logit_scale, softcap, ignore_index, workspace_mib};
  check_head(args);
  const DeviceGuard guard(hidden.device());
  const bool wide = hidden.scalar_type() == at::kDouble;
  const auto options = hidden.options().dtype(wide ? at::kDouble : at::kFloat);
  const auto logprobs = at::zeros(targets.sizes(), options);
  const auto lse = at::zeros(targets.sizes(), options);
  const auto entropy = at::zeros(return_entropy ? targets.sizes() : at::IntArrayRef{0}, options);
  if (targets.numel() == 0) return {logprobs, entropy, lse};
  with_arithmetic(args, [&](auto multiply) {
    using Multiply = decltype(multiply);
    using Real = typename Multiply::Real;
    forward_with<Multiply>(args, {logprobs.mutable_data_ptr<Real>(),
                                  return_entropy ? entropy.mutable_data_ptr<Real>() : nullptr,
                                  lse.mutable_data_ptr<Real>()});
  });
  return {logprobs, entropy, lse};
}

SPO_CUDA_LIBRARY(m) { m.impl("token_logprobs", &token_logprobs_cuda); }

}  // namespace
}  // namespace spo::cuda
