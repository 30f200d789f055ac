// SPDX-License-Identifier: Apache-2.0
// The schemas of csrc/spo_ops.cpp again, as the library spo_emulated.
#include <torch/library.h>
#undef TORCH_LIBRARY
#define TORCH_LIBRARY(name, m) TORCH_LIBRARY_FRAGMENT(spo_emulated, m)
#include "../../csrc/spo_ops.cpp"
