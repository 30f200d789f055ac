// SPDX-License-Identifier: Apache-2.0
// The small kernels of the LM head's backward pass: the scale of float16 gradients, dL/dz from
// products that were kept, and grad_bias.
#pragma once
#include "head_problem.cuh"

namespace spo::cuda {

constexpr int kBiasCols = 32, kBiasThreads = 256, kScaleThreads = 1024;
constexpr int kProductThreads = 256, kProductCols = 256;

// The largest power of two that keeps |dz| below 2^13, so that float16 can hold it and loses only
// probabilities below 2^-37 of the largest gradient. [0] the scale, [1] its inverse.
template <class Real>
__global__ void __launch_bounds__(kScaleThreads)
    gradient_scale(RowRange tokens, TokenStates<Real> states, Real slope, Real* out) {
  __shared__ Real warp_largest[kScaleThreads / 32];
  Real largest = 0;
  for (int64_t i = threadIdx.x; i < tokens.size(); i += kScaleThreads) {
    const TokenGrad<Real> grad = states.of(tokens.list.token[tokens.first + i]);
    // |p_j (log p_j + H)| <= 1/e + log V
    const Real bound = ::fabs(grad.grad_logprob) + 16 * ::fabs(grad.grad_entropy);
    largest = bound > largest ? bound : largest;
  }
  largest = lanes_max<32>(largest);
  if (threadIdx.x % 32 == 0) warp_largest[threadIdx.x / 32] = largest;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  largest = lanes_max<32>(warp_largest[threadIdx.x]) * slope;
  int exponent = 12;  // no gradient, or one that no scale can save
  if (largest > 0 && largest < std::numeric_limits<Real>::infinity()) ::frexp(largest, &exponent);
  const int shift = exponent > 112 ? -100 : exponent < -88 ? 100 : 12 - exponent;
  if (threadIdx.x == 0) out[0] = ::ldexp(Real(1), shift), out[1] = ::ldexp(Real(1), -shift);
}

// The factor of dz and what undoes it; nothing but for float16.
template <class Multiply>
class GradientScale {
  using Real = typename Multiply::Real;

 public:
  GradientScale(const at::Tensor& like, const LogitMap<Real>& map, const RowRange& tokens,
                const TokenStates<Real>& states) {
    if (!std::is_same_v<typename Multiply::Storage, c10::Half>) return;
    storage_ = blank({2}, like.options().dtype(c10::CppTypeToScalarType<Real>::value));
    const Real slope = std::abs(map.plain_slope());
    launch(&gradient_scale<Real>, dim3(1), kScaleThreads, 0, tokens, states, slope,
           storage_.template mutable_data_ptr<Real>());
  }
  const Real* factor() const { return data_or_null<Real>(storage_); }
  const Real* inverse() const { return storage_.defined() ? factor() + 1 : nullptr; }

 private:
  at::Tensor storage_;
};

struct HeadGrads {
  at::Tensor hidden, weight, bias;  // undefined where not wanted; bias in double
};

// run(pointer) with the type of a gradient that this arithmetic can have.
template <class Multiply, class Run>
void with_output(const at::Tensor& grad, const Run& run) {
  using Real = typename Multiply::Real;
  using Storage = typename Multiply::Storage;
  if constexpr (!std::is_same_v<Storage, Real>) {
    run(grad.mutable_data_ptr<Storage>());
  } else if (grad.scalar_type() == c10::CppTypeToScalarType<Real>::value) {
    run(grad.mutable_data_ptr<Real>());
  } else if constexpr (std::is_same_v<Real, float>) {  // mixed inputs
    if (grad.scalar_type() == at::kHalf) return run(grad.mutable_data_ptr<c10::Half>());
    run(grad.mutable_data_ptr<c10::BFloat16>());
  }
}

// dL/dz of one slice of kept products: one warp per row of dz and 256 entries. Rows are slots if
// `place` is given (head_sm90.h); unused slots get zeros.
template <class Real, class Storage>
__global__ void __launch_bounds__(kProductThreads)
    gradient_of_products(const int64_t* place, int64_t rows, KeptProducts<const Real> products,
                         int64_t entries, GradientEpilogue<Real, Storage> epilogue) {
  const int64_t at = int64_t(blockIdx.x) * (kProductThreads / 32) + threadIdx.x / 32;
  const int64_t col0 = int64_t(blockIdx.y) * kProductCols;
  const int lane = threadIdx.x % 32;
  if (at >= (place ? rows : epilogue.slice.tokens.size())) return;
  const int64_t row = place ? place[at] : at;
  if (row < 0) {
    for (int64_t c = col0 + lane; c < entries && c < col0 + kProductCols; c += 32)
      epilogue.dz[at * epilogue.pitch + c] = Storage(0);
    return;
  }
  const Real* const source = products.data + epilogue.slice.token(row) * products.pitch + col0;
  epilogue.template write<kProductCols>(source, row, at, false, col0, entries, lane);
}

template <class Real, class Storage>
void launch_gradient_of_products(const Slots* slots, const KeptProducts<const Real>& products,
                                 int64_t entries, const GradientEpilogue<Real, Storage>& epilogue) {
  const int64_t rows = slots ? slots->layout().slots : epilogue.slice.tokens.most;
  launch(&gradient_of_products<Real, Storage>,
         dim3(blocks_of(rows, kProductThreads / 32), blocks_of(entries, kProductCols)),
         kProductThreads, 0, slots ? slots->map().place : nullptr, rows, products, entries,
         epilogue);
}

// grad_bias[entry] += sum of dz over the group's tokens, in double: eight partial sums per entry.
template <class Real, class Storage>
__global__ void __launch_bounds__(kBiasThreads)
    add_bias_grad(RowRange tokens, RowsView dz, int64_t entries, const Real* unscale,
                  double* grad) {
  __shared__ double partial[kBiasThreads];
  const int lane = threadIdx.x % kBiasCols, part = threadIdx.x / kBiasCols;
  const int64_t entry = int64_t(blockIdx.x) * kBiasCols + lane, rows = tokens.size();
  double sum = 0;
  if (entry < entries)
    for (int64_t row = part; row < rows; row += kBiasThreads / kBiasCols)
      sum += static_cast<double>(static_cast<const Storage*>(dz.data)[dz.offset(row) + entry]);
  partial[threadIdx.x] = sum;
  __syncthreads();
  if (part != 0 || entry >= entries) return;
  for (int p = 1; p < kBiasThreads / kBiasCols; p++) sum += partial[p * kBiasCols + lane];
  grad[entry] += sum * (unscale ? double(*unscale) : 1.0);
}

}  // namespace spo::cuda
