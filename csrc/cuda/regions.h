// Deformable RoI pooling on a CUDA device. A thread of the forward pass takes 16 bytes of channels of a cell (kCount of
// them; or one, where the channels are no whole vectors), a thread of the map's gradient one channel, and a warp a cell
// of the offset's gradient.

#pragma once

#include <cstring>

#include "inputs.h"

namespace dyhead::cuda {

// The arguments as kernels read them. Sizes, and the bytes of a pixel in any type, are below 2^31.
template <typename A>
struct RegionMaps {
  const A *rois, *offset;  // (Q, 5); (Q, 2, side, side) or null
  int64_t batch, regions;
  int channels, height, width;
  Pooling pooling;

  DYHEAD_HOST_DEVICE int64_t image_stride() const { return static_cast<int64_t>(height) * width * channels; }
  DYHEAD_HOST_DEVICE int cells() const { return pooling.side * pooling.side; }  // of a region
  DYHEAD_DEVICE Region<A> region(int64_t q) const { return region_of(rois + 5 * q, pooling, offset != nullptr, batch); }
  DYHEAD_DEVICE RegionCell<A> cell(const Region<A>& region, int64_t q, int place) const {
    return cell_of(region, pooling, place / pooling.side, place % pooling.side,
                   offset == nullptr ? nullptr : offset + 2 * q * cells(), height, width);
  }
};

// kCount channels of the four pixels around a sample.
template <typename T, int kCount>
DYHEAD_DEVICE void load_corners(const Cell<Accumulator<T>>& cell, const T* from, int pixel_bytes,
                                Accumulator<T> (&wide)[4][kCount]) {
  T narrow[4][kCount];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    load_channels<(kCount > 1)>(from, static_cast<int>(cell.corner[i]), pixel_bytes, kCount, narrow[i]);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) widen(narrow[i], wide[i]);
}

template <typename T, int kCount>
struct PoolRegions {
  using A = Accumulator<T>;
  static constexpr int kThreads = 256, kMinBlocks = 1, kSharedBytes = 0;

  struct Params {
    RegionMaps<A> maps;
    const T* x;
    T* result;
  };

  static DYHEAD_DEVICE void run(const Params& params) {
    const RegionMaps<A>& maps = params.maps;
    const int vectors = maps.channels / kCount, pixel_bytes = maps.channels * static_cast<int>(sizeof(T));
    const int64_t thread = block_index() * kThreads + thread_index(), at = thread / vectors, q = at / maps.cells();
    if (q >= maps.regions) return;
    const int channel = static_cast<int>(thread % vectors) * kCount;
    const RegionCell<A> cell = maps.cell(maps.region(q), q, static_cast<int>(at % maps.cells()));
    const T* const from = params.x + (cell.region.image < 0 ? 0 : cell.region.image) * maps.image_stride() + channel;
    A sum[kCount] = {};
    cell.for_each_sample([&](const Cell<A>& sample) {
      A share[4], value[4][kCount];
      corner_shares(sample, share);
      load_corners<T>(sample, from, pixel_bytes, value);
#pragma unroll
      for (int c = 0; c < kCount; ++c) {
        sum[c] += share[0] * value[0][c] + share[1] * value[1][c] + share[2] * value[2][c] + share[3] * value[3][c];
      }
    });
    const A divisor = cell.divisor();
    T rounded[kCount];
#pragma unroll
    for (int c = 0; c < kCount; ++c) rounded[c] = static_cast<T>(sum[c] / divisor);
    T* const to = params.result + at * maps.channels + channel;
    if constexpr (kCount > 1) {
      Vector vector;
      std::memcpy(&vector, rounded, sizeof(vector));
      store_vector(to, vector);
    } else {
      *to = rounded[0];
    }
  }
};

// Adds the gradient of cells to the pixels around their samples. kOrdered: a thread takes all regions of an image, in
// their order, so that the sums are the same every time.
template <typename T, bool kOrdered>
struct RegionMapGradient {
  using A = Accumulator<T>;
  // Few threads to a block where there are few of them.
  static constexpr int kThreads = kOrdered ? 64 : 256, kMinBlocks = 1, kSharedBytes = 0;

