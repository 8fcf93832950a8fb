// Sums of many numbers, in an order that does not change.

#pragma once

#include "inputs.h"

namespace dyhead::cuda {

// result[i] = sum of terms[i * count ... (i + 1) * count), a block each.
template <typename A, typename T>
struct SumRows {
  static constexpr int kThreads = 256, kMinBlocks = 1;

  struct Params {
    const A* terms;
    T* result;
    int64_t count;
  };

  static constexpr int kSharedBytes = kThreads * static_cast<int>(sizeof(double));

  static DYHEAD_DEVICE void run(const Params& params) {
    double* const sums = reinterpret_cast<double*>(shared_memory());
    const A* const terms = params.terms + block_index() * params.count;
    double sum = 0;
    for (int64_t i = thread_index(); i < params.count; i += kThreads) sum += static_cast<double>(terms[i]);
    sums[thread_index()] = sum;
    for (int half = kThreads / 2; half > 0; half /= 2) {
      sync_block();
      if (thread_index() < half) sums[thread_index()] += sums[thread_index() + half];
    }
    if (thread_index() == 0) params.result[block_index()] = static_cast<T>(static_cast<A>(sums[0]));
  }
};

// The sum of parts of `part_stride` elements. Elements (row, tap, element) of a part, tap_stride elements of a tap,
// become (row, element, tap).
template <typename T>
struct SumParts {
  using A = Accumulator<T>;
  static constexpr int kThreads = 256, kMinBlocks = 1, kSharedBytes = 0;

  struct Params {
    const A* parts;
    T* result;
    int64_t part_stride, tap_stride;
    int parts_count, taps;
  };

  static DYHEAD_DEVICE void run(const Params& params) {
    const int64_t index = block_index() * kThreads + thread_index();
    if (index >= params.part_stride) return;
    A sum = A(0);
    for (int part = 0; part < params.parts_count; ++part) sum += params.parts[part * params.part_stride + index];
    const int64_t element = index % params.tap_stride, tap = index / params.tap_stride % params.taps;
    const int64_t row = index / params.tap_stride / params.taps;
    params.result[(row * params.tap_stride + element) * params.taps + tap] = static_cast<T>(sum);
  }
};

// Sums of columns of `source`, rows of `columns` elements, over chunks of rows: terms for SumRows, (column, chunk).
template <typename T>
struct SumColumnChunks {
  using A = Accumulator<T>;
  static constexpr int kThreads = 256, kMinBlocks = 1;
  static constexpr int kWidth = 64, kChunk = 512, kLines = kThreads / kWidth;
  static constexpr int kSharedBytes = kThreads * static_cast<int>(sizeof(A));

  struct Params {
    const T* source;
    A* terms;
    int64_t rows, columns, chunks;
  };

  static DYHEAD_DEVICE void run(const Params& params) {
    A* const sums = reinterpret_cast<A*>(shared_memory());
    const int64_t chunk = block_index() % params.chunks;
    const int64_t column = block_index() / params.chunks * kWidth + thread_index() % kWidth;
    const int64_t first = chunk * kChunk, last = first + kChunk < params.rows ? first + kChunk : params.rows;
    A sum = A(0);
    if (column < params.columns) {
      for (int64_t row = first + thread_index() / kWidth; row < last; row += kLines) {
        sum += static_cast<A>(params.source[row * params.columns + column]);
      }
    }
    sums[thread_index()] = sum;
    sync_block();
    if (thread_index() >= kWidth || column >= params.columns) return;
    for (int line = 1; line < kLines; ++line) sum += sums[line * kWidth + thread_index()];
    params.terms[column * params.chunks + chunk] = sum;
  }
};

}  // namespace dyhead::cuda
