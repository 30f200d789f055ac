// SPDX-License-Identifier: Apache-2.0
// Forward of the LM head: hidden x weight -> log-probability of each target, without [N, V] logits.
// For a group of rows and a slice of the vocabulary, every (rows, block of 256 entries) tile of
// logits lives in cache just long enough to leave (max, sum-exp) per row and block and the label's
// logit. The blocks are merged in vocabulary order, in double.
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "../kept.h"
#include "drop_blocks.h"
#include "head_jacobian.h"

namespace spo {
namespace {

static_assert(kBlockCols == kBlockEntries);

// How the workspace is divided. Results do not depend on it, only speed does.
struct HeadPlan {
  int64_t row_chunk;   // rows of one task
  int64_t group_rows;  // rows packed at a time
  int64_t slice_cols;  // vocabulary columns packed at a time, whole blocks
};

HeadPlan plan_forward(const HeadArgs& a, int64_t num_rows, int64_t row_chunk, int64_t real_size) {
  const int64_t depth = a.hidden.size(-1), vocabulary = a.weight.size(0);
  const int64_t blocks = panels(vocabulary, kBlockCols);
  const int64_t budget = (a.workspace_mib << 20) / real_size;
  HeadPlan plan;
  plan.row_chunk = row_chunk;
  plan.slice_cols = std::min<int64_t>(blocks, 8) * kBlockCols;
  while (plan.slice_cols > kBlockCols && plan.slice_cols * depth > budget / 4)
    plan.slice_cols -= kBlockCols;
  const int64_t fixed =
      plan.slice_cols * depth + at::get_num_threads() * plan.row_chunk * kBlockCols;
  const int64_t per_row = depth + 3 * blocks;
  plan.group_rows = (budget - fixed) / per_row / plan.row_chunk * plan.row_chunk;
  const int64_t least = ((fixed + plan.row_chunk * per_row) * real_size >> 20) + 1;
  TORCH_CHECK_VALUE(plan.group_rows > 0, a.op, ": workspace_mib must be at least ", least,
                    " for d = ", depth, " and V = ", vocabulary, ", got ", a.workspace_mib);
  plan.group_rows = std::min(plan.group_rows, panels(num_rows, plan.row_chunk) * plan.row_chunk);
  return plan;
}

template <class Real>
class HeadForward {
 public:
  // `logits`: where to keep them, [N, V], or null; `dropped` likewise, [N, blocks].
  HeadForward(const HeadArgs& args, const Rows& rows, bool entropy, Real* logits, Real* dropped)
      : args_(args),
        rows_(rows),
        entropy_(entropy),
        logits_(logits),
        dropped_(dropped),
        kernels_(head_kernels<Real>()),
        map_(logit_map<Real>(args)),
        plan_(plan_forward(args, rows.size(), row_chunk_for<Real>(rows.size()), sizeof(Real))),
        depth_(args.hidden.size(-1)),
        vocabulary_(args.weight.size(0)),
        blocks_(panels(vocabulary_, kBlockCols)),
        workspace_(
            {plan_.group_rows * depth_, plan_.slice_cols * depth_, plan_.group_rows * blocks_ * 3}),
        hidden_(workspace_.array(0)),
        weight_(workspace_.array(1)),
        stats_(reinterpret_cast<BlockStats<Real>*>(workspace_.array(2))),
        label_logit_(rows.size()) {}

  void run(const TokenOutputs<Real>& out) {
    for (int64_t first = 0; first < rows_.size(); first += plan_.group_rows) {
      const int64_t count = std::min(plan_.group_rows, rows_.size() - first);
      pack_rows(MatrixView::of_rows(args_.hidden, rows_), first, count, depth_, kernels_.tile_rows,
                hidden_);
      for (int64_t col = 0; col < vocabulary_; col += plan_.slice_cols)
        run_slice(first, count, col);
      merge(first, count, out);
    }
    if (dropped_) keep_all_if_most(dropped_, rows_.token, blocks_);
  }

 private:
  BlockStats<Real>* stats_of(int64_t row) { return stats_ + row * blocks_; }

  void run_slice(int64_t first, int64_t count, int64_t col) {
    const int64_t cols = std::min(plan_.slice_cols, vocabulary_ - col);
    pack_rows(MatrixView::of_weight(args_.weight), col, cols, depth_, kernels_.panel_cols, weight_);
    const int64_t chunks = panels(count, plan_.row_chunk);
    parallel_tasks(chunks * panels(cols, kBlockCols), [&](TaskQueue& queue) {
      std::vector<Real> tile(plan_.row_chunk * kBlockCols);
      for (int64_t task; queue.take(&task);)
        run_tile(first, count, col, task % chunks * plan_.row_chunk, task / chunks, tile.data());
    });
  }

