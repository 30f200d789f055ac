// SPDX-License-Identifier: Apache-2.0
// The three products of the LM head for every architecture from sm_80 on, as one kernel:
//   logits        z[row, entry]   = sum_k hidden[row, k] weight[entry, k]
//   grad_hidden   [row, k]       = sum_entry dz[row, entry] weight[entry, k]
//   grad_weight   [entry, k]      = sum_row dz[row, entry] hidden[row, k]
// A block multiplies one square tile (gemm_mma.cuh: 16-bit numbers on the matrix units;
// gemm_simt.cuh: float and double) into shared memory, then its warps hand the tile's rows to an
// epilogue. A number of the tile depends on nothing but its own row and column: the order of its
// sum is that of k, whatever the size of the batch.
#pragma once
#include "head_rows.cuh"

namespace spo::cuda {

// A matrix that is read by rows: element (r, c) at data[offset(r) + c * col_stride].
struct RowsView {
  const void* data;
  at::ScalarType type;
  const int64_t* positions;  // of every row, in steps of row_stride; null: r
  int64_t row_stride, col_stride;
  bool vectors;  // every 8th element of a row starts at a multiple of 16 bytes
  int64_t first_row = 0;

  __device__ int64_t offset(int64_t row) const {
    return (positions ? positions[first_row + row] : first_row + row) * row_stride;
  }
  __device__ RowsView from(int64_t row) const {
    RowsView out = *this;
    out.first_row += row;
    return out;
  }

  template <class Real>
  __device__ Real number(int64_t row, int64_t col) const {
    const int64_t at = offset(row) + col * col_stride;
    switch (type) {  // the same for every thread
      case at::kDouble:
        return static_cast<Real>(static_cast<const double*>(data)[at]);
      case at::kHalf:
        return static_cast<Real>(static_cast<const c10::Half*>(data)[at]);
      case at::kBFloat16:
        return static_cast<Real>(static_cast<const c10::BFloat16*>(data)[at]);
      default:
        return static_cast<Real>(static_cast<const float*>(data)[at]);
    }
  }
};

// What the rows of an operand are: an index of the output, with the sum running along the row, or
// steps of the sum.
enum class RowIs { kOutput, kStep };

struct Product {
  RowsView a, b;
  int64_t m, n, k;                   // one of m and k is the number of tokens: at most this many
  RowRange tokens;                   // and exactly this many
  bool tokens_are_steps;             // k rather than m
  const int32_t* only_if = nullptr;  // if given and zero: nothing to do

  __device__ void settle() {
    const int64_t count = tokens.size();
    if (tokens_are_steps) {
      k = count;
    } else {
      m = count;
    }
  }
};

constexpr int kGemmThreads = 256;

template <class Multiply, RowIs kA, RowIs kB, class Epilogue>
__global__ void __launch_bounds__(kGemmThreads) head_gemm(Product product, Epilogue epilogue) {
  using Real = typename Multiply::Real;
  constexpr int kTile = Multiply::kTile, kPitch = Multiply::kPitch;
  if (product.only_if && *product.only_if == 0) return;
  product.settle();
  const int64_t row0 = int64_t(blockIdx.x) * kTile, col0 = int64_t(blockIdx.y) * kTile;
  if (row0 >= product.m || col0 >= product.n) return;
  Real* const tile = shared_memory<Real>();
  Multiply::template run<kA, kB>(product, row0, col0);
  const int lane = threadIdx.x % 32;
  for (int r = threadIdx.x / 32; r < kTile && row0 + r < product.m; r += kGemmThreads / 32)
    epilogue.template row<kTile>(tile + r * kPitch, row0 + r, col0, product.n, lane);
}

template <class Multiply, RowIs kA, RowIs kB, class Epilogue>
void launch_gemm(const Product& product, const Epilogue& epilogue) {
  constexpr int kTile = Multiply::kTile;
  const dim3 grid(blocks_of(product.m, kTile), blocks_of(product.n, kTile));
  if (!product.only_if)
    launch_log.bytes += product.m * product.k * int64_t(c10::elementSize(product.a.type)) +
                        product.n * product.k * int64_t(c10::elementSize(product.b.type)) +
                        epilogue.bytes(product.m, product.n);
  launch(&head_gemm<Multiply, kA, kB, Epilogue>, grid, kGemmThreads, Multiply::kSharedBytes,
         product, epilogue);
}

}  // namespace spo::cuda
