// SPDX-License-Identifier: Apache-2.0
// Which rows of hidden the Hopper kernels visit (head_sm90.h): all of it stays on the device.
#include <algorithm>
#include <utility>
#include <vector>

#include "head_problem.cuh"
#include "head_sm90.h"

namespace spo::cuda {
namespace {

constexpr int kPlaceThreads = 256, kListThreads = 1024, kCheckThreads = 256;

__global__ void __launch_bounds__(kPlaceThreads)
    place_tokens(RowRange tokens, SlotLayout layout, int64_t* place, int64_t* slot_of) {
  const int64_t row = int64_t(blockIdx.x) * kPlaceThreads + threadIdx.x;
  if (row >= tokens.size()) return;
  const int64_t slot = tokens.list.offset[row] / layout.stride - layout.first;
  slot_of[row] = slot;
  if (slot >= 0 && slot < layout.slots) place[slot] = row;
}

// Whether the warp's group of `width` slots has a token in it; the same for every lane.
__device__ bool group_counts(const int64_t* place, int64_t slots, int64_t group, int width) {
  bool any = false;
  for (int i = threadIdx.x % 32; i < width; i += 32) {
    const int64_t slot = group * width + i;
    any = any || (slot < slots && place[slot] >= 0);
  }
  return __ballot_sync(kAllLanes, any) != 0;
}

// One block: a warp looks at a group of slots, then the groups found are listed in order.
__global__ void __launch_bounds__(kListThreads)
    list_groups(const int64_t* place, int64_t slots, int width, int32_t* list, int32_t* count) {
  constexpr int kWarps = kListThreads / 32;
  __shared__ bool found[kWarps];
  const int64_t groups = (slots + width - 1) / width;
  const int warp = threadIdx.x / 32;
  int32_t listed = 0;
  for (int64_t first = 0; first < groups; first += kWarps) {
    const bool counts = group_counts(place, slots, first + warp, width);
    if (threadIdx.x % 32 == 0) found[warp] = counts;
    __syncthreads();
    for (int w = 0; w < kWarps; w++) {
      if (!found[w]) continue;
      if (threadIdx.x == 0) list[listed] = static_cast<int32_t>(first + w);
      listed++;
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) *count = listed;
}

// One warp per slot. All ones in the exponent: Inf or NaN.
__global__ void __launch_bounds__(kCheckThreads)
    check_unused(const int64_t* place, SlotLayout layout, const uint16_t* hidden, int64_t depth,
                 uint16_t exponent, int32_t* poisoned) {
  const int64_t slot = int64_t(blockIdx.x) * (kCheckThreads / 32) + threadIdx.x / 32;
  if (slot >= layout.slots || place[slot] >= 0) return;
  if (!group_counts(place, layout.slots, slot / kSm90Steps, kSm90Steps)) return;
  const uint16_t* const row = hidden + (layout.first + slot) * layout.stride;
  bool bad = false;
  for (int64_t k = threadIdx.x % 32; k < depth; k += 32)
    bad = bad || (row[k] & exponent) == exponent;
  if (bad) *poisoned = 1;
}

}  // namespace

bool SlotLayout::fit(const HeadArgs& args, SlotLayout* out) {
  const at::Tensor &hidden = args.hidden, &weight = args.weight;
  const auto type = hidden.scalar_type();
  const int64_t depth = weight.size(1), chunk = 8;
  if ((type != at::kHalf && type != at::kBFloat16) || weight.scalar_type() != type) return false;
  if (depth % chunk != 0 || !rows_start_aligned(weight) || weight.stride(0) < depth) return false;
  if (hidden.stride(-1) != 1 || hidden.numel() == 0 ||
      reinterpret_cast<uintptr_t>(hidden.const_data_ptr()) % 16 != 0)
    return false;
  std::vector<std::pair<int64_t, int64_t>> dims;  // (stride, size), the closest first
  for (int64_t i = 0; i + 1 < hidden.dim(); i++)
    if (hidden.size(i) > 1) dims.emplace_back(hidden.stride(i), hidden.size(i));
  std::sort(dims.begin(), dims.end());
  const int64_t stride = dims.empty() ? depth : dims.front().first;
  if (stride < depth || stride % chunk != 0) return false;
  int64_t slots = 1, tokens = 1;
  for (const auto& [distance, size] : dims) {
    // A row that several tokens share, as in an expanded tensor, is no slot.
    if (distance % stride != 0 || distance / stride < slots) return false;
    slots += (size - 1) * (distance / stride);
    tokens *= size;
  }
  if (slots > tokens + tokens / 4 + kSm90PairRows || slots > INT32_MAX) return false;
  *out = {0, slots, stride};
  return true;
}

Slots::Slots(const HeadArgs& args, const SlotLayout& layout, const RowList& list, int64_t tokens)
    : layout_(layout) {
  const auto options = args.hidden.options();
  const int64_t slots = layout.slots;
  const int64_t pairs = blocks_of(slots, kSm90PairRows), steps = blocks_of(slots, kSm90Steps);
  place_ = filled({slots}, -1, options.dtype(at::kLong));
  slot_ = blank({tokens}, options.dtype(at::kLong));
  lists_ = filled({pairs + steps + 3}, 0, options.dtype(at::kInt));
  int64_t* const place = place_.mutable_data_ptr<int64_t>();
  int32_t* const counts = lists_.mutable_data_ptr<int32_t>();
  int32_t* const pair_list = counts + 3;
  int32_t* const step_list = pair_list + pairs;
  map_ = {
      place, pair_list, counts, step_list, counts + 1, counts + 2, slot_.const_data_ptr<int64_t>()};
  launch(&place_tokens, dim3(blocks_of(tokens, kPlaceThreads)), kPlaceThreads, 0,
         RowRange{list, 0, tokens}, layout, place, slot_.mutable_data_ptr<int64_t>());
  launch(&list_groups, dim3(1), kListThreads, 0, place, slots, kSm90PairRows, pair_list, counts);
  launch(&list_groups, dim3(1), kListThreads, 0, place, slots, kSm90Steps, step_list, counts + 1);
  const uint16_t exponent = args.hidden.scalar_type() == at::kHalf ? 0x7c00 : 0x7f80;
  launch(&check_unused, dim3(blocks_of(slots, kCheckThreads / 32)), kCheckThreads, 0, place, layout,
         static_cast<const uint16_t*>(args.hidden.const_data_ptr()), args.weight.size(1), exponent,
         counts + 2);
}

}  // namespace spo::cuda
