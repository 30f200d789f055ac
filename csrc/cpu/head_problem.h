// SPDX-License-Identifier: Apache-2.0
// What forward and backward of the LM head share on the CPU: the rows that count, and the copies of
// hidden and weight into panels in arithmetic precision, a slice at a time. Packing is the only
// place that reads hidden and weight, so strides, dtypes and skipped tokens end here.
#pragma once
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <atomic>
#include <iterator>
#include <optional>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../checks.h"
#include "head_kernels.h"

namespace spo {

// Tokens that take part, in order: their position, label and offset of their row in hidden's
// storage.
struct Rows {
  std::vector<int64_t> token, label, offset;
  int64_t size() const { return static_cast<int64_t>(token.size()); }
};

// The rows of `matrix` [.., columns] whose keep(position, label) holds.
template <class Keep>
Rows collect_rows(const at::Tensor& matrix, const at::Tensor& targets, const Keep& keep) {
  const auto labels = targets.to(at::kLong).contiguous();
  const int64_t* label = labels.const_data_ptr<int64_t>();
  Rows rows;
  for (int64_t i = 0; i < labels.numel(); i++) {
    if (!keep(i, label[i])) continue;
    int64_t offset = 0, rest = i;
    for (int64_t dim = matrix.dim() - 2; dim >= 0; dim--) {
      offset += rest % matrix.size(dim) * matrix.stride(dim);
      rest /= matrix.size(dim);
    }
    rows.token.push_back(i), rows.label.push_back(label[i]), rows.offset.push_back(offset);
  }
  return rows;
}

// Where the forward pass leaves a token's results; entropy may be null.
template <class Real>
struct TokenOutputs {
  Real *logprobs, *entropy, *top, *log_sum;

  void write(int64_t token, const TokenSoftmax& softmax) const {
    logprobs[token] = static_cast<Real>(softmax.logprob);
    top[token] = static_cast<Real>(softmax.top);
    log_sum[token] = static_cast<Real>(softmax.log_sum);
    if (entropy) entropy[token] = static_cast<Real>(softmax.entropy);
  }
};

// What the forward pass left and the gradients that came in, per token, in arithmetic precision.
struct TokenState {
  at::Tensor logprobs, entropy, top, log_sum;
  OptionalTensor grad_logprobs, grad_entropy;

  TokenState(const OptionalTensor& grad_logprobs_in, const OptionalTensor& grad_entropy_in,
             const at::Tensor& logprobs_in, const at::Tensor& entropy_in, const at::Tensor& top_in,
             const at::Tensor& log_sum_in) {
    const auto flat = [&](const at::Tensor& t) { return t.to(top_in.scalar_type()).contiguous(); };
    logprobs = flat(logprobs_in), entropy = flat(entropy_in);
    top = flat(top_in), log_sum = flat(log_sum_in);
    if (grad_logprobs_in) grad_logprobs = flat(*grad_logprobs_in);
    if (grad_entropy_in) grad_entropy = flat(*grad_entropy_in);
  }

  template <class Real>
  TokenGrad<Real> grad_of(int64_t token) const {
    const auto at = [&](const at::Tensor& t) { return t.const_data_ptr<Real>()[token]; };
    TokenGrad<Real> out{at(top), at(log_sum), at(logprobs), 0, 0, 0};
    if (grad_logprobs) out.grad_logprob = at(*grad_logprobs);
    if (grad_entropy) out.grad_entropy = at(*grad_entropy), out.entropy = at(entropy);
    return out;
  }

  template <class Real>
  bool needs_gradient(int64_t token) const {  // a NaN is not zero: it goes on
    const TokenGrad<Real> grad = grad_of<Real>(token);
    return grad.grad_logprob != 0 || grad.grad_entropy != 0;
  }
};

// Rows of a tensor of any float type and any strides.
struct MatrixView {
  const at::Tensor& tensor;
  const int64_t* offsets;  // of each row; null: row * row_stride
  int64_t row_stride, col_stride;

  static MatrixView of_weight(const at::Tensor& weight) {
    return {weight, nullptr, weight.stride(0), weight.stride(1)};
  }
  static MatrixView of_rows(const at::Tensor& hidden, const Rows& rows) {
    return {hidden, rows.offset.data(), 0, hidden.stride(-1)};
  }
  int64_t offset(int64_t row) const { return offsets ? offsets[row] : row * row_stride; }
};

inline int64_t panels(int64_t size, int64_t width) { return (size + width - 1) / width; }

// Tasks handed out one at a time: a thread that is held up by other work on the machine takes
// fewer. Which thread runs a task never matters to its result.
class TaskQueue {
 public:
  explicit TaskQueue(int64_t tasks) : tasks_(tasks) {}
  bool take(int64_t* task) {
    *task = next_.fetch_add(1, std::memory_order_relaxed);
    return *task < tasks_;
  }

 private:
  const int64_t tasks_;
  std::atomic<int64_t> next_{0};
};

// Runs work(queue) once per thread; it takes tasks until there are none.
template <class Work>
void parallel_tasks(int64_t tasks, const Work& work) {
  TaskQueue queue(tasks);
  at::parallel_for(0, std::min<int64_t>(tasks, at::get_num_threads()), 1,
                   [&](int64_t, int64_t) { work(queue); });
}

#define SPO_DISPATCH_STORAGE(TYPE, NAME, ...) \
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, TYPE, NAME, __VA_ARGS__)

