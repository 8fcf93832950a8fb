// The gradient of the weight: a product over pixels of samples, which are made again as in the forward pass, with the
// output's gradient.
//
// A worker owns a tap, level and block of input channels, over all pixels of all images.

#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "inputs.h"
#include "output_gradient.h"

namespace dyhead::cpu {

template <typename T, typename P>
class WeightGradient {
  using A = Accumulator<T>;

 public:
  WeightGradient(const Inputs<T>& inputs, const OutputGradient<T, P>& gradient, const Kernels<T, P>& kernel)
      : inputs_(inputs),
        problem_(inputs.problem),
        gradient_(gradient),
        kernel_(kernel),
        taps_(problem_.taps()),
        levels_(static_cast<int64_t>(problem_.levels.size())),
        blocks_(input_blocks()),
        sums_stride_(gradient.group_stride) {
    for (const Block& block : blocks_) width_ = std::max(width_, round_up(block.width, kernel.rows));
    sums_ = Buffer<A>(volume(unit_count(), width_, sums_stride_));
  }

  void run(Tensor& result) const {
    sum();
    write(static_cast<T*>(result.mutable_data_ptr()));
  }

 private:
  // Input channels in one convolution group.
  struct Block {
    static constexpr int64_t kWidth = 96;  // at most

    int64_t group, begin, width;
    std::vector<Segment> segments;
  };

  struct Scratch {
    Buffer<P> panel;
    Buffer<Pixel> pixels;
    Buffer<Sample<A>> samples;
  };

  std::vector<Block> input_blocks() const {
    const int64_t channels = problem_.group_channels();
    std::vector<Block> result;
    for (int64_t group = 0; group < problem_.groups; ++group) {
      for (int64_t first = 0; first < channels; first += Block::kWidth) {
        const int64_t begin = group * channels + first, width = std::min(Block::kWidth, channels - first);
        result.push_back({group, begin, width, segments(problem_, begin, begin + width)});
      }
    }
    return result;
  }

  int64_t block_count() const { return static_cast<int64_t>(blocks_.size()); }
  int64_t unit_count() const { return levels_ * taps_ * block_count(); }
  // The sums, as (level, tap, block, channel of the block, output channel).
  int64_t block_stride() const { return width_ * sums_stride_; }
  int64_t tap_stride() const { return block_count() * block_stride(); }

  void sum() const {
    const double cost = product_cost(problem_, problem_.batch * problem_.pixels(), width_, 1);
    const int64_t workers = worker_count(unit_count(), cost);
    std::vector<Scratch> scratches;
    for (int64_t worker = 0; worker < workers; ++worker) {
      scratches.push_back({Buffer<P>(kTile * width_), Buffer<Pixel>(kTile), Buffer<Sample<A>>(kTile)});
      // Columns beyond a block's channels are multiplied, too, into sums that nobody reads.
      std::fill(scratches.back().panel.get(), scratches.back().panel.get() + kTile * width_, P(0));
    }
    parallel_units(unit_count(), workers, [&](int64_t unit, int64_t worker) {
      A* const sums = sums_.get() + unit * block_stride();
      std::fill(sums, sums + block_stride(), A(0));
      const int64_t tap = unit / block_count() % taps_, level = unit / block_count() / taps_;
      for (int64_t n = 0; n < problem_.batch; ++n) {
        for (int64_t begin = 0; begin < problem_.pixels(); begin += kTile) {
          add_tile(n, level, tap, blocks_[unit % block_count()], begin, scratches[worker], sums);
        }
      }
    });
  }

  void add_tile(int64_t n, int64_t level, int64_t tap, const Block& block, int64_t begin, const Scratch& scratch,
                A* sums) const {
    const int64_t count = std::min(kTile, problem_.pixels() - begin), panel_stride = width_ * kUnit<P>;
    inputs_.order.list(begin, count, scratch.pixels.get());
    for (const Segment& segment : block.segments) {
      kernel_.locate(inputs_.tap(n, level, segment.offset_group, tap), scratch.pixels.get(), count,
                     scratch.samples.get());
      kernel_.sample_units(scratch.samples.get(), count, inputs_.channels(n, level, segment.begin), segment.width,
                           scratch.panel.get() + (segment.begin - block.begin) * kUnit<P>, panel_stride);
    }
    kernel_.product(blocks(block.width, kernel_.rows), sums_stride_ / kernel_.columns, blocks(count, kUnit<P>),
                    {scratch.panel.get(), kUnit<P>, panel_stride},
                    gradient_.unit(n, begin) + block.group * gradient_.group_stride * kUnit<P>,
                    kernel_.columns * kUnit<P>, gradient_.pixel_stride * kUnit<P>, sums, sums_stride_);
  }

  // The sums in the weight's order, (level, output channel, input channel of the group, tap).
  void write(T* result) const {
    constexpr int64_t most = 16;  // output channels of a worker
    const int64_t out_channels = problem_.group_out_channels(), row_stride = problem_.group_channels() * taps_;
    const int64_t chunks = blocks(out_channels, most), moves = levels_ * block_count() * chunks;
    const int64_t workers = worker_count(moves, static_cast<double>(most * width_ * taps_) / 2);
    std::vector<Buffer<A>> unpacked(std::is_same_v<T, A> ? 0 : workers);
    for (Buffer<A>& buffer : unpacked) buffer = Buffer<A>(volume(most, width_, taps_));
    parallel_units(moves, workers, [&](int64_t move, int64_t worker) {
      const int64_t first = move % chunks * most, b = move / chunks % block_count();
      const int64_t level = move / chunks / block_count(), outs = std::min(most, out_channels - first);
      const Block& block = blocks_[b];
      const A* const from = sums_.get() + level * taps_ * tap_stride() + b * block_stride() + first;
      T* const to = result + ((level * problem_.groups + block.group) * out_channels + first) * row_stride +
                    block.begin % problem_.group_channels() * taps_;
      const auto unpack = [&](A* target, int64_t target_stride) {
        kernel_.unpack(from, tap_stride(), sums_stride_, outs, block.width, taps_, target, target_stride);
      };
      if constexpr (std::is_same_v<T, A>) {
        unpack(to, row_stride);
      } else {
        const int64_t own_stride = block.width * taps_;
        A* const own = unpacked[worker].get();
        unpack(own, own_stride);
        for (int64_t o = 0; o < outs; ++o) {
          for (int64_t i = 0; i < own_stride; ++i) to[o * row_stride + i] = static_cast<T>(own[o * own_stride + i]);
        }
      }
    });
  }

  const Inputs<T>& inputs_;
  const Problem& problem_;
  const OutputGradient<T, P>& gradient_;
  const Kernels<T, P>& kernel_;
  int64_t taps_, levels_, width_ = 0;  // width: of the widest block, padded to whole blocks of rows
  std::vector<Block> blocks_;
  int64_t sums_stride_;
  Buffer<A> sums_;
};

template <typename T, typename P>
void weight_gradient_pass(const Inputs<T>& inputs, const OutputGradient<T, P>& gradient, const Kernels<T, P>& kernel,
                          Tensor& result) {
  WeightGradient<T, P>(inputs, gradient, kernel).run(result);
}

}  // namespace dyhead::cpu
