// The gradients that the backward pass returns, on any device.

#pragma once

#include <tuple>
#include <vector>

#include "arguments.h"

namespace dyhead {

// Which gradients are asked for, in the order of the arguments.
struct Needs {
  bool features, offset, weight, bias, mask, level_weight;
  bool positions() const { return offset || mask || level_weight; }
};

using GradientTuple = std::tuple<std::vector<Tensor>, Tensor, Tensor, Tensor, Tensor, Tensor>;

// A gradient that nobody asked for is an empty tensor.
struct Gradients {
  Needs needs;
  std::vector<Tensor> features;
  Tensor offset, weight, bias, mask, level_weight;

  // Checks the arguments of the backward pass, and allocates what it returns.
  Gradients(const Tensor& grad, const Arguments& arguments, const Problem& problem,
            const std::vector<bool>& needs_grad) {
    check_gradient(grad, arguments, problem);
    if (needs_grad.size() != 6) detail::fail("needs_grad", "6 values", std::to_string(needs_grad.size()));
    needs = {needs_grad[0],
             needs_grad[1],
             needs_grad[2],
             needs_grad[3] && arguments.bias.has_value(),
             needs_grad[4] && arguments.mask.has_value(),
             needs_grad[5] && arguments.level_weight.has_value()};
    const ScalarType positions = accumulation_dtype(problem.dtype);
    const auto allocate = [&](bool needed, const std::optional<Tensor>& like, ScalarType dtype) {
      std::vector<int64_t> sizes{0};
      if (needed) sizes.assign(like->sizes().begin(), like->sizes().end());
      return new_tensor(grad, sizes, dtype, false);
    };
    offset = allocate(needs.offset, arguments.offset, positions);
    weight = allocate(needs.weight, arguments.weight, problem.dtype);
    bias = allocate(needs.bias, arguments.bias, problem.dtype);
    mask = allocate(needs.mask, arguments.mask, positions);
    level_weight = allocate(needs.level_weight, arguments.level_weight, positions);
    if (needs.features) {
      for (const Tensor& feature : arguments.features) {
        const std::vector<int64_t> sizes(feature.sizes().begin(), feature.sizes().end());
        features.push_back(new_tensor(feature, sizes, problem.dtype, is_channels_last(feature)));
      }
    }
  }

  GradientTuple tuple() const { return {features, offset, weight, bias, mask, level_weight}; }

  // Tensors to sum up the features' gradients in: of the accumulation type, with channels last; the results themselves
  // where they are so. `finish` rounds the others into the results.
  std::vector<Tensor> feature_sums(const Problem& problem) const {
    std::vector<Tensor> sums;
    const ScalarType dtype = accumulation_dtype(problem.dtype);
    for (const Tensor& result : features) {
      const bool direct = problem.dtype == dtype && has_channels_last_strides(result);
      const std::vector<int64_t> sizes(result.sizes().begin(), result.sizes().end());
      sums.push_back(direct ? result : new_tensor(result, sizes, dtype, true));
    }
    return sums;
  }
  void finish(const std::vector<Tensor>& sums) {
    for (size_t level = 0; level < sums.size(); ++level) {
      if (sums[level].get() != features[level].get()) torch::stable::copy_(features[level], sums[level]);
    }
  }
};

}  // namespace dyhead
