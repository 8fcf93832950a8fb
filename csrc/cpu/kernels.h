// The three inner loops of the CPU operator. Each exists once per instruction set (kernels_*.cpp, all compiled from
// kernels_body.h) and is chosen at run time; everything around them, in forward.cpp and backward.cpp, is compiled once.

#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <type_traits>

#include "../geometry.h"

namespace dyhead::cpu {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// T is the type of features; sums, positions and panels have the accumulation type.
template <typename T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

// One sample of the forward pass: four rows of channels and what each counts, mask and level weight included.
template <typename T>
struct Sample {
  const T* corner[4];
  Accumulator<T> share[4];
};

// One sample of the backward pass. Offsets count elements from the first channel of an image; -1 is a corner outside.
template <typename A>
struct SampleGradient {
  int64_t corner[4];
  A share[4];  // mask and level weight included
};

// An operand of the product: element (i, d) is at data[i * row + d * depth].
template <typename A>
struct Operand {
  const A* data;
  int64_t row, depth;
};

template <typename T>
struct Kernels {
  using A = Accumulator<T>;

  // The product works on blocks of so many rows and columns.
  int rows, columns;

  // panel[p * stride + c] = sum_i share_i * corner_i[channel + c], for `width` channels of `count` samples.
  void (*sample)(const Sample<T>* samples, int64_t count, int64_t channel, int64_t width, A* panel, int64_t stride);

  // sums[r * stride + c] += sum_{d < depth} left(r, d) * right[(c / columns) * right_block + d * right_depth + c %
  // columns] for whole blocks: row_blocks * rows by column_blocks * columns elements. One stride of `left` is 1.
  void (*product)(int64_t row_blocks, int64_t column_blocks, int64_t depth, Operand<A> left, const A* right,
                  int64_t right_block, int64_t right_depth, A* sums, int64_t stride);

  // With g = panel[p * stride + c], the gradient of a sample's channel, adds for every corner i inside the map
  //     dots[4 * p + i] += sum_c g * features[corner_i + c]        (unless dots is null)
  //     gradient[corner_i + c] += share_i * g                      (unless gradient is null).
  void (*scatter)(const SampleGradient<A>* samples, int64_t count, int64_t width, const A* panel, int64_t stride,
                  const T* features, A* dots, A* gradient);
};

// The instruction sets, in the words of PyTorch's environment variable ATEN_CPU_CAPABILITY.
namespace default_path {
template <typename T>
const Kernels<T>& kernels();
}
#if defined(__x86_64__)
namespace avx2_path {
template <typename T>
const Kernels<T>& kernels();
}
namespace avx512_path {
template <typename T>
const Kernels<T>& kernels();
}
#endif

}  // namespace dyhead::cpu
