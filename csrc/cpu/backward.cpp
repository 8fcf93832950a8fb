// The backward pass on the CPU: which passes run, and with what. None needs atomic operations, and all give the same
// result for any number of threads.

#include "bias_gradient.h"
#include "implementation.h"
#include "inputs.h"
#include "output_gradient.h"
#include "sample_gradient.h"
#include "weight_gradient.h"

namespace dyhead::cpu {
namespace {

template <typename T, typename P>
void run(const Tensor& gradient, const Arguments& arguments, const Problem& problem, Gradients& gradients) {
  const Needs& needs = gradients.needs;
  const Kernels<T, P>& kernel = kernels<T, P>();
  const Inputs<T> inputs(arguments, problem);
  const OutputGradient<T, P> packed(problem, inputs.order, gradient, kernel);
  if (needs.features || needs.positions()) sample_gradient_pass(inputs, packed, kernel, gradients);
  if (needs.weight) weight_gradient_pass(inputs, packed, kernel, gradients.weight);
  if (needs.bias) bias_gradient_pass(problem, packed, gradients.bias);
}

}  // namespace

void Implementation::backward(const Tensor& grad, const Arguments& arguments, const Problem& problem,
                              bool /*allow_tf32*/, bool /*deterministic*/, Gradients& gradients) {
  dispatch(problem.dtype, [&](auto value, auto operand) {
    run<decltype(value), decltype(operand)>(grad, arguments, problem, gradients);
  });
}

}  // namespace dyhead::cpu
