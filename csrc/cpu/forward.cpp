// The forward pass on the CPU.
//
// It works on tiles of output pixels: the samples of a tile for a few taps go into a panel that stays in the cache, and
// the panel is multiplied with those taps' weights into the tile's sums; levels and taps add up there. Features are
// read with their channels last; others are copied once per call.

#include <algorithm>
#include <optional>
#include <vector>

#include "implementation.h"
#include "inputs.h"

namespace dyhead::cpu {
namespace {

constexpr int64_t kPanelDepth = 320;  // channels times taps that a panel holds per group, about

// Weights as (level, group, block of output channels, tap, unit of input channels, output channel of the block, input
// channel of the unit).
template <typename T, typename P>
struct ForwardWeights {
  ForwardWeights(const Inputs<T>& inputs, const Kernels<T, P>& kernel)
      : problem(inputs.problem),
        columns(kernel.columns),
        column_blocks(blocks(problem.group_out_channels(), columns)),
        depth(round_up(problem.group_channels(), kUnit<P>)),
        block_stride(problem.taps() * depth * columns),
        packed(volume(problem.levels.size(), problem.groups, column_blocks, problem.taps(), depth, columns)) {
    const int64_t units = static_cast<int64_t>(problem.levels.size()) * problem.groups * column_blocks;
    parallel_units(units, worker_count(units, static_cast<double>(block_stride) / 2), [&](int64_t unit, int64_t) {
      const int64_t first = unit % column_blocks * columns, run = unit / column_blocks;
      const int64_t taps = problem.taps(), channels = problem.group_channels();
      const int64_t width = std::min(columns, problem.group_out_channels() - first);
      P* const to = packed.get() + unit * block_stride;
      if (width < columns || depth > channels) std::fill(to, to + block_stride, P(0));
      kernel.pack(inputs.weight + (run * problem.group_out_channels() + first) * channels * taps, inputs.weight_end(),
                  channels * taps, taps, width, channels, taps, to, depth * columns, columns * kUnit<P>);
    });
  }

  const P* at(int64_t level, int64_t group, int64_t tap) const {
    return packed.get() + (level * problem.groups + group) * column_blocks * block_stride + tap * depth * columns;
  }

