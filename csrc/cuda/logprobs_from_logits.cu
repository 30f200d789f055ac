// SPDX-License-Identifier: Apache-2.0
// Log-probabilities from logits that already exist, on CUDA: one read of a row forward, one read
// and one write backward (in place if asked). A short row has one warp, a long one a block.
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/ops/zeros.h>

#include "row_softmax.cuh"

namespace spo::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kShortRow = 2048;      // columns: from here on a block per row
constexpr int64_t kBlocksAtOnce = 2048;  // statistics in shared memory together

#define SPO_DISPATCH_LOGITS(TYPE, NAME, ...) \
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, TYPE, NAME, __VA_ARGS__)

// The warps of one row, by the number of its columns alone.
struct RowTeam {
  int warps;
  static RowTeam of(int64_t columns) { return {columns <= kShortRow ? 1 : kThreads / 32}; }
  unsigned blocks(int64_t rows) const {
    const int64_t blocks = blocks_of(rows, kThreads / 32 / warps);
    TORCH_CHECK(blocks <= std::numeric_limits<int>::max(), "too many rows: ", rows);
    return static_cast<unsigned>(blocks);
  }
  __device__ int64_t row() const {
    return warps == 1 ? int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32 : blockIdx.x;
  }
  __device__ int warp() const { return warps == 1 ? 0 : threadIdx.x / 32; }
  __device__ void sync() const { warps == 1 ? __syncwarp() : __syncthreads(); }
};

template <class Storage>
RowsOf<Storage> rows_of(const char* op, const at::Tensor& matrix) {
  Storage* data;
  if constexpr (std::is_const_v<Storage>) {
    data = matrix.const_data_ptr<std::remove_const_t<Storage>>();
  } else {
    data = matrix.mutable_data_ptr<Storage>();
  }
  return {data, RowOffsets::of(op, matrix), matrix.stride(-1), matrix.size(-1)};
}

struct Targets {
  const int64_t* data;
  int64_t size, ignore_index;
  __device__ int64_t label(int64_t row, int64_t columns) const {
    const int64_t label = data[row];
    SPO_DEVICE_CHECK(label == ignore_index || (label >= 0 && label < columns),
                     "targets must be in [0, V) or ignore_index");
    return label;
  }
};

// Statistics of block `block`, all lanes; the lane that holds the label keeps its logit.
template <class Storage, class Real>
__device__ BlockStats<Real> read_block(const RowPiece<Storage>& piece, const LogitMap<Real>& map,
                                       int64_t label, bool entropy, Real* label_logit) {
  constexpr int kEach = RowPiece<Storage>::kEach;
  const int lane = threadIdx.x % 32;
  const Real lowest = -std::numeric_limits<Real>::infinity();
  Real logits[kEach], slope;
#pragma unroll
  for (int e = 0; e < kEach; e++) logits[e] = lowest;
  piece.load(lane, logits);
#pragma unroll
  for (int e = 0; e < kEach; e++) {
    logits[e] = map.unscaled(logits[e], &slope);
    if (piece.column(lane, e) == label) *label_logit = logits[e], logits[e] = lowest;
  }
  return lane_statistics<32, kEach>(logits, map, entropy);
}

template <class Storage, class Real>
__global__ void __launch_bounds__(kThreads)
    logprobs_kernel(RowsOf<const Storage> logits, Targets targets, RowTeam team, LogitMap<Real> map,
                    int64_t blocks_at_once, TokenOutputs<Real> out) {
  const int64_t row = team.row(), blocks = column_blocks(logits.columns);
  if (row >= targets.size) return;
  const int64_t label = targets.label(row, logits.columns);
  const int lane = threadIdx.x % 32, warp = team.warp();
  const bool leader = warp == 0 && lane == 0;
  if (label == targets.ignore_index) {
    if (leader) out.write(row, {0, 0, 0, 0});
    return;
  }
  auto* const stats = shared_memory<BlockStats<Real>>() +
                      (threadIdx.x / 32 - warp) * (blocks_at_once + 1);  // one set per team
  Real* const label_logit = &stats[blocks_at_once].max;
  LogSumExp others;
  for (int64_t first = 0; first < blocks; first += blocks_at_once) {
    const int64_t count = min(blocks_at_once, blocks - first);
    for (int64_t b = warp; b < count; b += team.warps) {
      const BlockStats<Real> block =
          read_block(logits.piece(row, first + b), map, label - (first + b) * kBlockColumns,
                     out.entropy != nullptr, label_logit);
      if (lane == 0) stats[b] = block;
    }
    team.sync();  // the statistics are there
    if (warp == 0) merge_blocks(stats, count, map.outer, &others);
    team.sync();  // and may be overwritten
  }
  if (leader) out.write(row, others.finish(*label_logit, map.outer));
}

