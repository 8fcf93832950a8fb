// Samples: where the taps of a block's output pixels read, and the gathering of channels from there.

#pragma once

#include <cstring>

#include "product.h"

namespace dyhead::cuda {

constexpr int kMaxLevels = 32;  // as many as fit into a kernel's parameters

// The operator's arguments as kernels read them: features with their channels last. Sizes, and the bytes of a pixel in
// any type, are below 2^31; elements are counted in 64 bits.
template <typename A>
struct Maps {
  struct Level {
    const void* features;
    int height, width;
    AxisMap rows, columns;
  };

  const A *offset, *mask, *level_weight;  // mask, level_weight: null where they are 1
  int batch, channels, out_channels, groups, offset_groups, kernel_height, kernel_width, height, width, levels;
  // Products and quotients of these, so that threads need not divide.
  int taps, pixels, group_channels, group_out_channels, offset_channels;
  Level level[kMaxLevels];

  DYHEAD_HOST_DEVICE int64_t image_stride(int l) const {
    return static_cast<int64_t>(level[l].height) * level[l].width * channels;
  }
  // The end of the run of at most `most` channels from `begin` on that have the same groups.
  DYHEAD_HOST_DEVICE int run_end(int begin, int most) const {
    const int limit = most < channels - begin ? begin + most : channels;
    return dyhead::run_end(begin, limit, group_channels, offset_channels);
  }
  // The number of such runs in channels [begin, end).
  DYHEAD_HOST_DEVICE int runs(int begin, int end, int most) const {
    int count = 0;
    for (; begin < end; begin = run_end(begin, most)) ++count;
    return count;
  }
  DYHEAD_HOST_DEVICE A level_factor(int n, int l) const {
    return level_weight == nullptr ? A(1) : level_weight[static_cast<int64_t>(n) * levels + l];
  }
};

// The output pixels that a block works on: a rectangle, so that neighbouring taps read the same lines of the cache.
template <int kPixels>
struct Patch {
  static constexpr int kWidth = kPixels == 128 ? 16 : 8, kHeight = kPixels / kWidth;

  int n, row, column;

  template <typename A>
  DYHEAD_HOST_DEVICE static int64_t count(const Maps<A>& maps) {
    return static_cast<int64_t>((maps.height + kHeight - 1) / kHeight) * ((maps.width + kWidth - 1) / kWidth);
  }
  template <typename A>
  DYHEAD_HOST_DEVICE static Patch at(const Maps<A>& maps, int64_t index) {
    const int across = (maps.width + kWidth - 1) / kWidth;
    const int64_t patches = count(maps), own = index % patches;
    return {static_cast<int>(index / patches), static_cast<int>(own / across) * kHeight,
            static_cast<int>(own % across) * kWidth};
  }

  // The patch after this one; behind the last one of an image, the first one of the next.
  template <typename A>
  DYHEAD_HOST_DEVICE void next(const Maps<A>& maps) {
    if ((column += kWidth) < maps.width) return;
    column = 0;
    if ((row += kHeight) < maps.height) return;
    row = 0;
    ++n;
  }

  // The output pixel row * width + column of place p, or -1 beyond the grid.
  template <typename A>
  DYHEAD_HOST_DEVICE int pixel(const Maps<A>& maps, int p) const {
    const int i = row + p / kWidth, j = column + p % kWidth;
    return i < maps.height && j < maps.width ? i * maps.width + j : -1;
  }
};

// What a sample's place is made of in memory; loaded ahead of its use.
template <typename A>
struct Reading {
  A dy, dx, mask;
};

template <typename A>
DYHEAD_DEVICE Reading<A> read_offset(const Maps<A>& maps, int n, int offset_group, int tap, int pixel) {
  if (pixel < 0) return {A(0), A(0), A(0)};
  const int64_t begin = plane(n, maps.offset_groups, offset_group, maps.taps, tap, maps.pixels);
  const A* const dy = maps.offset + 2 * begin + pixel;
  return {dy[0], dy[maps.pixels], maps.mask == nullptr ? A(1) : maps.mask[begin + pixel]};
}

template <typename A>
DYHEAD_DEVICE Cell<A> locate_sample(const Maps<A>& maps, int l, int tap, int pixel, const Reading<A>& reading) {
  if (pixel < 0) return {{-1, -1, -1, -1}, A(0), A(0)};
  const auto& level = maps.level[l];
  const A y = position<A>(level.rows, pixel / maps.width, tap / maps.kernel_width, reading.dy);
  const A x = position<A>(level.columns, pixel % maps.width, tap % maps.kernel_width, reading.dx);
  return locate<A>(y, x, level.height, level.width);
}

// The samples of one tap, level and offset group at kPixels output pixels, in shared memory: corners as pixels of the
// level (-1: outside) and what each counts, mask and level weight included.
template <typename A, int kPixels>
struct Table {
  struct alignas(16) Corners {
    int at[4];
  };
  struct alignas(16) Shares {
    A at[4];
  };
  Corners corner[kPixels];
  Shares share[kPixels];

