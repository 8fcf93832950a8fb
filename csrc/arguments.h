// The operator's arguments: what they mean and what is checked before any kernel runs, for every device.
// dyhead/ops/checks.py makes the same checks for the reference and for tensors without data.

#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <cstdio>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "geometry.h"

namespace dyhead {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// In the order of the schema (operators.h). Shapes: N batch, L levels, C channels, K = kh * kw taps, G offset groups,
// H x W the output grid.
struct Arguments {
  std::vector<Tensor> features;        // L of (N, C_in, H_l, W_l)
  Tensor offset;                       // (N, 2*G*K, H, W)
  Tensor weight;                       // (L, C_out, C_in/groups, kh, kw)
  std::optional<Tensor> bias;          // (C_out,)
  std::optional<Tensor> mask;          // (N, G*K, H, W)
  std::optional<Tensor> level_weight;  // (N, L)
  bool aligned;
  std::optional<std::vector<double>> scales;  // none: H_l / H
  std::vector<int64_t> stride, padding, dilation;
};

struct Level {
  int64_t height, width;
  AxisMap rows, columns;
};

struct Problem {
  ScalarType dtype;
  int64_t batch, channels, out_channels, groups, offset_groups, kernel_height, kernel_width, height, width;
  std::vector<Level> levels;

  int64_t taps() const { return kernel_height * kernel_width; }
  int64_t pixels() const { return height * width; }
  int64_t group_channels() const { return channels / groups; }
  int64_t group_out_channels() const { return out_channels / groups; }
};

namespace detail {

inline void append(std::string& text, const std::string& part) { text += part; }
inline void append(std::string& text, const char* part) { text += part; }
inline void append(std::string& text, double part) {
  char digits[32];
  std::snprintf(digits, sizeof(digits), "%g", part);
  text += digits;
}
template <typename Integer, std::enable_if_t<std::is_integral_v<Integer>, int> = 0>
void append(std::string& text, Integer part) {
  text += std::to_string(part);
}

// Without streams, which are slow, and depend on the C++ library that a process happens to have loaded.
template <typename... Parts>
std::string text(const Parts&... parts) {
  std::string result;
  (append(result, parts), ...);
  return result;
}

// Plain exceptions: PyTorch's own macro would put a file name before the text.
[[noreturn]] inline void fail(const std::string& argument, const std::string& expected, const std::string& got) {
  throw std::runtime_error(argument + ": expected " + expected + ", got " + got);
}

inline std::string shape_text(const std::vector<std::string>& sizes) {
  std::string result = "(";
  for (size_t i = 0; i < sizes.size(); ++i) result += (i > 0 ? ", " : "") + sizes[i];
  return result + (sizes.size() == 1 ? ",)" : ")");
}

// `skip` leading dimensions are not shown: the level dimension that deform_conv2d adds to the weight is not its
// caller's.
inline std::string shape_text(const Tensor& tensor, int64_t skip = 0) {
  std::vector<std::string> sizes;
  for (int64_t i = skip; i < tensor.dim(); ++i) sizes.push_back(std::to_string(tensor.size(i)));
  return shape_text(sizes);
}

inline std::string pair_text(const std::vector<int64_t>& values) {
  std::vector<std::string> numbers;
  for (const int64_t value : values) numbers.push_back(std::to_string(value));
  return shape_text(numbers);
}

inline std::string dtype_text(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return "torch.float64";
    case ScalarType::Float:
      return "torch.float32";
    case ScalarType::BFloat16:
      return "torch.bfloat16";
    case ScalarType::Half:
      return "torch.float16";
    default:
      return torch::headeronly::toString(dtype);
  }
}

inline std::string device_text(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  if (tensor.is_cuda()) return text("cuda:", tensor.get_device_index());
  return text("device type ", static_cast<int>(tensor.device().type()), ":", tensor.get_device_index());
}

inline void expect_like(const std::string& name, const Tensor& tensor, ScalarType dtype, const Tensor& first) {
  if (tensor.scalar_type() != dtype) fail(name, dtype_text(dtype), dtype_text(tensor.scalar_type()));
  if (tensor.device() != first.device()) fail(name, device_text(first), device_text(tensor));
}

inline void expect_shape(const std::string& name, const Tensor& tensor, const std::vector<int64_t>& expected) {
  bool equal = tensor.dim() == static_cast<int64_t>(expected.size());
  for (size_t i = 0; equal && i < expected.size(); ++i) equal = tensor.size(static_cast<int64_t>(i)) == expected[i];
  if (!equal) fail(name, pair_text(expected), shape_text(tensor));
}

}  // namespace detail

