// Deformable RoI pooling on a CUDA device: which kernels run, and with what.

#include "regions.h"

#include "implementation.h"

namespace dyhead::cuda {
namespace {

// The arguments as kernels take them, and what they point to.
template <typename A>
struct RegionInputs {
  RegionInputs(const RegionArguments& arguments, const RegionProblem& problem)
      : rois(as_contiguous(arguments.rois)), offset(arguments.offset) {
    const auto small = [](const char* expected, int64_t value, int64_t most) {
      if (value > most) detail::fail("x", expected, std::to_string(value));
      return static_cast<int>(value);
    };
    constexpr int64_t most = std::numeric_limits<int32_t>::max();
    small("fewer than 2^31 pixels", problem.pixels(), most);
    if (offset) offset = as_contiguous(*offset);
    maps = {static_cast<const A*>(rois.const_data_ptr()),
            offset ? static_cast<const A*>(offset->const_data_ptr()) : nullptr,
            problem.batch,
            problem.regions,
            small("fewer than 2^28 channels", problem.channels, most / sizeof(double)),
            static_cast<int>(problem.height),
            static_cast<int>(problem.width),
            problem.pooling};
  }

  RegionMaps<A> maps;
  Tensor rois;
  std::optional<Tensor> offset;
};

template <typename T, int kCount>
void pool(const Device& device, const RegionMaps<Accumulator<T>>& maps, const Tensor& x, Tensor& result) {
  using Kernel = PoolRegions<T, kCount>;
  launch<Kernel>(device, blocks_of(maps.regions * maps.cells() * (maps.channels / kCount), Kernel::kThreads),
                 {maps, static_cast<const T*>(x.const_data_ptr()), static_cast<T*>(result.mutable_data_ptr())});
}

template <typename T, bool kOrdered>
void map_gradient(const Device& device, const RegionMaps<Accumulator<T>>& maps, const Tensor& grad, Tensor& sums) {
  using Kernel = RegionMapGradient<T, kOrdered>;
  launch<Kernel>(
      device, blocks_of(Kernel::threads(maps), Kernel::kThreads),
      {maps, static_cast<const T*>(grad.const_data_ptr()), static_cast<Accumulator<T>*>(sums.mutable_data_ptr())});
}

template <typename T>
void offset_gradient(const Device& device, const RegionMaps<Accumulator<T>>& maps, const Tensor& x, const Tensor& grad,
                     Tensor& result) {
  using Kernel = RegionOffsetGradient<T>;
  launch<Kernel>(device, blocks_of(maps.regions * maps.cells(), Kernel::kCells),
                 {maps, static_cast<const T*>(x.const_data_ptr()), static_cast<const T*>(grad.const_data_ptr()),
                  static_cast<Accumulator<T>*>(result.mutable_data_ptr())});
}

}  // namespace

void Implementation::deform_roi_pool(const RegionArguments& arguments, const RegionProblem& problem, Tensor& result) {
  const Device device(arguments.x);
  const Tensor last = as_channels_last(arguments.x);
  const bool direct = has_channels_last_strides(result);
  Tensor values = direct ? result : new_tensor(result, problem.result_sizes(), problem.dtype, true);
  dispatch(problem.dtype, false, [&](auto value, auto) {
    using T = decltype(value);
    const RegionInputs<Accumulator<T>> inputs(arguments, problem);
    if (problem.channels % kVector<T> == 0 && is_aligned(last.const_data_ptr())) {
      pool<T, kVector<T>>(device, inputs.maps, last, values);
    } else {
      pool<T, 1>(device, inputs.maps, last, values);
    }
  });
  if (!direct) torch::stable::copy_(result, values);
}

void Implementation::deform_roi_pool_backward(const Tensor& grad, const RegionArguments& arguments,
                                              const RegionProblem& problem, bool deterministic,
                                              RegionGradients& gradients) {
  const Device device(grad);
  const Tensor grad_last = as_channels_last(grad);
  dispatch(problem.dtype, false, [&](auto value, auto) {
    using T = decltype(value);
    const RegionInputs<Accumulator<T>> inputs(arguments, problem);
    if (gradients.needs_offset) {
      offset_gradient<T>(device, inputs.maps, as_channels_last(arguments.x), grad_last, gradients.offset);
    }
    if (!gradients.needs_x) return;
    Tensor sums = gradients.sums();
    torch::stable::zero_(sums);
    if (deterministic) {
      map_gradient<T, true>(device, inputs.maps, grad_last, sums);
    } else {
      map_gradient<T, false>(device, inputs.maps, grad_last, sums);
    }
    gradients.finish(sums);
  });
}

}  // namespace dyhead::cuda
