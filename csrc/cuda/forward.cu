// The forward pass on a CUDA device: which kernels run, and with what.

#include "forward.h"

#include "implementation.h"

namespace dyhead::cuda {
namespace {

template <typename T, bool kTensorCores, bool kVectors, int kColumns>
void launch_forward(const Device& device, Inputs<T>& inputs, const Arguments& arguments, Tensor& result,
                    bool channels_last) {
  using Kernel = Forward<T, kTensorCores, kVectors, kColumns>;
  const auto& maps = inputs.maps;
  const int blocks = static_cast<int>(blocks_of(maps.group_out_channels, kColumns));
  int runs = 0;
  for (int group = 0; group < maps.groups; ++group) {
    const int begin = group * maps.group_channels;
    runs = std::max(runs, maps.runs(begin, begin + maps.group_channels, kRow<T>));
  }
  const Tensor weights = pack_weights<typename Kernel::Pack>(device, inputs, result, blocks, runs);
  const T* const bias = arguments.bias ? inputs.template keep<T>(as_contiguous(*arguments.bias)) : nullptr;
  const int64_t patches = maps.batch * Patch<Kernel::kPixels>::count(maps);
  launch<Kernel>(
      device, patches * maps.groups * blocks,
      {maps, static_cast<const char*>(weights.const_data_ptr()), bias, static_cast<T*>(result.mutable_data_ptr()),
       blocks, runs, channels_last, maps.group_out_channels % kVector<T> == 0});
}

template <typename T, bool kTensorCores>
void run(const Device& device, const Arguments& arguments, const Problem& problem, Tensor& result, bool channels_last) {
  Inputs<T> inputs(arguments, problem);
  if constexpr (std::is_same_v<T, double>) {
    if (inputs.vectors)
      return launch_forward<T, kTensorCores, true, 64>(device, inputs, arguments, result, channels_last);
    return launch_forward<T, kTensorCores, false, 64>(device, inputs, arguments, result, channels_last);
  } else {
    if (!inputs.vectors)
      return launch_forward<T, kTensorCores, false, 128>(device, inputs, arguments, result, channels_last);
    if constexpr (kTensorCores) {
      // Wide blocks gather every sample once; but not where they leave multiprocessors without work, or do not fit.
      using Wide = Forward<T, kTensorCores, true, 256>;
      const int64_t patches = inputs.maps.batch * Patch<Wide::kPixels>::count(inputs.maps);
      if (inputs.maps.group_out_channels > 128 && patches * inputs.maps.groups >= device.processors() &&
          Wide::kSharedBytes <= device.shared_limit()) {
        return launch_forward<T, kTensorCores, true, 256>(device, inputs, arguments, result, channels_last);
      }
    }
    launch_forward<T, kTensorCores, true, 128>(device, inputs, arguments, result, channels_last);
  }
}

}  // namespace

void Implementation::forward(const Arguments& arguments, const Problem& problem, bool allow_tf32, Tensor& result) {
  const Device device(arguments.features[0]);
  if (problem.batch == 0) return;
  const bool channels_last = is_channels_last(arguments.features[0]);
  dispatch(problem.dtype, allow_tf32, [&](auto value, auto tensor_cores) {
    run<decltype(value), decltype(tensor_cores)::value>(device, arguments, problem, result, channels_last);
  });
}

}  // namespace dyhead::cuda
