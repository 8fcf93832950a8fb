// Products of two tiles in shared memory, added to sums in registers: on tensor cores, or with multiply-add
// instructions where the type has to be exact (float32 without TF32, float64). Both spread the sums over a warp in the
// same way.
//
// A tile has rows of 128 bytes. The 16-byte chunks of a row stand in an order that depends on the row, so that neither
// rows side by side nor a column of chunks meet in the same banks; it is the order that TMA and wgmma call 128B
// swizzle.

#pragma once

#include <cstring>

#include "warp_groups.h"

namespace dyhead::cuda {

constexpr int kRowBytes = 128;
constexpr int kChunks = kRowBytes / static_cast<int>(sizeof(Vector));

// Elements of a vector, and of a row.
template <typename T>
constexpr int kVector = static_cast<int>(sizeof(Vector) / sizeof(T));
template <typename T>
constexpr int kRow = kRowBytes / static_cast<int>(sizeof(T));

DYHEAD_HOST_DEVICE int tile_offset(int row, int chunk) {
  return row * kRowBytes + (chunk ^ (row & 7)) * static_cast<int>(sizeof(Vector));
}

// What a warp sums up: 16 * kRowBlocks rows by 8 * kColumnBlocks columns. With g = lane / 4 and t = lane % 4, a lane
// has rows g and g + 8 and columns 2t and 2t + 1 of every block: the layout of mma.m16n8.
template <typename A, int kRowBlocks, int kColumnBlocks>
struct Sums {
  A at[kRowBlocks][kColumnBlocks][4];

  DYHEAD_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < kRowBlocks; ++i) {
#pragma unroll
      for (int j = 0; j < kColumnBlocks; ++j) {
#pragma unroll
        for (int k = 0; k < 4; ++k) at[i][j][k] = A(0);
      }
    }
  }

  // Calls visit(row, column, first, second) for every two neighbours in a row that this lane has.
  template <typename Visit>
  DYHEAD_DEVICE void visit_pairs(const Visit& visit) const {
#pragma unroll
    for (int j = 0; j < kColumnBlocks; ++j) {
      visit_pairs_of_block(j,
                           [&](int row, int column, A first, A second) { visit(row, j * 8 + column, first, second); });
    }
  }
  // The same for block j of 8 columns, counted from its first one.
  template <typename Visit>
  DYHEAD_DEVICE void visit_pairs_of_block(int j, const Visit& visit) const {
    const int lane = thread_index() % kWarp;
#pragma unroll
    for (int i = 0; i < kRowBlocks; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        visit(i * 16 + half * 8 + lane / 4, lane % 4 * 2, at[i][j][2 * half], at[i][j][2 * half + 1]);
      }
    }
  }
};

// Operands lie in tiles of two kinds. Where a tile's rows are the product's rows (or columns), the depth runs along a
// row, and kSteps steps cover it. Where they are the depth, element (depth, i) lies in panel i / kRow, in its row
// `depth`; panels of kPanelRows rows each follow each other.
constexpr int kSteps = 4;
constexpr int kPanelRows = 64;

DYHEAD_HOST_DEVICE int panel_offset(int row, int chunk) {
  return chunk / kChunks * kPanelRows * kRowBytes + tile_offset(row, chunk % kChunks);
}

template <typename T, bool kTensorCores>
struct Product;

template <typename T>
struct Product<T, true> {
  // Depth of one instruction, and steps of kPanelRows.
  static constexpr int kDepth = 32 / static_cast<int>(sizeof(T));
  static constexpr int kPanelSteps = kPanelRows / kDepth;

  // A vector of operands.
  DYHEAD_DEVICE static Vector pack(const float (&value)[kVector<T>]) {
    Vector result;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (std::is_same_v<T, float>) {
        result.word[i] = round_to_tf32(value[i]);
      } else {
        result.word[i] = pack_pair(T(), value[2 * i], value[2 * i + 1]);
      }
    }
    return result;
  }

  // sums += left (rows from `left_row` on) * right^T (rows from `right_row` on), over step `step` of their depth.
  template <int kRowBlocks, int kColumnBlocks>
  DYHEAD_DEVICE static void add_rows(const char* left, int left_row, const char* right, int right_row, int step,
                                     Sums<float, kRowBlocks, kColumnBlocks>& sums) {
    static_assert(kColumnBlocks % 2 == 0);
    sync_warp();  // what follows needs all lanes at once, and they may come from branches
    const int lane = thread_index() % kWarp;
    uint32_t rows[kRowBlocks][4];
#pragma unroll
    for (int i = 0; i < kRowBlocks; ++i) {
      load_matrices(rows[i], left + tile_offset(left_row + i * 16 + lane % 16, 2 * step + lane / 16));
    }
#pragma unroll
    for (int j = 0; j < kColumnBlocks; j += 2) {
      uint32_t columns[4];
      load_matrices(columns,
                    right + tile_offset(right_row + j * 8 + lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2));
#pragma unroll
      for (int i = 0; i < kRowBlocks; ++i) {
        multiply_add(T(), sums.at[i][j], rows[i], columns[0], columns[1]);
        multiply_add(T(), sums.at[i][j + 1], rows[i], columns[2], columns[3]);
      }
    }
  }

  // The same for 64 rows of a warp group and 256 columns, over all of their depth; runs until wait_for_products().
  DYHEAD_DEVICE static void begin_rows(const char* left, const char* right, Sums<float, 1, 32>& sums) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      multiply_add_rows(T(), sums.at[0], left, right, step * kRowBytes / kSteps);
    }
  }

  // sums += left^T (elements from `left_begin` on) * right (elements from `right_begin` on), over step `step` of
  // panels.
  template <int kRowBlocks, int kColumnBlocks>
  DYHEAD_DEVICE static void add_panels(const char* left, int left_begin, const char* right, int right_begin, int step,
                                       Sums<float, kRowBlocks, kColumnBlocks>& sums) {
    static_assert(kColumnBlocks % 2 == 0);
    sync_warp();  // what follows needs all lanes at once, and they may come from branches
    const int lane = thread_index() % kWarp, depth = step * kDepth;
    uint32_t rows[kRowBlocks][4];
#pragma unroll
    for (int i = 0; i < kRowBlocks; ++i) {
      const int begin = left_begin + i * 16;
      if constexpr (std::is_same_v<T, float>) {
        // Tensor cores transpose 2-byte elements only. Any order of the depth will do that both operands share; this
        // one keeps the lanes of a load in different banks.
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          rows[i][k] = element(left, depth + lane % 4 * 2 + k / 2, begin + k % 2 * 8 + lane / 4);
        }
      } else {
        load_matrices_transposed(
            rows[i], left + panel_offset(depth + lane % 8 + lane / 16 * 8, begin / kVector<T> + lane / 8 % 2));
      }
    }
