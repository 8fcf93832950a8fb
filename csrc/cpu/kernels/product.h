// The product of two packed operands, whose sums stay in registers over the whole depth.

#pragma once

#include "vectors.h"

namespace dyhead::cpu::DYHEAD_PATH {
namespace {

// One step along the depth: total += left * right, where the left operand is the same for all columns.
template <typename A>
DYHEAD_INLINE Vector<A> load_operand(const A* from) {
  return load(from);
}
template <typename A>
DYHEAD_INLINE void multiply_add(Vector<A>& total, const A* left, Vector<A> right) {
  total += *left * right;
}

#if defined(DYHEAD_PAIRS)

DYHEAD_INLINE Vector<BFloat16> load_operand(const BFloat16* from) { return (Vector<BFloat16>)_mm512_loadu_si512(from); }
DYHEAD_INLINE void multiply_add(Vector<float>& total, const BFloat16* left, Vector<BFloat16> right) {
  int pair;
  std::memcpy(&pair, left, sizeof(pair));
  total = (Vector<float>)_mm512_dpbf16_ps((__m512)total, right, (Vector<BFloat16>)_mm512_set1_epi32(pair));
}

#endif

// One block: its sums stay in registers over the whole depth and are added to memory once.
template <int kRows, typename P, typename A>
DYHEAD_INLINE void product_block(int64_t units, const P* left, int64_t left_row_stride, int64_t left_depth_stride,
                                 const P* right, int64_t right_depth_stride, A* sums, int64_t sums_stride) {
  constexpr int64_t kVector = kLanes<A> * kUnit<P>;
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {  // needed at the end
    __builtin_prefetch(sums + r * sums_stride, 1);
    __builtin_prefetch(sums + r * sums_stride + kLanes<A>, 1);
  }
  Vector<A> total[kRows][2] = {};
  for (int64_t d = 0; d < units; ++d, left += left_depth_stride, right += right_depth_stride) {
    const Vector<P> right0 = load_operand(right), right1 = load_operand(right + kVector);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      multiply_add(total[r][0], left + r * left_row_stride, right0);
      multiply_add(total[r][1], left + r * left_row_stride, right1);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    A* row = sums + r * sums_stride;
    store(row, load(row) + total[r][0]);
    store(row + kLanes<A>, load(row + kLanes<A>) + total[r][1]);
  }
}

template <int kRows, typename P, typename A>
DYHEAD_INLINE void product_rows(int64_t units, const P* left, Operand<P> operand, const P* right,
                                int64_t right_depth_stride, A* sums, int64_t sums_stride) {
  // A constant stride makes for shorter addresses.
  if (operand.row_stride == kUnit<P>) {
    product_block<kRows>(units, left, kUnit<P>, operand.depth_stride, right, right_depth_stride, sums, sums_stride);
  } else {
    product_block<kRows>(units, left, operand.row_stride, kUnit<P>, right, right_depth_stride, sums, sums_stride);
  }
}

constexpr int kBlockRows = DYHEAD_ROWS / 3;

template <typename P, typename A>
DYHEAD_TARGET void product(int64_t row_blocks, int64_t column_blocks, int64_t units, Operand<P> left, const P* right,
                           int64_t right_block_stride, int64_t right_depth_stride, A* sums, int64_t sums_stride) {
  const int64_t rows = row_blocks * kBlockRows;
  for (int64_t column = 0; column < column_blocks; ++column, right += right_block_stride, sums += 2 * kLanes<A>) {
    int64_t row = 0;
    for (; row + DYHEAD_ROWS <= rows; row += DYHEAD_ROWS) {
      product_rows<DYHEAD_ROWS>(units, left.data + row * left.row_stride, left, right, right_depth_stride,
                                sums + row * sums_stride, sums_stride);
    }
    if (rows - row == 2 * kBlockRows) {
      product_rows<2 * kBlockRows>(units, left.data + row * left.row_stride, left, right, right_depth_stride,
                                   sums + row * sums_stride, sums_stride);
    } else if (rows - row == kBlockRows) {
      product_rows<kBlockRows>(units, left.data + row * left.row_stride, left, right, right_depth_stride,
                               sums + row * sums_stride, sums_stride);
    }
  }
}

}  // namespace
}  // namespace dyhead::cpu::DYHEAD_PATH
