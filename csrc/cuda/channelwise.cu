// The channel-wise operators on a CUDA device: which kernels run, and with what.

#include "channelwise.h"

#include "implementation.h"

namespace dyhead::cuda {
namespace {

int checked_size(const char* name, int64_t size) {
  if (size > std::numeric_limits<int32_t>::max()) {
    detail::fail(name, "fewer than 2^31 channels", std::to_string(size));
  }
  return static_cast<int>(size);
}

template <typename T, int kCount>
void statistics(const Device& device, const Tensor& x, Tensor& result) {
  using A = Accumulator<T>;
  using Chunks = ChunkMoments<T, kCount>;
  using Join = JoinMoments<A>;
  const int channels = checked_size("x", x.size(1));
  const int64_t batch = x.size(0), pixels = x.size(2) * x.size(3);
  const Tensor memory = workspace(x, batch * blocks_of(pixels, kChunkPixels) * channels * 2, result.scalar_type());
  Moments<A>* const moments = static_cast<Moments<A>*>(memory.mutable_data_ptr());
  launch<Chunks>(device, Chunks::Part::blocks(batch, pixels, channels, 1),
                 {static_cast<const T*>(x.const_data_ptr()), moments, pixels, channels});
  launch<Join>(device, ChunkSums::blocks(batch, channels),
               {moments, static_cast<A*>(result.mutable_data_ptr()), pixels, channels});
}

// The arguments of affine_maximum, and what they point to.
template <typename T>
struct MaximumInputs {
  using A = Accumulator<T>;

  MaximumInputs(const std::vector<Tensor>& xs, const Tensor& slopes, const Tensor& intercepts) {
    if (xs.size() > kMaxTerms) {
      detail::fail("xs", detail::text("at most ", kMaxTerms, " maps on a CUDA device"), std::to_string(xs.size()));
    }
    maps.batch = xs[0].size(0);
    maps.pixels = xs[0].size(2) * xs[0].size(3);
    maps.channels = checked_size("xs[0]", xs[0].size(1));
    maps.terms = static_cast<int>(xs.size());
    vectors = maps.channels % kVector<T> == 0;
    for (size_t i = 0; i < xs.size(); ++i) maps.x[i] = keep<T>(as_channels_last(xs[i]));
    maps.slopes = keep<A>(as_contiguous(slopes));
    maps.intercepts = keep<A>(as_contiguous(intercepts));
  }

  template <typename E>
  const E* keep(Tensor tensor) {
    tensors.push_back(std::move(tensor));
    vectors = vectors && is_aligned(tensors.back().const_data_ptr());
    return static_cast<const E*>(tensors.back().const_data_ptr());
  }

  AffineMaps<T> maps{};
  bool vectors;
  std::vector<Tensor> tensors;
};

template <typename T, int kCount>
void maximum(const Device& device, const AffineMaps<T>& maps, Tensor& result) {
  using Kernel = AffineMaximum<T, kCount>;
  const int64_t size = maps.batch * maps.pixels * (maps.channels / kCount);
  launch<Kernel>(device, blocks_of(size, Kernel::kThreads), {maps, static_cast<T*>(result.mutable_data_ptr())});
}

template <typename T, int kCount>
void maximum_gradient(const Device& device, const AffineMaps<T>& maps, const Tensor& grad,
                      MaximumGradients& gradients) {
  using A = Accumulator<T>;
  using Kernel = AffineMaximumGradient<T, kCount>;
  using Join = JoinSums<A>;
  const int64_t columns = Join::columns(maps.channels, maps.terms), chunks = blocks_of(maps.pixels, kChunkPixels);
  const Tensor memory = workspace(grad, maps.batch * columns * chunks, gradients.slopes.scalar_type());
  typename Kernel::Params params{
      maps, static_cast<const T*>(grad.const_data_ptr()), {}, static_cast<A*>(memory.mutable_data_ptr())};
  for (int term = 0; term < maps.terms; ++term) params.x[term] = static_cast<T*>(gradients.xs[term].mutable_data_ptr());
  launch<Kernel>(device, Kernel::Part::blocks(maps.batch, maps.pixels, maps.channels, maps.terms), params);
  launch<Join>(device, ChunkSums::blocks(maps.batch, columns),
               {params.sums, static_cast<A*>(gradients.slopes.mutable_data_ptr()),
                static_cast<A*>(gradients.intercepts.mutable_data_ptr()), chunks, maps.channels, maps.terms});
}

// Calls visit with a value of the maps' type and how many channels a thread takes.
template <typename Visit>
void dispatch_maps(ScalarType dtype, const Visit& visit) {
  dispatch(dtype, false,
           [&](auto value, auto) { visit(value, std::integral_constant<int, kVector<decltype(value)>>()); });
}

}  // namespace

void Implementation::channel_statistics(const Tensor& x, Tensor& result) {
  const Device device(x);
  const Tensor last = as_channels_last(x);
  dispatch_maps(x.scalar_type(), [&](auto value, auto count) {
    using T = decltype(value);
    if (x.size(1) % count == 0 && is_aligned(last.const_data_ptr())) {
      statistics<T, decltype(count)::value>(device, last, result);
    } else {
      statistics<T, 1>(device, last, result);
    }
  });
}

void Implementation::affine_maximum(const std::vector<Tensor>& xs, const Tensor& slopes, const Tensor& intercepts,
                                    Tensor& result) {
  const Device device(xs[0]);
  dispatch_maps(xs[0].scalar_type(), [&](auto value, auto count) {
    using T = decltype(value);
    const MaximumInputs<T> inputs(xs, slopes, intercepts);
    if (inputs.vectors) {
      maximum<T, decltype(count)::value>(device, inputs.maps, result);
    } else {
      maximum<T, 1>(device, inputs.maps, result);
    }
  });
}

void Implementation::affine_maximum_backward(const Tensor& grad, const std::vector<Tensor>& xs, const Tensor& slopes,
                                             const Tensor& intercepts, MaximumGradients& gradients) {
  const Device device(xs[0]);
  const Tensor last = as_channels_last(grad);
  dispatch_maps(xs[0].scalar_type(), [&](auto value, auto count) {
    using T = decltype(value);
    const MaximumInputs<T> inputs(xs, slopes, intercepts);
    if (inputs.vectors && is_aligned(last.const_data_ptr())) {
      maximum_gradient<T, decltype(count)::value>(device, inputs.maps, last, gradients);
    } else {
      maximum_gradient<T, 1>(device, inputs.maps, last, gradients);
    }
  });
}

}  // namespace dyhead::cuda
