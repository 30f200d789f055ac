// SPDX-License-Identifier: Apache-2.0
// Which tokens take part in the LM head on the device: compacted in order into a list whose length
// only the device knows, so that nothing waits for the host. Kernels start enough blocks for every
// token and those past the end of the list return at once.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include "../checks.h"
#include "../math/logit_map.h"
#include "../math/logsumexp.h"
#include "launch.cuh"

namespace spo::cuda {

inline int64_t blocks_of(int64_t size, int64_t width) { return (size + width - 1) / width; }

// Offsets of the rows of a [.., d] tensor with any strides.
struct RowOffsets {
  static constexpr int kMostDims = 8;
  int dims;
  int64_t size[kMostDims], stride[kMostDims];

  static RowOffsets of(const char* op, const at::Tensor& matrix) {
    RowOffsets out{static_cast<int>(matrix.dim()) - 1, {}, {}};
    TORCH_CHECK_VALUE(out.dims <= kMostDims, op, ": the rows must have at most ", kMostDims + 1,
                      " dimensions, got ", matrix.dim());
    for (int i = 0; i < out.dims; i++)
      out.size[i] = matrix.size(i), out.stride[i] = matrix.stride(i);
    return out;
  }

  __host__ __device__ int64_t operator()(int64_t row) const {
    int64_t offset = 0;
    for (int i = dims - 1; i >= 0; i--) offset += row % size[i] * stride[i], row /= size[i];
    return offset;
  }
};

// The list: row i of a kernel is token[i], with its label and the offset of its row of hidden.
struct RowList {
  int64_t *count, *token, *label, *offset;
};

// The tokens of one kernel call: list entries [first, first + most) as far as they exist.
struct RowRange {
  RowList list;
  int64_t first, most;
  __device__ int64_t size() const {
    const int64_t left = *list.count - first;
    return left < 0 ? 0 : left < most ? left : most;
  }
};

// Upstream gradients and what the forward pass left, by token.
template <class Real>
struct TokenStates {
  // The gradients may be null.
  const Real *logprobs, *entropy, *top, *log_sum, *grad_logprobs, *grad_entropy;

  __device__ TokenGrad<Real> of(int64_t token) const {
    TokenGrad<Real> out{top[token], log_sum[token], logprobs[token], 0, 0, 0};
    if (grad_logprobs) out.grad_logprob = grad_logprobs[token];
    if (grad_entropy) out.grad_entropy = grad_entropy[token], out.entropy = entropy[token];
    return out;
  }
};

// A token is kept if it has a label and, in a backward pass, a gradient (a NaN is not zero).
template <class Real>
struct KeepRow {
  int64_t ignore_index;
  bool backward;
  TokenStates<Real> states;
  __device__ bool operator()(int64_t token, int64_t label) const {
    if (label == ignore_index) return false;
    if (!backward) return true;
    const TokenGrad<Real> grad = states.of(token);
    return !(grad.grad_logprob == 0) || !(grad.grad_entropy == 0);
  }
};

constexpr int kSelectThreads = 1024;

// One block walks over all tokens: 1024 at a time, each finds its place by counting those before.
template <class Keep>
__global__ void __launch_bounds__(kSelectThreads)
    select_rows(const int64_t* labels, int64_t tokens, int64_t vocabulary, int64_t ignore_index,
                RowOffsets offsets, Keep keep, RowList out) {
  __shared__ int kept_by_warp[kSelectThreads / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int64_t before = 0;
  for (int64_t start = 0; start < tokens; start += kSelectThreads) {
    const int64_t token = start + threadIdx.x;
    const int64_t label = token < tokens ? labels[token] : ignore_index;
    SPO_DEVICE_CHECK(label == ignore_index || (label >= 0 && label < vocabulary),
                     "targets must be in [0, V) or ignore_index");
    const bool kept = token < tokens && keep(token, label);
    const unsigned ballot = __ballot_sync(kAllLanes, kept);
    if (lane == 0) kept_by_warp[warp] = __popc(ballot);
    __syncthreads();
    int64_t place = before + __popc(ballot & ((1u << lane) - 1));
    for (int w = 0; w < kSelectThreads / 32; w++) {
      if (w < warp) place += kept_by_warp[w];
      before += kept_by_warp[w];
    }
    if (kept) {
      out.token[place] = token, out.label[place] = label;
      out.offset[place] = offsets(token);
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) *out.count = before;
}

// Room for numbers. Where the log is dry nothing will be written, so there is only an address.
inline at::Tensor blank(at::IntArrayRef sizes, const at::TensorOptions& options) {
  if (!launch_log.dry) return at::empty(sizes, options);
  void* const nowhere = reinterpret_cast<void*>(256);
  return at::for_blob(nowhere, sizes)
      .options(options)
      .target_device(options.device())
      .make_tensor();
}

// Numbers of one value; the kernel that writes them counts.
inline at::Tensor filled(at::IntArrayRef sizes, double value, const at::TensorOptions& options) {
  auto out = blank(sizes, options);
  if (out.numel() > 0 && launch_log.add()) out.fill_(value);
  return out;
}

// The list and the tensor that owns it.
struct SelectedRows {
  at::Tensor storage;
  RowList list;
  int64_t most;  // tokens in all

  template <class Keep>
  SelectedRows(const HeadArgs& args, const Keep& keep) : most(args.targets.numel()) {
    storage = blank({3 * most + 1}, args.targets.options().dtype(at::kLong));
    int64_t* data = storage.mutable_data_ptr<int64_t>();
    list = {data, data + 1, data + 1 + most, data + 1 + 2 * most};
    const at::Tensor labels = args.targets.to(at::kLong).contiguous();
    launch(&select_rows<Keep>, dim3(1), kSelectThreads, 0, labels.const_data_ptr<int64_t>(), most,
           args.weight.size(0), args.ignore_index, RowOffsets::of(args.op, args.hidden), keep,
           list);
  }
  RowRange range(int64_t first, int64_t count) const { return {list, first, count}; }
  RowRange all() const { return {list, 0, most}; }
};

}  // namespace spo::cuda
