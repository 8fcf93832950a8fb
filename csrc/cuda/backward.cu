// The backward pass on a CUDA device: which kernels run, and with what.

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

// Gradients of features, offset, mask and level weight.
template <typename T, bool kTensorCores, bool kVectors>
void sample_gradient_pass(const Device& device, const Inputs<T>& inputs, const OutputGradient<T>& gradient,
                          const Problem& problem, bool deterministic, Gradients& gradients) {
  using A = Accumulator<T>;
  using Kernel = SampleGradient<T, kTensorCores, kVectors, false>;
  using Ordered = SampleGradient<T, kTensorCores, false, true>;
  const auto& maps = inputs.maps;
  const Needs& needs = gradients.needs;
  const ScalarType dtype = accumulation_dtype(problem.dtype);
  const Tensor& like = inputs.tensors[0];

  const int slices = static_cast<int>(blocks_of(maps.group_out_channels, kRow<T>));
  const int runs = maps.runs(0, maps.channels, Kernel::kRun);
  const Tensor weights = pack_weights<typename Kernel::Pack>(device, inputs, like, slices, runs);
  typename Kernel::Params params{maps, gradient, static_cast<const char*>(weights.const_data_ptr()), slices, runs};

  std::vector<Tensor> sums = gradients.feature_sums(problem);
  std::vector<A*> features;
  for (Tensor& sum : sums) {
    torch::stable::zero_(sum);
    features.push_back(static_cast<A*>(sum.mutable_data_ptr()));
  }
  if (!deterministic) std::copy(features.begin(), features.end(), params.features);
  const int64_t patches = Patch<Kernel::kPixels>::count(maps);
  Tensor level_terms;
  if (needs.offset) params.offset = static_cast<A*>(gradients.offset.mutable_data_ptr());
  if (needs.mask) params.mask = static_cast<A*>(gradients.mask.mutable_data_ptr());
  if (needs.level_weight) {
    level_terms = workspace(like, static_cast<int64_t>(maps.batch) * maps.levels * patches, dtype);
    params.level_weight = static_cast<A*>(level_terms.mutable_data_ptr());
  }
  if (needs.positions() || !deterministic) {
    launch<Kernel>(device, Kernel::block_count(maps, runs), params);
  }
  if (needs.level_weight) {
    sum_rows<A, A>(device, level_terms, static_cast<int64_t>(maps.batch) * maps.levels, patches,
                   gradients.level_weight);
  }
  if (needs.features && deterministic) {
    typename Ordered::Params ordered{maps, gradient, params.weights, slices, runs};
    std::copy(features.begin(), features.end(), ordered.features);
    launch<Ordered>(device, Ordered::block_count(maps, runs), ordered);
  }
  gradients.finish(sums);
}

template <typename T, bool kTensorCores, bool kVectors, int kRunPanels>
void weight_gradient_pass_of(const Device& device, const Inputs<T>& inputs, const OutputGradient<T>& gradient,
                             Tensor& result) {
  using A = Accumulator<T>;
  using Kernel = WeightGradient<T, kTensorCores, kVectors, kRunPanels>;
  using Sum = SumWeightGradient<T>;
  const auto& maps = inputs.maps;
  const int blocks = static_cast<int>(blocks_of(maps.group_out_channels, Kernel::kOuts));
  const int runs = maps.runs(0, maps.channels, Kernel::kRun);
  const int64_t slices = Kernel::slices(maps);
  const int64_t units = static_cast<int64_t>(blocks) * runs * maps.taps * maps.levels;
  const int64_t tap_stride = static_cast<int64_t>(maps.out_channels) * maps.group_channels;
  const int64_t part_stride = tap_stride * maps.taps * maps.levels;

  // Parts enough for some waves of blocks, but not so many that writing them takes longer than computing. A wave is
  // what runs at a time: kMinBlocks blocks on every multiprocessor. Rounded down, because a few blocks in a last wave
  // would take as long as a whole one.
  constexpr int64_t most_waves = 8, least_slices = 4, most_elements = int64_t(1) << 26;
  const int64_t wave = static_cast<int64_t>(device.processors()) * Kernel::kMinBlocks;
  const int64_t wanted =
      std::min(most_waves * wave / units, std::min(blocks_of(slices, least_slices), most_elements / part_stride));
  constexpr int64_t most_slices = 1 << 20;  // of a part, which counts its rows in 32 bits
  const int64_t part_slices = std::min(blocks_of(slices, std::max<int64_t>(wanted, 1)), most_slices);
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
