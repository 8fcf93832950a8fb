// Where a tap reads and how it interpolates: the arithmetic that every kernel shares, on the host and on a device.
// dyhead/ops/reference.py states the same in PyTorch.

#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#if defined(__CUDACC__)
#define DYHEAD_HOST_DEVICE __host__ __device__ __forceinline__
#define DYHEAD_ROLLED _Pragma("unroll 1")  // in front of a loop whose copies would take too many registers
#else
#define DYHEAD_HOST_DEVICE inline
#define DYHEAD_ROLLED
#endif

namespace dyhead {

// T is the type of features; positions and sums have the accumulation type.
template <typename T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

// One axis of a level: output pixel i, row or column r of the kernel and offset d read at
//     step * i + tap * r + shift * d + origin,
// in pixels of the level.
struct AxisMap {
  double step, tap, shift, origin;
};

// The pyramid's geometry: pixel centres of the image coincide. A tap at t on the output grid reads the level at
// scale * (t + 1/2) - 1/2, where scale is the stride of the output grid over the stride of the level.
DYHEAD_HOST_DEVICE AxisMap aligned_axis(double scale, int64_t kernel, int64_t dilation) {
  return {scale, scale * static_cast<double>(dilation), scale,
          scale * (0.5 - static_cast<double>(dilation) * static_cast<double>(kernel - 1) / 2) - 0.5};
}

// The geometry of a convolution: everything in pixels of its input.
DYHEAD_HOST_DEVICE AxisMap convolution_axis(int64_t stride, int64_t padding, int64_t dilation) {
  return {static_cast<double>(stride), static_cast<double>(dilation), 1.0, -static_cast<double>(padding)};
}

// The position without an offset is computed in double and rounded once, so that large maps keep exact pixel positions.
template <typename T>
DYHEAD_HOST_DEVICE T position(const AxisMap& axis, int64_t pixel, int64_t tap, T offset) {
  const double base = axis.step * static_cast<double>(pixel) + axis.tap * static_cast<double>(tap) + axis.origin;
  return static_cast<T>(base) + static_cast<T>(axis.shift) * offset;
}

// The four pixels around a position: top left, top right, bottom left, bottom right.
template <typename T>
struct Cell {
  int64_t corner[4];  // row * width + column, or -1 outside the map, where the corner counts 0
  T down, right;      // distance from the top left corner, in [0, 1)
};

// Only positions in (-1, height) x (-1, width) touch the map; all others, and NaN, give four corners outside.
template <typename T>
DYHEAD_HOST_DEVICE Cell<T> locate(T y, T x, int64_t height, int64_t width) {
  Cell<T> cell{{-1, -1, -1, -1}, 0, 0};
  if (!(y > -1 && y < static_cast<T>(height) && x > -1 && x < static_cast<T>(width))) return cell;
  const T floor_y = std::floor(y), floor_x = std::floor(x);
  const int64_t top = static_cast<int64_t>(floor_y), left = static_cast<int64_t>(floor_x);
  cell.down = y - floor_y;
  cell.right = x - floor_x;
  // The upper bounds are tested on integers again: a height beyond the type's precision may have been rounded up.
  const bool rows[2] = {top >= 0 && top < height, top + 1 < height};
  const bool columns[2] = {left >= 0 && left < width, left + 1 < width};
  for (int i = 0; i < 4; ++i) {
    if (rows[i / 2] && columns[i % 2]) cell.corner[i] = (top + i / 2) * width + left + i % 2;
  }
  return cell;
}

// Where border alignment reads along a border of a box, in pixels of the map: y + k * down, x + k * right at point k.
template <typename T>
struct Border {
  T y, x, down, right;
};

// Border 0, top, and 1, left, begin at (x1, y1); 2, bottom, and 3, right, run back from (x2, y2).
template <typename T>
DYHEAD_HOST_DEVICE Border<T> border_of_box(T x1, T y1, T x2, T y2, int border, int pool_size) {
  const T across = (x2 - x1) / static_cast<T>(pool_size), down = (y2 - y1) / static_cast<T>(pool_size);
  if (border == 0) return {y1, x1, 0, across};
  if (border == 1) return {y1, x1, down, 0};
  if (border == 2) return {y2, x2, 0, -across};
  return {y2, x2, -down, 0};
}

template <typename T>
DYHEAD_HOST_DEVICE Cell<T> locate(const Border<T>& border, int point, int64_t height, int64_t width) {
  return locate<T>(border.y + static_cast<T>(point) * border.down, border.x + static_cast<T>(point) * border.right,
                   height, width);
}

// How deformable RoI pooling divides regions: into side * side cells of samples * samples points. `scale`: pixels of
// the map for one of the image; `gamma`: the unit of offsets.
struct Pooling {
  double scale, gamma;
  int side, samples;
  bool aligned;
};

// Where a region lies, in pixels of the map: point k along an axis is at y + k * down or x + k * right, and is moved by
// an offset d to there + shift_y * d or shift_x * d.
template <typename T>
struct Region {
  int64_t image;  // -1: none, and no point counts
  double y, x, down, right;
  T shift_y, shift_x;
};

DYHEAD_HOST_DEVICE bool is_finite(double value) { return value - value == 0; }

// In double, and rounded once per point, so that a point on the edge of the map is there whatever the compiler fuses.
template <typename T>
DYHEAD_HOST_DEVICE Region<T> region_of(const T* roi, const Pooling& pooling, bool has_offset, int64_t batch) {
  bool there = roi[0] >= 0 && roi[0] < static_cast<T>(batch);
  double start[2], step[2];
  T shift[2];
  for (int i = 0; i < 2; ++i) {
    double first = static_cast<double>(roi[1 + i]), second = static_cast<double>(roi[3 + i]);
    if (!pooling.aligned) {
      first = std::round(first);
      second = std::round(second) + 1;
    }
    start[i] = first * pooling.scale - 0.5;
    double extent = (second - first) * pooling.scale;
    there = there && is_finite(start[i]) && is_finite(extent);
    if (!pooling.aligned && extent < 0.1) extent = 0.1;
    step[i] = extent / (pooling.side * pooling.samples);
    if (pooling.aligned) start[i] += step[i] / 2;
    shift[i] = static_cast<T>(pooling.gamma * extent);
    there = there && (!has_offset || is_finite(static_cast<double>(shift[i])));
  }
  if (!there) return {-1, 0, 0, 0, 0, 0, 0};
  return {static_cast<int64_t>(roi[0]), start[1], start[0], step[1], step[0], shift[1], shift[0]};
}

// The two pixels around a point along an axis, the edge twice for a point beyond it, and its distance from the first.
template <typename T>
struct Span {
  bool counts;
  int64_t low, high;
  T part;
};

template <typename T>
DYHEAD_HOST_DEVICE Span<T> span_of(T position, int64_t size, T margin) {
  if (!(position >= -margin && position <= static_cast<T>(size - 1) + margin)) return {false, 0, 0, 0};
  const T floor = std::floor(position);
  const int64_t before = static_cast<int64_t>(floor), last = size - 1;
  // On integers: a size beyond the type's precision may have been rounded up.
  return {true, before < 0 ? 0 : before < last ? before : last, before < last ? before + 1 : last, position - floor};
}

// A cell of a region on a map, and the points of it that count.
template <typename T>
struct RegionCell {
  Region<T> region;
  int64_t height, width;
  int row, column, samples;  // row, column: of its first point
  T down, right;             // by how much the offset moves it
  bool aligned;