inline ScalarType accumulation_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Throws std::runtime_error naming the argument, what was expected and what came, unless the operator can run.
inline Problem check_arguments(const Arguments& arguments) {
  using namespace detail;
  const auto& [features, offset, weight, bias, mask, level_weight, aligned, scales, stride, padding, dilation] =
      arguments;
  // Lambdas take `arguments`: a structured binding may be captured only since C++20, and not in every compiler of it.
  const auto feature_name = [&arguments](size_t level) {
    return arguments.aligned ? text("features[", level, "]") : std::string("input");
  };
  const int64_t hidden = aligned ? 0 : 1;

  if (features.empty()) fail("features", "at least one level", "an empty list");
  const Tensor& first = features[0];
  const ScalarType dtype = first.scalar_type(), positions = accumulation_dtype(dtype);
  if (dtype != ScalarType::Double && dtype != ScalarType::Float && dtype != ScalarType::BFloat16 &&
      dtype != ScalarType::Half) {
    fail(feature_name(0), "float64, float32, bfloat16 or float16", dtype_text(dtype));
  }
  for (size_t level = 1; level < features.size(); ++level) {
    expect_like(feature_name(level), features[level], dtype, first);
  }
  expect_like("offset", offset, positions, first);
  expect_like("weight", weight, dtype, first);
  if (bias) expect_like("bias", *bias, dtype, first);
  if (mask) expect_like("mask", *mask, positions, first);
  if (level_weight) expect_like("level_weight", *level_weight, positions, first);

  const auto expect_pair = [](const char* name, const std::vector<int64_t>& pair, int64_t least) {
    constexpr int64_t most = std::numeric_limits<int32_t>::max();
    if (pair.size() != 2 || pair[0] < least || pair[1] < least || pair[0] > most || pair[1] > most) {
      fail(name, text("two integers of at least ", least), pair_text(pair));
    }
  };
  expect_pair("stride", stride, 1);
  expect_pair("padding", padding, 0);
  expect_pair("dilation", dilation, 1);

  if (!aligned && features.size() != 1) {
    fail("features", "one level in the convolution geometry", text(features.size(), " levels"));
  }
  if (first.dim() != 4) fail(feature_name(0), "(N, C, H, W)", shape_text(first));
  const int64_t batch = first.size(0), channels = first.size(1);
  for (size_t level = 0; level < features.size(); ++level) {
    const Tensor& feature = features[level];
    if (feature.dim() != 4 || feature.size(0) != batch || feature.size(1) != channels) {
      fail(feature_name(level), text("(", batch, ", ", channels, ", H, W)"), shape_text(feature));
    }
    if (channels < 1 || feature.size(2) < 1 || feature.size(3) < 1) {
      fail(feature_name(level), "at least one channel and one pixel", shape_text(feature));
    }
  }

  const int64_t levels = static_cast<int64_t>(features.size());
  if (weight.dim() != 5 || weight.size(0) != levels) {
    fail("weight", aligned ? text("(", levels, ", C_out, C_in/groups, kh, kw)") : "(C_out, C_in/groups, kh, kw)",
         shape_text(weight, hidden));
  }
  const int64_t out_channels = weight.size(1), group_channels = weight.size(2);
  const int64_t kernel_height = weight.size(3), kernel_width = weight.size(4);
  if (weight.numel() < 1) fail("weight", "no empty dimension", shape_text(weight, hidden));
  if (channels % group_channels != 0) {
    fail("weight", text("C_in/groups to divide the features' ", channels, " channels"), shape_text(weight, hidden));
  }
  const int64_t groups = channels / group_channels;
  if (out_channels % groups != 0) {
    fail("weight", text("C_out to be a multiple of the ", groups, " groups"), shape_text(weight, hidden));
  }
  if (bias) expect_shape("bias", *bias, {out_channels});

  const int64_t taps = kernel_height * kernel_width;
  if (offset.dim() != 4) fail("offset", "(N, 2*G*K, H, W)", shape_text(offset));
  int64_t height = offset.size(2), width = offset.size(3);
  if (aligned) {
    if (height < 1 || width < 1) fail("offset", "an output grid of at least one pixel", shape_text(offset));
  } else {
    const auto output_size = [&arguments](int64_t size, int64_t kernel, int axis) {
      const int64_t room = size + 2 * arguments.padding[axis] - arguments.dilation[axis] * (kernel - 1) - 1;
      return room < 0 ? 0 : room / arguments.stride[axis] + 1;
    };
    height = output_size(first.size(2), kernel_height, 0);
    width = output_size(first.size(3), kernel_width, 1);
    if (height < 1 || width < 1) {
      fail("weight", text("a kernel that fits the padded input ", shape_text(first)), shape_text(weight, hidden));
    }
  }
  if (offset.size(1) < 1 || offset.size(1) % (2 * taps) != 0) {
    fail("offset", text("a multiple of 2*K = ", 2 * taps, " channels"), shape_text(offset));
  }
  expect_shape("offset", offset, {batch, offset.size(1), height, width});
  const int64_t offset_groups = offset.size(1) / (2 * taps);
  if (channels % offset_groups != 0) {
    fail("offset", text("offset groups that divide the features' ", channels, " channels"),
         text(offset_groups, " groups"));
  }
  if (mask) expect_shape("mask", *mask, {batch, offset_groups * taps, height, width});
  if (level_weight) expect_shape("level_weight", *level_weight, {batch, levels});
  if (scales && scales->size() != features.size()) {
    fail("scales", text(levels, " numbers, one a level"), std::to_string(scales->size()));
  }
  for (size_t level = 0; scales && level < scales->size(); ++level) {
    const double scale = (*scales)[level];
    if (!(scale > 0 && std::isfinite(scale))) {
      fail(text("scales[", level, "]"), "a positive finite number", text(scale));
    }
  }

  Problem problem{dtype,         batch,        channels, out_channels, groups, offset_groups,
                  kernel_height, kernel_width, height,   width,        {}};
  for (size_t level = 0; level < features.size(); ++level) {
    const int64_t level_height = features[level].size(2), level_width = features[level].size(3);
    if (aligned) {
      const double scale = scales ? (*scales)[level] : static_cast<double>(level_height) / static_cast<double>(height);
      problem.levels.push_back({level_height, level_width, aligned_axis(scale, kernel_height, dilation[0]),
                                aligned_axis(scale, kernel_width, dilation[1])});
    } else {
      problem.levels.push_back({level_height, level_width, convolution_axis(stride[0], padding[0], dilation[0]),
                                convolution_axis(stride[1], padding[1], dilation[1])});
    }
  }
  return problem;
}