template <class Storage, class Real>
__global__ void __launch_bounds__(kThreads)
    logprobs_backward_kernel(RowsOf<const Storage> logits, RowsOf<Storage> grads, Targets targets,
                             RowTeam team, LogitMap<Real> map, TokenStates<Real> states) {
  constexpr int kEach = RowPiece<Storage>::kEach;
  const int64_t row = team.row(), blocks = column_blocks(logits.columns);
  if (row >= targets.size) return;
  const int64_t label = targets.label(row, logits.columns);
  const TokenGrad<Real> grad = states.of(row);
  // A NaN is not zero: it goes on.
  const bool live =
      label != targets.ignore_index && (!(grad.grad_logprob == 0) || !(grad.grad_entropy == 0));
  const int lane = threadIdx.x % 32;
  for (int64_t b = blockIdx.y * team.warps + team.warp(); b < blocks; b += gridDim.y * team.warps) {
    const auto from = logits.piece(row, b);
    Real values[kEach] = {};
    if (live) from.load(lane, values);
#pragma unroll
    for (int e = 0; e < kEach; e++) {
      if (!live) break;
      Real slope;
      const Real below = map.below(map.unscaled(values[e], &slope), grad.top);
      const bool is_label = b * kBlockColumns + from.column(lane, e) == label;
      const Real to_logit = is_label              ? grad.label()
                            : states.grad_entropy ? grad.template other<Real, true>(below)
                                                  : grad.template other<Real, false>(below);
      values[e] = slope * to_logit;
    }
    grads.piece(row, b).store(lane, values);
  }
}

LogitsOutputs logprobs_from_logits_cuda(const at::Tensor& logits, const at::Tensor& targets,
                                        double temperature, int64_t ignore_index,
                                        bool return_entropy,
                                        bool /*inplace_backward: autograd's choice*/) {
  constexpr auto op = "logprobs_from_logits";
  check_logits(op, logits, targets, temperature);
  const DeviceGuard guard(logits.device());
  const auto options = logits.options().dtype(result_type_of(logits));
  const auto column = [&] { return at::empty(targets.sizes(), options); };
  const auto logprobs = column(), top = column(), log_sum = column();
  const auto entropy = return_entropy ? column() : at::empty({0}, options);
  const auto labels = targets.to(at::kLong).contiguous();
  const RowTeam team = RowTeam::of(logits.size(-1));
  const int64_t at_once = std::min(kBlocksAtOnce, column_blocks(logits.size(-1)));
  SPO_DISPATCH_LOGITS(logits.scalar_type(), op, [&] {
    using Real = at::opmath_type<scalar_t>;
    const size_t shared = (at_once + 1) * (kThreads / 32 / team.warps) * sizeof(BlockStats<Real>);
    launch(logprobs_kernel<scalar_t, Real>, team.blocks(labels.numel()), kThreads, shared,
           rows_of<const scalar_t>(op, logits),
           Targets{labels.const_data_ptr<int64_t>(), labels.numel(), ignore_index}, team,
           LogitMap<Real>::make(temperature, 1, 0), at_once,
           TokenOutputs<Real>{logprobs.mutable_data_ptr<Real>(),
                              return_entropy ? entropy.mutable_data_ptr<Real>() : nullptr,
                              top.mutable_data_ptr<Real>(), log_sum.mutable_data_ptr<Real>()});
  });
  return {logprobs, entropy, top, log_sum};
}

