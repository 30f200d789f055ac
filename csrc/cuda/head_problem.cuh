// SPDX-License-Identifier: Apache-2.0
// What forward and backward of the LM head share on the host side of CUDA: operands of the
// products, the arithmetic for the inputs' dtypes, and one workspace cut into arrays.
#pragma once

#include <cstdlib>
#include <string_view>

#include "gemm_mma.cuh"
#include "gemm_simt.cuh"
#include "head_sm90.h"

namespace spo::cuda {

inline bool rows_start_aligned(const at::Tensor& matrix) {
  constexpr int64_t kBytes = 16;
  bool aligned =
      matrix.stride(-1) == 1 && reinterpret_cast<uintptr_t>(matrix.const_data_ptr()) % kBytes == 0;
  for (int64_t i = 0; i + 1 < matrix.dim(); i++)
    aligned = aligned && matrix.stride(i) * matrix.element_size() % kBytes == 0;
  return aligned;
}

inline RowsView hidden_rows(const at::Tensor& hidden, const RowRange& tokens) {
  return {hidden.const_data_ptr(), hidden.scalar_type(),      tokens.list.offset + tokens.first, 1,
          hidden.stride(-1),       rows_start_aligned(hidden)};
}

inline RowsView weight_rows(const at::Tensor& weight, int64_t first_entry) {
  const auto* data = static_cast<const char*>(weight.const_data_ptr());
  return {data + first_entry * weight.stride(0) * weight.element_size(),
          weight.scalar_type(),
          nullptr,
          weight.stride(0),
          weight.stride(1),
          rows_start_aligned(weight)};
}

// run(Multiply{}) with the arithmetic that the dtypes call for.
template <class Run>
void with_arithmetic(const HeadArgs& args, const Run& run) {
  const auto hidden = args.hidden.scalar_type(), weight = args.weight.scalar_type();
  if (hidden == at::kDouble) return run(SimtMultiply<double>{});
  if (hidden == at::kBFloat16 && weight == at::kBFloat16) return run(MmaMultiply<c10::BFloat16>{});
  if (hidden == at::kHalf && weight == at::kHalf) return run(MmaMultiply<c10::Half>{});
  run(SimtMultiply<float>{});
}

// SPO_HOPPER=0 in the environment gives a Hopper GPU the kernels of every other one. It is read in
// each call, so that one process can compare the two.
inline bool hopper_wanted(const char* op) {
  const char* asked = std::getenv("SPO_HOPPER");
  if (!asked || !*asked) return true;
  const std::string_view value(asked);
  TORCH_CHECK_VALUE(value == "0" || value == "1", op, ": SPO_HOPPER must be 0, 1 or unset, got '",
                    asked, "'");
  return value == "1";
}

// How the Hopper kernels would read these inputs, where they were built, can run and are wanted.
inline std::optional<SlotLayout> hopper_layout(const HeadArgs& args) {
  SlotLayout layout;
  if (kHopperBuilt && compute_capability() == 90 && hopper_wanted(args.op) &&
      SlotLayout::fit(args, &layout))
    return layout;
  return std::nullopt;
}

template <class Real>
LogitMap<Real> logit_map(const HeadArgs& a) {
  return LogitMap<Real>::make(a.temperature, a.logit_scale, a.softcap.value_or(0));
}

// The bias in arithmetic precision; undefined without one.
template <class Real>
at::Tensor bias_of(const HeadArgs& args) {
  if (!args.bias) return {};
  return args.bias->to(c10::CppTypeToScalarType<Real>::value).contiguous();
}

template <class Real>
const Real* data_or_null(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr<Real>() : nullptr;
}

// Scratch bytes on the device; take() cuts arrays off the front.
class Workspace {
 public:
  Workspace(const at::Tensor& like, int64_t bytes)
      : block_(blank({bytes}, like.options().dtype(at::kByte))) {}

  static int64_t padded(int64_t bytes) { return blocks_of(bytes, kAlign) * kAlign; }

  template <class T>
  T* take(int64_t count) {
    T* const out = reinterpret_cast<T*>(block_.mutable_data_ptr<uint8_t>() + used_);
    used_ += padded(count * int64_t(sizeof(T)));
    TORCH_INTERNAL_ASSERT(used_ <= block_.numel());
    return out;
  }

 private:
  static constexpr int64_t kAlign = 256;
  at::Tensor block_;
  int64_t used_ = 0;
};

}  // namespace spo::cuda
