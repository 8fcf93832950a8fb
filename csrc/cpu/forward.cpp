// The forward pass on the CPU.
//
// It works on tiles of output pixels: the samples of a tile for a few taps go into a panel that stays in the cache, and
// the panel is multiplied with those taps' weights into the tile's sums; levels and taps add up there. Features are
// read with their channels last; others are copied once per call.

#include <torch/csrc/stable/library.h>

#include "inputs.h"

namespace dyhead::cpu {
namespace {

constexpr int64_t kPanelDepth = 320;  // channels times taps that a panel holds per group, about

// Weights as (level, group, block of output channels, tap, input channel, output channel of the block).
template <typename T>
struct ForwardWeights {
  using A = Accumulator<T>;

  ForwardWeights(const Inputs<T>& inputs, int64_t columns)
      : problem(inputs.problem),
        columns(columns),
        column_blocks(blocks(problem.group_out_channels(), columns)),
        block_size(problem.taps() * problem.group_channels() * columns),
        packed(volume(problem.levels.size(), problem.groups, column_blocks, problem.taps(), problem.group_channels(),
                      columns)) {
    const int64_t units = static_cast<int64_t>(problem.levels.size()) * problem.groups * column_blocks;
    parallel_units(units, worker_count(units, static_cast<double>(block_size)), [&](int64_t unit, int64_t) {
      const int64_t first = unit % column_blocks * columns, run = unit / column_blocks;
      const int64_t taps = problem.taps(), channels = problem.group_channels();
      const int64_t width = std::min(columns, problem.group_out_channels() - first);
      const T* from = inputs.weight + (run * problem.group_out_channels() + first) * channels * taps;
      A* to = packed.get() + unit * block_size;
      if (width < columns) std::fill(to, to + block_size, A(0));
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t k = 0; k < taps; ++k) {
          A* row = to + (k * channels + c) * columns;
          for (int64_t o = 0; o < width; ++o) row[o] = static_cast<A>(from[(o * channels + c) * taps + k]);
        }
      }
    });
  }

  const A* at(int64_t level, int64_t group, int64_t tap) const {
    return packed.get() + (level * problem.groups + group) * column_blocks * block_size +
           tap * problem.group_channels() * columns;
  }

  const Problem& problem;
  int64_t columns, column_blocks, block_size;
  Buffer<A> packed;
};

// Writes the sums of a tile, (pixel, group, output channel of the group padded to `group_stride`).
template <typename T>
void write_tile(const Problem& problem, const Accumulator<T>* sums, int64_t group_stride, int64_t n, int64_t begin,
                int64_t count, bool channels_last, T* out) {
  const int64_t stride = problem.groups * group_stride, group_channels = problem.group_out_channels();
  for (int64_t group = 0; group < problem.groups; ++group) {
    const Accumulator<T>* from = sums + group * group_stride;
    if (channels_last) {
      T* to = out + (n * problem.pixels() + begin) * problem.out_channels + group * group_channels;
      for (int64_t p = 0; p < count; ++p) {
        for (int64_t o = 0; o < group_channels; ++o) {
          to[p * problem.out_channels + o] = static_cast<T>(from[p * stride + o]);
        }
      }
    } else {
      T* to = out + (n * problem.out_channels + group * group_channels) * problem.pixels() + begin;
      for (int64_t o = 0; o < group_channels; ++o) {
        for (int64_t p = 0; p < count; ++p) to[o * problem.pixels() + p] = static_cast<T>(from[p * stride + o]);
      }
    }
  }
}

