// The backward pass on the CPU: two passes that need no atomic operations and give the same result for any number of
// threads.
//
//     scatter   a worker owns a block of channels of an image. It multiplies the output's gradient with a tap's weights
//               into a panel, the gradient of the samples, and spreads that over the features' gradient. Gradients of
//               offset, mask and level weight are sums over channels: every block adds into a plane of its own, and the
//               planes of a group are summed at the end, in their order.
//     weights   a worker owns a tap, level and block of input channels, samples it again over all pixels, and
//               multiplies the samples with the output's gradient.

#include <torch/csrc/stable/library.h>

#include "../gradients.h"
#include "inputs.h"

namespace dyhead::cpu {
namespace {

constexpr int64_t kScatterChannels = 64;  // channels of a block of the scatter pass
constexpr int64_t kWeightChannels = 96;   // input channels of a block of the weights pass

// The output's gradient as (image, pixel in the tiles' order, group, output channel of the group), every group padded
// to whole blocks of columns, the pixels of an image to whole units, and all pixels to a whole block of rows.
template <typename T, typename P>
struct OutputGradient {
  OutputGradient(const Problem& problem, const PixelOrder& order, const Tensor& gradient, const Kernels<T, P>& kernel)
      : group_stride(round_up(problem.group_out_channels(), kernel.columns)),
        stride(problem.groups * group_stride),
        image_stride(round_up(problem.pixels(), kUnit<P>) * stride),
        rows(volume(problem.batch, image_stride) + kernel.rows * stride),
        pairs(kUnit<P> == 1 ? 0 : volume(problem.batch, image_stride)) {
    const Tensor source = as_channels_last(gradient);
    const T* from = static_cast<const T*>(source.const_data_ptr());
    const int64_t pixels = problem.pixels(), tiles = blocks(pixels, kTile), units = problem.batch * tiles;
    std::fill(rows.get() + problem.batch * image_stride,
              rows.get() + problem.batch * image_stride + kernel.rows * stride, P(0));
    parallel_units(units, worker_count(units, static_cast<double>(kTile * stride) / 4), [&](int64_t unit, int64_t) {
      const int64_t n = unit / tiles, begin = unit % tiles * kTile, end = std::min(pixels, begin + kTile);
      const int64_t padded = round_up(end, kUnit<P>);
      Pixel list[kTile];
      order.list(begin, end - begin, list);
      for (int64_t p = begin; p < end; ++p) {
        pack_row(problem, from + (n * pixels + list[p - begin].index) * problem.out_channels, row(n, p));
      }
      std::fill(row(n, end), row(n, padded), P(0));
      if constexpr (kUnit<P> > 1) {
        for (int64_t p = begin; p < padded; p += kUnit<P>) {
          P* const to = pairs.get() + n * image_stride + p * stride;
          const P *first = row(n, p), *second = row(n, p + 1);
          for (int64_t o = 0; o < stride; ++o) {
            to[2 * o] = first[o];
            to[2 * o + 1] = second[o];
          }
        }
      }
    });
  }

  // The pixel at a place of the order, for products over output channels.
  P* row(int64_t n, int64_t pixel) const { return rows.get() + n * image_stride + pixel * stride; }
  // The unit that begins there, for products over pixels.
  const P* unit(int64_t n, int64_t pixel) const {
    return (kUnit<P> == 1 ? rows : pairs).get() + n * image_stride + pixel * stride;
  }

  int64_t group_stride, stride, image_stride;
  Buffer<P> rows, pairs;

