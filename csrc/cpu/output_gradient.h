// The output's gradient as the backward passes multiply with it.

#pragma once

#include <algorithm>

#include "inputs.h"

namespace dyhead::cpu {

// As (image, pixel in the tiles' order, group, output channel of the group), every group padded to whole blocks of
// columns, the pixels of an image to whole units, and all pixels to a whole block of rows.
template <typename T, typename P>
struct OutputGradient {
  OutputGradient(const Problem& problem, const PixelOrder& order, const Tensor& gradient, const Kernels<T, P>& kernel)
      : group_stride(round_up(problem.group_out_channels(), kernel.columns)),
        pixel_stride(problem.groups * group_stride),
        image_stride(round_up(problem.pixels(), kUnit<P>) * pixel_stride),
        rows(volume(problem.batch, image_stride) + kernel.rows * pixel_stride),
        pairs(kUnit<P> == 1 ? 0 : volume(problem.batch, image_stride)) {
    const Tensor source = as_channels_last(gradient);
    const T* const from = static_cast<const T*>(source.const_data_ptr());
    const int64_t pixels = problem.pixels(), tiles = blocks(pixels, kTile), units = problem.batch * tiles;
    P* const end = rows.get() + problem.batch * image_stride;
    std::fill(end, end + kernel.rows * pixel_stride, P(0));
    const double cost = static_cast<double>(kTile * pixel_stride) / 4;
    parallel_units(units, worker_count(units, cost), [&](int64_t unit, int64_t) {
      const int64_t n = unit / tiles, begin = unit % tiles * kTile;
      pack_tile(problem, order, from + n * pixels * problem.out_channels, n, begin, std::min(pixels, begin + kTile));
    });
  }

  // The pixel at a place of the order, for products over output channels.
  P* row(int64_t n, int64_t pixel) const { return rows.get() + n * image_stride + pixel * pixel_stride; }
  // The unit that begins there, for products over pixels.
  const P* unit(int64_t n, int64_t pixel) const {
    return (kUnit<P> == 1 ? rows : pairs).get() + n * image_stride + pixel * pixel_stride;
  }

  int64_t group_stride, pixel_stride, image_stride;
  Buffer<P> rows, pairs;

 private:
  // Places [begin, end) of the order.
  void pack_tile(const Problem& problem, const PixelOrder& order, const T* image, int64_t n, int64_t begin,
                 int64_t end) const {
    const int64_t padded = round_up(end, kUnit<P>);
    Pixel list[kTile];
    order.list(begin, end - begin, list);
    for (int64_t p = begin; p < end; ++p) {
      pack_row(problem, image + list[p - begin].index * problem.out_channels, row(n, p));
    }
    std::fill(row(n, end), row(n, padded), P(0));
    if constexpr (kUnit<P> > 1) {
      for (int64_t p = begin; p < padded; p += kUnit<P>) pair_rows(n, p);
    }
  }

  void pack_row(const Problem& problem, const T* from, P* to) const {
    const int64_t channels = problem.group_out_channels();
    for (int64_t group = 0; group < problem.groups; ++group, from += channels, to += group_stride) {
      for (int64_t o = 0; o < channels; ++o) to[o] = static_cast<P>(from[o]);
      std::fill(to + channels, to + group_stride, P(0));
    }
  }

  // The unit of two pixels from their rows.
  void pair_rows(int64_t n, int64_t pixel) const {
    P* const to = pairs.get() + n * image_stride + pixel * pixel_stride;
    const P *first = row(n, pixel), *second = row(n, pixel + 1);
    for (int64_t o = 0; o < pixel_stride; ++o) {
      to[2 * o] = first[o];
      to[2 * o + 1] = second[o];
    }
  }
};

}  // namespace dyhead::cpu
