// SPDX-License-Identifier: Apache-2.0
// Forward of the LM head on CUDA: hidden x weight -> log-probability of each target, without [N, V]
// logits. Per row and vocabulary block the product leaves (max, sum-exp) and the label's logit; one
// warp per row merges the blocks in vocabulary order, in double.
#include "drop_blocks.cuh"
#include "head_jacobian.cuh"

namespace spo::cuda {
namespace {

// Rows and vocabulary blocks whose statistics fit in the workspace together. Slices are whole merge
// steps, so that the order of the merge does not depend on them. In one group, a merge step of
// every token fits by decree: that is O(N).
struct ForwardPlan {
  int64_t group_rows, slice_entries;

  ForwardPlan(const HeadArgs& args, int64_t tile, int64_t stats_bytes, bool one_group) {
    const int64_t step = kMergeBlocks * tile, budget = args.workspace_mib << 20;
    const int64_t step_bytes = kMergeBlocks * stats_bytes, tokens = args.targets.numel();
    const int64_t all_steps = blocks_of(args.weight.size(0), step);
    group_rows = one_group ? tokens : std::max<int64_t>(std::min(tokens, budget / step_bytes), 1);
    slice_entries = std::clamp<int64_t>(budget / (step_bytes * group_rows), 1, all_steps) * step;
  }
};

// What is kept for the backward pass, each [N, ..] or null.
template <class Real>
struct KeptArrays {
  Real *logits, *dropped;
};

// make_statistics(tokens, entries, epilogue) fills the statistics of one group and slice, in blocks
// of `tile` entries.
template <class Real, class MakeStatistics>
void run_forward(const HeadArgs& args, const SelectedRows& rows, const TokenOutputs<Real>& out,
                 const KeptArrays<Real>& kept, const ForwardPlan& plan, int64_t tile,
                 const MakeStatistics& make_statistics) {
  const int64_t vocabulary = args.weight.size(0);
  const int64_t most_blocks = blocks_of(std::min(plan.slice_entries, vocabulary), tile);
  const int64_t group = plan.group_rows;
  Workspace workspace(args.hidden,
                      Workspace::padded(group * most_blocks * sizeof(BlockStats<Real>)) +
                          Workspace::padded(group * sizeof(Real)) +
                          Workspace::padded(group * sizeof(LogSumExp)));
  auto* const stats = workspace.take<BlockStats<Real>>(group * most_blocks);
  auto* const label_raw = workspace.take<Real>(group);
  auto* const running = workspace.take<LogSumExp>(group);
  const at::Tensor bias = bias_of<Real>(args);
  const auto map = logit_map<Real>(args);
  const int64_t dropped_blocks = blocks_of(vocabulary, kBlockEntries);
  const auto real = args.hidden.options().dtype(c10::CppTypeToScalarType<Real>::value);
  const at::Tensor base_of_token = filled({kept.dropped ? rows.most : 0}, -INFINITY, real);
  auto* const bases = base_of_token.template mutable_data_ptr<Real>();
  for (int64_t row = 0; row < rows.most; row += group) {
    const RowRange tokens = rows.range(row, std::min(group, rows.most - row));
    for (int64_t entry = 0; entry < vocabulary; entry += plan.slice_entries) {
      const int64_t entries = std::min(plan.slice_entries, vocabulary - entry);
      const int64_t blocks = blocks_of(entries, tile);
      const LogitSlice<Real> slice{map, data_or_null<Real>(bias), tokens, entry};
      const KeptProducts<Real> keep{kept.logits ? kept.logits + entry : nullptr, vocabulary};
      make_statistics(
          tokens, entries,
          StatisticsEpilogue<Real>{slice, out.entropy != nullptr, stats, blocks, label_raw, keep});
      launch_merge(tokens, stats, blocks, blocks, map, label_raw, running, entry == 0,
                   entry + entries == vocabulary, out);
      if (kept.dropped)
        launch_block_logsumexps(tokens, stats, map.outer, blocks, tile, entries, dropped_blocks,
                                bases, kept.dropped + entry / kBlockEntries);
    }
  }
  if (kept.dropped)
    launch_drop_blocks(args, rows, out, map.outer, bases, dropped_blocks, kept.dropped);
}

template <class Multiply>
void forward_with(const HeadArgs& args, const SelectedRows& rows,
                  const TokenOutputs<typename Multiply::Real>& out,
                  const KeptArrays<typename Multiply::Real>& kept) {
  using Real = typename Multiply::Real;
  if constexpr (kHopperBuilt && !std::is_same_v<Real, typename Multiply::Storage>) {
    if (const auto layout = hopper_layout(args)) {
      const Slots slots(args, *layout, rows.list, rows.most);
      const ForwardPlan plan(args, kSm90TileCols, sizeof(BlockStats<float>), true);
      return run_forward<float>(
          args, rows, out, kept, plan, kSm90TileCols,
          [&](const RowRange&, int64_t entries, const StatisticsEpilogue<float>& epilogue) {
            sm90_statistics<typename Multiply::Storage>(args, slots, entries, epilogue);
          });
    }
  }
  const ForwardPlan plan(args, Multiply::kTile, sizeof(BlockStats<Real>), false);
  run_forward<Real>(
      args, rows, out, kept, plan, Multiply::kTile,
      [&](const RowRange& tokens, int64_t entries, const StatisticsEpilogue<Real>& epilogue) {
        launch_gemm<Multiply, RowIs::kOutput, RowIs::kOutput>(
            {hidden_rows(args.hidden, tokens), weight_rows(args.weight, epilogue.slice.first_entry),
             tokens.most, entries, args.weight.size(1), tokens, false},
            epilogue);
      });
}

HeadOutputs token_logprobs_cuda(const at::Tensor& hidden, const at::Tensor& weight,
                                const at::Tensor& targets, const OptionalTensor& bias,
                                double temperature, double logit_scale,
                                std::optional<double> softcap, int64_t ignore_index,
                                bool return_entropy, int64_t workspace_mib,
                                c10::string_view keep_name, double max_dropped_mass) {
  HeadArgs args{"token_logprobs", hidden,      weight,  targets,      bias,
                temperature,      logit_scale, softcap, ignore_index, workspace_mib,
                max_dropped_mass};
  check_head(args);
  const Keep keep = keep_of(args.op, keep_name);
  const DeviceGuard guard(hidden.device());
  const auto options = hidden.options().dtype(result_type_of(hidden));
  const auto column = [&] { return filled(targets.sizes(), 0, options); };
  const auto logprobs = column(), top = column(), log_sum = column();
  const auto entropy = filled(return_entropy ? targets.sizes() : at::IntArrayRef{0}, 0, options);
  const auto kept = make_kept(args, keep, return_entropy);
  launch_log.launches += keep == Keep::kJacobian || keep == Keep::kDropped;  // zeros
  args.workspace_mib = workspace_beside(workspace_mib, keep, kept);
  if (targets.numel() == 0) return {logprobs, entropy, top, log_sum, kept};
  with_arithmetic(args, [&](auto multiply) {
    using Multiply = decltype(multiply);
    using Real = typename Multiply::Real;
    const SelectedRows rows(args, KeepRow<Real>{ignore_index, false, {}});
    const TokenOutputs<Real> out{logprobs.mutable_data_ptr<Real>(),
                                 return_entropy ? entropy.mutable_data_ptr<Real>() : nullptr,
                                 top.mutable_data_ptr<Real>(), log_sum.mutable_data_ptr<Real>()};
    if (keep == Keep::kJacobian) return HeadJacobian<Multiply>(args, rows, out, kept).run();
    const auto kept_as = [&](Keep what) {
      return keep == what ? kept.mutable_data_ptr<Real>() : nullptr;
    };
    forward_with<Multiply>(args, rows, out, {kept_as(Keep::kLogits), kept_as(Keep::kDropped)});
  });
  return {logprobs, entropy, top, log_sum, kept};
}

// Of this thread's calls since the last one.
std::vector<int64_t> launch_log_since(bool dry) {
  const LaunchLog log = std::exchange(launch_log, {dry});
  return {log.launches, log.bytes};
}

SPO_CUDA_LIBRARY(m) { m.impl("token_logprobs", &token_logprobs_cuda); }
SPO_HOST_LIBRARY(m) { m.impl("launch_log", &launch_log_since); }

}  // namespace
}  // namespace spo::cuda
