// SPDX-License-Identifier: Apache-2.0
// Backward of the LM head on CUDA: the logits of one slice of the vocabulary are computed again, or
// read where the forward pass kept them, and leave as dL/dz, which is multiplied into grad_hidden
// and grad_weight.
//   dz = g (onehot - p) ...                [tokens, slice]  in the inputs' 16 bits, or in float
//   grad_hidden += dz weight               [tokens, d]      split floats, rounded after the last
//   grad_weight  = dz^T hidden             [slice, d]       rounded once
// On Hopper the rows of dz are slots (head_sm90.h), elsewhere the tokens that take part.
#include "../kept.h"
#include "backward_plan.cuh"
#include "sparse_backward.h"

namespace spo::cuda {
namespace {

template <class Multiply>
class HeadBackward {
  using Real = typename Multiply::Real;
  using Storage = typename Multiply::Storage;
  static constexpr bool kOnHopper = kHopperBuilt && !std::is_same_v<Real, Storage>;

 public:
  // `products`: [N, V] as the forward pass kept them, or undefined.
  HeadBackward(const HeadArgs& args, const SelectedRows& rows, const TokenStates<Real>& states,
               const at::Tensor& products, const HeadGrads& grads)
      : args_(args),
        rows_(rows),
        states_(states),
        products_(data_or_null<Real>(products)),
        grads_(grads),
        map_(logit_map<Real>(args)),
        bias_(bias_of<Real>(args)),
        scale_(args.hidden, map_, rows.all(), states),
        depth_(args.weight.size(1)),
        vocabulary_(args.weight.size(0)) {
    if constexpr (kOnHopper) layout_ = hopper_layout(args);
  }

  void run() {
    const int64_t most = BackwardPlan::most_split_rows(args_, sizeof(Storage));
    const int64_t rows = layout_ ? layout_->slots : rows_.most;
    in_passes(rows, split_hidden() ? most : rows, grads_,
              [&](const BackwardPass& pass) { run_pass(pass); });
  }

 private:
  bool split_hidden() const { return args_.hidden.element_size() < int64_t(sizeof(Real)); }

  void run_pass(const BackwardPass& pass) {
    const BackwardPlan plan(args_, pass, sizeof(Storage), sizeof(Real), split_hidden(),
                            layout_.has_value());
    const int64_t sums = plan.weight_sums ? plan.slice_entries * depth_ : 0;
    Workspace workspace(
        args_.hidden,
        Workspace::padded(plan.low_bytes) + Workspace::padded(sums * sizeof(Real)) +
            Workspace::padded(plan.group_rows * plan.slice_entries * sizeof(Storage)));
    low_ = workspace.take<uint8_t>(plan.low_bytes);
    weight_sums_ = workspace.take<Real>(sums);
    dz_ = workspace.take<Storage>(plan.group_rows * plan.slice_entries);
    pitch_ = plan.slice_entries;
    if (layout_)
      slots_.emplace(args_, layout_->range(pass.first, pass.count), rows_.list, rows_.most);
    for (int64_t entry = 0; entry < vocabulary_; entry += plan.slice_entries) {
      entries_ = {entry, std::min(plan.slice_entries, vocabulary_ - entry)};
      for (int64_t row = 0; row < pass.count; row += plan.group_rows) {
        const int64_t count = std::min(plan.group_rows, pass.count - row);
        const RowRange tokens = slots_ ? rows_.all() : rows_.range(pass.first + row, count);
        make_gradient(tokens);
        if (pass.hidden_side) add_hidden(tokens, low_ + row * depth_);
        if (pass.weight_side) add_weight(tokens, row == 0, row + count == pass.count);
      }
    }
  }

  RowsView dz_rows() const {
    return {dz_,
            c10::CppTypeToScalarType<Storage>::value,
            slots_ ? slots_->map().slot : nullptr,
            pitch_,
            1,
            true};
  }

  void make_gradient(const RowRange& tokens) {
    const GradientEpilogue<Real, Storage> epilogue{
        {map_, data_or_null<Real>(bias_), tokens, entries_.first},
        states_,
        scale_.factor(),
        dz_,
        pitch_};
    if (products_)
      return launch_gradient_of_products<Real, Storage>(slots_ ? &*slots_ : nullptr,
                                                        {products_ + entries_.first, vocabulary_},
                                                        entries_.count, epilogue);
    if constexpr (kOnHopper) {
      if (slots_) return sm90_gradient(args_, *slots_, entries_.count, epilogue);
    }
    launch_gemm<Multiply, RowIs::kOutput, RowIs::kOutput>(
        {hidden_rows(args_.hidden, tokens), weight_rows(args_.weight, entries_.first), tokens.most,
         entries_.count, depth_, tokens, false},
        epilogue);
  }

  void add_hidden(const RowRange& tokens, uint8_t* low) {
    with_output<Multiply>(grads_.hidden, [&](auto* grad) {
      using Out = std::remove_pointer_t<decltype(grad)>;
      const HiddenGradEpilogue<Real, Out> epilogue{grad,
                                                   low,
                                                   tokens,
                                                   depth_,
                                                   scale_.inverse(),
                                                   nullptr,
                                                   entries_.first == 0,
                                                   entries_.end() == vocabulary_};
      if constexpr (kOnHopper) {
        if (slots_)
          return sm90_hidden_grad(args_, *slots_, dz_, pitch_, entries_.first, entries_.count,
                                  epilogue);
      }
      launch_gemm<Multiply, RowIs::kOutput, RowIs::kStep>(
          {dz_rows(), weight_rows(args_.weight, entries_.first), tokens.most, depth_,
           entries_.count, tokens, false},
          epilogue);
    });
  }

