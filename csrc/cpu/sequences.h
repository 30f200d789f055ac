// SPDX-License-Identifier: Apache-2.0
// Both layouts of per-token tensors as one: sequence s holds positions [begin(s), begin(s + 1)) of
// a flat array, where cu_seqlens cuts a packed [N] and rows cut a padded [B, T]; masked positions
// do not count.
#pragma once
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "../checks.h"

namespace spo {

class Sequences {
 public:
  Sequences(const at::Tensor& tokens, const OptionalTensor& cu_seqlens, const OptionalTensor& mask)
      : size_(num_sequences(tokens, cu_seqlens)), stride_(cu_seqlens ? 0 : tokens.size(1)) {
    if (cu_seqlens) offsets_ = cu_seqlens->to(at::kLong).contiguous();
    if (mask) mask_ = mask->contiguous();
    offset_data_ = cu_seqlens ? offsets_.const_data_ptr<int64_t>() : nullptr;
    mask_data_ = mask ? mask_.const_data_ptr<bool>() : nullptr;
  }

  int64_t size() const { return size_; }
  int64_t begin(int64_t s) const { return offset_data_ ? offset_data_[s] : s * stride_; }
  bool counts(int64_t i) const { return !mask_data_ || mask_data_[i]; }

  // Calls use(s) for every sequence, in parallel.
  template <class Use>
  void for_each(const Use& use) const {
    at::parallel_for(0, size_, 8, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; s++) use(s);
    });
  }

 private:
  int64_t size_, stride_;
  at::Tensor offsets_, mask_;
  const int64_t* offset_data_;
  const bool* mask_data_;
};

}  // namespace spo
