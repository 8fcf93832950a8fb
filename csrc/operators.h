// The operators: the schema of each and the function that every device registers for it, which takes the schema's
// arguments in the schema's order. functional.py, channelwise.py, border.py and regions.py in dyhead/ops document the
// arguments.

#pragma once

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "border.h"
#include "channelwise.h"
#include "gradients.h"
#include "regions.h"

namespace dyhead {

// `scales` left out mean H_l / H: computed inside, because a list of floats from Python would make torch.compile
// specialise on every size. `allow_tf32` and `deterministic` are PyTorch's settings, which the stable ABI does not
// tell; both concern CUDA devices only.
constexpr const char* kForwardSchema =
    "pyramid_deform_conv2d(Tensor[] features, Tensor offset, Tensor weight, Tensor? bias, Tensor? mask, "
    "Tensor? level_weight, bool aligned, float[]? scales, int[] stride, int[] padding, int[] dilation, "
    "bool allow_tf32=False) -> Tensor";
constexpr const char* kBackwardSchema =
    "_pyramid_deform_conv2d_backward(Tensor grad, Tensor[] features, Tensor offset, Tensor weight, Tensor? bias, "
    "Tensor? mask, Tensor? level_weight, bool aligned, float[]? scales, int[] stride, int[] padding, int[] dilation, "
    "bool[] needs_grad, bool allow_tf32=False, bool deterministic=False) -> (Tensor[] features, Tensor offset, "
    "Tensor weight, Tensor bias, Tensor mask, Tensor level_weight)";
constexpr const char* kStatisticsSchema = "channel_statistics(Tensor x) -> Tensor";
constexpr const char* kMaximumSchema = "affine_maximum(Tensor[] xs, Tensor slopes, Tensor intercepts) -> Tensor";
constexpr const char* kMaximumBackwardSchema =
    "_affine_maximum_backward(Tensor grad, Tensor[] xs, Tensor slopes, Tensor intercepts) -> "
    "(Tensor[] xs, Tensor slopes, Tensor intercepts)";
constexpr const char* kBorderSchema =
    "border_align(Tensor x, Tensor boxes, int pool_size) -> (Tensor values, Tensor index)";
// Of `x`, the shape, type and layout matter.
constexpr const char* kBorderBackwardSchema =
    "_border_align_backward(Tensor grad, Tensor x, Tensor boxes, Tensor index, int pool_size, "
    "bool deterministic=False) -> Tensor";
constexpr const char* kRegionSchema =
    "deform_roi_pool(Tensor x, Tensor rois, Tensor? offset, int output_size, float spatial_scale, int sampling_ratio, "
    "float gamma, bool aligned) -> Tensor";
constexpr const char* kRegionBackwardSchema =
    "_deform_roi_pool_backward(Tensor grad, Tensor x, Tensor rois, Tensor? offset, int output_size, "
    "float spatial_scale, int sampling_ratio, float gamma, bool aligned, bool[] needs_grad, "
    "bool deterministic=False) -> (Tensor x, Tensor offset)";

// Defines them all.
template <typename Library>
void define_operators(Library& library) {
  for (const char* schema : {kForwardSchema, kBackwardSchema, kStatisticsSchema, kMaximumSchema, kMaximumBackwardSchema,
                             kBorderSchema, kBorderBackwardSchema, kRegionSchema, kRegionBackwardSchema}) {
    library.def(schema);
  }
}

// On a device, whose Implementation (cpu/implementation.h, cuda/implementation.h) computes: here arguments are checked
// and results allocated.
template <typename Implementation>
struct Operators {
  static Tensor pyramid_deform_conv2d(std::vector<Tensor> features, Tensor offset, Tensor weight,
                                      std::optional<Tensor> bias, std::optional<Tensor> mask,
                                      std::optional<Tensor> level_weight, bool aligned,
                                      std::optional<std::vector<double>> scales, std::vector<int64_t> stride,
                                      std::vector<int64_t> padding, std::vector<int64_t> dilation, bool allow_tf32) {
    const Arguments arguments{features, offset, weight, bias,    mask,    level_weight,
                              aligned,  scales, stride, padding, dilation};
    const Problem problem = check_arguments(arguments);
    const std::vector<int64_t> sizes{problem.batch, problem.out_channels, problem.height, problem.width};
    Tensor result = new_tensor(features[0], sizes, problem.dtype, is_channels_last(features[0]));
    Implementation::forward(arguments, problem, allow_tf32, result);
    return result;
  }

