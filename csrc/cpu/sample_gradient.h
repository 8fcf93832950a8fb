// The gradients of samples, and from them those of features, offset, mask and level weight.
//
// A worker owns a block of channels of an image. It multiplies the output's gradient with a tap's weights into a panel,
// the gradient of the samples, and scatters that over the features' gradient, without atomic operations.

#pragma once

#include <algorithm>
#include <vector>

#include "../gradients.h"
#include "inputs.h"
#include "output_gradient.h"
#include "position_gradients.h"

namespace dyhead::cpu {

// Channels in one offset group, what a worker owns of an image.
struct ChannelBlock {
  static constexpr int64_t kWidth = 64;  // at most

  int64_t offset_group, begin, width;
  std::vector<Segment> segments;  // one per convolution group in it
  std::vector<int64_t> columns;   // where each segment begins in the panel; segments are padded to whole blocks
  int64_t panel_width;
};

// `columns` are those of a block of the product.
inline std::vector<ChannelBlock> channel_blocks(const Problem& problem, int64_t columns) {
  const int64_t offset_channels = problem.channels / problem.offset_groups;
  std::vector<ChannelBlock> result;
  for (int64_t g = 0; g < problem.offset_groups; ++g) {
    for (int64_t begin = 0; begin < offset_channels; begin += ChannelBlock::kWidth) {
      const int64_t width = std::min(ChannelBlock::kWidth, offset_channels - begin);
      ChannelBlock block{g, g * offset_channels + begin, width, {}, {}, 0};
      block.segments = segments(problem, block.begin, block.begin + width);
      for (const Segment& segment : block.segments) {
        block.columns.push_back(block.panel_width);
        block.panel_width += round_up(segment.width, columns);
      }
      result.push_back(std::move(block));
    }
  }
  return result;
}

// The weights as (block of channels, level, segment, tap, block of columns, unit of output channels, channel of the
// block of columns, output channel of the unit).
template <typename T, typename P>
struct SampleGradientWeights {
  SampleGradientWeights(const Inputs<T>& inputs, const std::vector<ChannelBlock>& channel_blocks,
                        const Kernels<T, P>& kernel)
      : problem(inputs.problem), columns(kernel.columns), depth(round_up(problem.group_out_channels(), kUnit<P>)) {
    int64_t size = 0;
    for (const ChannelBlock& block : channel_blocks) {
      starts.push_back(size);
      size += volume(problem.levels.size(), problem.taps(), block.panel_width, depth);
    }
    packed = Buffer<P>(size);
    const int64_t levels = static_cast<int64_t>(problem.levels.size());
    const int64_t units = levels * static_cast<int64_t>(channel_blocks.size());
    const double cost = static_cast<double>(size) / static_cast<double>(2 * units);
    parallel_units(units, worker_count(units, cost), [&](int64_t unit, int64_t) {
      const int64_t level = unit % levels, b = unit / levels;
      for (size_t s = 0; s < channel_blocks[b].segments.size(); ++s) {
        pack(inputs, kernel, channel_blocks[b], b, level, static_cast<int64_t>(s));
      }
    });
  }

  // The right operand of a tap's product.
  P* at(int64_t b, const ChannelBlock& block, int64_t level, int64_t segment, int64_t tap) const {
    const int64_t padded = round_up(block.segments[segment].width, columns);
    return packed.get() + starts[b] +
           ((level * block.panel_width + block.columns[segment]) * problem.taps() + tap * padded) * depth;
  }
  int64_t column_block_stride() const { return depth * columns; }

  const Problem& problem;
  int64_t columns, depth;
  std::vector<int64_t> starts;  // of the blocks of channels
  Buffer<P> packed;

 private:
  void pack(const Inputs<T>& inputs, const Kernels<T, P>& kernel, const ChannelBlock& block, int64_t b, int64_t level,
            int64_t s) const {
    const Segment& segment = block.segments[s];
    const int64_t taps = problem.taps(), channels = problem.group_channels(), outs = problem.group_out_channels();
    const int64_t padded = round_up(segment.width, columns), first = segment.begin % channels;
    P* const to = at(b, block, level, s, 0);
    if (padded != segment.width || depth != outs) std::fill(to, to + taps * padded * depth, P(0));
    const T* const from = inputs.weight + ((level * problem.groups + segment.group) * outs * channels + first) * taps;
    for (int64_t begin = 0; begin < segment.width; begin += columns) {
      kernel.pack(from + begin * taps, inputs.weight_end(), taps, channels * taps,
                  std::min(columns, segment.width - begin), outs, taps, to + begin * depth, padded * depth,
                  columns * kUnit<P>);
    }
  }
};

template <typename T, typename P>
class SampleGradient {
  using A = Accumulator<T>;

 public:
  SampleGradient(const Inputs<T>& inputs, const OutputGradient<T, P>& gradient, const Kernels<T, P>& kernel,
                 Gradients& gradients)
      : inputs_(inputs),
        problem_(inputs.problem),
        gradient_(gradient),
        kernel_(kernel),
        gradients_(gradients),
        sums_(gradients.feature_sums(problem_)),
        blocks_(channel_blocks(problem_, kernel.columns)),
        weights_(inputs, blocks_, kernel),
        positions_(problem_, gradients, static_cast<int64_t>(blocks_.size())) {
    for (const Tensor& sum : sums_) feature_sums_.push_back(static_cast<A*>(sum.mutable_data_ptr()));
  }

