// SPDX-License-Identifier: Apache-2.0
// The backward pass of the LM head over the (row, block of entries) pairs that the forward pass
// kept.
#pragma once
#include "backward_kernels.cuh"

namespace spo::cuda {

// The tokens, in two lists of the same kind, one of which is empty: those whose gradient is
// sparse, and those that kept too much and take the exact way. Which it is, the host does not
// learn.
struct TwoWays {
  TwoWays(const HeadArgs& args, const SelectedRows& rows, const at::Tensor& dropped);

  SelectedRows exact, sparse;

 private:
  at::Tensor counts_;
};

// Of a sparse list. Where it has tokens, grad_hidden (zero on entry), grad_bias and every block of
// grad_weight that a token visits are written; the rest of grad_weight is left as it is.
template <class Real>
void sparse_backward(const HeadArgs& args, const SelectedRows& rows,
                     const TokenStates<Real>& states, const at::Tensor& dropped,
                     const HeadGrads& grads);

}  // namespace spo::cuda