  static GradientTuple pyramid_deform_conv2d_backward(Tensor grad, std::vector<Tensor> features, Tensor offset,
                                                      Tensor weight, std::optional<Tensor> bias,
                                                      std::optional<Tensor> mask, std::optional<Tensor> level_weight,
                                                      bool aligned, std::optional<std::vector<double>> scales,
                                                      std::vector<int64_t> stride, std::vector<int64_t> padding,
                                                      std::vector<int64_t> dilation, std::vector<bool> needs_grad,
                                                      bool allow_tf32, bool deterministic) {
    const Arguments arguments{features, offset, weight, bias,    mask,    level_weight,
                              aligned,  scales, stride, padding, dilation};
    const Problem problem = check_arguments(arguments);
    Gradients gradients(grad, arguments, problem, needs_grad);
    Implementation::backward(grad, arguments, problem, allow_tf32, deterministic, gradients);
    return gradients.tuple();
  }

  static Tensor channel_statistics(Tensor x) {
    check_map("x", x);
    Tensor result = new_tensor(x, {x.size(0), 2, x.size(1)}, accumulation_dtype(x.scalar_type()), false);
    Implementation::channel_statistics(x, result);
    return result;
  }

  static Tensor affine_maximum(std::vector<Tensor> xs, Tensor slopes, Tensor intercepts) {
    check_maps(xs, slopes, intercepts);
    Tensor result = new_map(xs[0]);
    Implementation::affine_maximum(xs, slopes, intercepts, result);
    return copy_back(result, xs[0]);
  }

  static std::tuple<std::vector<Tensor>, Tensor, Tensor> affine_maximum_backward(Tensor grad, std::vector<Tensor> xs,
                                                                                 Tensor slopes, Tensor intercepts) {
    MaximumGradients gradients(grad, xs, slopes, intercepts);
    Implementation::affine_maximum_backward(grad, xs, slopes, intercepts, gradients);
    return gradients.tuple(xs);
  }

  static std::tuple<Tensor, Tensor> border_align(Tensor x, Tensor boxes, int64_t pool_size) {
    const BorderProblem problem = check_borders(x, boxes, pool_size);
    Maxima maxima(x, boxes);
    Implementation::border_align(x, boxes, problem, maxima);
    return {maxima.values, maxima.index};
  }

  static Tensor border_align_backward(Tensor grad, Tensor x, Tensor boxes, Tensor index, int64_t pool_size,
                                      bool deterministic) {
    const BorderProblem problem = check_borders(x, boxes, pool_size);
    check_maxima_gradient(grad, x, boxes, index);
    const std::vector<int64_t> sizes{x.size(0), x.size(1), x.size(2), x.size(3)};
    Tensor gradient = new_tensor(x, sizes, problem.dtype, is_channels_last(x));
    Implementation::border_align_backward(grad, boxes, index, problem, deterministic, gradient);
    return gradient;
  }

  static Tensor deform_roi_pool(Tensor x, Tensor rois, std::optional<Tensor> offset, int64_t output_size,
                                double spatial_scale, int64_t sampling_ratio, double gamma, bool aligned) {
    const RegionArguments arguments{x, rois, offset, output_size, spatial_scale, sampling_ratio, gamma, aligned};
    const RegionProblem problem = check_regions(arguments);
    Tensor result = new_tensor(x, problem.result_sizes(), problem.dtype, is_channels_last(x));
    Implementation::deform_roi_pool(arguments, problem, result);
    return result;
  }

  static std::tuple<Tensor, Tensor> deform_roi_pool_backward(Tensor grad, Tensor x, Tensor rois,
                                                             std::optional<Tensor> offset, int64_t output_size,
                                                             double spatial_scale, int64_t sampling_ratio, double gamma,
                                                             bool aligned, std::vector<bool> needs_grad,
                                                             bool deterministic) {
    const RegionArguments arguments{x, rois, offset, output_size, spatial_scale, sampling_ratio, gamma, aligned};
    const RegionProblem problem = check_regions(arguments);
    RegionGradients gradients(grad, arguments, problem, needs_grad);
    Implementation::deform_roi_pool_backward(grad, arguments, problem, deterministic, gradients);
    return gradients.tuple();
  }

  // Registers them all.
  template <typename Library>
  static void implement(Library& library) {
    library.impl("pyramid_deform_conv2d", TORCH_BOX(&pyramid_deform_conv2d));
    library.impl("_pyramid_deform_conv2d_backward", TORCH_BOX(&pyramid_deform_conv2d_backward));
    library.impl("channel_statistics", TORCH_BOX(&channel_statistics));
    library.impl("affine_maximum", TORCH_BOX(&affine_maximum));
    library.impl("_affine_maximum_backward", TORCH_BOX(&affine_maximum_backward));
    library.impl("border_align", TORCH_BOX(&border_align));
    library.impl("_border_align_backward", TORCH_BOX(&border_align_backward));
    library.impl("deform_roi_pool", TORCH_BOX(&deform_roi_pool));
    library.impl("_deform_roi_pool_backward", TORCH_BOX(&deform_roi_pool_backward));
  }
};

}  // namespace dyhead