template <typename T>
void forward(const Arguments& arguments, const Problem& problem, Tensor& result, bool channels_last) {
  using A = Accumulator<T>;
  const Kernels<T>& kernel = kernels<T>();
  const Inputs<T> inputs(arguments, problem);
  T* out = static_cast<T*>(result.mutable_data_ptr());
  std::optional<Tensor> bias_tensor;
  if (arguments.bias) bias_tensor = as_contiguous(*arguments.bias);
  const T* bias = bias_tensor ? static_cast<const T*>(bias_tensor->const_data_ptr()) : nullptr;

  const int64_t taps = problem.taps(), depth = problem.group_channels(), pixels = problem.pixels();
  const int64_t panel_taps =
      blocks(taps, blocks(taps, std::clamp<int64_t>(kPanelDepth / depth, 1, taps)));  // of equal size
  const ForwardWeights<T> weights(inputs, kernel.columns);
  const Buffer<T> outside = zeros<T>(problem.channels);
  const std::vector<Segment> all = segments(problem, 0, problem.channels);

  // A pixel's result does not depend on its tile, so small maps may be cut to occupy all threads.
  const int64_t share = blocks(problem.batch * pixels, 4 * static_cast<int64_t>(torch::stable::get_num_threads()));
  const int64_t tile = std::min(kTile, round_up(std::clamp<int64_t>(share, 1, pixels), kernel.rows));
  const int64_t tiles = blocks(pixels, tile), units = problem.batch * tiles;
  const int64_t levels = static_cast<int64_t>(problem.levels.size());
  const int64_t workers = worker_count(units, product_cost(problem, tile, problem.channels, levels * taps));
  const int64_t group_stride = weights.column_blocks * kernel.columns, sums_stride = problem.groups * group_stride;
  const int64_t panel_stride = panel_taps * problem.channels;

  struct Scratch {
    Buffer<A> sums, panel;
    Buffer<Sample<T>> samples;
  };
  std::vector<Scratch> scratches;
  for (int64_t worker = 0; worker < workers; ++worker) {
    scratches.push_back({Buffer<A>(volume(tile, sums_stride)), Buffer<A>(volume(tile, panel_stride)),
                         Buffer<Sample<T>>(volume(problem.offset_groups, tile))});
  }

  parallel_units(units, workers, [&](int64_t unit, int64_t worker) {
    const Scratch& scratch = scratches[worker];
    const int64_t n = unit / tiles, begin = unit % tiles * tile, count = std::min(tile, pixels - begin);
    A* sums = scratch.sums.get();
    std::fill(sums, sums + tile * sums_stride, A(0));
    if (bias != nullptr) {
      for (int64_t p = 0; p < count; ++p) {
        for (int64_t o = 0; o < problem.out_channels; ++o) {
          const int64_t group = o / problem.group_out_channels();
          sums[p * sums_stride + group * (group_stride - problem.group_out_channels()) + o] = static_cast<A>(bias[o]);
        }
      }
    }
    for (int64_t level = 0; level < levels; ++level) {
      for (int64_t first = 0; first < taps; first += panel_taps) {
        // The panel: (pixel, group, tap, channel of the group).
        const int64_t some = std::min(panel_taps, taps - first);
        for (int64_t tap = first; tap < first + some; ++tap) {
          for (int64_t g = 0; g < problem.offset_groups; ++g) {
            inputs.samples(n, level, g, tap, begin, count, outside.get(), scratch.samples.get() + g * tile);
          }
          for (const Segment& segment : all) {
            A* to = scratch.panel.get() + (segment.group * some + tap - first) * depth + segment.begin % depth;
            kernel.sample(scratch.samples.get() + segment.offset_group * tile, count, segment.begin, segment.width, to,
                          panel_stride);
          }
        }
        for (int64_t group = 0; group < problem.groups; ++group) {
          kernel.product(blocks(count, kernel.rows), weights.column_blocks, some * depth,
                         {scratch.panel.get() + group * some * depth, panel_stride, 1}, weights.at(level, group, first),
                         weights.block_size, kernel.columns, sums + group * group_stride, sums_stride);
        }
      }
    }
    write_tile<T>(problem, sums, group_stride, n, begin, count, channels_last, out);
  });
}

Tensor pyramid_deform_conv2d(std::vector<Tensor> features, Tensor offset, std::optional<Tensor> mask, Tensor weight,
                             std::optional<Tensor> bias, std::optional<Tensor> level_weight, bool aligned,
                             std::optional<std::vector<double>> scales, std::vector<int64_t> stride,
                             std::vector<int64_t> padding, std::vector<int64_t> dilation) {
  const Arguments arguments{features, offset, mask,   weight,  bias,    level_weight,
                            aligned,  scales, stride, padding, dilation};
  const Problem problem = check_arguments(arguments);
  const bool last = is_channels_last(features[0]);
  Tensor result = new_tensor(features[0], {problem.batch, problem.out_channels, problem.height, problem.width},
                             problem.dtype, last);
  dispatch(problem.dtype, [&](auto value) { forward<decltype(value)>(arguments, problem, result, last); });
  return result;
}

}  // namespace
}  // namespace dyhead::cpu

STABLE_TORCH_LIBRARY_IMPL(dyhead, CPU, library) {
  library.impl("pyramid_deform_conv2d", TORCH_BOX(&dyhead::cpu::pyramid_deform_conv2d));
}
