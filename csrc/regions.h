// What deformable RoI pooling takes and returns, on any device. dyhead/ops/regions.py documents it.

#pragma once

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "channelwise.h"

namespace dyhead {

constexpr int64_t kMostPerSide = 255;  // cells of a region, samples of a cell

struct RegionProblem {
  ScalarType dtype;
  int64_t batch, channels, height, width, regions;
  Pooling pooling;
  bool has_offset;

  int64_t pixels() const { return height * width; }
  int64_t cells() const { return int64_t(pooling.side) * pooling.side; }  // of a region
  std::vector<int64_t> result_sizes() const { return {regions, channels, pooling.side, pooling.side}; }
};

// In the order of the schema (operators.h).
struct RegionArguments {
  Tensor x, rois;
  std::optional<Tensor> offset;
  int64_t output_size;
  double spatial_scale;
  int64_t sampling_ratio;
  double gamma;
  bool aligned;
};

inline RegionProblem check_regions(const RegionArguments& arguments) {
  using namespace detail;
  const auto& [x, rois, offset, output_size, spatial_scale, sampling_ratio, gamma, aligned] = arguments;
  check_map("x", x);
  const ScalarType positions = accumulation_dtype(x.scalar_type());
  expect_like("rois", rois, positions, x);
  if (offset) expect_like("offset", *offset, positions, x);
  if (rois.dim() != 2 || rois.size(1) != 5) fail("rois", "(Q, 5)", shape_text(rois));
  const auto expect_count = [](const char* name, int64_t value) {
    if (value < 1 || value > kMostPerSide) {
      fail(name, text("an integer from 1 to ", kMostPerSide), std::to_string(value));
    }
  };
  expect_count("output_size", output_size);
  expect_count("sampling_ratio", sampling_ratio);
  if (!(spatial_scale > 0 && std::isfinite(spatial_scale))) {
    fail("spatial_scale", "a finite number above 0", text(spatial_scale));
  }
  if (!std::isfinite(gamma)) fail("gamma", "a finite number", text(gamma));
  if (offset) expect_shape("offset", *offset, {rois.size(0), 2, output_size, output_size});
  return {x.scalar_type(),
          x.size(0),
          x.size(1),
          x.size(2),
          x.size(3),
          rois.size(0),
          {spatial_scale, gamma, static_cast<int>(output_size), static_cast<int>(sampling_ratio), aligned},
          offset.has_value()};
}

// A gradient that nobody asked for is an empty tensor.
struct RegionGradients {
  bool needs_x, needs_offset;
  Tensor x, offset;

  // Checks the arguments of the backward pass, and allocates what it returns.
  RegionGradients(const Tensor& grad, const RegionArguments& arguments, const RegionProblem& problem,
                  const std::vector<bool>& needs_grad) {
    detail::expect_like("grad", grad, problem.dtype, arguments.x);
    detail::expect_shape("grad", grad, problem.result_sizes());
    if (needs_grad.size() != 2) detail::fail("needs_grad", "2 values", std::to_string(needs_grad.size()));
    needs_x = needs_grad[0];
    needs_offset = needs_grad[1] && problem.has_offset;
    const std::vector<int64_t> none{0}, map{problem.batch, problem.channels, problem.height, problem.width};
    const std::vector<int64_t> moves{problem.regions, 2, problem.pooling.side, problem.pooling.side};
    x = new_tensor(grad, needs_x ? map : none, problem.dtype, needs_x && is_channels_last(arguments.x));
    offset = new_tensor(grad, needs_offset ? moves : none, accumulation_dtype(problem.dtype), false);
  }

  // A tensor to sum up the map's gradient in: of the accumulation type, with channels last; the result itself where it
  // is so. `finish` rounds another into the result.
  Tensor sums() const {
    const ScalarType dtype = accumulation_dtype(x.scalar_type());
    if (x.scalar_type() == dtype && has_channels_last_strides(x)) return x;
    return new_tensor(x, {x.size(0), x.size(1), x.size(2), x.size(3)}, dtype, true);
  }
  void finish(const Tensor& sums) {
    if (sums.get() != x.get()) torch::stable::copy_(x, sums);
  }

  std::tuple<Tensor, Tensor> tuple() const { return {x, offset}; }
};

}  // namespace dyhead
