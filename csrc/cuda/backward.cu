// The backward pass on a CUDA device: which kernels run, and with what.

#include "feature_gradient.h"
#include "implementation.h"
#include "sample_gradient.h"
#include "sums.h"
#include "weight_gradient.h"

namespace dyhead::cuda {
namespace {

template <typename A, typename T>
void sum_rows(const Device& device, const Tensor& terms, int64_t rows, int64_t count, Tensor& result) {
  using Kernel = SumRows<A, T>;
  launch<Kernel>(device, rows,
                 {static_cast<const A*>(terms.const_data_ptr()), static_cast<T*>(result.mutable_data_ptr()), count});
}

// The features' gradient by way of samples' gradients in main memory, and with these launches of SampleGradient
// everything else that `params` asks for.
template <typename Kernel, typename T, bool kVectors>
void deterministic_pass(const Device& device, typename Kernel::Params params,
                        const std::vector<Accumulator<T>*>& results, const Tensor& like) {
  using A = Accumulator<T>;
  using Sum = SumSamples<T, kVectors, Kernel::kRun>;
  using Stored = StoredSample<T>;
  const auto& maps = params.maps;
  const int64_t patches = Patch<Kernel::kPixels>::count(maps), samples = static_cast<int64_t>(maps.taps) * maps.pixels;
  const auto most = [&](int64_t bytes_each, int count) {
    return static_cast<int>(std::clamp<int64_t>(device.working_bytes() / bytes_each, 1, count));
  };
  const int64_t run_bytes = samples * Kernel::kRun * static_cast<int64_t>(sizeof(Stored));
  // A cell, its sorted copy, its place before, and shares.
  const int64_t group_bytes =
      samples * (3 * static_cast<int64_t>(sizeof(int64_t)) + 4 * static_cast<int64_t>(sizeof(A)));
  const int splits = params.splits;
  const int images_at_once = most(run_bytes + maps.offset_groups * group_bytes, maps.batch);
  const int runs_at_once = most(images_at_once * run_bytes, params.run_count);
  const int64_t rows = static_cast<int64_t>(images_at_once) * maps.offset_groups;
  const Tensor stored = workspace(like, images_at_once * runs_at_once * run_bytes, ScalarType::Byte);
  const Tensor shares = workspace(like, 4 * rows * samples, accumulation_dtype(like.scalar_type()));
  for (int level = 0; level < maps.levels; ++level) {
    const int64_t cells = cell_count(maps.level[level].height, maps.level[level].width);
    for (int first_image = 0; first_image < maps.batch; first_image += images_at_once) {
      const int images = std::min(images_at_once, maps.batch - first_image);
      const int64_t groups = static_cast<int64_t>(images) * maps.offset_groups;
      const Tensor unsorted =
          torch::stable::empty({groups, samples}, ScalarType::Long, std::nullopt, like.device(), std::nullopt);
      launch<LocateSamples<A>>(device, blocks_of(groups * samples, LocateSamples<A>::kThreads),
                               {maps, level, first_image, images, static_cast<int64_t*>(unsorted.mutable_data_ptr()),
                                static_cast<A*>(shares.mutable_data_ptr())});
      const auto [sorted, order] = sort_rows(unsorted);
      const Tensor begins = workspace(like, groups * cells, ScalarType::Long);
      launch<FindCells>(device, blocks_of(groups * cells, FindCells::kThreads),
                        {static_cast<const int64_t*>(sorted.const_data_ptr()),
                         static_cast<int64_t*>(begins.mutable_data_ptr()), groups, samples, cells});
      for (int first_run = 0; first_run < params.runs; first_run += runs_at_once) {
        params.first_run = first_run;
        params.run_count = std::min(runs_at_once, params.runs - first_run);
        params.splits = std::min(splits, params.run_count);
        params.first_level = level;
        params.level_count = 1;
        params.first_patch = first_image * patches;
        params.samples = static_cast<Stored*>(stored.mutable_data_ptr());
        launch<Kernel>(device, images * patches * params.splits, params);
        const typename Sum::Params sum{maps,
                                       level,
                                       first_image,
                                       images,
                                       first_run,
                                       params.run_count,
                                       params.samples,
                                       static_cast<const A*>(shares.const_data_ptr()),
                                       static_cast<const int64_t*>(order.const_data_ptr()),
                                       static_cast<const int64_t*>(begins.const_data_ptr()),
                                       results[level]};
        launch<Sum>(device, Sum::block_count(sum), sum);
      }
    }
  }
}

// Gradients of features, offset, mask and level weight.
template <typename T, bool kTensorCores, bool kVectors, int kTaps>
void sample_gradient_pass_of(const Device& device, const Inputs<T>& inputs, const OutputGradient<T>& gradient,
                             const Problem& problem, bool deterministic, Gradients& gradients) {
  using A = Accumulator<T>;
  using Kernel = SampleGradient<T, kTensorCores, kVectors, kTaps>;
  const auto& maps = inputs.maps;
  const Needs& needs = gradients.needs;
  const ScalarType dtype = accumulation_dtype(problem.dtype);
  const Tensor& like = inputs.tensors[0];

  const int slices = static_cast<int>(blocks_of(maps.group_out_channels, kRow<T>));
  const int runs = maps.runs(0, maps.channels, Kernel::kRun);
  const Tensor weights = pack_weights<typename Kernel::Pack>(device, inputs, like, slices, runs);
  const int64_t patches = Patch<Kernel::kPixels>::count(maps), all_patches = maps.batch * patches;

  // Steps in parts of their own where patches are few. What a block begins and ends with counts as one of them; the
  // gradients of positions take memory for every part.
  constexpr int64_t most_elements = int64_t(1) << 26;
  const int64_t level_steps = static_cast<int64_t>(runs) * Kernel::Pack::tap_groups(maps);
  const int64_t steps = level_steps * maps.levels;
  const int64_t offsets = needs.offset ? gradients.offset.numel() : 0, masks = needs.mask ? gradients.mask.numel() : 0;
  const int splits =
      static_cast<int>(best_parts(all_patches, steps, static_cast<int64_t>(device.processors()) * Kernel::kMinBlocks, 1,
                                  most_elements / std::max<int64_t>(offsets + masks, 1)));
  typename Kernel::Params params{
      maps,   gradient, static_cast<const char*>(weights.const_data_ptr()), slices, runs, 0, runs, 0, maps.levels,
      splits, 0};

  std::vector<Tensor> kept;
  const auto parts_of = [&](bool needed, Tensor& result, int64_t& stride) -> A* {
    if (!needed) return nullptr;
    stride = result.numel();
    kept.push_back(splits == 1 ? result : workspace(like, splits * stride, dtype));
    torch::stable::zero_(kept.back());
    return static_cast<A*>(kept.back().mutable_data_ptr());
  };
  params.offset = parts_of(needs.offset, gradients.offset, params.offset_stride);
  params.mask = parts_of(needs.mask, gradients.mask, params.mask_stride);
  Tensor level_terms;
  if (needs.level_weight) {
    level_terms = workspace(like, static_cast<int64_t>(maps.batch) * steps * patches, dtype);
    torch::stable::zero_(level_terms);
    params.level_weight = static_cast<A*>(level_terms.mutable_data_ptr());
  }

  std::vector<Tensor> sums = gradients.feature_sums(problem);
  std::vector<A*> features;
  for (Tensor& sum : sums) features.push_back(static_cast<A*>(sum.mutable_data_ptr()));
  if (needs.features && deterministic) {
    deterministic_pass<Kernel, T, kVectors>(device, params, features, like);
  } else {
    for (Tensor& sum : sums) torch::stable::zero_(sum);
    std::copy(features.begin(), features.end(), params.features);
    launch<Kernel>(device, all_patches * splits, params);
  }

  const auto add_parts = [&](const A* parts, Tensor& result) {
    if (parts == nullptr || splits == 1) return;
    const int64_t stride = result.numel();
    launch<SumParts<A>>(device, blocks_of(stride, SumParts<A>::kThreads),
                        {parts, static_cast<A*>(result.mutable_data_ptr()), stride, stride, splits, 1});
  };
  add_parts(params.offset, gradients.offset);
  add_parts(params.mask, gradients.mask);
  if (needs.level_weight) {
    sum_rows<A, A>(device, level_terms, static_cast<int64_t>(maps.batch) * maps.levels, level_steps * patches,
                   gradients.level_weight);
  }
  gradients.finish(sums);
}

template <typename T, bool kTensorCores, bool kVectors>
void sample_gradient_pass(const Device& device, const Inputs<T>& inputs, const OutputGradient<T>& gradient,
                          const Problem& problem, bool deterministic, Gradients& gradients) {
  if constexpr (kTensorCores && kVectors) {
    // All taps of a 3 x 3 kernel at a time, where shared memory is large enough.
    if (inputs.maps.taps > 3 && SampleGradient<T, true, true, 9>::kSharedBytes <= device.shared_limit()) {
      return sample_gradient_pass_of<T, true, true, 9>(device, inputs, gradient, problem, deterministic, gradients);
    }
  }
  sample_gradient_pass_of<T, kTensorCores, kVectors, 3>(device, inputs, gradient, problem, deterministic, gradients);
}

template <typename T, bool kTensorCores, bool kVectors, int kRunPanels>
void weight_gradient_pass_of(const Device& device, const Inputs<T>& inputs, const OutputGradient<T>& gradient,
                             Tensor& result) {
  using A = Accumulator<T>;
  using Kernel = WeightGradient<T, kTensorCores, kVectors, kRunPanels>;
  using Sum = SumParts<T>;
  const auto& maps = inputs.maps;
  const int blocks = static_cast<int>(blocks_of(maps.group_out_channels, Kernel::kOuts));
  const int runs = maps.runs(0, maps.channels, Kernel::kRun);
  const int64_t slices = Kernel::slices(maps);
  const int64_t units = static_cast<int64_t>(blocks) * runs * maps.taps * maps.levels;
  const int64_t tap_stride = static_cast<int64_t>(maps.out_channels) * maps.group_channels;
  const int64_t part_stride = tap_stride * maps.taps * maps.levels;

  // Parts of whole waves of blocks, but not so many that writing them, which takes about as long as a few slices, takes
  // longer than computing.
  constexpr int64_t most_waves = 8, writing = 4, most_elements = int64_t(1) << 26;
  const int64_t wave = static_cast<int64_t>(device.processors()) * Kernel::kMinBlocks;
  const int64_t wanted =
      best_parts(units, slices, wave, writing, std::min(most_waves * wave / units, most_elements / part_stride));
  constexpr int64_t most_slices = 1 << 20;  // of a part, which counts them in 32 bits
  const int64_t part_slices = std::min(blocks_of(slices, wanted), most_slices);
  const int64_t parts = blocks_of(slices, part_slices);
  const Tensor workspace_tensor = workspace(result, parts * part_stride, accumulation_dtype(result.scalar_type()));
  A* const data = static_cast<A*>(workspace_tensor.mutable_data_ptr());
  launch<Kernel>(device, parts * units, {maps, gradient, data, blocks, runs, part_slices});
  launch<Sum>(
      device, blocks_of(part_stride, Sum::kThreads),
      {data, static_cast<T*>(result.mutable_data_ptr()), part_stride, tap_stride, static_cast<int>(parts), maps.taps});
}

template <typename T, bool kTensorCores, bool kVectors>
void weight_gradient_pass(const Device& device, const Inputs<T>& inputs, const OutputGradient<T>& gradient,
                          Tensor& result) {
  if constexpr (kTensorCores && kVectors) {
    // Wide blocks read every operand from shared memory half as often, where it is large enough.
    const auto& maps = inputs.maps;
    const int run = std::min(maps.group_channels, maps.offset_channels);
    if (run > kRow<T> && WeightGradient<T, kTensorCores, kVectors, 2>::kSharedBytes <= device.shared_limit()) {
      return weight_gradient_pass_of<T, kTensorCores, kVectors, 2>(device, inputs, gradient, result);
    }
  }
  weight_gradient_pass_of<T, kTensorCores, kVectors, 1>(device, inputs, gradient, result);
}

template <typename T>
void bias_gradient_pass(const Device& device, const Tensor& source, const Problem& problem, Tensor& result) {
  using A = Accumulator<T>;
  using Chunks = SumColumnChunks<T>;
  const int64_t rows = problem.batch * problem.pixels(), chunks = blocks_of(rows, Chunks::kChunk);
  const Tensor terms = workspace(result, problem.out_channels * chunks, accumulation_dtype(problem.dtype));
  launch<Chunks>(device, chunks * blocks_of(problem.out_channels, Chunks::kWidth),
                 {static_cast<const T*>(source.const_data_ptr()), static_cast<A*>(terms.mutable_data_ptr()), rows,
                  problem.out_channels, chunks});
  sum_rows<A, T>(device, terms, problem.out_channels, chunks, result);
}

template <typename T, bool kTensorCores, bool kVectors>
void run(const Device& device, const Inputs<T>& inputs, const Tensor& source, const Problem& problem,
         bool deterministic, Gradients& gradients) {
  const Needs& needs = gradients.needs;
  if (needs.features || needs.positions() || needs.weight) {
    std::vector<Tensor> kept;
    const OutputGradient<T> gradient = pack_output_gradient<T, kTensorCores>(device, source, inputs.maps, kept);
    if (needs.features || needs.positions()) {
      sample_gradient_pass<T, kTensorCores, kVectors>(device, inputs, gradient, problem, deterministic, gradients);
    }
    if (needs.weight) weight_gradient_pass<T, kTensorCores, kVectors>(device, inputs, gradient, gradients.weight);
  }
  if (needs.bias) bias_gradient_pass<T>(device, source, problem, gradients.bias);
}

// All gradients of an empty batch: those that have elements are sums of nothing.
void clear(Gradients& gradients) {
  for (Tensor* const gradient : {&gradients.weight, &gradients.bias}) torch::stable::zero_(*gradient);
}

}  // namespace

void Implementation::backward(const Tensor& grad, const Arguments& arguments, const Problem& problem, bool allow_tf32,
                              bool deterministic, Gradients& gradients) {
  const Device device(arguments.features[0]);
  if (problem.batch == 0) return clear(gradients);
  const Tensor source = as_channels_last(grad);
  dispatch(problem.dtype, allow_tf32, [&](auto value, auto tensor_cores) {
    using T = decltype(value);
    constexpr bool kTensorCores = decltype(tensor_cores)::value;
    const Inputs<T> inputs(arguments, problem);
    if (inputs.vectors) {
      run<T, kTensorCores, true>(device, inputs, source, problem, deterministic, gradients);
    } else {
      run<T, kTensorCores, false>(device, inputs, source, problem, deterministic, gradients);
    }
  });
}

}  // namespace dyhead::cuda