  DYHEAD_HOST_DEVICE Span<T> row_at(int k) const {
    if (region.image < 0) return {false, 0, 0, 0};
    return span_of<T>(static_cast<T>(region.y + static_cast<double>(row + k) * region.down) + down, height, margin());
  }
  DYHEAD_HOST_DEVICE Span<T> column_at(int k) const {
    return span_of<T>(static_cast<T>(region.x + static_cast<double>(column + k) * region.right) + right, width,
                      margin());
  }
  DYHEAD_HOST_DEVICE Cell<T> between(const Span<T>& rows, const Span<T>& columns) const {
    const int64_t top = rows.low * width, bottom = rows.high * width;
    return {
        {top + columns.low, top + columns.high, bottom + columns.low, bottom + columns.high}, rows.part, columns.part};
  }
  // Calls visit(cell) with the pixels around every point that counts.
  template <typename Visit>
  DYHEAD_HOST_DEVICE void for_each_sample(const Visit& visit) const {
    DYHEAD_ROLLED
    for (int r = 0; r < samples; ++r) {
      const Span<T> rows = row_at(r);
      if (!rows.counts) continue;
      DYHEAD_ROLLED
      for (int s = 0; s < samples; ++s) {
        const Span<T> columns = column_at(s);
        if (columns.counts) visit(between(rows, columns));
      }
    }
  }
  // What the sum of the samples is divided by.
  DYHEAD_HOST_DEVICE T divisor() const {
    if (aligned) return static_cast<T>(samples * samples);
    int rows = 0, columns = 0;
    for (int k = 0; k < samples; ++k) {
      rows += row_at(k).counts ? 1 : 0;
      columns += column_at(k).counts ? 1 : 0;
    }
    return static_cast<T>(rows * columns > 0 ? rows * columns : 1);
  }
  DYHEAD_HOST_DEVICE T margin() const { return aligned ? T(1) : T(0.5); }
};

// Cell (i, j) of a region. `offset`: of the region, (2, side, side), or null.
template <typename T>
DYHEAD_HOST_DEVICE RegionCell<T> cell_of(const Region<T>& region, const Pooling& pooling, int i, int j, const T* offset,
                                         int64_t height, int64_t width) {
  RegionCell<T> cell{region,          height, width, i * pooling.samples, j * pooling.samples,
                     pooling.samples, 0,      0,     pooling.aligned};
  if (offset != nullptr) {
    const int place = i * pooling.side + j;
    cell.right = region.shift_x * offset[place];
    cell.down = region.shift_y * offset[pooling.side * pooling.side + place];
  }
  return cell;
}

// The weight of every corner in the interpolated value.
template <typename T>
DYHEAD_HOST_DEVICE void corner_shares(const Cell<T>& cell, T share[4]) {
  share[0] = (1 - cell.down) * (1 - cell.right);
  share[1] = (1 - cell.down) * cell.right;
  share[2] = cell.down * (1 - cell.right);
  share[3] = cell.down * cell.right;
}

// Derivatives by y and x of the interpolated value, from the four corner values (0 for a corner outside).
template <typename T>
DYHEAD_HOST_DEVICE T derivative_y(const Cell<T>& cell, const T value[4]) {
  return (1 - cell.right) * (value[2] - value[0]) + cell.right * (value[3] - value[1]);
}

template <typename T>
DYHEAD_HOST_DEVICE T derivative_x(const Cell<T>& cell, const T value[4]) {
  return (1 - cell.down) * (value[1] - value[0]) + cell.down * (value[3] - value[2]);
}

// Gradients of what one sample is made of, from the products of the output's gradient with its four corner values.
template <typename T>
struct SampleGradients {
  T dy, dx, mask, level_weight;
};

template <typename T>
DYHEAD_HOST_DEVICE SampleGradients<T> sample_gradients(const Cell<T>& cell, const T product[4], T mask, T level_weight,
                                                       T shift_y, T shift_x) {
  T share[4];
  corner_shares(cell, share);
  const T value = share[0] * product[0] + share[1] * product[1] + share[2] * product[2] + share[3] * product[3];
  const T factor = mask * level_weight;
  return {factor * shift_y * derivative_y(cell, product), factor * shift_x * derivative_x(cell, product),
          level_weight * value, mask * value};
}

// Where the plane of a tap begins in a mask (N, G*K, H, W). In an offset, dy's begins at twice that, dx's follows.
DYHEAD_HOST_DEVICE int64_t plane(int64_t n, int64_t offset_groups, int64_t offset_group, int64_t taps, int64_t tap,
                                 int64_t pixels) {
  return ((n * offset_groups + offset_group) * taps + tap) * pixels;
}

// The end of the longest run of channels from `begin` on, at most up to `limit`, that one convolution group and one
// offset group share; both are given by their number of channels.
template <typename Integer>
DYHEAD_HOST_DEVICE Integer run_end(Integer begin, Integer limit, Integer group_channels, Integer offset_channels) {
  const Integer group_left = group_channels - begin % group_channels;
  const Integer offset_left = offset_channels - begin % offset_channels;
  const Integer left = group_left < offset_left ? group_left : offset_left;
  return left < limit - begin ? begin + left : limit;
}

}  // namespace dyhead