  const Problem& problem;
  int64_t columns, column_blocks, depth, block_stride;
  Buffer<P> packed;
};

// Writes the sums of a tile, (pixel, group, output channel of the group padded to `group_stride`).
template <typename T>
void write_tile(const Problem& problem, const Accumulator<T>* sums, int64_t group_stride, const Pixel* pixels,
                int64_t count, bool channels_last, T* image) {
  const int64_t sums_stride = problem.groups * group_stride, channels = problem.group_out_channels();
  const int64_t pixel_stride = channels_last ? problem.out_channels : 1;
  const int64_t channel_stride = channels_last ? 1 : problem.pixels();
  for (int64_t group = 0; group < problem.groups; ++group) {
    const Accumulator<T>* const from = sums + group * group_stride;
    T* const to = image + group * channels * channel_stride;
    if (channels_last) {
      for (int64_t p = 0; p < count; ++p) {
        const Accumulator<T>* const row = from + p * sums_stride;
        T* const pixel = to + pixels[p].index * pixel_stride;
        for (int64_t o = 0; o < channels; ++o) pixel[o] = static_cast<T>(row[o]);
      }
    } else {
      for (int64_t o = 0; o < channels; ++o) {
        T* const plane = to + o * channel_stride;
        for (int64_t p = 0; p < count; ++p) plane[pixels[p].index] = static_cast<T>(from[p * sums_stride + o]);
      }
    }
  }
}

template <typename T, typename P>
void run(const Arguments& arguments, const Problem& problem, Tensor& result) {
  using A = Accumulator<T>;
  const Kernels<T, P>& kernel = kernels<T, P>();
  const Inputs<T> inputs(arguments, problem);
  T* out = static_cast<T*>(result.mutable_data_ptr());
  const bool channels_last = is_channels_last(arguments.features[0]);
  std::optional<Tensor> bias_tensor;
  if (arguments.bias) bias_tensor = as_contiguous(*arguments.bias);
  const T* bias = bias_tensor ? static_cast<const T*>(bias_tensor->const_data_ptr()) : nullptr;

  const ForwardWeights<T, P> weights(inputs, kernel);
  const int64_t taps = problem.taps(), depth = weights.depth, pixels = problem.pixels();
  const int64_t panel_taps =
      blocks(taps, blocks(taps, std::clamp<int64_t>(kPanelDepth / depth, 1, taps)));  // of equal size
  const std::vector<Segment> all = segments(problem, 0, problem.channels);

  // A pixel's result does not depend on its tile, so tiles are cut to give all threads the same number of pixels.
  const int64_t threads = torch::stable::get_num_threads(), rounds = blocks(problem.batch * pixels, threads * kTile);
  const int64_t share = rounds > 0 ? blocks(problem.batch * pixels, threads * rounds) : 1;
  const int64_t tile = std::min(kTile, round_up(std::clamp<int64_t>(share, 1, pixels), kernel.rows));
  const int64_t tiles = blocks(pixels, tile), units = problem.batch * tiles;
  const int64_t levels = static_cast<int64_t>(problem.levels.size());
  const int64_t workers = worker_count(units, product_cost(problem, tile, problem.channels, levels * taps));
  const int64_t group_stride = weights.column_blocks * kernel.columns, sums_stride = problem.groups * group_stride;
  const int64_t panel_group_stride = panel_taps * depth, panel_stride = problem.groups * panel_group_stride;

  struct Scratch {
    Buffer<A> sums;
    Buffer<P> panel;
    Buffer<Pixel> pixels;
    Buffer<Sample<A>> samples;
  };
  std::vector<Scratch> scratches;
  for (int64_t worker = 0; worker < workers; ++worker) {
    scratches.push_back({Buffer<A>(volume(tile, sums_stride)), Buffer<P>(volume(tile, panel_stride)),
                         Buffer<Pixel>(tile), Buffer<Sample<A>>(volume(problem.offset_groups, tile))});
    // A channel that only completes a unit is never written.
    P* const panel = scratches.back().panel.get();
    if (depth > problem.group_channels()) std::fill(panel, panel + tile * panel_stride, P(0));
  }

  parallel_units(units, workers, [&](int64_t unit, int64_t worker) {
    const Scratch& scratch = scratches[worker];
    const int64_t n = unit / tiles, begin = unit % tiles * tile, count = std::min(tile, pixels - begin);
    Pixel* const list = scratch.pixels.get();
    inputs.order.list(begin, count, list);
    A* const sums = scratch.sums.get();
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
            kernel.locate(inputs.tap(n, level, g, tap), list, count, scratch.samples.get() + g * tile);
          }
          for (const Segment& segment : all) {
            P* to = scratch.panel.get() + segment.group * panel_group_stride + (tap - first) * depth +
                    segment.begin % problem.group_channels();
            kernel.sample(scratch.samples.get() + segment.offset_group * tile, count,
                          inputs.channels(n, level, segment.begin), segment.width, to, panel_stride);
          }
        }
        for (int64_t group = 0; group < problem.groups; ++group) {
          kernel.product(blocks(count, kernel.rows), weights.column_blocks, some * depth / kUnit<P>,
                         {scratch.panel.get() + group * panel_group_stride, panel_stride, kUnit<P>},
                         weights.at(level, group, first), weights.block_stride, kernel.columns * kUnit<P>,
                         sums + group * group_stride, sums_stride);
        }
      }
    }
    write_tile<T>(problem, sums, group_stride, list, count, channels_last, out + n * problem.out_channels * pixels);
  });
}

}  // namespace

void Implementation::forward(const Arguments& arguments, const Problem& problem, bool /*allow_tf32*/, Tensor& result) {
  dispatch(problem.dtype,
           [&](auto value, auto operand) { run<decltype(value), decltype(operand)>(arguments, problem, result); });
}

}  // namespace dyhead::cpu