  // Rows [row, row + row_chunk) of the group times one block of the packed slice.
  void run_tile(int64_t first, int64_t count, int64_t slice, int64_t row, int64_t block,
                Real* tile) {
    const int64_t rows = std::min(plan_.row_chunk, count - row);
    const int64_t col = slice + block * kBlockCols;
    const int64_t cols = std::min(kBlockCols, vocabulary_ - col);
    std::vector<Real*> out(rows);
    for (int64_t i = 0; i < rows; i++) out[i] = tile + i * kBlockCols;
    kernels_.gemm({rows, cols, depth_, Left::kPanel, hidden_ + row * depth_,
                   depth_ * kernels_.tile_rows, weight_ + block * kBlockCols * depth_,
                   depth_ * kernels_.panel_cols, out.data(), false});
    if (logits_)
      for (int64_t i = 0; i < rows; i++)
        std::copy_n(out[i], cols, logits_ + rows_.token[first + row + i] * vocabulary_ + col);
    const auto bias = bias_block<Real>(args_.bias, col, cols);
    for (int64_t i = 0; i < rows; i++) {
      const int64_t label = rows_.label[first + row + i] - col;
      const bool inside = label >= 0 && label < cols;
      stats_of(row + i)[col / kBlockCols] = kernels_.statistics(
          {out[i], args_.bias ? bias.data() : nullptr, cols, inside ? label : -1}, map_, entropy_,
          &label_logit_[first + row + i]);
    }
  }

  void merge(int64_t first, int64_t count, const TokenOutputs<Real>& out) {
    at::parallel_for(0, count, 16, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        LogSumExp others;
        for (int64_t b = 0; b < blocks_; b++) others.merge(stats_of(i)[b], map_.outer);
        const TokenSoftmax token = others.finish(label_logit_[first + i], map_.outer);
        const int64_t at = rows_.token[first + i];
        out.write(at, token);
        if (dropped_) drop(i, token, dropped_ + at * blocks_);
      }
    });
  }

  void drop(int64_t row, const TokenSoftmax& token, Real* mass) {
    for (int64_t b = 0; b < blocks_; b++) mass[b] = stats_of(row)[b].mass(token, map_.outer);
    drop_blocks(mass, blocks_, dropping_bound(args_));
  }

  const HeadArgs& args_;
  const Rows& rows_;
  const bool entropy_;
  Real *const logits_, *const dropped_;
  const HeadKernels<Real>& kernels_;
  const LogitMap<Real> map_;
  const HeadPlan plan_;
  const int64_t depth_, vocabulary_, blocks_;
  const Workspace<Real> workspace_;
  Real *const hidden_, *const weight_;  // panels of the group's rows and of the slice's entries
  BlockStats<Real>* const stats_;       // [group_rows, blocks]
  std::vector<double> label_logit_;
};

HeadOutputs token_logprobs_cpu(const at::Tensor& hidden, const at::Tensor& weight,
                               const at::Tensor& targets, const OptionalTensor& bias,
                               double temperature, double logit_scale,
                               std::optional<double> softcap, int64_t ignore_index,
                               bool return_entropy, int64_t workspace_mib,
                               c10::string_view keep_name, double max_dropped_mass) {
  HeadArgs args{"token_logprobs", hidden,      weight,  targets,      bias,
                temperature,      logit_scale, softcap, ignore_index, workspace_mib,
                max_dropped_mass};
  check_head(args);
  check_target_values(args.op, targets, weight.size(0), ignore_index);
  const Keep keep = keep_of(args.op, keep_name);
  const auto options = hidden.options().dtype(result_type_of(hidden));
  const auto column = [&] { return at::zeros(targets.sizes(), options); };
  const auto logprobs = column(), top = column(), log_sum = column();
  const auto entropy = at::zeros(return_entropy ? targets.sizes() : at::IntArrayRef{0}, options);
  const auto kept = make_kept(args, keep, return_entropy);
  args.workspace_mib = workspace_beside(workspace_mib, keep, kept);
  const Rows rows =
      collect_rows(hidden, targets, [&](int64_t, int64_t label) { return label != ignore_index; });
  if (rows.size() > 0) {
    AT_DISPATCH_FLOATING_TYPES(logprobs.scalar_type(), "token_logprobs", [&] {
      const TokenOutputs<scalar_t> out{data_of<scalar_t>(logprobs),
                                       return_entropy ? data_of<scalar_t>(entropy) : nullptr,
                                       data_of<scalar_t>(top), data_of<scalar_t>(log_sum)};
      if (keep == Keep::kJacobian) return HeadJacobian<scalar_t>(args, rows).run(out, kept);
      scalar_t* const logits = keep == Keep::kLogits ? data_of<scalar_t>(kept) : nullptr;
      scalar_t* const dropped = keep == Keep::kDropped ? data_of<scalar_t>(kept) : nullptr;
      HeadForward<scalar_t>(args, rows, return_entropy, logits, dropped).run(out);
    });
  }
  return {logprobs, entropy, top, log_sum, kept};
}

TORCH_LIBRARY_IMPL(spo, CPU, m) { m.impl("token_logprobs", &token_logprobs_cpu); }

}  // namespace
}  // namespace spo