  void add_weight(const RowRange& tokens, bool first, bool last) {
    if (grads_.bias.defined())
      launch(&add_bias_grad<Real, Storage>, dim3(blocks_of(entries_.count, kBiasCols)),
             kBiasThreads, 0, tokens, dz_rows(), entries_.count, scale_.inverse(),
             grads_.bias.template mutable_data_ptr<double>() + entries_.first);
    if (!grads_.weight.defined()) return;
    with_output<Multiply>(grads_.weight, [&](auto* grad) {
      using Out = std::remove_pointer_t<decltype(grad)>;
      const WeightGradEpilogue<Real, Out> epilogue{
          grad + entries_.first * depth_, weight_sums_, depth_, scale_.inverse(), first, last};
      Product product{
          dz_rows(), hidden_rows(args_.hidden, tokens), entries_.count, depth_, tokens.most, tokens,
          true};
      if constexpr (kOnHopper) {
        if (slots_) {  // one of the two finds out on the device that it has nothing to do
          sm90_weight_grad(args_, *slots_, dz_, pitch_, entries_.count, epilogue);
          product.only_if = slots_->map().poisoned;
        }
      }
      launch_gemm<Multiply, RowIs::kStep, RowIs::kStep>(product, epilogue);
    });
  }

  const HeadArgs& args_;
  const SelectedRows& rows_;
  const TokenStates<Real> states_;
  const Real* const products_;
  const HeadGrads& grads_;
  const LogitMap<Real> map_;
  const at::Tensor bias_;
  const GradientScale<Multiply> scale_;
  const int64_t depth_, vocabulary_;
  std::optional<SlotLayout> layout_;  // on Hopper
  // of the pass under way
  struct {
    int64_t first, count;
    int64_t end() const { return first + count; }
  } entries_;
  std::optional<Slots> slots_;
  uint8_t* low_;
  Real* weight_sums_;
  Storage* dz_;
  int64_t pitch_;
};

// The tensors of one call in arithmetic precision, so that kernels read them by token.
template <class Real>
struct StateTensors {
  at::Tensor logprobs, entropy, top, log_sum, grad_logprobs, grad_entropy;

  TokenStates<Real> pointers() const {
    return {logprobs.const_data_ptr<Real>(),   data_or_null<Real>(entropy),
            top.const_data_ptr<Real>(),        log_sum.const_data_ptr<Real>(),
            data_or_null<Real>(grad_logprobs), data_or_null<Real>(grad_entropy)};
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> token_logprobs_backward_cuda(
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
  const DeviceGuard guard(hidden.device());
  if (keep == Keep::kJacobian) {
    launch_log.launches += 3;  // a product, a comparison and zeros where there is no gradient
    return jacobian_grads(args, kept, grad_logprobs, needs[0] && !launch_log.dry);
  }
  const bool any = targets.numel() > 0;
  const auto grad_hidden =
      filled(needs[0] ? hidden.sizes() : at::IntArrayRef{0}, 0, hidden.options());
  // Every entry of grad_weight is written, so it needs no zeros, if there is any token at all.
  const auto weight_sizes = needs[1] ? weight.sizes().vec() : std::vector<int64_t>{0};
  const auto grad_weight =
      any ? blank(weight_sizes, weight.options()) : filled(weight_sizes, 0, weight.options());
  const auto bias_sums =
      filled({needs[2] ? weight.size(0) : 0}, 0, weight.options().dtype(at::kDouble));
  HeadGrads grads;
  if (needs[0]) grads.hidden = grad_hidden;
  if (needs[1]) grads.weight = grad_weight;
  if (needs[2]) grads.bias = bias_sums;

  if (any) {
    const auto flat = [&](const at::Tensor& t) { return t.to(top.scalar_type()).contiguous(); };
    const auto optional = [&](const OptionalTensor& t) { return t ? flat(*t) : at::Tensor(); };
    with_arithmetic(args, [&](auto multiply) {
      using Multiply = decltype(multiply);
      using Real = typename Multiply::Real;
      const StateTensors<Real> tensors{
          flat(logprobs), flat(entropy),           flat(top),
          flat(log_sum),  optional(grad_logprobs), optional(grad_entropy)};
      const auto states = tensors.pointers();
      const SelectedRows rows(args, KeepRow<Real>{ignore_index, true, states});
      if (keep == Keep::kDropped && !grad_entropy) {  // the entropy has its whole gradient
        const at::Tensor dropped = kept.contiguous();
        const TwoWays ways(args, rows, dropped);
        // Without tokens, the exact pass leaves zeros in grad_weight.
        HeadBackward<Multiply>(args, ways.exact, states, {}, grads).run();
        return sparse_backward(args, ways.sparse, states, dropped, grads);
      }
      const auto products = keep == Keep::kLogits ? kept.contiguous() : at::Tensor();
      HeadBackward<Multiply>(args, rows, states, products, grads).run();
    });
  }
  const auto bias_type = bias ? bias->scalar_type() : at::kDouble;
  if (launch_log.dry) return {grad_hidden, grad_weight, bias_sums};
  return {grad_hidden, grad_weight, bias_sums.to(bias_type)};
}

SPO_CUDA_LIBRARY(m) { m.impl("token_logprobs_backward", &token_logprobs_backward_cuda); }

}  // namespace
}  // namespace spo::cuda
