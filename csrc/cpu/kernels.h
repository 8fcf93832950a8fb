// The inner loops of the CPU operator. Each exists once per instruction set (kernels/*.cpp, all compiled from the
// headers there) and is chosen at run time; everything around them, in the passes, is compiled once.

#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <type_traits>

#include "../geometry.h"

namespace dyhead::cpu {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// Both operands of a product have elements of type P: the accumulation type or, where the machine multiplies and adds
// pairs of them, BFloat16. So many elements that follow each other along the depth make a unit:
template <typename P>
constexpr int64_t kUnit = std::is_same_v<P, BFloat16> ? 2 : 1;

// The left operand: element (i, d) is at data[i * row_stride + d / kUnit * depth_stride + d % kUnit].
template <typename P>
struct Operand {
  const P* data;
  int64_t row_stride, depth_stride;  // one of them is kUnit
};

// A pixel of the output grid; `index` is row * width + column.
struct Pixel {
  int64_t row, column, index;
};

// A tap on a level, with the planes of offset and mask (null: none) that belong to it.
template <typename A>
struct Tap {
  const AxisMap& rows;
  const AxisMap& columns;
  int64_t height, width;  // of the level
  int64_t row, column;    // of the tap in its kernel
  const A *dy, *dx, *mask;
  A factor;  // the level's weight
};

// Where a tap reads for one pixel, and what each corner counts, mask and level weight included.
template <typename A>
struct Sample {
  Cell<A> cell;
  A share[4], mask;
};

// Channels of a level's map: those of pixel i are at data[i * pixel_stride]. `outside` is a row of zeros, which stands
// for the pixels outside the map.
template <typename T>
struct Channels {
  const T* data;
  int64_t pixel_stride;
  const T* outside;

  const T* at(int64_t pixel) const { return pixel < 0 ? outside : data + pixel * pixel_stride; }
};

constexpr int64_t kPooled = 16;

template <typename T, typename P>
struct Kernels {
  using A = Accumulator<T>;

  // The product writes to whole blocks of so many rows and columns.
  int rows, columns;

  void (*locate)(const Tap<A>& tap, const Pixel* pixels, int64_t count, Sample<A>* samples);

  // panel[p * panel_stride + c] = sum_i share_i * from.at(corner_i)[c], for `width` channels of `count` samples.
  void (*sample)(const Sample<A>* samples, int64_t count, const Channels<T>& from, int64_t width, P* panel,
                 int64_t panel_stride);

  // sums[c] += sum_p sum_i share_i * from.at(corner_i)[c], for `width` channels of at most kPooled samples.
  void (*pool)(const Sample<A>* samples, int64_t count, const Channels<T>& from, int64_t width, A* sums);

  // What `sample` does, for a product over samples: at panel[p / kUnit * panel_stride + c * kUnit + p % kUnit]. A
  // sample that is missing from the last unit is 0.
  void (*sample_units)(const Sample<A>* samples, int64_t count, const Channels<T>& from, int64_t width, P* panel,
                       int64_t panel_stride);

  // sums[r * sums_stride + c] += sum_d left(r, d) * right(d, c) for `units` units of d and whole blocks: row_blocks *
  // rows by column_blocks * columns elements. right(d, c) is at
  //     right[c / columns * right_block_stride + d / kUnit * right_depth_stride + c % columns * kUnit + d % kUnit].
  void (*product)(int64_t row_blocks, int64_t column_blocks, int64_t units, Operand<P> left, const P* right,
                  int64_t right_block_stride, int64_t right_depth_stride, A* sums, int64_t sums_stride);

  // Weights for the right operand: to[k * tap_stride + d / kUnit * unit_stride + c * kUnit + d % kUnit] =
  // from[c * column_stride + d * depth_stride + k] for `columns` columns, `depths` depths and `taps` taps. `end` is
  // where the weights end.
  void (*pack)(const T* from, const T* end, int64_t column_stride, int64_t depth_stride, int64_t columns,
               int64_t depths, int64_t taps, P* to, int64_t tap_stride, int64_t unit_stride);

  // The way back, for the gradient of the weight: to[c * column_stride + d * taps + k] =
  // from[k * tap_stride + d * depth_stride + c].
  void (*unpack)(const A* from, int64_t tap_stride, int64_t depth_stride, int64_t columns, int64_t depths, int64_t taps,
                 A* to, int64_t column_stride);

  // With g = panel[p * panel_stride + c], the gradient of a sample's channel, adds for every corner i inside the map
  //     corner_products[4 * p + i] += sum_c g * from.at(corner_i)[c]      (unless corner_products is null)
  //     gradient[corner_i * from.pixel_stride + c] += share_i * g         (unless gradient is null).
  void (*scatter)(const Sample<A>* samples, int64_t count, const Channels<T>& from, int64_t width, const A* panel,
                  int64_t panel_stride, A* corner_products, A* gradient);

  // For `width` channels: the largest value along a border, and at which of its pool_size + 1 points, as a number. Of
  // equal values the first one counts, and NaN is the largest.
  void (*maximum)(const Border<A>& border, int pool_size, int64_t map_height, int64_t map_width,
                  const Channels<A>& from, int64_t width, A* values, A* points);
};

// The instruction sets, in the words of PyTorch's environment variable ATEN_CPU_CAPABILITY.
namespace default_path {
template <typename T>
const Kernels<T, Accumulator<T>>& kernels();
}
#if defined(__x86_64__)
namespace avx2_path {
template <typename T>
const Kernels<T, Accumulator<T>>& kernels();
}
namespace avx512_path {
template <typename T>
const Kernels<T, Accumulator<T>>& kernels();
}
// What AVX512-BF16 does better than AVX-512: products of bfloat16.
namespace avx512_bf16_path {
const Kernels<BFloat16, BFloat16>& kernels();
}
#endif

}  // namespace dyhead::cpu
