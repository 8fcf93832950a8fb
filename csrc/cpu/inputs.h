// The arguments as the CPU kernels read them, and what the forward and the backward pass share.

#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "../arguments.h"
#include "kernels.h"
#include "memory.h"
#include "path.h"

namespace dyhead::cpu {

constexpr int64_t kTile = 144;  // output pixels of a tile, a multiple of every Kernels::rows

// Vector instructions of the product of `rows` samples of `channels` channels with the weights of `taps` taps.
inline double product_cost(const Problem& problem, int64_t rows, int64_t channels, int64_t taps) {
  constexpr double lanes = 16;
  return static_cast<double>(rows) * static_cast<double>(channels) * static_cast<double>(taps) *
         static_cast<double>(problem.group_out_channels()) / lanes;
}

template <typename T, typename P>
const Kernels<T, P>& kernels() {
#if defined(__x86_64__)
  if constexpr (std::is_same_v<P, BFloat16>) {
    return avx512_bf16_path::kernels();
  } else {
    if (path() >= Path::kAvx512) return avx512_path::kernels<T>();
    if (path() == Path::kAvx2) return avx2_path::kernels<T>();
    return default_path::kernels<T>();
  }
#else
  return default_path::kernels<T>();
#endif
}

// The order in which tiles take up the pixels of the output: strips of columns from left to right, each of them row by
// row. A tile is then about as high as it is wide, and what its taps read is little and stays in the cache.
class PixelOrder {
 public:
  PixelOrder(int64_t height, int64_t width)
      : height_(height), width_(width), strip_(blocks(width, blocks(width, kStrip))) {}

  // Writes `count` pixels of the order from the one at `begin` on.
  void list(int64_t begin, int64_t count, Pixel* pixels) const {
    int64_t first = begin / (strip_ * height_) * strip_, last = std::min(first + strip_, width_);
    const int64_t rest = begin - first * height_;
    int64_t row = rest / (last - first), column = first + rest % (last - first);
    for (int64_t p = 0; p < count; ++p) {
      pixels[p] = {row, column, row * width_ + column};
      if (++column < last) continue;
      if (++row == height_) {
        row = 0;
        first = last;
        last = std::min(first + strip_, width_);
      }
      column = first;
    }
  }

 private:
  static constexpr int64_t kStrip = 12;
  int64_t height_, width_, strip_;
};

// A run of channels that one convolution group and one offset group share.
struct Segment {
  int64_t begin, width, group, offset_group;
};

// Cuts channels [begin, end) where a group begins.
inline std::vector<Segment> segments(const Problem& problem, int64_t begin, int64_t end) {
  const int64_t group_channels = problem.group_channels(), offset_channels = problem.channels / problem.offset_groups;
  std::vector<Segment> result;
  while (begin < end) {
    const int64_t stop = run_end(begin, end, group_channels, offset_channels);
    result.push_back({begin, stop - begin, begin / group_channels, begin / offset_channels});
    begin = stop;
  }
  return result;
}

// The arguments as the kernels read them.
template <typename T>
struct Inputs {
  using A = Accumulator<T>;

  Inputs(const Arguments& arguments, const Problem& problem)
      : problem(problem),
        order(problem.height, problem.width),
        outside(problem.channels),
        offset_tensor(as_contiguous(arguments.offset)),
        weight_tensor(as_contiguous(arguments.weight)),
        offset(static_cast<const A*>(offset_tensor.const_data_ptr())),
        weight(static_cast<const T*>(weight_tensor.const_data_ptr())) {
    std::fill(outside.get(), outside.get() + problem.channels, T(0));
    for (const Tensor& feature : arguments.features) {
      feature_tensors.push_back(as_channels_last(feature));
      features.push_back(static_cast<const T*>(feature_tensors.back().const_data_ptr()));
    }
    if (arguments.mask) {
      mask_tensor = as_contiguous(*arguments.mask);
      mask = static_cast<const A*>(mask_tensor->const_data_ptr());
    }
    if (arguments.level_weight) {
      level_weight_tensor = as_contiguous(*arguments.level_weight);
      level_weight = static_cast<const A*>(level_weight_tensor->const_data_ptr());
    }
  }

  // The features of an image on a level, from a channel on.
  Channels<T> channels(int64_t n, int64_t level, int64_t channel) const {
    return {features[level] + n * image_stride(level) + channel, problem.channels, outside.get()};
  }
  int64_t image_stride(int64_t level) const {
    return problem.levels[level].height * problem.levels[level].width * problem.channels;
  }

  const T* weight_end() const {
    return weight + static_cast<int64_t>(problem.levels.size()) * problem.out_channels * problem.group_channels() *
                        problem.taps();
  }
  A level_factor(int64_t n, int64_t level) const {
    return level_weight ? level_weight[n * static_cast<int64_t>(problem.levels.size()) + level] : A(1);
  }
  // Row (n, offset_group, tap) of the mask, or of a half of the offset: planes of H * W elements.
  int64_t plane(int64_t n, int64_t offset_group, int64_t tap) const {
    return dyhead::plane(n, problem.offset_groups, offset_group, problem.taps(), tap, problem.pixels());
  }

  Tap<A> tap(int64_t n, int64_t level, int64_t offset_group, int64_t tap) const {
    const Level& map = problem.levels[level];
    const int64_t at = plane(n, offset_group, tap);
    const A* const dy = offset + 2 * at;
    return {map.rows,
            map.columns,
            map.height,
            map.width,
            tap / problem.kernel_width,
            tap % problem.kernel_width,
            dy,
            dy + problem.pixels(),
            mask ? mask + at : nullptr,
            level_factor(n, level)};
  }

  const Problem& problem;
  const PixelOrder order;
  Buffer<T> outside;
  Tensor offset_tensor, weight_tensor;
  std::optional<Tensor> mask_tensor, level_weight_tensor;
  std::vector<Tensor> feature_tensors;
  std::vector<const T*> features;
  const A* offset;
  const T* weight;
  const A* mask = nullptr;
  const A* level_weight = nullptr;
};

// Calls visit with values of the C++ type of `dtype`, which was checked, and of the type of a product's operands.
template <typename Visit>
void dispatch(ScalarType dtype, const Visit& visit) {
  switch (dtype) {
    case ScalarType::Double:
      return visit(double(), double());
    case ScalarType::Float:
      return visit(float(), float());
    case ScalarType::BFloat16:
#if defined(__x86_64__)
      if (path() == Path::kAvx512Bf16) return visit(BFloat16(), BFloat16());
#endif
      return visit(BFloat16(), float());
    default:
      return visit(Half(), float());
  }
}

}  // namespace dyhead::cpu
