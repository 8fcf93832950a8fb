// Border alignment on a CUDA device. A thread of the forward pass takes 16 bytes of channels of a box (kCount of them;
// or one, where a border's channels are no whole vectors), a thread of the backward pass one channel.

#pragma once

#include <cstring>

#include "inputs.h"

namespace dyhead::cuda {

// The arguments as kernels read them. Sizes, and the bytes of a pixel in any type, are below 2^31.
template <typename A>
struct BorderMaps {
  const A* boxes;  // (N, 4, cells)
  int64_t batch, cells;
  int channels, border_channels, height, width, pool_size;

  DYHEAD_HOST_DEVICE int64_t image_stride() const { return static_cast<int64_t>(height) * width * channels; }
  // Of the box at `cell`, the border that a channel belongs to.
  DYHEAD_DEVICE Border<A> border(int64_t n, int64_t cell, int channel) const {
    const A* const box = boxes + n * 4 * cells + cell;
    return border_of_box(box[0], box[cells], box[2 * cells], box[3 * cells], channel / border_channels, pool_size);
  }
};

// kCount numbers of points, on a boundary of as many bytes.
template <int kCount>
DYHEAD_DEVICE void store_points(uint8_t* to, const int (&points)[kCount]) {
  using Word =
      std::conditional_t<kCount == 8, uint64_t,
                         std::conditional_t<kCount == 4, uint32_t, std::conditional_t<kCount == 2, uint16_t, uint8_t>>>;
  static_assert(sizeof(Word) == kCount);
  Word word = 0;
#pragma unroll
  for (int c = 0; c < kCount; ++c) word = static_cast<Word>(word | static_cast<Word>(points[c]) << (8 * c));
  *reinterpret_cast<Word*>(to) = word;
}

template <typename T, int kCount>
struct BorderMaximum {
  using A = Accumulator<T>;
  static constexpr int kThreads = 256, kMinBlocks = 1, kSharedBytes = 0;

  struct Params {
    BorderMaps<A> maps;
    const T* x;
    T* values;
    uint8_t* index;
  };

  static DYHEAD_DEVICE void run(const Params& params) {
    const BorderMaps<A>& maps = params.maps;
    const int vectors = maps.channels / kCount, pixel_bytes = maps.channels * static_cast<int>(sizeof(T));
    const int64_t thread = block_index() * kThreads + thread_index(), row = thread / vectors, n = row / maps.cells;
    if (n >= maps.batch) return;
    const int channel = static_cast<int>(thread % vectors) * kCount;
    const Border<A> border = maps.border(n, row % maps.cells, channel);
    const T* const from = params.x + n * maps.image_stride() + channel;
    A best[kCount] = {};
    int at[kCount] = {};
#pragma unroll 1  // registers
    for (int k = 0; k <= maps.pool_size; ++k) {
      A value[kCount];
      interpolate(locate<A>(border, k, maps.height, maps.width), from, pixel_bytes, value);
#pragma unroll
      for (int c = 0; c < kCount; ++c) {
        // Of equal values the first one counts, and NaN is the largest.
        const bool kept = k > 0 && (value[c] <= best[c] || best[c] != best[c]);
        best[c] = kept ? best[c] : value[c];
        at[c] = kept ? at[c] : k;
      }
    }
    const int64_t to = row * maps.channels + channel;
    T rounded[kCount];
#pragma unroll
    for (int c = 0; c < kCount; ++c) rounded[c] = static_cast<T>(best[c]);
    if constexpr (kCount > 1) {
      Vector vector;
      std::memcpy(&vector, rounded, sizeof(vector));
      store_vector(params.values + to, vector);
    } else {
      params.values[to] = rounded[0];
    }
    store_points(params.index + to, at);
  }

  static DYHEAD_DEVICE void interpolate(const Cell<A>& cell, const T* from, int pixel_bytes, A (&value)[kCount]) {
    A share[4], wide[4][kCount];
    corner_shares(cell, share);
    T narrow[4][kCount];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      load_channels<(kCount > 1)>(from, static_cast<int>(cell.corner[i]), pixel_bytes, kCount, narrow[i]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) widen(narrow[i], wide[i]);
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
      value[c] = share[0] * wide[0][c] + share[1] * wide[1][c] + share[2] * wide[2][c] + share[3] * wide[3][c];
    }
  }
};

// Adds what outputs' gradients are to the pixels around the points of their maxima. kOrdered: a thread takes all boxes
// of an image, in their order, so that the sums are the same every time.
template <typename T, bool kOrdered>
struct BorderGradient {
  using A = Accumulator<T>;
  // Few threads to a block where there are few of them.
  static constexpr int kThreads = kOrdered ? 32 : 256, kMinBlocks = 1, kSharedBytes = 0;

  struct Params {
    BorderMaps<A> maps;
    const T* grad;
    const uint8_t* index;
    A* sums;
  };

  static DYHEAD_HOST_DEVICE int64_t threads(const BorderMaps<A>& maps) {
    return maps.batch * (kOrdered ? 1 : maps.cells) * maps.channels;
  }

  static DYHEAD_DEVICE void run(const Params& params) {
    const BorderMaps<A>& maps = params.maps;
    const int64_t thread = block_index() * kThreads + thread_index(), row = thread / maps.channels;
    if (thread >= threads(maps)) return;
    const int channel = static_cast<int>(thread % maps.channels);
    if constexpr (kOrdered) {
#pragma unroll 4
      for (int64_t cell = 0; cell < maps.cells; ++cell) add(params, row, cell, channel);
    } else {
      add(params, row / maps.cells, row % maps.cells, channel);
    }
  }

  static DYHEAD_DEVICE void add(const Params& params, int64_t n, int64_t box, int channel) {
    const BorderMaps<A>& maps = params.maps;
    const int64_t at = (n * maps.cells + box) * maps.channels + channel;
    const A grad = static_cast<A>(params.grad[at]);
    const Cell<A> cell = locate<A>(maps.border(n, box, channel), params.index[at], maps.height, maps.width);
    A share[4];
    corner_shares(cell, share);
    A* const sums = params.sums + n * maps.image_stride() + channel;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (cell.corner[i] < 0) continue;
      A* const to = sums + cell.corner[i] * maps.channels;
      if constexpr (kOrdered) {
        owned_atomic_add(to, share[i] * grad);
      } else {
        atomic_add(to, share[i] * grad);
      }
    }
  }
};

}  // namespace dyhead::cuda
