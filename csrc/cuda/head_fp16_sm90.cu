// SPDX-License-Identifier: Apache-2.0
// The Hopper kernels for float16 inputs; empty where they cannot be built.
#ifdef SPO_CUTLASS
#include "head_sm90_launch.cuh"

namespace spo::cuda {
SPO_INSTANTIATE_SM90(c10::Half)
}  // namespace spo::cuda
#endif