  DYHEAD_DEVICE void set(int p, const Cell<A>& cell, A factor) {
    Corners corners;
    Shares shares;
    corner_shares(cell, shares.at);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      corners.at[i] = static_cast<int>(cell.corner[i]);
      shares.at[i] *= factor;
    }
    corner[p] = corners;
    share[p] = shares;
  }
};

// kCount channels of a corner, of which the first `valid` exist; 0 for the others and for a corner outside. `from`:
// those of the map's first pixel. kVectors: the channels that exist are whole vectors on their boundaries, so one load
// fetches up to 16 bytes.
template <bool kVectors, int kCount, typename T>
DYHEAD_DEVICE void load_channels(const T* from, int corner, int pixel_bytes, int valid, T (&result)[kCount]) {
  const int64_t offset = static_cast<int64_t>(corner) * pixel_bytes;
  if constexpr (kVectors && kCount * sizeof(T) == sizeof(Vector)) {
    const Vector vector = load_if<Vector>(corner >= 0 && valid > 0, from, offset);
    std::memcpy(result, &vector, sizeof(vector));
  } else if constexpr (kVectors && kCount * sizeof(T) == sizeof(Vector) / 2) {
    const uint64_t half = load_if<uint64_t>(corner >= 0 && valid > 0, from, offset);
    std::memcpy(result, &half, sizeof(half));
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      result[i] = load_if<T>(corner >= 0 && i < valid, from, offset + i * static_cast<int>(sizeof(T)));
    }
  }
}

// kCount values as the type of sums. bfloat16 by words: the compiler would shift the upper one of two twice.
template <typename T, int kCount>
DYHEAD_DEVICE void widen(const T (&value)[kCount], Accumulator<T> (&result)[kCount]) {
  if constexpr (std::is_same_v<T, BFloat16> && kCount % 2 == 0) {
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      uint32_t word;
      std::memcpy(&word, value + i, sizeof(word));
      const uint32_t wide[2] = {word << 16, word & 0xffff0000u};
      std::memcpy(result + i, wide, sizeof(wide));
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) result[i] = static_cast<Accumulator<T>>(value[i]);
  }
}

// One vector of channels of a sample on its way from global memory to a tile: loaded before a product, stored after it.
template <typename T, bool kTensorCores, bool kVectors>
struct Gather {
  using A = Accumulator<T>;
  static constexpr int kCount = kVector<T>;

  T value[4][kCount];

  template <int kPixels>
  DYHEAD_DEVICE void load(const Table<A, kPixels>& table, int p, const T* from, int pixel_bytes, int valid) {
    const auto corners = table.corner[p];
#pragma unroll
    for (int i = 0; i < 4; ++i) load_channels<kVectors>(from, corners.at[i], pixel_bytes, valid, value[i]);
  }

  template <int kPixels>
  DYHEAD_DEVICE void store(const Table<A, kPixels>& table, int p, char* to) const {
    const auto shares = table.share[p];
    A wide[4][kCount], sum[kCount];
#pragma unroll
    for (int i = 0; i < 4; ++i) widen(value[i], wide[i]);
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
      sum[c] = A(0);
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[c] += shares.at[i] * wide[i][c];
    }
    store_vector(to, Product<T, kTensorCores>::pack(sum));
  }
};

}  // namespace dyhead::cuda
