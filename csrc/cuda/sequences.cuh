// SPDX-License-Identifier: Apache-2.0
// One team of warps per sequence, walking it in chunks of 32 tokens, one chunk per warp at a time.
// Sums run inside a chunk by warp shuffles and over the chunks in their order, in double, so that
// they depend on the sequence alone: neither on the batch nor on the number of warps, which is
// chosen for speed.
#pragma once
#include <ATen/ops/empty.h>

#include "../checks.h"
#include "launch.cuh"

namespace spo::cuda {

// Both layouts as one, like cpu/sequences.h: sequence s holds [begin(s), begin(s + 1)).
struct SequenceView {
  int64_t size, stride, num_tokens;
  const int64_t* offsets;  // [size + 1], null for padded rows of `stride` tokens
  const bool* mask;        // [num_tokens], null if all count

  __device__ int64_t begin(int64_t s) const { return offsets ? offsets[s] : s * stride; }
  __device__ bool counts(int64_t i) const { return !mask || mask[i]; }
  __device__ void check(int64_t s) const {
    SPO_DEVICE_CHECK(s > 0 || begin(0) == 0, "cu_seqlens must start at 0");
    SPO_DEVICE_CHECK(begin(s) <= begin(s + 1), "cu_seqlens must not fall");
    SPO_DEVICE_CHECK(
        begin(s) >= 0 && begin(s + 1) <= num_tokens && (s + 1 < size || begin(size) == num_tokens),
        "cu_seqlens must end at the number of tokens");
  }
};

// The view and the tensors it points into.
struct Sequences {
  Sequences(const char* op, const at::Tensor& tokens, const OptionalTensor& cu_seqlens,
            const OptionalTensor& mask) {
    if (cu_seqlens) offsets_ = cu_seqlens->to(at::kLong).contiguous();
    if (mask) mask_ = mask->contiguous();
    view = {num_sequences(tokens, cu_seqlens), cu_seqlens ? 0 : tokens.size(1), tokens.numel(),
            cu_seqlens ? offsets_.const_data_ptr<int64_t>() : nullptr,
            mask ? mask_.const_data_ptr<bool>() : nullptr};
    TORCH_CHECK_VALUE(view.size > 0 || view.num_tokens == 0, op,
                      ": cu_seqlens must end at the number of tokens ", view.num_tokens,
                      ", got no sequence");
  }
  SequenceView view;

 private:
  at::Tensor offsets_, mask_;
};

// How many warps walk one sequence. Short ones share a block.
struct Teams {
  int warps, threads;
  unsigned blocks;

  static Teams for_sequences(const SequenceView& sequences) {
    const int64_t average = sequences.num_tokens / (sequences.size > 0 ? sequences.size : 1);
    const int warps = average <= 256 ? 1 : (average <= 4096 ? 8 : kMostThreads / 32);
    const int threads = warps == 1 ? 128 : 32 * warps;
    const int64_t per_block = threads / 32 / warps;
    return {warps, threads, static_cast<unsigned>((sequences.size + per_block - 1) / per_block)};
  }
  // Two sets of kMaxSums sums per warp, so that one barrier per step is enough.
  size_t shared_bytes() const { return warps == 1 ? 0 : 2 * kMaxSums * warps * sizeof(double); }
  static constexpr int kMaxSums = 2, kMostThreads = 512;
};

__device__ __forceinline__ double scan_lanes(double value) {
#pragma unroll
  for (unsigned delta = 1; delta < 32; delta *= 2) {
    const double left = __shfl_up_sync(kAllLanes, value, delta);
    if (threadIdx.x % 32 >= delta) value = left + value;
  }
  return value;
}

class Team {
 public:
  __device__ explicit Team(int warps)
      : lane(threadIdx.x % 32),
        warp(warps == 1 ? 0 : threadIdx.x / 32),
        warps(warps),
        sequence(warps == 1 ? int64_t(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32
                            : int64_t(blockIdx.x)) {}

  // Calls step(i) in every lane for the positions of [begin, end) and, so that all lanes take part
  // in the sums, for some beyond (then i is -1); chunk by chunk, from the front or from the back.
  template <bool kReverse, class Step>
  __device__ void walk(int64_t begin, int64_t end, const Step& step) const {
    const int64_t chunks = (end - begin + 31) / 32;
    for (int64_t first = 0; first < chunks; first += warps) {
      const int64_t chunk = kReverse ? chunks - 1 - first - warp : first + warp;
      // The last lane is the first of a reversed chunk.
      const int64_t i = begin + 32 * chunk + (kReverse ? 31 - lane : lane);
      step(chunk >= 0 && i < end ? i : -1);
    }
  }

  // chunk: a sum over this warp's chunk. *before becomes the sum over all chunks before it, and
  // *carry, which started at 0, moves on past the chunks of all warps.
  template <int kSums>
  __device__ void add_chunks(const double (&chunk)[kSums], double (&before)[kSums],
                             double (&carry)[kSums]) {
    static_assert(kSums <= Teams::kMaxSums);
    if (warps == 1) {
#pragma unroll
      for (int k = 0; k < kSums; k++) before[k] = carry[k], carry[k] += chunk[k];
      return;
    }
    double* slots = next_slots<double>();
    if (lane == 0)
      for (int k = 0; k < kSums; k++) slots[warp * kSums + k] = chunk[k];
    __syncthreads();
    for (int w = 0; w < warps; w++)
#pragma unroll
      for (int k = 0; k < kSums; k++) {
        if (w == warp) before[k] = carry[k];
        carry[k] += slots[w * kSums + k];
      }
  }

  // The inclusive sum up to this lane's token.
  __device__ double running_sum(double value, double* carry) {
    const double inside = scan_lanes(value);
    const double chunk[1] = {__shfl_sync(kAllLanes, inside, 31)};
    double before[1], total[1] = {*carry};
    add_chunks(chunk, before, total);
    *carry = total[0];
    return before[0] + inside;
  }

  // Adds to *carry the sum over all lanes, which is then the same in each.
  __device__ void add(double value, double* carry) {
#pragma unroll
    for (int bits = 16; bits > 0; bits /= 2) value += __shfl_xor_sync(kAllLanes, value, bits);
    const double chunk[1] = {value};
    double before[1], total[1] = {*carry};
    add_chunks(chunk, before, total);
    *carry = total[0];
  }

  // An associative and commutative op over all lanes, such as the largest.
  template <class Op>
  __device__ int64_t combine(int64_t value, const Op& op) {
#pragma unroll
    for (int bits = 16; bits > 0; bits /= 2)
      value = op(value, __shfl_xor_sync(kAllLanes, value, bits));
    if (warps == 1) return value;
    int64_t* slots = next_slots<int64_t>();
    if (lane == 0) slots[warp] = value;
    __syncthreads();
    value = slots[0];
    for (int w = 1; w < warps; w++) value = op(value, slots[w]);
    return value;
  }

  // What one lane wrote to memory before, every lane can read after.
  __device__ void sync() const { warps == 1 ? __syncwarp() : __syncthreads(); }
  __device__ bool leader() const { return warp == 0 && lane == 0; }

  const int lane, warp, warps;
  const int64_t sequence;

 private:
  // Two sets of slots by turns: whoever writes to one again has passed the barrier behind which
  // everybody had read it.
  template <class T>
  __device__ T* next_slots() {
    static_assert(sizeof(T) == sizeof(double));
    parity_ ^= 1;
    return shared_memory<T>() + parity_ * Teams::kMaxSums * warps;
  }

  int parity_ = 0;
};

}  // namespace spo::cuda
