// The operator's arguments as CUDA kernels take them, and what the forward and the backward pass share on the host.

#pragma once

#include <tuple>
#include <vector>

#include "launch.h"
#include "sampling.h"

namespace dyhead::cuda {

inline bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % sizeof(Vector) == 0; }

template <typename T>
struct Inputs {
  using A = Accumulator<T>;

  Inputs(const Arguments& arguments, const Problem& problem) {
    constexpr int64_t most = std::numeric_limits<int32_t>::max();
    const int64_t levels = static_cast<int64_t>(problem.levels.size());
    if (levels > kMaxLevels) {
      detail::fail("features", detail::text("at most ", kMaxLevels, " levels on a CUDA device"),
                   detail::text(levels, " levels"));
    }
    const auto small = [](const char* name, int64_t value) {
      if (value > most) detail::fail(name, "fewer than 2^31 images and pixels of a map", std::to_string(value));
      return static_cast<int>(value);
    };
    const auto few = [](const char* name, int64_t channels) {
      if (channels > most / static_cast<int64_t>(sizeof(double)))
        detail::fail(name, "fewer than 2^28 channels", std::to_string(channels));
      return static_cast<int>(channels);
    };
    maps.channels = few("features", problem.channels);
    maps.out_channels = few("weight", problem.out_channels);
    maps.pixels = small("offset", problem.pixels());
    maps.offset = keep<A>(as_contiguous(arguments.offset));
    maps.mask = arguments.mask ? keep<A>(as_contiguous(*arguments.mask)) : nullptr;
    maps.level_weight = arguments.level_weight ? keep<A>(as_contiguous(*arguments.level_weight)) : nullptr;
    maps.batch = small("features", problem.batch);
    maps.groups = static_cast<int>(problem.groups);
    maps.offset_groups = static_cast<int>(problem.offset_groups);
    maps.kernel_height = static_cast<int>(problem.kernel_height);
    maps.kernel_width = static_cast<int>(problem.kernel_width);
    maps.taps = small("weight", problem.taps());
    maps.group_channels = maps.channels / maps.groups;
    maps.group_out_channels = maps.out_channels / maps.groups;
    maps.offset_channels = maps.channels / maps.offset_groups;
    maps.height = static_cast<int>(problem.height);
    maps.width = static_cast<int>(problem.width);
    maps.levels = static_cast<int>(levels);
    vectors = maps.group_channels % kVector<T> == 0 && maps.offset_channels % kVector<T> == 0;
    for (int64_t l = 0; l < levels; ++l) {
      const Level& level = problem.levels[l];
      small("features", level.height * level.width);
      const T* const features = keep<T>(as_channels_last(arguments.features[l]));
      vectors = vectors && is_aligned(features);
      maps.level[l] = {features, static_cast<int>(level.height), static_cast<int>(level.width), level.rows,
                       level.columns};
    }
    weight = keep<T>(as_contiguous(arguments.weight));
  }

  // The data of a tensor that lives as long as this.
  template <typename E>
  const E* keep(Tensor tensor) {
    tensors.push_back(std::move(tensor));
    return static_cast<const E*>(tensors.back().const_data_ptr());
  }

  Maps<A> maps;
  const T* weight;
  bool vectors;  // whether runs of channels with the same groups are whole vectors on their boundaries
  std::vector<Tensor> tensors;
};

// Working memory, from PyTorch's allocator, in this device's stream.
inline Tensor workspace(const Tensor& like, int64_t count, ScalarType dtype) {
  return torch::stable::empty({count}, dtype, std::nullopt, like.device());
}

// Rows in ascending order, and where each element was; equal ones stay in their order, so that there is only one.
inline std::tuple<Tensor, Tensor> sort_rows(const Tensor& rows) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  // torch::stable::sort is younger than the oldest PyTorch.
  StableIValue stack[] = {from(rows), from(std::optional<bool>(true)), from(int64_t(-1)), from(false)};
  if (torch_call_dispatcher("aten::sort", "stable", stack, TORCH_ABI_VERSION) != 0) {
    detail::fail("device", "memory to sort samples in", "none");
  }
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}

// Calls visit with a value of the C++ type of `dtype`, which was checked, and whether tensor cores multiply.
template <typename Visit>
void dispatch(ScalarType dtype, bool allow_tf32, const Visit& visit) {
  switch (dtype) {
    case ScalarType::Double:
      return visit(double(), std::false_type());
    case ScalarType::Float:
      return allow_tf32 ? visit(float(), std::true_type()) : visit(float(), std::false_type());
    case ScalarType::BFloat16:
      return visit(BFloat16(), std::true_type());
    default:
      return visit(Half(), std::true_type());
  }
}

}  // namespace dyhead::cuda
