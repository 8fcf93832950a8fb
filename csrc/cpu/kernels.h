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

// T is the type of features; positions and sums have the accumulation type.
template <typename T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Both operands of a product have elements of type P: the accumulation type or, where the machine multiplies and adds
// pairs of them, BFloat16. So many elements that follow each other along the depth make a unit:
template <typename P>
constexpr int64_t kUnit = std::is_same_v<P, BFloat16> ? 2 : 1;

// The left operand: element (i, d) is at data[i * row + d / kUnit * depth + d % kUnit].
template <typename P>
struct Operand {
  const P* data;
  int64_t row, depth;  // one of them is kUnit
};

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

template <typename T, typename P>
struct Kernels {
  using A = Accumulator<T>;

  // The product writes to whole blocks of so many rows and columns.
  int rows, columns;

  // panel[p * stride + c] = sum_i share_i * corner_i[channel + c], for `width` channels of `count` samples.
  void (*sample)(const Sample<T>* samples, int64_t count, int64_t channel, int64_t width, P* panel, int64_t stride);

  // The same for a product over samples: at panel[p / kUnit * stride + c * kUnit + p % kUnit]. A sample that is missing
  // from the last unit is 0.
  void (*sample_units)(const Sample<T>* samples, int64_t count, int64_t channel, int64_t width, P* panel,
                       int64_t stride);

  // sums[r * stride + c] += sum_d left(r, d) * right(d, c) for `units` units of d and whole blocks: row_blocks * rows
  // by column_blocks * columns elements. right(d, c) is at
  //     right[c / columns * right_block + d / kUnit * right_depth + c % columns * kUnit + d % kUnit].
  void (*product)(int64_t row_blocks, int64_t column_blocks, int64_t units, Operand<P> left, const P* right,
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
const Kernels<T, Accumulator<T>>& kernels();
}
#if defined(__x86_64__)
namespace avx2_path {
template <typename T>
const Kernels<T, Accumulator<T>>& kernels();
}
namespace avx512_path {
template <typename T>
const Kernels<T, Accumulator<T>>& kernels();
}
// What AVX512-BF16 does better than AVX-512: products of bfloat16.
namespace avx512_bf16_path {
const Kernels<BFloat16, BFloat16>& kernels();
}
#endif

}  // namespace dyhead::cpu
