// What the channel-wise operators take and return, on any device. dyhead/ops/channelwise.py documents them.

#pragma once

#include <string>
#include <tuple>
#include <vector>

#include "arguments.h"

namespace dyhead {

inline void check_map(const std::string& name, const Tensor& x) {
  const ScalarType dtype = x.scalar_type();
  if (dtype != ScalarType::Double && dtype != ScalarType::Float && dtype != ScalarType::BFloat16 &&
      dtype != ScalarType::Half) {
    detail::fail(name, "float64, float32, bfloat16 or float16", detail::dtype_text(dtype));
  }
  if (x.dim() != 4 || x.size(1) < 1 || x.size(2) < 1 || x.size(3) < 1) {
    detail::fail(name, "(N, C, H, W) with at least one channel and one pixel", detail::shape_text(x));
  }
}

inline void check_maps(const std::vector<Tensor>& xs, const Tensor& slopes, const Tensor& intercepts) {
  if (xs.empty()) detail::fail("xs", "at least one map", "an empty list");
  for (size_t i = 0; i < xs.size(); ++i) {
    const std::string name = detail::text("xs[", i, "]");
    check_map(name, xs[i]);
    detail::expect_like(name, xs[i], xs[0].scalar_type(), xs[0]);
    detail::expect_shape(name, xs[i], {xs[0].size(0), xs[0].size(1), xs[0].size(2), xs[0].size(3)});
  }
  const ScalarType dtype = accumulation_dtype(xs[0].scalar_type());
  detail::expect_like("slopes", slopes, dtype, xs[0]);
  detail::expect_like("intercepts", intercepts, dtype, xs[0]);
  detail::expect_shape("slopes", slopes, {xs[0].size(0), 2, static_cast<int64_t>(xs.size()), xs[0].size(1)});
  detail::expect_shape("intercepts", intercepts, {xs[0].size(0), 2, xs[0].size(1)});
}

// A map to be written with its channels last; where x has the other layout, copy_back gives the result that.
inline Tensor new_map(const Tensor& x) {
  const bool last = is_channels_last(x) || (x.numel() > 0 && !has_channels_last_strides(x));
  return new_tensor(x, {x.size(0), x.size(1), x.size(2), x.size(3)}, x.scalar_type(), last);
}
inline Tensor copy_back(const Tensor& written, const Tensor& x) {
  return x.numel() == 0 || has_channels_last_strides(x) ? written : torch::stable::contiguous(written);
}

// The gradients of affine_maximum, of maps that are written with their channels last.
struct MaximumGradients {
  std::vector<Tensor> xs;
  Tensor slopes, intercepts;

  // Checks the arguments, and allocates.
  MaximumGradients(const Tensor& grad, const std::vector<Tensor>& maps, const Tensor& slopes_of,
                   const Tensor& intercepts_of) {
    check_maps(maps, slopes_of, intercepts_of);
    const Tensor& first = maps[0];
    const std::vector<int64_t> sizes{first.size(0), first.size(1), first.size(2), first.size(3)};
    detail::expect_like("grad", grad, first.scalar_type(), first);
    detail::expect_shape("grad", grad, sizes);
    const ScalarType dtype = accumulation_dtype(first.scalar_type());
    for (const Tensor& x : maps) xs.push_back(new_map(x));
    slopes = new_tensor(first, {sizes[0], 2, static_cast<int64_t>(maps.size()), sizes[1]}, dtype, false);
    intercepts = new_tensor(first, {sizes[0], 2, sizes[1]}, dtype, false);
  }

  std::tuple<std::vector<Tensor>, Tensor, Tensor> tuple(const std::vector<Tensor>& maps) {
    for (size_t i = 0; i < xs.size(); ++i) xs[i] = copy_back(xs[i], maps[i]);
    return {xs, slopes, intercepts};
  }
};

}  // namespace dyhead
