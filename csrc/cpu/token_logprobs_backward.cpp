// SPDX-License-Identifier: Apache-2.0
// Backward of the LM head: the logits of one slice of the vocabulary are computed again, or read
// where the forward pass kept them, turned into dL/dz, and multiplied into grad_hidden and
// grad_weight.
//   dz = g (onehot - p) ...          [rows, slice]  one tile at a time
//   grad_hidden += dz weight         [rows, d]      one chunk of rows per task, blocks in order
//   grad_weight += dz^T hidden       [slice, d]     one block of entries and range of d per task
// No two tasks write the same number and each sum has one order, so the result is the same for any
// number of threads. A 16-bit gradient is summed in float and rounded once.
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "../kept.h"
#include "head_tiles.h"
#include "sparse_backward.h"

namespace spo {
namespace {

template <class Real>
class HeadBackward : HeadTiles<Real> {
  using Base = HeadTiles<Real>;
  using Base::args_, Base::rows_, Base::kernels_, Base::map_, Base::depth_, Base::vocabulary_;
  using typename Base::Buffers;

 public:
  // `logits`: [N, V] as the forward pass kept them, or null.
  HeadBackward(const HeadArgs& args, const Rows& rows, const TokenState& state, const Real* logits,
               const HeadGrads& grads)
      : Base(args, rows), state_(state), logits_(logits), grads_(grads) {}

  void run() {
    this->in_passes(grads_, [&](auto... range_and_sides) { pass(range_and_sides...); });
  }

 private:
  void pass(int64_t first, int64_t count, bool hidden_side, bool weight_side) {
    Buffers b(args_, kernels_, count,
              this->work_of(grads_, count, hidden_side, weight_side, logits_ == nullptr));
    b.allocate();
    const bool rounded = b.work.hidden_sums > 0;
    std::vector<Real*> hidden_out;
    if (hidden_side) hidden_out = this->sum_rows(b.hidden_sums, first, count, grads_.hidden);
    for (int64_t col = 0; col < vocabulary_; col += b.slice_cols)
      run_slice(b, first, count, col, hidden_out, weight_side);
    if (rounded)
      write_rows(b.hidden_sums, count, grads_.hidden,
                 [&](int64_t i) { return rows_.token[first + i]; });
  }

  void run_slice(const Buffers& b, int64_t first, int64_t count, int64_t col,
                 const std::vector<Real*>& hidden_out, bool weight_side) {
    const int64_t cols = std::min(b.slice_cols, vocabulary_ - col);
    this->pack_entries(b, col, cols, !hidden_out.empty());
    if (b.weight_sums) std::fill_n(b.weight_sums, cols * depth_, Real(0));
    for (int64_t row = 0; row < count; row += b.group_rows) {
      const int64_t rows = std::min(b.group_rows, count - row);
      if (col == 0 || count > b.group_rows)  // a single group stays packed for every slice
        this->pack_tokens(b, first + row, rows, weight_side);
      add_rows(b, first + row, rows, col, cols,
               hidden_out.empty() ? nullptr : hidden_out.data() + row, weight_side);
      if (weight_side && grads_.weight.defined()) add_weight(b, rows, col, cols);
      if (weight_side && grads_.bias.defined()) add_bias(b, rows, col, cols);
    }
    if (b.weight_sums)
      write_rows(b.weight_sums, cols, grads_.weight, [&](int64_t v) { return col + v; });
  }

  // One task per chunk of rows. dz of a block stays in cache while it is multiplied into
  // grad_hidden and copied into the panels that grad_weight will read.
  void add_rows(const Buffers& b, int64_t first, int64_t rows, int64_t slice, int64_t cols,
                Real* const* hidden_out, bool weight_side) const {
    parallel_tasks(panels(rows, b.row_chunk), [&](TaskQueue& queue) {
      std::vector<Real> tile(b.row_chunk * kBlockCols);
      for (int64_t chunk; queue.take(&chunk);) {
        const int64_t row = chunk * b.row_chunk, count = std::min(b.row_chunk, rows - row);
        for (int64_t block = 0; block * kBlockCols < cols; block++) {
          const int64_t col = slice + block * kBlockCols;
          const int64_t entries = std::min(kBlockCols, vocabulary_ - col);
          if (logits_) {
            read_logits(first + row, count, col, entries, tile.data());
          } else {
            this->logits_tile(b, row, count, block, entries, tile.data());
          }
          make_gradient(first + row, count, col, entries, tile.data());
          if (hidden_out)
            this->add_products(b, count, block, entries, tile.data(), hidden_out + row);
          if (weight_side)
            kernels_.transpose_block(tile.data(), count,
                                     b.dz_block(block) + row * kernels_.tile_rows, b.group_rows);
        }
      }
    });
  }

