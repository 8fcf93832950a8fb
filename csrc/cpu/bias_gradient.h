// The gradient of the bias: the sum of the output's gradient over all pixels of all images.

#pragma once

#include <algorithm>
#include <vector>

#include "inputs.h"
#include "output_gradient.h"

namespace dyhead::cpu {

template <typename T, typename P>
void bias_gradient_pass(const Problem& problem, const OutputGradient<T, P>& gradient, Tensor& result) {
  T* const to = static_cast<T*>(result.mutable_data_ptr());
  const int64_t channels = problem.group_out_channels(), columns = gradient.pixel_stride;
  std::vector<double> sums(static_cast<size_t>(columns), 0.0);
  constexpr int64_t width = 64;  // columns of a worker
  const int64_t units = blocks(columns, width), pixels = problem.pixels();
  const double cost = static_cast<double>(problem.batch * pixels * width) / 4;
  parallel_units(units, worker_count(units, cost), [&](int64_t unit, int64_t) {
    const int64_t begin = unit * width, end = std::min(begin + width, columns);
    for (int64_t n = 0; n < problem.batch; ++n) {
      for (int64_t p = 0; p < pixels; ++p) {
        const P* const row = gradient.row(n, p);
        for (int64_t o = begin; o < end; ++o) sums[o] += static_cast<Accumulator<T>>(row[o]);
      }
    }
  });
  for (int64_t o = 0; o < problem.out_channels; ++o) {
    const double sum = sums[o / channels * gradient.group_stride + o % channels];
    to[o] = static_cast<T>(static_cast<Accumulator<T>>(sum));
  }
}

}  // namespace dyhead::cpu
