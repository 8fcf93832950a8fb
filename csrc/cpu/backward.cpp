// The backward pass on the CPU: which passes run, and with what. None needs atomic operations, and all give the same
// result for any number of threads.

#include <torch/csrc/stable/library.h>

#include "../gradients.h"
#include "bias_gradient.h"
#include "inputs.h"
#include "output_gradient.h"
#include "sample_gradient.h"
#include "weight_gradient.h"

namespace dyhead::cpu {
namespace {

template <typename T, typename P>
void backward(const Tensor& gradient, const Arguments& arguments, const Problem& problem, Gradients& gradients) {
  const Needs& needs = gradients.needs;
  const Kernels<T, P>& kernel = kernels<T, P>();
  const Inputs<T> inputs(arguments, problem);
  const OutputGradient<T, P> packed(problem, inputs.order, gradient, kernel);
  if (needs.features || needs.positions()) sample_gradient_pass(inputs, packed, kernel, gradients);
  if (needs.weight) weight_gradient_pass(inputs, packed, kernel, gradients.weight);
  if (needs.bias) bias_gradient_pass(problem, packed, gradients.bias);
}

GradientTuple pyramid_deform_conv2d_backward(Tensor grad, std::vector<Tensor> features, Tensor offset,
                                             std::optional<Tensor> mask, Tensor weight, std::optional<Tensor> bias,
                                             std::optional<Tensor> level_weight, bool aligned,
                                             std::optional<std::vector<double>> scales, std::vector<int64_t> stride,
                                             std::vector<int64_t> padding, std::vector<int64_t> dilation,
                                             std::vector<bool> needs_grad, bool /*allow_tf32*/,
                                             bool /*deterministic*/) {
  const Arguments arguments{features, offset, mask,   weight,  bias,    level_weight,
                            aligned,  scales, stride, padding, dilation};
  const Problem problem = check_arguments(arguments);
  Gradients gradients(grad, arguments, problem, needs_grad);
  dispatch(problem.dtype, [&](auto value, auto operand) {
    backward<decltype(value), decltype(operand)>(grad, arguments, problem, gradients);
  });
  return gradients.tuple();
}

}  // namespace
}  // namespace dyhead::cpu

STABLE_TORCH_LIBRARY_IMPL(dyhead, CPU, library) {
  library.impl("_pyramid_deform_conv2d_backward", TORCH_BOX(&dyhead::cpu::pyramid_deform_conv2d_backward));
}