#pragma unroll
    for (int j = 0; j < kColumnBlocks; j += 2) {
      const int begin = right_begin + j * 8;
      uint32_t columns[4];
      if constexpr (std::is_same_v<T, float>) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          columns[k] = element(right, depth + lane % 4 * 2 + k % 2, begin + k / 2 * 8 + lane / 4);
        }
      } else {
        load_matrices_transposed(columns, right + panel_offset(depth + lane % 16, begin / kVector<T> + lane / 16));
      }
#pragma unroll
      for (int i = 0; i < kRowBlocks; ++i) {
        multiply_add(T(), sums.at[i][j], rows[i], columns[0], columns[1]);
        multiply_add(T(), sums.at[i][j + 1], rows[i], columns[2], columns[3]);
      }
    }
  }

  // The same for a panel of a warp group and two others, over all of their depth; runs until wait_for_products().
  DYHEAD_DEVICE static void begin_panels(const char* left, const char* right, Sums<float, 1, 16>& sums) {
#pragma unroll
    for (int depth = 0; depth < kPanelRows; depth += kDepth) {
      multiply_add_panels(T(), sums.at[0], left, right, kPanelRows * kRowBytes, depth * kRowBytes);
    }
  }

 private:
  DYHEAD_DEVICE static uint32_t element(const char* tile, int row, int i) {
    return reinterpret_cast<const uint32_t*>(tile + panel_offset(row, i / kVector<T>))[i % kVector<T>];
  }
};

template <typename T>
struct Product<T, false> {
  static constexpr int kDepth = 8;
  static constexpr int kPanelSteps = kPanelRows / kDepth;

  DYHEAD_DEVICE static Vector pack(const T (&value)[kVector<T>]) {
    Vector result;
    std::memcpy(&result, value, sizeof(result));
    return result;
  }

  template <int kRowBlocks, int kColumnBlocks>
  DYHEAD_DEVICE static void add_rows(const char* left, int left_row, const char* right, int right_row, int step,
                                     Sums<T, kRowBlocks, kColumnBlocks>& sums) {
    const int lane = thread_index() % kWarp;
#pragma unroll 1  // registers
    for (int chunk = 2 * step; chunk < 2 * step + 2; ++chunk) {
      T rows[2 * kRowBlocks][kVector<T>];
#pragma unroll
      for (int i = 0; i < 2 * kRowBlocks; ++i) {
        read(left + tile_offset(left_row + i * 8 + lane / 4, chunk), rows[i]);
      }
#pragma unroll
      for (int j = 0; j < 2 * kColumnBlocks; ++j) {
        T column[kVector<T>];
        read(right + tile_offset(right_row + j / 2 * 8 + lane % 4 * 2 + j % 2, chunk), column);
#pragma unroll
        for (int i = 0; i < 2 * kRowBlocks; ++i) {
#pragma unroll
          for (int k = 0; k < kVector<T>; ++k) sums.at[i / 2][j / 2][i % 2 * 2 + j % 2] += rows[i][k] * column[k];
        }
      }
    }
  }

  template <int kRowBlocks, int kColumnBlocks>
  DYHEAD_DEVICE static void add_panels(const char* left, int left_begin, const char* right, int right_begin, int step,
                                       Sums<T, kRowBlocks, kColumnBlocks>& sums) {
    const int lane = thread_index() % kWarp;
#pragma unroll
    for (int depth = step * kDepth; depth < (step + 1) * kDepth; ++depth) {
      T rows[2 * kRowBlocks];
#pragma unroll
      for (int i = 0; i < 2 * kRowBlocks; ++i) rows[i] = element(left, depth, left_begin + i * 8 + lane / 4);
#pragma unroll
      for (int j = 0; j < 2 * kColumnBlocks; ++j) {
        const T column = element(right, depth, right_begin + j / 2 * 8 + lane % 4 * 2 + j % 2);
#pragma unroll
        for (int i = 0; i < 2 * kRowBlocks; ++i) sums.at[i / 2][j / 2][i % 2 * 2 + j % 2] += rows[i] * column;
      }
    }
  }

 private:
  DYHEAD_DEVICE static void read(const char* from, T (&to)[kVector<T>]) {
    const Vector vector = read_vector(from);
    std::memcpy(to, &vector, sizeof(vector));
  }
  DYHEAD_DEVICE static T element(const char* tile, int row, int i) {
    return reinterpret_cast<const T*>(tile + panel_offset(row, i / kVector<T>))[i % kVector<T>];
  }
};

}  // namespace dyhead::cuda
