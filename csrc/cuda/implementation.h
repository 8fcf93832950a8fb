// How the operators of csrc/operators.h are computed on a CUDA device. Arguments are checked and results allocated
// before.

#pragma once

#include <vector>

#include "../border.h"
#include "../channelwise.h"
#include "../gradients.h"
#include "../regions.h"

namespace dyhead::cuda {

struct Implementation {
  static void forward(const Arguments& arguments, const Problem& problem, bool allow_tf32, Tensor& result);
  static void backward(const Tensor& grad, const Arguments& arguments, const Problem& problem, bool allow_tf32,
                       bool deterministic, Gradients& gradients);
  static void channel_statistics(const Tensor& x, Tensor& result);
  static void affine_maximum(const std::vector<Tensor>& xs, const Tensor& slopes, const Tensor& intercepts,
                             Tensor& result);
  static void affine_maximum_backward(const Tensor& grad, const std::vector<Tensor>& xs, const Tensor& slopes,
                                      const Tensor& intercepts, MaximumGradients& gradients);
  static void border_align(const Tensor& x, const Tensor& boxes, const BorderProblem& problem, Maxima& maxima);
  static void border_align_backward(const Tensor& grad, const Tensor& boxes, const Tensor& index,
                                    const BorderProblem& problem, bool deterministic, Tensor& result);
  static void deform_roi_pool(const RegionArguments& arguments, const RegionProblem& problem, Tensor& result);
  static void deform_roi_pool_backward(const Tensor& grad, const RegionArguments& arguments,
                                       const RegionProblem& problem, bool deterministic, RegionGradients& gradients);
};

}  // namespace dyhead::cuda