 private:
  void pack_row(const Problem& problem, const T* from, P* to) const {
    const int64_t channels = problem.group_out_channels();
    for (int64_t group = 0; group < problem.groups; ++group, from += channels, to += group_stride) {
      for (int64_t o = 0; o < channels; ++o) to[o] = static_cast<P>(from[o]);
      std::fill(to + channels, to + group_stride, P(0));
    }
  }
};

// A block of channels in one offset group, what a worker of the scatter pass owns of an image.
struct ChannelBlock {
  int64_t offset_group, begin, width;
  std::vector<Segment> segments;  // one per convolution group in it
  std::vector<int64_t> columns;   // where each segment begins in the panel; segments are padded to whole blocks
  int64_t panel_width;
};

std::vector<ChannelBlock> channel_blocks(const Problem& problem, int64_t columns) {
  const int64_t size = problem.channels / problem.offset_groups;
  std::vector<ChannelBlock> result;
  for (int64_t g = 0; g < problem.offset_groups; ++g) {
    for (int64_t begin = 0; begin < size; begin += kScatterChannels) {
      const int64_t width = std::min(kScatterChannels, size - begin);
      ChannelBlock block{g, g * size + begin, width, {}, {}, 0};
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

// Weights of one block of channels as (level, segment, tap, block of columns, unit of output channels, channel of the
// block, output channel of the unit).
template <typename T, typename P>
struct ScatterWeights {
  ScatterWeights(const Inputs<T>& inputs, const std::vector<ChannelBlock>& channel_blocks, const Kernels<T, P>& kernel)
      : problem(inputs.problem), columns(kernel.columns), depth(round_up(problem.group_out_channels(), kUnit<P>)) {
    const int64_t taps = problem.taps(), channels = problem.group_channels();
    for (const ChannelBlock& block : channel_blocks) {
      starts.push_back(size);
      size += volume(problem.levels.size(), taps, block.panel_width, depth);
    }
    packed = Buffer<P>(size);
    const int64_t levels = static_cast<int64_t>(problem.levels.size());
    const int64_t units = levels * static_cast<int64_t>(channel_blocks.size());
    const double cost = static_cast<double>(size) / static_cast<double>(2 * units);
    parallel_units(units, worker_count(units, cost), [&](int64_t unit, int64_t) {
      const int64_t level = unit % levels, b = unit / levels, outs = problem.group_out_channels();
      const ChannelBlock& block = channel_blocks[b];
      for (size_t s = 0; s < block.segments.size(); ++s) {
        const Segment& segment = block.segments[s];
        const int64_t padded = round_up(segment.width, columns), first = segment.begin % channels;
        P* const to = const_cast<P*>(at(b, block, level, static_cast<int64_t>(s), 0));
        if (padded != segment.width || depth != outs) std::fill(to, to + taps * padded * depth, P(0));
        const T* const from =
            inputs.weight + ((level * problem.groups + segment.group) * outs * channels + first) * taps;
        for (int64_t begin = 0; begin < segment.width; begin += columns) {
          kernel.pack(from + begin * taps, inputs.weight_end(), taps, channels * taps,
                      std::min(columns, segment.width - begin), outs, taps, to + begin * depth, padded * depth,
                      columns * kUnit<P>);
        }
      }
    });
  }

  const P* at(int64_t b, const ChannelBlock& block, int64_t level, int64_t segment, int64_t tap) const {
    const int64_t padded = round_up(block.segments[segment].width, columns);
    return packed.get() + starts[b] +
           ((level * block.panel_width + block.columns[segment]) * problem.taps() + tap * padded) * depth;
  }

  const Problem& problem;
  int64_t columns, depth, size = 0;
  std::vector<int64_t> starts;
  Buffer<P> packed;
};

// Gradients of features, offset, mask and level weight.
template <typename T, typename P>
void scatter_pass(const Inputs<T>& inputs, const OutputGradient<T, P>& gradient, const Kernels<T, P>& kernel,
                  Gradients& gradients) {
  using A = Accumulator<T>;
  const Needs& needs = gradients.needs;
  const Problem& problem = inputs.problem;
  const int64_t levels = static_cast<int64_t>(problem.levels.size());
  const int64_t taps = problem.taps(), pixels = problem.pixels();

  const std::vector<Tensor> sums = gradients.feature_sums(problem);
  std::vector<A*> feature_sums;
  for (const Tensor& sum : sums) feature_sums.push_back(static_cast<A*>(sum.mutable_data_ptr()));

  const std::vector<ChannelBlock> all = channel_blocks(problem, kernel.columns);
  const ScatterWeights<T, P> weights(inputs, all, kernel);
  const int64_t block_count = static_cast<int64_t>(all.size()), group_blocks = block_count / problem.offset_groups;
  int64_t panel_width = 0;
  for (const ChannelBlock& block : all) panel_width = std::max(panel_width, block.panel_width);

  // Planes of the gradients by position: (block of the group, image, offset group, tap, [dy, dx,] pixel). The first is
  // the result itself.
  const int64_t planes = problem.batch * problem.offset_groups * taps * pixels;
  const auto planes_of = [&](const Tensor& first, int64_t size, Buffer<A>& rest) {
    rest = Buffer<A>(volume(group_blocks - 1, size));
    std::vector<A*> result{static_cast<A*>(first.mutable_data_ptr())};
    for (int64_t i = 1; i < group_blocks; ++i) result.push_back(rest.get() + (i - 1) * size);
    return result;
  };
  Buffer<A> offset_rest, mask_rest;
  std::vector<A*> offset_planes, mask_planes;
  if (needs.offset) offset_planes = planes_of(gradients.offset, 2 * planes, offset_rest);
  if (needs.mask) mask_planes = planes_of(gradients.mask, planes, mask_rest);
  std::vector<double> level_sums(static_cast<size_t>(block_count * problem.batch * levels), 0.0);

  const int64_t units = problem.batch * block_count;
  const int64_t workers = worker_count(units, 2 * product_cost(problem, pixels, all[0].width, levels * taps));
  struct Scratch {
    Buffer<A> panel, dots;
    Buffer<Pixel> pixels;
    Buffer<Sample<A>> samples;
  };
  std::vector<Scratch> scratches;
  for (int64_t worker = 0; worker < workers; ++worker) {
    scratches.push_back(
        {Buffer<A>(kTile * panel_width), Buffer<A>(4 * kTile), Buffer<Pixel>(kTile), Buffer<Sample<A>>(kTile)});
  }

  parallel_units(units, workers, [&](int64_t unit, int64_t worker) {
    const Scratch& scratch = scratches[worker];
    A* const panel = scratch.panel.get();
    A* const dots = scratch.dots.get();
    Pixel* const list = scratch.pixels.get();
    Sample<A>* const samples = scratch.samples.get();
    const int64_t n = unit / block_count, b = unit % block_count;
    const ChannelBlock& block = all[b];
    const int64_t g = block.offset_group, own = b % group_blocks;
    for (int64_t level = 0; level < levels; ++level) {
      const A factor = inputs.level_factor(n, level);
      const A step_y = static_cast<A>(problem.levels[level].rows.shift);
      const A step_x = static_cast<A>(problem.levels[level].columns.shift);
      A* feature_sum = nullptr;
      if (needs.features) {
        feature_sum = feature_sums[level] + n * inputs.image_size(level) + block.begin;
        const int64_t map = problem.levels[level].height * problem.levels[level].width;
        for (int64_t i = 0; i < map; ++i) {
          std::fill(feature_sum + i * problem.channels, feature_sum + i * problem.channels + block.width, A(0));
        }
      }
      double level_sum = 0;
      for (int64_t begin = 0; begin < pixels; begin += kTile) {
        const int64_t count = std::min(kTile, pixels - begin);
        inputs.order.list(begin, count, list);
        for (int64_t tap = 0; tap < taps; ++tap) {
          kernel.locate(inputs.tap(n, level, g, tap), list, count, samples);
          std::fill(panel, panel + round_up(count, kernel.rows) * block.panel_width, A(0));
          std::fill(dots, dots + 4 * count, A(0));
          for (size_t s = 0; s < block.segments.size(); ++s) {
            const Segment& segment = block.segments[s];
            const int64_t to = block.columns[s];
            kernel.product(blocks(count, kernel.rows), blocks(segment.width, kernel.columns), weights.depth / kUnit<P>,
                           {gradient.row(n, begin) + segment.group * gradient.group_stride, gradient.stride, kUnit<P>},
                           weights.at(b, block, level, static_cast<int64_t>(s), tap), weights.depth * kernel.columns,
                           kernel.columns * kUnit<P>, panel + to, block.panel_width);
            const int64_t from = segment.begin - block.begin;
            kernel.scatter(samples, count, inputs.channels(n, level, segment.begin), segment.width, panel + to,
                           block.panel_width, needs.positions() ? dots : nullptr,
                           feature_sum ? feature_sum + from : nullptr);
          }
          if (!needs.positions()) continue;

          const int64_t at = inputs.plane(n, g, tap);
          for (int64_t p = 0; p < count; ++p) {
            const auto [dy, dx, mask, level_weight] =
                sample_gradients(samples[p].cell, dots + 4 * p, samples[p].mask, factor, step_y, step_x);
            // Levels add up; the first one sets.
            const auto add = [&](A* to, A more) { *to = level == 0 ? more : *to + more; };
            if (needs.offset) {
              A* to = offset_planes[own] + 2 * at + list[p].index;
              add(to, dy);
              add(to + pixels, dx);
            }
            if (needs.mask) add(mask_planes[own] + at + list[p].index, mask);
            level_sum += static_cast<double>(level_weight);
          }
        }
      }
      level_sums[(b * problem.batch + n) * levels + level] = level_sum;
    }
  });

  const auto sum_planes = [&](const std::vector<A*>& terms, int64_t size) {
    const int64_t chunk = 4096, chunks = terms.size() > 1 ? blocks(size, chunk) : 0;
    parallel_units(chunks, worker_count(chunks, chunk / 4.0), [&](int64_t unit, int64_t) {
      for (size_t term = 1; term < terms.size(); ++term) {
        for (int64_t i = unit * chunk; i < std::min(size, (unit + 1) * chunk); ++i) terms[0][i] += terms[term][i];
      }
    });
  };
  if (needs.offset) sum_planes(offset_planes, 2 * planes);
  if (needs.mask) sum_planes(mask_planes, planes);
  if (needs.level_weight) {
    A* result = static_cast<A*>(gradients.level_weight.mutable_data_ptr());
    const int64_t size = problem.batch * levels;
    for (int64_t i = 0; i < size; ++i) {
      double total = 0;
      for (int64_t b = 0; b < block_count; ++b) total += level_sums[b * size + i];
      result[i] = static_cast<A>(total);
    }
  }
  gradients.finish(sums);
}

// The gradient of the weight.
template <typename T, typename P>
void weights_pass(const Inputs<T>& inputs, const OutputGradient<T, P>& gradient, const Kernels<T, P>& kernel,
                  Tensor& result) {
  using A = Accumulator<T>;
  const Problem& problem = inputs.problem;
  const int64_t levels = static_cast<int64_t>(problem.levels.size());
  const int64_t taps = problem.taps(), pixels = problem.pixels(), channels = problem.group_channels();
  const int64_t out_channels = problem.group_out_channels(), sums_stride = gradient.group_stride;
  T* to = static_cast<T*>(result.mutable_data_ptr());

  // Blocks of channels within one convolution group.
  std::vector<std::vector<Segment>> all;
  int64_t width = 0;
  for (int64_t group = 0; group < problem.groups; ++group) {
    for (int64_t begin = 0; begin < channels; begin += kWeightChannels) {
      const int64_t size = std::min(kWeightChannels, channels - begin);
      all.push_back(segments(problem, group * channels + begin, group * channels + begin + size));
      width = std::max(width, round_up(size, kernel.rows));
    }
  }

  const int64_t block_count = static_cast<int64_t>(all.size()), units = levels * taps * block_count;
  const int64_t workers = worker_count(units, product_cost(problem, problem.batch * pixels, width, 1));
  // As (level, tap, block, channel of the block, output channel); in the end they are brought into the weights' order.
  const Buffer<A> all_sums(volume(units, width, sums_stride));
  struct Scratch {
    Buffer<P> panel;
    Buffer<Pixel> pixels;
    Buffer<Sample<A>> samples;
  };
  std::vector<Scratch> scratches;
  for (int64_t worker = 0; worker < workers; ++worker) {
    scratches.push_back({Buffer<P>(kTile * width), Buffer<Pixel>(kTile), Buffer<Sample<A>>(kTile)});
    // Columns beyond a block's channels are multiplied, too, into sums that nobody reads.
    std::fill(scratches.back().panel.get(), scratches.back().panel.get() + kTile * width, P(0));
  }

  parallel_units(units, workers, [&](int64_t unit, int64_t worker) {
    const Scratch& scratch = scratches[worker];
    const std::vector<Segment>& block = all[unit % block_count];
    const int64_t tap = unit / block_count % taps, level = unit / block_count / taps;
    const int64_t begin_channel = block.front().begin, group = block.front().group;
    const int64_t size = block.back().begin + block.back().width - begin_channel;
    A* const sums = all_sums.get() + unit * width * sums_stride;
    std::fill(sums, sums + width * sums_stride, A(0));
    for (int64_t n = 0; n < problem.batch; ++n) {
      for (int64_t begin = 0; begin < pixels; begin += kTile) {
        const int64_t count = std::min(kTile, pixels - begin);
        inputs.order.list(begin, count, scratch.pixels.get());
        for (const Segment& segment : block) {
          kernel.locate(inputs.tap(n, level, segment.offset_group, tap), scratch.pixels.get(), count,
                        scratch.samples.get());
          kernel.sample_units(scratch.samples.get(), count, inputs.channels(n, level, segment.begin), segment.width,
                              scratch.panel.get() + (segment.begin - begin_channel) * kUnit<P>, width * kUnit<P>);
        }
        kernel.product(blocks(size, kernel.rows), sums_stride / kernel.columns, blocks(count, kUnit<P>),
                       {scratch.panel.get(), kUnit<P>, width * kUnit<P>},
                       gradient.unit(n, begin) + group * gradient.group_stride * kUnit<P>, kernel.columns * kUnit<P>,
                       gradient.stride * kUnit<P>, sums, sums_stride);
      }
    }
  });

  constexpr int64_t some = 16;  // output channels of a worker
  const int64_t chunks = blocks(out_channels, some), moves = levels * block_count * chunks;
  const int64_t movers = worker_count(moves, static_cast<double>(some * width * taps) / 2);
  std::vector<Buffer<A>> rows(std::is_same_v<T, A> ? 0 : movers);
  for (Buffer<A>& buffer : rows) buffer = Buffer<A>(volume(some, width, taps));
  parallel_units(moves, movers, [&](int64_t move, int64_t worker) {
    const int64_t first = move % chunks * some, b = move / chunks % block_count, level = move / chunks / block_count;
    const Segment& front = all[b].front();
    const int64_t size = all[b].back().begin + all[b].back().width - front.begin;
    const int64_t outs = std::min(some, out_channels - first);
    const A* const from = all_sums.get() + (level * taps * block_count + b) * width * sums_stride + first;
    T* const there =
        to +
        (((level * problem.groups + front.group) * out_channels + first) * channels + front.begin % channels) * taps;
    const auto unpack = [&](A* target, int64_t row) {
      kernel.unpack(from, block_count * width * sums_stride, sums_stride, outs, size, taps, target, row);
    };
    if constexpr (std::is_same_v<T, A>) {
      unpack(there, channels * taps);
    } else {
      A* const own = rows[worker].get();
      unpack(own, size * taps);
      for (int64_t o = 0; o < outs; ++o) {
        const A* const row = own + o * size * taps;
        for (int64_t i = 0; i < size * taps; ++i) there[o * channels * taps + i] = static_cast<T>(row[i]);
      }
    }
  });
}

template <typename T, typename P>
void bias_pass(const Problem& problem, const OutputGradient<T, P>& gradient, Tensor& result) {
  T* to = static_cast<T*>(result.mutable_data_ptr());
  const int64_t channels = problem.group_out_channels();
  std::vector<double> sums(static_cast<size_t>(gradient.stride), 0.0);
  constexpr int64_t width = 64;  // columns of a worker
  const int64_t units = blocks(gradient.stride, width), pixels = problem.pixels();
  const double cost = static_cast<double>(problem.batch * pixels * width) / 4;
  parallel_units(units, worker_count(units, cost), [&](int64_t unit, int64_t) {
    const int64_t begin = unit * width, end = std::min(begin + width, gradient.stride);
    for (int64_t n = 0; n < problem.batch; ++n) {
      for (int64_t p = 0; p < pixels; ++p) {
        const P* row = gradient.row(n, p);
        for (int64_t o = begin; o < end; ++o) sums[o] += static_cast<Accumulator<T>>(row[o]);
      }
    }
  });
  for (int64_t o = 0; o < problem.out_channels; ++o) {
    const double sum = sums[o / channels * gradient.group_stride + o % channels];
    to[o] = static_cast<T>(static_cast<Accumulator<T>>(sum));
  }
}

template <typename T, typename P>
void backward(const Tensor& gradient, const Arguments& arguments, const Problem& problem, Gradients& gradients) {
  const Needs& needs = gradients.needs;
  const Kernels<T, P>& kernel = kernels<T, P>();
  const Inputs<T> inputs(arguments, problem);
  const OutputGradient<T, P> packed(problem, inputs.order, gradient, kernel);
  if (needs.features || needs.positions()) scatter_pass<T, P>(inputs, packed, kernel, gradients);
  if (needs.weight) weights_pass<T, P>(inputs, packed, kernel, gradients.weight);
  if (needs.bias) bias_pass<T, P>(problem, packed, gradients.bias);
}

GradientTuple pyramid_deform_conv2d_backward(Tensor grad, std::vector<Tensor> features, Tensor offset,
                                             std::optional<Tensor> mask, Tensor weight, std::optional<Tensor> bias,
                                             std::optional<Tensor> level_weight, bool aligned,
                                             std::optional<std::vector<double>> scales, std::vector<int64_t> stride,
                                             std::vector<int64_t> padding, std::vector<int64_t> dilation,
                                             std::vector<bool> needs_grad, bool /*allow_tf32*/,
                                             bool /*deterministic*/) {
  const Arguments arguments{features, offset, mask,   weight,  bias,    level_weight,
                            aligned,  scales, stride, padding, dilation};
  const Problem problem = check_arguments(arguments);
  Gradients gradients(grad, arguments, problem, needs_grad);
  dispatch(problem.dtype, [&](auto value, auto operand) {
    backward<decltype(value), decltype(operand)>(grad, arguments, problem, gradients);
  });
  return gradients.tuple();
}

}  // namespace
}  // namespace dyhead::cpu

STABLE_TORCH_LIBRARY_IMPL(dyhead, CPU, library) {
  library.impl("_pyramid_deform_conv2d_backward", TORCH_BOX(&dyhead::cpu::pyramid_deform_conv2d_backward));
}
