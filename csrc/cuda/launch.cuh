// SPDX-License-Identifier: Apache-2.0
// How every CUDA kernel of the project is started: on the current stream of the tensors' device,
// with the launch checked. Kernels take plain pointers and numbers, never tensors.
// With SPO_EMULATE (python_tests/cuda_emulation) the same sources are compiled for the host and
// run there thread by thread, so that their logic is tested on machines without a GPU.
#pragma once
#include <cstdint>

namespace spo::cuda {

// What this thread has started: kernels, those of ATen that fill memory included, and the bytes
// that products of matrices move, every operand and result once. While it is dry nothing is
// started: the same code then tells what a call would cost.
struct LaunchLog {
  bool dry = false;
  int64_t launches = 0, bytes = 0;

  // Whether a kernel that comes now is to be started.
  bool add() {
    launches++;
    return !dry;
  }
};
inline thread_local LaunchLog launch_log;

}  // namespace spo::cuda

#ifdef SPO_EMULATE
#include "emulate.h"
#else

#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#define SPO_CUDA_LIBRARY(m) TORCH_LIBRARY_IMPL(spo, CUDA, m)
#define SPO_HOST_LIBRARY(m) TORCH_LIBRARY_IMPL(spo, CompositeExplicitAutograd, m)
// A condition on values, which only the device can read without a wait: stops the kernel.
#define SPO_DEVICE_CHECK(condition, message) CUDA_KERNEL_ASSERT_MSG(condition, message)

namespace spo::cuda {

using DeviceGuard = c10::cuda::OptionalCUDAGuard;

// Of the current device: 90 is Hopper.
inline int compute_capability() {
  const auto* device = at::cuda::getCurrentDeviceProperties();
  return device->major * 10 + device->minor;
}

inline int multiprocessors() { return at::cuda::getCurrentDeviceProperties()->multiProcessorCount; }

// A grid with no blocks is no work. More than 48 KiB of shared memory has to be asked for.
template <class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 grid, int threads, size_t shared_bytes, Args... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || !launch_log.add()) return;
  if (shared_bytes > 48 << 10)
    C10_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(shared_bytes)));
  // clang-format off: it would take >>> apart
  kernel<<<grid, threads, shared_bytes, at::cuda::getCurrentCUDAStream()>>>(Params(args)...);
  // clang-format on
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

// The dynamic shared memory of a block.
template <class T>
__device__ __forceinline__ T* shared_memory() {
  extern __shared__ __align__(128) unsigned char spo_shared[];
  return reinterpret_cast<T*>(spo_shared);
}

}  // namespace spo::cuda
#endif

namespace spo::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;  // the lanes of a warp that take part

}  // namespace spo::cuda
