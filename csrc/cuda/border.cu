// Border alignment on a CUDA device: which kernels run, and with what.

#include "border.h"

#include "implementation.h"

namespace dyhead::cuda {
namespace {

// `boxes`: contiguous.
template <typename A>
BorderMaps<A> border_maps(const BorderProblem& problem, const Tensor& boxes) {
  const auto small = [](const char* expected, int64_t value, int64_t most) {
    if (value > most) detail::fail("x", expected, std::to_string(value));
    return static_cast<int>(value);
  };
  constexpr int64_t most = std::numeric_limits<int32_t>::max();
  const int channels = small("fewer than 2^28 channels", problem.channels, most / sizeof(double));
  small("fewer than 2^31 pixels", problem.pixels(), most);
  return {static_cast<const A*>(boxes.const_data_ptr()),
          problem.batch,
          problem.cells,
          channels,
          channels / kBorders,
          static_cast<int>(problem.height),
          static_cast<int>(problem.width),
          problem.pool_size};
}

// A map of the same shape with its channels last.
Tensor new_like(const Tensor& map, ScalarType dtype) {
  return new_tensor(map, {map.size(0), map.size(1), map.size(2), map.size(3)}, dtype, true);
}

template <typename T, int kCount>
void maximum(const Device& device, const BorderMaps<Accumulator<T>>& maps, const Tensor& x, Tensor& values,
             Tensor& index) {
  using Kernel = BorderMaximum<T, kCount>;
  launch<Kernel>(device, blocks_of(maps.batch * maps.cells * (maps.channels / kCount), Kernel::kThreads),
                 {maps, static_cast<const T*>(x.const_data_ptr()), static_cast<T*>(values.mutable_data_ptr()),
                  static_cast<uint8_t*>(index.mutable_data_ptr())});
}

template <typename T, bool kOrdered>
void gradient(const Device& device, const BorderMaps<Accumulator<T>>& maps, const Tensor& grad, const Tensor& index,
              Tensor& sums) {
  using Kernel = BorderGradient<T, kOrdered>;
  launch<Kernel>(
      device, blocks_of(Kernel::threads(maps), Kernel::kThreads),
      {maps, static_cast<const T*>(grad.const_data_ptr()), static_cast<const uint8_t*>(index.const_data_ptr()),
       static_cast<Accumulator<T>*>(sums.mutable_data_ptr())});
}

}  // namespace

void Implementation::border_align(const Tensor& x, const Tensor& boxes, const BorderProblem& problem, Maxima& maxima) {
  const Device device(x);
  const Tensor last = as_channels_last(x), boxes_kept = as_contiguous(boxes);
  Tensor values = maxima.values;
  const bool direct = has_channels_last_strides(values);
  if (!direct) values = new_like(values, problem.dtype);
  dispatch(problem.dtype, false, [&](auto value, auto) {
    using T = decltype(value);
    const BorderMaps<Accumulator<T>> maps = border_maps<Accumulator<T>>(problem, boxes_kept);
    if (maps.border_channels % kVector<T> == 0 && is_aligned(last.const_data_ptr())) {
      maximum<T, kVector<T>>(device, maps, last, values, maxima.index);
    } else {
      maximum<T, 1>(device, maps, last, values, maxima.index);
    }
  });
  if (!direct) torch::stable::copy_(maxima.values, values);
}

void Implementation::border_align_backward(const Tensor& grad, const Tensor& boxes, const Tensor& index,
                                           const BorderProblem& problem, bool deterministic, Tensor& result) {
  const Device device(grad);
  const Tensor grad_last = as_channels_last(grad), index_last = as_channels_last(index);
  const Tensor boxes_kept = as_contiguous(boxes);
  const ScalarType dtype = accumulation_dtype(problem.dtype);
  const bool direct = problem.dtype == dtype && has_channels_last_strides(result);
  Tensor sums = direct ? result : new_like(result, dtype);
  torch::stable::zero_(sums);
  dispatch(problem.dtype, false, [&](auto value, auto) {
    using T = decltype(value);
    const BorderMaps<Accumulator<T>> maps = border_maps<Accumulator<T>>(problem, boxes_kept);
    if (deterministic) {
      gradient<T, true>(device, maps, grad_last, index_last, sums);
    } else {
      gradient<T, false>(device, maps, grad_last, index_last, sums);
    }
  });
  if (!direct) torch::stable::copy_(result, sums);
}

}  // namespace dyhead::cuda