  void read_logits(int64_t first, int64_t rows, int64_t col, int64_t cols, Real* tile) const {
    for (int64_t i = 0; i < rows; i++)
      std::copy_n(logits_ + rows_.token[first + i] * vocabulary_ + col, cols,
                  tile + i * kBlockCols);
  }

  // The products of rows [first, first + rows) with one block of entries become dL/dz.
  void make_gradient(int64_t first, int64_t rows, int64_t col, int64_t cols, Real* tile) const {
    const auto bias = bias_block<Real>(args_.bias, col, cols);
    for (int64_t i = 0; i < rows; i++)
      kernels_.gradient({tile + i * kBlockCols, args_.bias ? bias.data() : nullptr, cols,
                         this->label_in(first + i, col, cols)},
                        map_, state_.grad_entropy.has_value(),
                        state_.grad_of<Real>(rows_.token[first + i]));
  }

  void add_weight(const Buffers& b, int64_t rows, int64_t slice, int64_t cols) const {
    Real* base = b.weight_sums ? b.weight_sums : data_of<Real>(grads_.weight) + slice * depth_;
    const int64_t ranges = panels(depth_, kDepthRange);
    parallel_tasks(panels(cols, kBlockCols) * ranges, [&](TaskQueue& queue) {
      for (int64_t task; queue.take(&task);) {
        const int64_t block = task / ranges, k = task % ranges * kDepthRange;
        const int64_t entries = std::min(kBlockCols, cols - block * kBlockCols);
        std::vector<Real*> out(entries);
        for (int64_t v = 0; v < entries; v++) out[v] = base + (block * kBlockCols + v) * depth_ + k;
        kernels_.gemm({entries, std::min(kDepthRange, depth_ - k), rows, Left::kPanel,
                       b.dz_block(block), b.group_rows * kernels_.tile_rows,
                       b.hidden_cols + k * rows, rows * kernels_.panel_cols, out.data(), true});
      }
    });
  }

  void add_bias(const Buffers& b, int64_t rows, int64_t slice, int64_t cols) const {
    double* sums = data_of<double>(grads_.bias) + slice;
    at::parallel_for(0, cols, kBlockCols, [&](int64_t begin, int64_t end) {
      for (int64_t v = begin; v < end; v++) {
        const int64_t width = kernels_.tile_rows, entry = v % kBlockCols;
        const Real* column =
            b.dz_block(v / kBlockCols) + entry / width * b.group_rows * width + entry % width;
        for (int64_t i = 0; i < rows; i++) sums[v] += column[i * width];
      }
    });
  }

  const TokenState& state_;
  const Real* const logits_;
  const HeadGrads& grads_;
};

// Plans the passes that HeadBackward and SparseBackward would make for all tokens.
template <class Real>
class BackwardRoom : HeadTiles<Real> {
 public:
  BackwardRoom(const HeadArgs& args, const Rows& rows) : HeadTiles<Real>(args, rows) {}

