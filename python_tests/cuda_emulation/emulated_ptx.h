// SPDX-License-Identifier: Apache-2.0
// The instructions of csrc/cuda/ptx.cuh with the same layouts of fragments.
#pragma once
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "emulate.h"

namespace spo::cuda {

// Nothing lands before it is waited for: until then the destination is NaN.
inline void cp_async_16(void* shared, const void* global, int bytes) {
  TORCH_CHECK(reinterpret_cast<uintptr_t>(shared) % 16 == 0, "cp_async_16: shared not aligned");
  TORCH_CHECK(reinterpret_cast<uintptr_t>(global) % 16 == 0, "cp_async_16: global not aligned");
  TORCH_CHECK(bytes >= 0 && bytes <= 16, "cp_async_16: bytes ", bytes);
  std::memset(shared, 0xff, 16);
  emulate::Block::get().fiber().open.push_back({shared, global, bytes});
}

inline void cp_async_commit() {
  emulate::Fiber& fiber = emulate::Block::get().fiber();
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}

template <int kPending>
inline void cp_async_wait() {
  auto& groups = emulate::Block::get().fiber().groups;
  while (static_cast<int>(groups.size()) > kPending) {
    for (const emulate::Copy& copy : groups.front()) {
      std::memset(copy.to, 0, 16);
      if (copy.bytes > 0) std::memcpy(copy.to, copy.from, copy.bytes);
    }
    groups.pop_front();
  }
}

namespace emulated {

struct Matrices {
  const uint16_t* row;
  uint32_t* out;
};

inline void load_matrices(const char* what, bool transposed, uint32_t (&out)[4], const void* row) {
  TORCH_CHECK(reinterpret_cast<uintptr_t>(row) % 16 == 0, what, ": row not aligned");
  Matrices mine{static_cast<const uint16_t*>(row), out};
  emulate::Block::get().meet(what, 0xffffffff, &mine, [transposed](void** lanes) {
    for (int lane = 0; lane < 32; lane++)
      for (int m = 0; m < 4; m++) {
        const auto element = [&](int r, int c) -> uint32_t {
          return static_cast<Matrices*>(lanes[8 * m + r])->row[c];
        };
        const int one = lane / 4, two = 2 * (lane % 4);
        static_cast<Matrices*>(lanes[lane])->out[m] =
            transposed ? element(two, one) | element(two + 1, one) << 16
                       : element(one, two) | element(one, two + 1) << 16;
      }
  });
}

struct Fragments {
  float* sums;
  const uint32_t *a, *b;
};

template <class T>
float half_of(uint32_t pair, int which) {
  return static_cast<float>(T(static_cast<uint16_t>(pair >> 16 * which), T::from_bits()));
}

}  // namespace emulated

inline void ldmatrix_x4(uint32_t (&out)[4], const void* row) {
  emulated::load_matrices("ldmatrix_x4", false, out, row);
}

inline void ldmatrix_x4_trans(uint32_t (&out)[4], const void* row) {
  emulated::load_matrices("ldmatrix_x4_trans", true, out, row);
}

template <class T>
inline void mma_16x8x16(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulated::Fragments mine{sums, a, b};
  emulate::Block::get().meet("mma_16x8x16", 0xffffffff, &mine, [](void** lanes) {
    float left[16][16], right[16][8];  // [row][k], [k][col]
    for (int lane = 0; lane < 32; lane++) {
      const auto* f = static_cast<emulated::Fragments*>(lanes[lane]);
      const int r = lane / 4, c = 2 * (lane % 4);
      for (int j = 0; j < 2; j++) {
        for (int i = 0; i < 4; i++)
          left[r + 8 * (i % 2)][c + 8 * (i / 2) + j] = emulated::half_of<T>(f->a[i], j);
        for (int i = 0; i < 2; i++) right[c + 8 * i + j][r] = emulated::half_of<T>(f->b[i], j);
      }
    }
    for (int lane = 0; lane < 32; lane++) {
      float* out = static_cast<emulated::Fragments*>(lanes[lane])->sums;
      const int r = lane / 4, c = 2 * (lane % 4);
      for (int i = 0; i < 4; i++) {
        double sum = out[i];
        for (int k = 0; k < 16; k++) sum += double(left[r + 8 * (i / 2)][k]) * right[k][c + i % 2];
        out[i] = static_cast<float>(sum);
      }
    }
  });
}

}  // namespace spo::cuda
