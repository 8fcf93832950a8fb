// What border alignment takes and returns, on any device. dyhead/ops/border.py documents it.

#pragma once

#include <vector>

#include "channelwise.h"

namespace dyhead {

constexpr int kBorders = 4;             // of a box, with a group of channels each: top, left, bottom, right
constexpr int64_t kMostPoolSize = 255;  // the last point's number fits a byte

// Cells are the boxes of an image.
struct BorderProblem {
  ScalarType dtype;
  int64_t batch, channels, height, width, cells;
  int pool_size;

  int64_t pixels() const { return height * width; }
  int64_t border_channels() const { return channels / kBorders; }
};

inline BorderProblem check_borders(const Tensor& x, const Tensor& boxes, int64_t pool_size) {
  using namespace detail;
  check_map("x", x);
  if (x.size(1) % kBorders != 0) {
    fail("x", text("a multiple of ", kBorders, " channels, as many for every border"), shape_text(x));
  }
  expect_like("boxes", boxes, accumulation_dtype(x.scalar_type()), x);
  if (boxes.dim() != 4 || boxes.size(0) != x.size(0) || boxes.size(1) != 4) {
    fail("boxes", text("(", x.size(0), ", 4, H, W)"), shape_text(boxes));
  }
  if (pool_size < 1 || pool_size > kMostPoolSize) {
    fail("pool_size", text("an integer from 1 to ", kMostPoolSize), std::to_string(pool_size));
  }
  return {x.scalar_type(),
          x.size(0),
          x.size(1),
          x.size(2),
          x.size(3),
          boxes.size(2) * boxes.size(3),
          static_cast<int>(pool_size)};
}

// Maxima, in x's layout, and which point has each, with channels last.
struct Maxima {
  Tensor values, index;

  Maxima(const Tensor& x, const Tensor& boxes) {
    const std::vector<int64_t> sizes{x.size(0), x.size(1), boxes.size(2), boxes.size(3)};
    values = new_tensor(x, sizes, x.scalar_type(), is_channels_last(x));
    index = new_tensor(x, sizes, ScalarType::Byte, true);
  }
};

// Checks what the backward pass takes besides; `index` may have any values.
inline void check_maxima_gradient(const Tensor& grad, const Tensor& x, const Tensor& boxes, const Tensor& index) {
  const std::vector<int64_t> sizes{x.size(0), x.size(1), boxes.size(2), boxes.size(3)};
  detail::expect_like("grad", grad, x.scalar_type(), x);
  detail::expect_shape("grad", grad, sizes);
  detail::expect_like("index", index, ScalarType::Byte, x);
  detail::expect_shape("index", index, sizes);
}

}  // namespace dyhead