  void run() {
    const int64_t levels = static_cast<int64_t>(problem_.levels.size());
    const int64_t block_count = static_cast<int64_t>(blocks_.size()), units = problem_.batch * block_count;
    const double cost = 2 * product_cost(problem_, problem_.pixels(), blocks_[0].width, levels * problem_.taps());
    const int64_t workers = worker_count(units, cost);
    int64_t panel_width = 0;
    for (const ChannelBlock& block : blocks_) panel_width = std::max(panel_width, block.panel_width);
    std::vector<Scratch> scratches;
    for (int64_t worker = 0; worker < workers; ++worker) {
      scratches.push_back(
          {Buffer<A>(kTile * panel_width), Buffer<A>(4 * kTile), Buffer<Pixel>(kTile), Buffer<Sample<A>>(kTile)});
    }
    parallel_units(units, workers, [&](int64_t unit, int64_t worker) {
      for (int64_t level = 0; level < levels; ++level) {
        run_level(unit / block_count, unit % block_count, level, scratches[worker]);
      }
    });
    positions_.finish();
    gradients_.finish(sums_);
  }

 private:
  struct Scratch {
    Buffer<A> panel, corner_products;
    Buffer<Pixel> pixels;
    Buffer<Sample<A>> samples;
  };

  // A block of channels of an image, on one level.
  void run_level(int64_t n, int64_t b, int64_t level, const Scratch& scratch) {
    const ChannelBlock& block = blocks_[b];
    const bool needs_positions = gradients_.needs.positions();
    const A level_weight = inputs_.level_factor(n, level);
    A* const features = gradients_.needs.features ? clear_features(n, block, level) : nullptr;
    double level_sum = 0;
    for (int64_t begin = 0; begin < problem_.pixels(); begin += kTile) {
      const int64_t count = std::min(kTile, problem_.pixels() - begin);
      inputs_.order.list(begin, count, scratch.pixels.get());
      for (int64_t tap = 0; tap < problem_.taps(); ++tap) {
        kernel_.locate(inputs_.tap(n, level, block.offset_group, tap), scratch.pixels.get(), count,
                       scratch.samples.get());
        run_tap(n, b, level, tap, begin, count, features, scratch);
        if (!needs_positions) continue;
        positions_.add(b, level, inputs_.plane(n, block.offset_group, tap), scratch.pixels.get(), scratch.samples.get(),
                       scratch.corner_products.get(), count, level_weight, level_sum);
      }
    }
    positions_.set_level_sum(b, n, level, level_sum);
  }

  // The gradients of a tile's samples, scattered over `features` (null: not wanted) and the corners' products.
  void run_tap(int64_t n, int64_t b, int64_t level, int64_t tap, int64_t begin, int64_t count, A* features,
               const Scratch& scratch) const {
    const ChannelBlock& block = blocks_[b];
    A* const panel = scratch.panel.get();
    A* const corner_products = scratch.corner_products.get();
    std::fill(panel, panel + round_up(count, kernel_.rows) * block.panel_width, A(0));
    std::fill(corner_products, corner_products + 4 * count, A(0));
    for (size_t s = 0; s < block.segments.size(); ++s) {
      const Segment& segment = block.segments[s];
      A* const own = panel + block.columns[s];
      kernel_.product(
          blocks(count, kernel_.rows), blocks(segment.width, kernel_.columns), weights_.depth / kUnit<P>,
          {gradient_.row(n, begin) + segment.group * gradient_.group_stride, gradient_.pixel_stride, kUnit<P>},
          weights_.at(b, block, level, static_cast<int64_t>(s), tap), weights_.column_block_stride(),
          kernel_.columns * kUnit<P>, own, block.panel_width);
      kernel_.scatter(scratch.samples.get(), count, inputs_.channels(n, level, segment.begin), segment.width, own,
                      block.panel_width, gradients_.needs.positions() ? corner_products : nullptr,
                      features == nullptr ? nullptr : features + (segment.begin - block.begin));
    }
  }

  // The features' gradient from the block's first channel on, after the block's channels were set to 0.
  A* clear_features(int64_t n, const ChannelBlock& block, int64_t level) const {
    A* const result = feature_sums_[level] + n * inputs_.image_stride(level) + block.begin;
    const int64_t pixels = problem_.levels[level].height * problem_.levels[level].width;
    for (int64_t i = 0; i < pixels; ++i) {
      std::fill(result + i * problem_.channels, result + i * problem_.channels + block.width, A(0));
    }
    return result;
  }

  const Inputs<T>& inputs_;
  const Problem& problem_;
  const OutputGradient<T, P>& gradient_;
  const Kernels<T, P>& kernel_;
  Gradients& gradients_;
  std::vector<Tensor> sums_;
  std::vector<A*> feature_sums_;
  std::vector<ChannelBlock> blocks_;
  SampleGradientWeights<T, P> weights_;
  PositionGradients<A> positions_;
};

template <typename T, typename P>
void sample_gradient_pass(const Inputs<T>& inputs, const OutputGradient<T, P>& gradient, const Kernels<T, P>& kernel,
                          Gradients& gradients) {
  SampleGradient<T, P>(inputs, gradient, kernel, gradients).run();
}

}  // namespace dyhead::cpu