// The gradient of the output, for the backward pass of `problem`.
inline void check_gradient(const Tensor& gradient, const Arguments& arguments, const Problem& problem) {
  detail::expect_like("grad", gradient, problem.dtype, arguments.features[0]);
  detail::expect_shape("grad", gradient, {problem.batch, problem.out_channels, problem.height, problem.width});
}

// Whether pixels follow each other with all channels of each in one run, as the kernels read and write them.
inline bool has_channels_last_strides(const Tensor& tensor) {
  int64_t expected = 1;
  for (const int dimension : {1, 3, 2, 0}) {
    if (tensor.size(dimension) != 1 && tensor.stride(dimension) != expected) return false;
    expected *= tensor.size(dimension);
  }
  return true;
}

// Whether a result that follows this tensor's layout has its channels last: not where the two layouts are the same, as
// for maps of one channel or one pixel.
inline bool is_channels_last(const Tensor& tensor) {
  return !tensor.is_contiguous() && has_channels_last_strides(tensor);
}

inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline Tensor as_channels_last(const Tensor& tensor) {
  return has_channels_last_strides(tensor) ? tensor : torch::stable::contiguous(tensor, MemoryFormat::ChannelsLast);
}

// Uninitialised, on the device of `like`.
inline Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype, bool channels_last) {
  return torch::stable::empty(sizes, dtype, std::nullopt, like.device(), std::nullopt,
                              channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

}  // namespace dyhead
