// The CUDA operators, of the schemas in csrc/schemas.h.

#pragma once

#include <torch/csrc/stable/library.h>

#include <optional>
#include <vector>

#include "../gradients.h"

namespace dyhead::cuda {

Tensor pyramid_deform_conv2d(std::vector<Tensor> features, Tensor offset, std::optional<Tensor> mask, Tensor weight,
                             std::optional<Tensor> bias, std::optional<Tensor> level_weight, bool aligned,
                             std::optional<std::vector<double>> scales, std::vector<int64_t> stride,
                             std::vector<int64_t> padding, std::vector<int64_t> dilation, bool allow_tf32);

GradientTuple pyramid_deform_conv2d_backward(Tensor grad, std::vector<Tensor> features, Tensor offset,
                                             std::optional<Tensor> mask, Tensor weight, std::optional<Tensor> bias,
                                             std::optional<Tensor> level_weight, bool aligned,
                                             std::optional<std::vector<double>> scales, std::vector<int64_t> stride,
                                             std::vector<int64_t> padding, std::vector<int64_t> dilation,
                                             std::vector<bool> needs_grad, bool allow_tf32, bool deterministic);

Tensor channel_statistics(Tensor x);
Tensor affine_maximum(std::vector<Tensor> xs, Tensor slopes, Tensor intercepts);
std::tuple<std::vector<Tensor>, Tensor, Tensor> affine_maximum_backward(Tensor grad, std::vector<Tensor> xs,
                                                                        Tensor slopes, Tensor intercepts);

template <typename Library>
void implement_operators(Library& library) {
  library.impl("pyramid_deform_conv2d", TORCH_BOX(&pyramid_deform_conv2d));
  library.impl("_pyramid_deform_conv2d_backward", TORCH_BOX(&pyramid_deform_conv2d_backward));
  library.impl("channel_statistics", TORCH_BOX(&channel_statistics));
  library.impl("affine_maximum", TORCH_BOX(&affine_maximum));
  library.impl("_affine_maximum_backward", TORCH_BOX(&affine_maximum_backward));
}

}  // namespace dyhead::cuda
