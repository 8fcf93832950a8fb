// The output's gradient as the backward kernels multiply with it.

#pragma once

#include "inputs.h"

namespace dyhead::cuda {

// Rows of a pixel each, (image, pixel): output channels group by group, each group padded to whole vectors.
template <typename T>
struct OutputGradient {
  const T* data;
  int group_stride;  // elements
  int64_t pixel_stride;

  // The vector of output channels from `out` of a group on.
  DYHEAD_DEVICE const T* at(int64_t row, int group, int out) const {
    return data + row * pixel_stride + static_cast<int64_t>(group) * group_stride + out;
  }
};

// Pads groups and, for TF32, rounds. `source` has rows of all output channels.
template <typename T, bool kTensorCores>
struct PackOutputGradient {
  using A = Accumulator<T>;
  static constexpr int kThreads = 256, kMinBlocks = 1, kSharedBytes = 0;

  struct Params {
    const T* source;
    T* packed;
    int64_t rows;
    int groups, group_channels, group_stride;
  };

  static DYHEAD_DEVICE void run(const Params& params) {
    const int vectors = params.group_stride / kVector<T>;
    const int64_t index = block_index() * kThreads + thread_index();
    const int64_t segment = index / vectors, row = segment / params.groups;
    if (row >= params.rows) return;
    const int begin = static_cast<int>(index % vectors) * kVector<T>;
    const T* const from = params.source + segment * params.group_channels;
    A value[kVector<T>];
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) {
      value[i] = begin + i < params.group_channels ? static_cast<A>(from[begin + i]) : A(0);
    }
    store_vector(params.packed + index * kVector<T>, Product<T, kTensorCores>::pack(value));
  }
};

// `gradient` is the tensor itself where that has the layout; `tensors` keeps what it points to.
template <typename T, bool kTensorCores>
OutputGradient<T> pack_output_gradient(const Device& device, const Tensor& source, const Maps<Accumulator<T>>& maps,
                                       std::vector<Tensor>& tensors) {
  using Pack = PackOutputGradient<T, kTensorCores>;
  constexpr bool rounds = kTensorCores && std::is_same_v<T, float>;
  const T* const data = static_cast<const T*>(source.const_data_ptr());
  const int channels = maps.group_out_channels;
  const int group_stride = static_cast<int>(blocks_of(channels, kVector<T>)) * kVector<T>;
  const int64_t pixel_stride = static_cast<int64_t>(maps.groups) * group_stride;
  if (group_stride == channels && !rounds && is_aligned(data)) return {data, group_stride, pixel_stride};
  const int64_t rows = static_cast<int64_t>(maps.batch) * maps.pixels;
  tensors.push_back(workspace(source, rows * pixel_stride, source.scalar_type()));
  T* const packed = static_cast<T*>(tensors.back().mutable_data_ptr());
  launch<Pack>(device, blocks_of(rows * pixel_stride / kVector<T>, Pack::kThreads),
               {data, packed, rows, maps.groups, channels, group_stride});
  return {packed, group_stride, pixel_stride};
}

}  // namespace dyhead::cuda
