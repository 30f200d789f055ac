// SPDX-License-Identifier: Apache-2.0
// CUDA C++ for the host compiler, as far as csrc/cuda uses it: blocks run one after the other,
// their threads as fibers (fibers.h). Shared memory is NaN before each block, asynchronous copies
// land when they are waited for, and a barrier that cannot be passed is an error.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <mutex>
#include <optional>
#include <tuple>
#include <type_traits>

#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))

#define SPO_CUDA_LIBRARY(m) TORCH_LIBRARY_IMPL(spo_emulated, CPU, m)
#define SPO_HOST_LIBRARY(m) TORCH_LIBRARY_IMPL(spo_emulated, CompositeExplicitAutograd, m)
#define SPO_DEVICE_CHECK(condition, message) TORCH_CHECK(condition, message)
#undef CUDA_KERNEL_ASSERT
#define CUDA_KERNEL_ASSERT(condition) TORCH_CHECK(condition, #condition)

#define SPO_VECTOR_TYPES(T, name)                    \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; }; \
  struct alignas(16) name##4 { T x, y, z, w; };
SPO_VECTOR_TYPES(float, float)
SPO_VECTOR_TYPES(int, int)
SPO_VECTOR_TYPES(unsigned, uint)
#undef SPO_VECTOR_TYPES
struct alignas(16) double2 {
  double x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }

template <class A, class B>
inline std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <class A, class B>
inline std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}
template <class T>
inline T __ldg(const T* p) {
  return *p;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline float __expf(float x) { return ::expf(x); }
inline float __logf(float x) { return ::logf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline double __dmul_rn(double x, double y) { return x * y; }
inline double __dadd_rn(double x, double y) { return x + y; }
inline float __fmaf_rn(float x, float y, float z) { return ::fmaf(x, y, z); }
inline float __int_as_float(int x) { return __builtin_bit_cast(float, x); }
inline int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
inline float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }
inline unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
inline void __threadfence() {}
inline void __threadfence_block() {}
[[noreturn]] inline void __trap() { TORCH_CHECK(false, "__trap"); }

inline void __syncthreads() { spo::emulate::Block::get().sync_block(); }
inline void __syncwarp(unsigned mask = 0xffffffff) {
  spo::emulate::Block::get().meet("__syncwarp", mask, nullptr, [](void**) {});
}

namespace spo::emulate {

template <class T>
struct Shuffle {
  unsigned mask;
  int from;  // the lane to read
  T mine, got;
};

template <class T, class From>
T shuffle(const char* what, unsigned mask, T value, int width, const From& from) {
  const int lane = threadIdx.x % 32, first = lane & ~(width - 1);
  const int source = from(lane, first);
  const bool inside = source >= first && source < first + width;
  Shuffle<T> mine{mask, inside ? source : lane, value, value};
  Block::get().meet(what, mask, &mine, [mask](void** lanes) {
    for (int i = 0; i < 32; i++) {
      if (!(mask >> i & 1)) continue;
      auto* to = static_cast<Shuffle<T>*>(lanes[i]);
      TORCH_CHECK(mask >> to->from & 1, "shuffle: lane ", i, " reads lane ", to->from,
                  ", which is not in the mask");
      to->got = static_cast<Shuffle<T>*>(lanes[to->from])->mine;
    }
  });
  return mine.got;
}

inline unsigned ballot(const char* what, unsigned mask, bool vote) {
  struct Vote {
    bool mine;
    unsigned all;
  } mine{vote, 0};
  Block::get().meet(what, mask, &mine, [mask](void** lanes) {
    unsigned all = 0;
    for (int i = 0; i < 32; i++)
      if (mask >> i & 1) all |= unsigned(static_cast<Vote*>(lanes[i])->mine) << i;
    for (int i = 0; i < 32; i++)
      if (mask >> i & 1) static_cast<Vote*>(lanes[i])->all = all;
  });
  return mine.all;
}

}  // namespace spo::emulate

template <class T>
inline T __shfl_sync(unsigned mask, T v, int from, int width = 32) {
  return spo::emulate::shuffle("__shfl_sync", mask, v, width,
                               [=](int, int first) { return first + (from & (width - 1)); });
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T v, int bits, int width = 32) {
  return spo::emulate::shuffle("__shfl_xor_sync", mask, v, width,
                               [=](int lane, int) { return lane ^ bits; });
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32) {
  return spo::emulate::shuffle("__shfl_up_sync", mask, v, width,
                               [=](int lane, int) { return lane - static_cast<int>(delta); });
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32) {
  return spo::emulate::shuffle("__shfl_down_sync", mask, v, width,
                               [=](int lane, int) { return lane + static_cast<int>(delta); });
}
inline unsigned __ballot_sync(unsigned mask, bool vote) {
  return spo::emulate::ballot("__ballot_sync", mask, vote);
}
inline int __any_sync(unsigned mask, bool vote) {
  return spo::emulate::ballot("__any_sync", mask, vote) != 0;
}
inline int __all_sync(unsigned mask, bool vote) {
  return spo::emulate::ballot("__all_sync", mask, vote) == mask;
}

namespace spo::cuda {

struct DeviceGuard {
  explicit DeviceGuard(std::optional<c10::Device>) {}
};

// SPO_EMULATE_HOPPER=1 in the environment makes the ops take the path of sm_90a (hopper.cpp).
inline int compute_capability() {
  const char* hopper = std::getenv("SPO_EMULATE_HOPPER");
  return hopper && hopper[0] == '1' ? 90 : 80;
}

inline int multiprocessors() { return 3; }

namespace emulated {
inline unsigned char* shared = nullptr;
inline std::mutex one_kernel_at_a_time;
}  // namespace emulated

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 grid, int threads, size_t shared_bytes, Args... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || !launch_log.add()) return;
  TORCH_CHECK(threads > 0 && threads <= 1024 && threads % 32 == 0, "bad block of ", threads);
  TORCH_CHECK(grid.x <= 0x7fffffff && grid.y <= 65535 && grid.z <= 65535, "bad grid");
  TORCH_CHECK(shared_bytes <= 227 << 10, "bad shared memory: ", shared_bytes);
  const std::lock_guard<std::mutex> lock(emulated::one_kernel_at_a_time);
  const std::tuple<std::decay_t<Params>...> params{Params(args)...};
  void* shared = nullptr;  // its own piece of the heap, so that a sanitizer sees where it ends
  TORCH_CHECK(posix_memalign(&shared, 128, shared_bytes) == 0);
  const std::unique_ptr<void, decltype(&std::free)> owner(shared, &std::free);
  emulated::shared = static_cast<unsigned char*>(shared);
  blockDim = dim3(threads), gridDim = grid;
  for (blockIdx.z = 0; blockIdx.z < grid.z; blockIdx.z++)
    for (blockIdx.y = 0; blockIdx.y < grid.y; blockIdx.y++)
      for (blockIdx.x = 0; blockIdx.x < grid.x; blockIdx.x++) {
        std::memset(shared, 0xff, shared_bytes);  // NaN in every float type
        emulate::Block::get().run(threads, [&] { std::apply(kernel, params); });
      }
}

template <class T>
T* shared_memory() {
  return reinterpret_cast<T*>(emulated::shared);
}

}  // namespace spo::cuda
