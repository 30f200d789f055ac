// SPDX-License-Identifier: Apache-2.0
// The inner loops of the LM head, compiled once per instruction set (head_kernels_*.cpp) and picked
// at run time. Everything works on packed panels in the arithmetic type (float, or double for
// double):
//   A  tiles of `tile_rows` rows in one of two layouts (Left)
//   B  panels of `panel_cols` columns, [panel][k][panel_cols], zero-padded at the right edge
//   C  one pointer per row, so that a result can be scattered without a copy
// Each element of C is a chain of fused multiply-adds in the order of k, in steps of kDepthStep,
// whatever the number of rows and columns around it: this is what makes a token's result
// independent of its batch.
#pragma once
#include <cstdint>

#include "../math/logit_map.h"
#include "../math/logsumexp.h"

namespace spo {

constexpr int64_t kBlockCols = 256;  // vocabulary columns per block of statistics (kBlockEntries)
constexpr int64_t kDepthStep = 128;  // k-steps summed in registers before C is touched

// Where element (row, k) of a tile of A lies. Known when the kernel is compiled, so that the rows'
// offsets need no registers.
enum class Left {
  kPanel,  // k * tile_rows + row
  kBlock,  // row * kBlockCols + k
};

template <class Real>
struct Gemm {
  int64_t rows, cols, depth;
  Left layout;
  const Real* a;
  int64_t a_tile;  // stride between tiles
  const Real* b;
  int64_t b_panel;  // stride between panels
  Real* const* c;   // [rows]
  bool accumulate;  // C += A B instead of C = A B
};

// One token's logits in one vocabulary block: raw products on entry.
template <class Real>
struct LogitRow {
  Real* logits;      // [kBlockCols]; the columns from `cols` on are padding
  const Real* bias;  // [kBlockCols] or null
  int64_t cols;
  int64_t label;  // column of the label in this block, or -1
};

template <class Real>
struct HeadKernels {
  const char* isa;
  int64_t tile_rows, panel_cols;
  void (*gemm)(const Gemm<Real>&);
  // Statistics over the columns other than the label; *label_logit, unscaled, is set if the label
  // is in the block.
  BlockStats<Real> (*statistics)(const LogitRow<Real>&, const LogitMap<Real>&, bool entropy,
                                 double* label_logit);
  // Replaces the raw products by dL/draw.
  void (*gradient)(const LogitRow<Real>&, const LogitMap<Real>&, bool entropy,
                   const TokenGrad<Real>&);
  // Rows of one block, [rows][kBlockCols], as a left factor transposed: [panels of tile_rows
  // columns][row][tile_rows], with `stride` rows per panel in `out`.
  void (*transpose_block)(const Real* block, int64_t rows, Real* out, int64_t stride);
};

// The kernels for the best instruction set this processor has (or the one that SPO_CPU_ISA names).
template <class Real>
const HeadKernels<Real>& head_kernels();

}  // namespace spo