// Writes dL/dlogits to `out`, which may be `logits` itself: each lane reads a piece before it
// writes the same piece. Ignored rows get zero, even where a logit is NaN.
void backward_into(const at::Tensor& out, const OptionalTensor& grad_logprobs,
                   const OptionalTensor& grad_entropy, const at::Tensor& logits,
                   const at::Tensor& targets, const at::Tensor& logprobs, const at::Tensor& entropy,
                   const at::Tensor& top, const at::Tensor& log_sum, double temperature,
                   int64_t ignore_index) {
  constexpr auto op = "logprobs_from_logits_backward";
  check_logits(op, logits, targets, temperature);
  check_grads(op, grad_logprobs, grad_entropy, logprobs);
  const DeviceGuard guard(logits.device());
  const auto flat = [&](const at::Tensor& t) { return t.to(top.scalar_type()).contiguous(); };
  const auto to_logprobs = grad_logprobs ? flat(*grad_logprobs) : at::Tensor();
  const auto to_entropy = grad_entropy ? flat(*grad_entropy) : at::Tensor();
  const auto left_logprobs = flat(logprobs), left_entropy = flat(entropy);
  const auto left_top = flat(top), left_log_sum = flat(log_sum);
  const auto labels = targets.to(at::kLong).contiguous();
  const RowTeam team = RowTeam::of(logits.size(-1));
  // A long row is shared by several blocks: four pieces for each warp.
  const int64_t pieces = column_blocks(logits.size(-1));
  const auto parts = static_cast<unsigned>(
      team.warps == 1 ? 1 : std::min<int64_t>(blocks_of(pieces, 4 * team.warps), 65535));
  SPO_DISPATCH_LOGITS(logits.scalar_type(), op, [&] {
    using Real = at::opmath_type<scalar_t>;
    const auto data = [](const at::Tensor& t) {
      return t.defined() ? t.const_data_ptr<Real>() : nullptr;
    };
    launch(logprobs_backward_kernel<scalar_t, Real>, dim3(team.blocks(labels.numel()), parts),
           kThreads, 0, rows_of<const scalar_t>(op, logits), rows_of<scalar_t>(op, out),
           Targets{labels.const_data_ptr<int64_t>(), labels.numel(), ignore_index}, team,
           LogitMap<Real>::make(temperature, 1, 0),
           TokenStates<Real>{data(left_logprobs), data(left_entropy), data(left_top),
                             data(left_log_sum), data(to_logprobs), data(to_entropy)});
  });
}

at::Tensor logprobs_from_logits_backward_cuda(const OptionalTensor& grad_logprobs,
                                              const OptionalTensor& grad_entropy,
                                              const at::Tensor& logits, const at::Tensor& targets,
                                              const at::Tensor& logprobs, const at::Tensor& entropy,
                                              const at::Tensor& top, const at::Tensor& log_sum,
                                              double temperature, int64_t ignore_index) {
  const auto out = at::empty(logits.sizes(), logits.options());
  backward_into(out, grad_logprobs, grad_entropy, logits, targets, logprobs, entropy, top, log_sum,
                temperature, ignore_index);
  return out;
}

void logprobs_from_logits_backward_inplace_cuda(
    const OptionalTensor& grad_logprobs, const OptionalTensor& grad_entropy, at::Tensor& logits,
    const at::Tensor& targets, const at::Tensor& logprobs, const at::Tensor& entropy,
    const at::Tensor& top, const at::Tensor& log_sum, double temperature, int64_t ignore_index) {
  check_writable("logprobs_from_logits_backward_", logits);
  backward_into(logits, grad_logprobs, grad_entropy, logits, targets, logprobs, entropy, top,
                log_sum, temperature, ignore_index);
  logits.unsafeGetTensorImpl()->bump_version();  // whoever saved these logits must notice
}

SPO_CUDA_LIBRARY(m) {
  m.impl("logprobs_from_logits", &logprobs_from_logits_cuda);
  m.impl("logprobs_from_logits_backward", &logprobs_from_logits_backward_cuda);
  m.impl("logprobs_from_logits_backward_", &logprobs_from_logits_backward_inplace_cuda);
}

}  // namespace
}  // namespace spo::cuda
