// How the operators of csrc/operators.h are computed on the CPU. Arguments are checked and results allocated before.

#pragma once

#include <vector>

#include "../channelwise.h"
#include "../gradients.h"

namespace dyhead::cpu {

struct Implementation {
  static void forward(const Arguments& arguments, const Problem& problem, bool allow_tf32, Tensor& result);
  static void backward(const Tensor& grad, const Arguments& arguments, const Problem& problem, bool allow_tf32,
                       bool deterministic, Gradients& gradients);
  static void channel_statistics(const Tensor& x, Tensor& result);
  static void affine_maximum(const std::vector<Tensor>& xs, const Tensor& slopes, const Tensor& intercepts,
                             Tensor& result);
  static void affine_maximum_backward(const Tensor& grad, const std::vector<Tensor>& xs, const Tensor& slopes,
                                      const Tensor& intercepts, MaximumGradients& gradients);
};

}  // namespace dyhead::cpu
