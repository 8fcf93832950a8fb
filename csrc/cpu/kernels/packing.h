// Weights in the order in which a product reads them, and their gradient in the order of the weights.

#pragma once

#include <algorithm>

#include "vectors.h"

namespace dyhead::cpu::DYHEAD_PATH {
namespace {

// Taps k, k + 1, ... of so many columns as a vector has lanes, one vector a tap.
template <typename T>
DYHEAD_INLINE void load_taps(const T* from, const T* end, int64_t column_stride, int64_t taps,
                             Vector<Accumulator<T>> (&rows)[kLanes<Accumulator<T>>]) {
  constexpr int kCount = kLanes<Accumulator<T>>;
#pragma GCC unroll 16
  for (int i = 0; i < kCount; ++i, from += column_stride) {
    // What follows the last tap is read, too, but nothing beyond the weights.
    if (end - from >= kCount) {
      rows[i] = load(from);
    } else {
      T some[kCount] = {};
      std::memcpy(some, from, static_cast<size_t>(taps) * sizeof(T));
      rows[i] = load(some);
    }
  }
  transpose<Accumulator<T>>(rows);
}

template <typename T, typename P>
DYHEAD_INLINE P operand(T value) {
  if constexpr (std::is_same_v<T, P>) {
    return value;
  } else {
    return single(value);
  }
}

template <typename T, typename P>
DYHEAD_TARGET void pack(const T* from, const T* end, int64_t column_stride, int64_t depth_stride, int64_t columns,
                        int64_t depths, int64_t taps, P* to, int64_t tap_stride, int64_t unit_stride) {
  using A = Accumulator<T>;
  constexpr int64_t kCount = kLanes<A>;
  const int64_t whole_columns = columns / kCount * kCount, whole_depths = depths / kUnit<P> * kUnit<P>;
  for (int64_t d = 0; d < whole_depths; d += kUnit<P>) {
    for (int64_t c = 0; c < whole_columns; c += kCount) {
      for (int64_t k = 0; k < taps; k += kCount) {
        const T* const some = from + c * column_stride + d * depth_stride + k;
        P* const there = to + k * tap_stride + d / kUnit<P> * unit_stride + c * kUnit<P>;
        const int64_t count = std::min(kCount, taps - k);
        Vector<A> rows[kCount];
        load_taps(some, end, column_stride, count, rows);
        if constexpr (kUnit<P> == 1) {
          for (int64_t i = 0; i < count; ++i) store(there + i * tap_stride, rows[i]);
        } else {
          Vector<A> next[kCount];
          load_taps(some + depth_stride, end, column_stride, count, next);
          for (int64_t i = 0; i < count; ++i) store_pairs(there + i * tap_stride, rows[i], next[i]);
        }
      }
    }
  }
  for (int64_t d = 0; d < depths; ++d) {
    for (int64_t c = d < whole_depths ? whole_columns : 0; c < columns; ++c) {
      for (int64_t k = 0; k < taps; ++k) {
        to[k * tap_stride + d / kUnit<P> * unit_stride + c * kUnit<P> + d % kUnit<P>] =
            operand<T, P>(from[c * column_stride + d * depth_stride + k]);
      }
    }
  }
}

template <typename A>
DYHEAD_TARGET void unpack(const A* from, int64_t tap_stride, int64_t depth_stride, int64_t columns, int64_t depths,
                          int64_t taps, A* to, int64_t column_stride) {
  constexpr int64_t kCount = kLanes<A>;
  const int64_t elements = depths * taps;
  for (int64_t c = 0; c < columns; c += kCount) {
    int64_t d = 0, k = 0;
    for (int64_t e = 0; e < elements; e += kCount) {
      const int64_t some_columns = std::min(kCount, columns - c), some = std::min(kCount, elements - e);
      A block[kCount][kCount];
      Vector<A> rows[kCount];
      for (int64_t i = 0; i < some; ++i) {
        const A* const row = from + k * tap_stride + d * depth_stride + c;
        if (some_columns == kCount) {
          store(block[i], load(row));
        } else {
          std::memcpy(block[i], row, static_cast<size_t>(some_columns) * sizeof(A));
        }
        if (++k == taps) k = 0, ++d;
      }
#pragma GCC unroll 16
      for (int i = 0; i < kCount; ++i) rows[i] = load(block[i]);
      transpose<A>(rows);
#pragma GCC unroll 16
      for (int i = 0; i < kCount; ++i) store(block[i], rows[i]);
      for (int64_t i = 0; i < some_columns; ++i) {
        A* const there = to + (c + i) * column_stride + e;
        if (some == kCount) {
          store(there, load(block[i]));
        } else {
          std::memcpy(there, block[i], static_cast<size_t>(some) * sizeof(A));
        }
      }
    }
  }
}

}  // namespace
}  // namespace dyhead::cpu::DYHEAD_PATH
