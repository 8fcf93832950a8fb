// The gradients of offset, mask and level weight, which are sums over channels.
//
// Blocks of channels are worked on side by side. Every one adds into planes of its own, and the planes of an offset
// group are summed at the end, in their order, so that the result is the same for any number of threads.

#pragma once

#include <algorithm>
#include <vector>

#include "../gradients.h"
#include "inputs.h"

namespace dyhead::cpu {

template <typename A>
class PositionGradients {
 public:
  // Every offset group has the same number of the `block_count` blocks, which follow each other.
  PositionGradients(const Problem& problem, const Gradients& gradients, int64_t block_count)
      : problem_(problem),
        gradients_(gradients),
        levels_(static_cast<int64_t>(problem.levels.size())),
        block_count_(block_count),
        group_blocks_(block_count / problem.offset_groups),
        mask_size_(problem.batch * problem.offset_groups * problem.taps() * problem.pixels()),
        level_sums_(static_cast<size_t>(block_count * problem.batch * levels_), 0.0) {
    if (gradients.needs.offset) offset_.allocate(gradients.offset, 2 * mask_size_, group_blocks_);
    if (gradients.needs.mask) mask_.allocate(gradients.mask, mask_size_, group_blocks_);
  }

  // Adds what a level's samples of a tap give, whose plane (Inputs::plane) is given, from the corners' products with
  // the gradients of samples; and to `level_sum` the terms of the level weight's gradient.
  void add(int64_t block, int64_t level, int64_t plane, const Pixel* pixels, const Sample<A>* samples,
           const A* corner_products, int64_t count, A level_weight, double& level_sum) const {
    const Needs& needs = gradients_.needs;
    const Level& map = problem_.levels[level];
    const A shift_y = static_cast<A>(map.rows.shift), shift_x = static_cast<A>(map.columns.shift);
    const int64_t own = block % group_blocks_, plane_stride = problem_.pixels();
    // Levels add up; the first one sets.
    const auto add_to = [&](A* to, A more) { *to = level == 0 ? more : *to + more; };
    for (int64_t p = 0; p < count; ++p) {
      const SampleGradients<A> more =
          sample_gradients(samples[p].cell, corner_products + 4 * p, samples[p].mask, level_weight, shift_y, shift_x);
      if (needs.offset) {
        A* const to = offset_.planes[own] + 2 * plane + pixels[p].index;
        add_to(to, more.dy);
        add_to(to + plane_stride, more.dx);
      }
      if (needs.mask) add_to(mask_.planes[own] + plane + pixels[p].index, more.mask);
      level_sum += static_cast<double>(more.level_weight);
    }
  }

  void set_level_sum(int64_t block, int64_t n, int64_t level, double sum) {
    level_sums_[(block * problem_.batch + n) * levels_ + level] = sum;
  }

  // Sums up over blocks, into the results.
  void finish() const {
    if (gradients_.needs.offset) offset_.sum(2 * mask_size_);
    if (gradients_.needs.mask) mask_.sum(mask_size_);
    if (!gradients_.needs.level_weight) return;
    A* const result = static_cast<A*>(gradients_.level_weight.mutable_data_ptr());
    const int64_t block_stride = problem_.batch * levels_;
    for (int64_t i = 0; i < block_stride; ++i) {
      double total = 0;
      for (int64_t block = 0; block < block_count_; ++block) total += level_sums_[block * block_stride + i];
      result[i] = static_cast<A>(total);
    }
  }

 private:
  // As (block of the group, image, offset group, tap, [dy, dx,] pixel). The first block's are the result itself.
  struct Planes {
    void allocate(const Tensor& result, int64_t block_stride, int64_t count) {
      rest = Buffer<A>(volume(count - 1, block_stride));
      planes.push_back(static_cast<A*>(result.mutable_data_ptr()));
      for (int64_t i = 1; i < count; ++i) planes.push_back(rest.get() + (i - 1) * block_stride);
    }

    void sum(int64_t block_stride) const {
      constexpr int64_t chunk = 4096;
      const int64_t chunks = planes.size() > 1 ? blocks(block_stride, chunk) : 0;
      parallel_units(chunks, worker_count(chunks, chunk / 4.0), [&](int64_t unit, int64_t) {
        for (size_t block = 1; block < planes.size(); ++block) {
          const int64_t end = std::min(block_stride, (unit + 1) * chunk);
          for (int64_t i = unit * chunk; i < end; ++i) planes[0][i] += planes[block][i];
        }
      });
    }

    Buffer<A> rest;
    std::vector<A*> planes;
  };

  const Problem& problem_;
  const Gradients& gradients_;
  int64_t levels_, block_count_, group_blocks_, mask_size_;
  Planes offset_, mask_;
  std::vector<double> level_sums_;
};

}  // namespace dyhead::cpu
