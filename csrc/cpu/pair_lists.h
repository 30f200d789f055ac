// SPDX-License-Identifier: Apache-2.0
// The (row, block of entries) pairs that a backward pass visits, by block.
#pragma once
#include "head_problem.h"

namespace spo {

// One slice of the vocabulary, a group of rows: who kept each block, and whose label lies in a
// block that it dropped. Rows are in increasing order.
struct PairLists {
  std::vector<std::vector<int32_t>> rows, labels;  // [blocks]
  std::vector<int64_t> start;                      // [blocks + 1] pairs before each block

  explicit PairLists(int64_t blocks) : rows(blocks), labels(blocks), start(blocks + 1) {}
  int64_t blocks() const { return static_cast<int64_t>(rows.size()); }
  int64_t pairs() const { return start.back(); }

  // Sets the lists to rows [first, end) as far as `capacity` pairs go; returns the row after.
  template <class Real>
  int64_t fill(const Rows& all, const Real* dropped, int64_t row_blocks, int64_t slice,
               int64_t first, int64_t end, int64_t capacity) {
    for (auto& list : rows) list.clear();
    for (auto& list : labels) list.clear();
    int64_t total = 0, row = first;
    for (; row < end && total + blocks() <= capacity; row++) {
      const Real* mass = dropped + all.token[row] * row_blocks + slice;
      for (int64_t b = 0; b < blocks(); b++)
        if (mass[b] < 0) rows[b].push_back(row), total++;
      const int64_t home = all.label[row] / kBlockCols - slice;
      if (home >= 0 && home < blocks() && mass[home] >= 0) labels[home].push_back(row);
    }
    for (int64_t b = 0; b < blocks(); b++)
      start[b + 1] = start[b] + static_cast<int64_t>(rows[b].size());
    return row;
  }

  struct Piece {
    int64_t block, first, rows;  // of the block's list
  };

  // The lists cut into pieces of at most `most` rows.
  std::vector<Piece> pieces(int64_t most) const {
    std::vector<Piece> out;
    for (int64_t block = 0; block < blocks(); block++) {
      const int64_t all = static_cast<int64_t>(rows[block].size());
      for (int64_t first = 0; first < all; first += most)
        out.push_back({block, first, std::min(most, all - first)});
    }
    return out;
  }
};

}  // namespace spo