  void check(const HeadGrads& grads, Keep keep) const {
    const int64_t rows = this->rows_.size();
    this->in_passes(grads, [&](int64_t, int64_t count, bool hidden_side, bool weight_side) {
      const auto work =
          this->work_of(grads, count, hidden_side, weight_side, keep != Keep::kLogits);
      BackwardBuffers<Real>(this->args_, this->kernels_, count, work);
      if (keep == Keep::kDropped)
        SparseBuffers<Real>(this->args_, rows, work, SparseTiles<Real>::row_chunk());
    });
  }
};

void check_backward_workspace_cpu(const at::Tensor& hidden, const at::Tensor& weight,
                                  const at::Tensor& targets, const OptionalTensor& bias,
                                  std::array<bool, 3> needs, int64_t workspace_mib,
                                  c10::string_view keep_name) {
  HeadArgs args{"token_logprobs", hidden, weight, targets, bias, 1, 1, {}, 0, workspace_mib};
  check_head(args);
  const Keep keep = keep_of(args.op, keep_name);
  args.workspace_mib = workspace_beside(args, keep);
  Rows rows;
  rows.token.resize(targets.numel());
  HeadGrads grads;  // their types are those of the inputs
  if (needs[0]) grads.hidden = hidden;
  if (needs[1]) grads.weight = weight;
  if (needs[2]) grads.bias = *bias;
  if (rows.size() == 0 || keep == Keep::kJacobian) return;
  AT_DISPATCH_FLOATING_TYPES(result_type_of(hidden), "token_logprobs",
                             [&] { BackwardRoom<scalar_t>(args, rows).check(grads, keep); });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> token_logprobs_backward_cpu(
    const OptionalTensor& grad_logprobs, const OptionalTensor& grad_entropy,
    const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets,
    const OptionalTensor& bias, const at::Tensor& logprobs, const at::Tensor& entropy,
    const at::Tensor& top, const at::Tensor& log_sum, const at::Tensor& kept, double temperature,
    double logit_scale, std::optional<double> softcap, int64_t ignore_index,
    std::array<bool, 3> needs, int64_t workspace_mib, c10::string_view keep_name) {
  HeadArgs args{"token_logprobs_backward",
                hidden,
                weight,
                targets,
                bias,
                temperature,
                logit_scale,
                softcap,
                ignore_index,
                workspace_mib};
  check_head(args);
  check_grads(args.op, grad_logprobs, grad_entropy, logprobs);
  const Keep keep = keep_of(args.op, keep_name);
  check_kept(args, keep, kept, grad_entropy, needs);
  args.workspace_mib = workspace_beside(workspace_mib, keep, kept);
  check_target_values(args.op, targets, weight.size(0), ignore_index);
  if (keep == Keep::kJacobian) return jacobian_grads(args, kept, grad_logprobs, needs[0]);
  const TokenState state(grad_logprobs, grad_entropy, logprobs, entropy, top, log_sum);
  const auto like = [](const at::Tensor& t, bool wanted) {
    return at::zeros(wanted ? t.sizes() : at::IntArrayRef{0}, t.options());
  };
  const auto grad_hidden = like(hidden, needs[0]), grad_weight = like(weight, needs[1]);
  const auto bias_sums =
      at::zeros({needs[2] ? weight.size(0) : 0}, weight.options().dtype(at::kDouble));
  HeadGrads grads;
  if (needs[0]) grads.hidden = grad_hidden.view({-1, hidden.size(-1)});
  if (needs[1]) grads.weight = grad_weight;
  if (needs[2]) grads.bias = bias_sums;

  AT_DISPATCH_FLOATING_TYPES(logprobs.scalar_type(), "token_logprobs_backward", [&] {
    const Rows rows = collect_rows(hidden, targets, [&](int64_t i, int64_t label) {
      return label != ignore_index && state.needs_gradient<scalar_t>(i);
    });
    const auto logits = keep == Keep::kLogits ? kept.contiguous() : at::Tensor();
    const scalar_t* data = logits.defined() ? logits.const_data_ptr<scalar_t>() : nullptr;
    if (rows.size() == 0) return;
    if (keep == Keep::kDropped && !grad_entropy) {
      const auto dropped = kept.contiguous();
      const scalar_t* mass = dropped.const_data_ptr<scalar_t>();
      SparseBackward<scalar_t> sparse(args, rows, state, mass, grads);
      if (sparse.applies()) return sparse.run();
    }
    HeadBackward<scalar_t>(args, rows, state, data, grads).run();
  });
  const auto bias_type = bias ? bias->scalar_type() : at::kDouble;
  return {grad_hidden, grad_weight, bias_sums.to(bias_type)};
}

TORCH_LIBRARY_IMPL(spo, CPU, m) {
  m.impl("token_logprobs_backward", &token_logprobs_backward_cpu);
  m.impl("check_backward_workspace", &check_backward_workspace_cpu);
}

}  // namespace
}  // namespace spo