  struct Params {
    RegionMaps<A> maps;
    const T* grad;
    A* sums;
  };

  static DYHEAD_HOST_DEVICE int64_t threads(const RegionMaps<A>& maps) {
    return (kOrdered ? maps.batch : maps.regions * maps.cells()) * maps.channels;
  }

  static DYHEAD_DEVICE void run(const Params& params) {
    const RegionMaps<A>& maps = params.maps;
    const int64_t thread = block_index() * kThreads + thread_index(), row = thread / maps.channels;
    if (thread >= threads(maps)) return;
    const int channel = static_cast<int>(thread % maps.channels);
    if constexpr (kOrdered) {
      for (int64_t q = 0; q < maps.regions; ++q) {
        const Region<A> region = maps.region(q);
        if (region.image != row) continue;
        for (int place = 0; place < maps.cells(); ++place) add(params, region, q, place, channel);
      }
    } else {
      const int64_t q = row / maps.cells();
      const Region<A> region = maps.region(q);
      if (region.image >= 0) add(params, region, q, static_cast<int>(row % maps.cells()), channel);
    }
  }

  static DYHEAD_DEVICE void add(const Params& params, const Region<A>& region, int64_t q, int place, int channel) {
    const RegionMaps<A>& maps = params.maps;
    const RegionCell<A> cell = maps.cell(region, q, place);
    const A grad = static_cast<A>(params.grad[(q * maps.cells() + place) * maps.channels + channel]) / cell.divisor();
    A* const sums = params.sums + region.image * maps.image_stride() + channel;
    cell.for_each_sample([&](const Cell<A>& sample) {
      A share[4];
      corner_shares(sample, share);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        A* const to = sums + sample.corner[i] * maps.channels;
        if constexpr (kOrdered) {
          owned_atomic_add(to, share[i] * grad);
        } else {
          atomic_add(to, share[i] * grad);
        }
      }
    });
  }
};

template <typename T>
struct RegionOffsetGradient {
  using A = Accumulator<T>;
  static constexpr int kThreads = 256, kMinBlocks = 1, kSharedBytes = 0, kCells = kThreads / kWarp;

  struct Params {
    RegionMaps<A> maps;
    const T *x, *grad;
    A* result;
  };

  static DYHEAD_DEVICE void run(const Params& params) {
    const RegionMaps<A>& maps = params.maps;
    const int lane = thread_index() % kWarp;
    const int64_t at = block_index() * kCells + thread_index() / kWarp, q = at / maps.cells();
    if (q >= maps.regions) return;  // with the whole warp
    const int place = static_cast<int>(at % maps.cells()), pixel_bytes = maps.channels * static_cast<int>(sizeof(T));
    const RegionCell<A> cell = maps.cell(maps.region(q), q, place);
    const T* const from = params.x + (cell.region.image < 0 ? 0 : cell.region.image) * maps.image_stride();
    const T* const grads = params.grad + at * maps.channels;
    A right = A(0), down = A(0);
    cell.for_each_sample([&](const Cell<A>& sample) {
      A products[4] = {};
#pragma unroll 2
      for (int channel = lane; channel < maps.channels; channel += kWarp) {
        A value[4][1];
        load_corners<T>(sample, from + channel, pixel_bytes, value);
        const A grad = static_cast<A>(grads[channel]);
#pragma unroll
        for (int i = 0; i < 4; ++i) products[i] += grad * value[i][0];
      }
      right += derivative_x(sample, products);
      down += derivative_y(sample, products);
    });
#pragma unroll
    for (int mask = kWarp / 2; mask > 0; mask /= 2) {
      right += shuffle_xor(right, mask);
      down += shuffle_xor(down, mask);
    }
    if (lane > 0) return;
    const A divisor = cell.divisor();
    A* const to = params.result + 2 * q * maps.cells() + place;
    to[0] = cell.region.shift_x * right / divisor;
    to[maps.cells()] = cell.region.shift_y * down / divisor;
  }
};

}  // namespace dyhead::cuda