// Panels of `width` rows, depth-major: out[panel][k][width], zero where there is no row.
template <class Real>
void pack_rows(const MatrixView& m, int64_t first, int64_t rows, int64_t depth, int64_t width,
               Real* out) {
  SPO_DISPATCH_STORAGE(m.tensor.scalar_type(), "pack_rows", [&] {
    const scalar_t* data = m.tensor.const_data_ptr<scalar_t>();
    at::parallel_for(0, panels(rows, width), 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; p++) {
        Real* panel = out + p * depth * width;
        const int64_t valid = std::min(width, rows - p * width);
        if (valid < width) std::fill_n(panel, depth * width, Real(0));
        for (int64_t k0 = 0; k0 < depth;
             k0 += 64) {  // the piece of the panel being written stays in L1
          for (int64_t i = 0; i < valid; i++) {
            const scalar_t* source = data + m.offset(first + p * width + i);
            for (int64_t k = k0; k < std::min(k0 + 64, depth); k++)
              panel[k * width + i] = static_cast<Real>(source[k * m.col_stride]);
          }
        }
      }
    });
  });
}

// Panels of `width` columns, row-major inside: out[panel][row][width], zero right of the last
// column.
template <class Real>
void pack_cols(const MatrixView& m, int64_t first, int64_t rows, int64_t cols, int64_t width,
               Real* out) {
  SPO_DISPATCH_STORAGE(m.tensor.scalar_type(), "pack_cols", [&] {
    const scalar_t* data = m.tensor.const_data_ptr<scalar_t>();
    at::parallel_for(0, panels(cols, width), 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; p++) {
        Real* panel = out + p * rows * width;
        const int64_t valid = std::min(width, cols - p * width);
        for (int64_t row = 0; row < rows; row++) {
          const scalar_t* source = data + m.offset(first + row) + p * width * m.col_stride;
          for (int64_t j = 0; j < width; j++)
            panel[row * width + j] =
                j < valid ? static_cast<Real>(source[j * m.col_stride]) : Real(0);
        }
      }
    });
  });
}

// Scratch arrays cut from one allocation. A single large block goes back to the system when it is
// freed; several smaller ones would stay in the heap and count against the memory contract.
template <class Real>
class Workspace {
 public:
  explicit Workspace(const std::vector<int64_t>& sizes) {
    int64_t total = 0;
    for (const int64_t size : sizes) {
      starts_.push_back(total);
      total += panels(size, kAlign) * kAlign;
    }
    block_ = at::empty({total}, c10::CppTypeToScalarType<Real>::value);
    use_large_pages();
  }
  Real* array(size_t i) const { return block_.template mutable_data_ptr<Real>() + starts_[i]; }

 private:
  // Panels are walked with strides of many pages: with pages of 2 MiB the products run about 5%
  // faster.
  void use_large_pages() const {
#if defined(__linux__)
    constexpr uintptr_t kPage = 2 << 20;
    const uintptr_t begin =
        (reinterpret_cast<uintptr_t>(block_.data_ptr()) + kPage - 1) / kPage * kPage;
    const uintptr_t end =
        (reinterpret_cast<uintptr_t>(block_.data_ptr()) + block_.nbytes()) / kPage * kPage;
    if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a hint
#endif
  }

  static constexpr int64_t kAlign = 64 / sizeof(Real);  // a cache line
  std::vector<int64_t> starts_;
  at::Tensor block_;
};

template <class Real>
Real* data_of(const at::Tensor& t) {
  return t.mutable_data_ptr<Real>();
}

template <class Real>
bool is_sum_type(const at::Tensor& t) {
  return t.scalar_type() == c10::CppTypeToScalarType<Real>::value;
}

// Rounds `rows` rows of sums into rows of `out`.
template <class Real, class RowOf>
void write_rows(const Real* sums, int64_t rows, const at::Tensor& out, const RowOf& row_of) {
  const int64_t depth = out.size(1);
  SPO_DISPATCH_STORAGE(out.scalar_type(), "write_rows", [&] {
    scalar_t* data = out.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++)
        for (int64_t k = 0; k < depth; k++)
          data[row_of(i) * depth + k] = static_cast<scalar_t>(sums[i * depth + k]);
    });
  });
}

// bias of vocabulary columns [first, first + kBlockCols) in arithmetic precision.
template <class Real>
std::vector<Real> bias_block(const OptionalTensor& bias, int64_t first, int64_t cols) {
  if (!bias) return {};
  std::vector<Real> out(kBlockCols, Real(0));
  const auto block = bias->narrow(0, first, cols).to(c10::CppTypeToScalarType<Real>::value);
  for (int64_t j = 0; j < cols; j++)
    out[j] = block.template const_data_ptr<Real>()[j * block.stride(0)];
  return out;
}

template <class Real>
LogitMap<Real> logit_map(const HeadArgs& a) {
  return LogitMap<Real>::make(a.temperature, a.logit_scale, a.softcap.value_or(0));
}

// Rows of one task: enough to use a packed block of weight well, few enough to give every thread
// some.
template <class Real>
int64_t row_chunk_for(int64_t rows) {
  const int64_t tile_rows = head_kernels<Real>().tile_rows;
  const int64_t most = std::max<int64_t>(112 / tile_rows, 1);
  const int64_t fair = panels(panels(rows, at::get_num_threads()), tile_rows);
  return std::max<int64_t>(std::min(most, fair), 1) * tile_rows;
}

}  // namespace spo
