// The operators' schemas. dyhead/ops/functional.py and dyhead/ops/channelwise.py document the arguments.

#pragma once

namespace dyhead {

// `scales` left out mean H_l / H: computed inside, because a list of floats from Python would make torch.compile
// specialise on every size. `allow_tf32` and `deterministic` are PyTorch's settings, which the stable ABI does not
// tell; both concern CUDA devices only.
constexpr const char* kForwardSchema =
    "pyramid_deform_conv2d(Tensor[] features, Tensor offset, Tensor? mask, Tensor weight, Tensor? bias, "
    "Tensor? level_weight, bool aligned, float[]? scales, int[] stride, int[] padding, int[] dilation, "
    "bool allow_tf32=False) -> Tensor";
constexpr const char* kBackwardSchema =
    "_pyramid_deform_conv2d_backward(Tensor grad, Tensor[] features, Tensor offset, Tensor? mask, Tensor weight, "
    "Tensor? bias, Tensor? level_weight, bool aligned, float[]? scales, int[] stride, int[] padding, int[] dilation, "
    "bool[] needs_grad, bool allow_tf32=False, bool deterministic=False) -> (Tensor[] features, Tensor offset, "
    "Tensor mask, Tensor weight, Tensor bias, Tensor level_weight)";
constexpr const char* kStatisticsSchema = "channel_statistics(Tensor x) -> Tensor";
constexpr const char* kMaximumSchema = "affine_maximum(Tensor[] xs, Tensor slopes, Tensor intercepts) -> Tensor";
constexpr const char* kMaximumBackwardSchema =
    "_affine_maximum_backward(Tensor grad, Tensor[] xs, Tensor slopes, Tensor intercepts) -> "
    "(Tensor[] xs, Tensor slopes, Tensor intercepts)";

// Defines them all.
template <typename Library>
void define_operators(Library& library) {
  for (const char* schema :
       {kForwardSchema, kBackwardSchema, kStatisticsSchema, kMaximumSchema, kMaximumBackwardSchema}) {
    library.def(schema);
  }
}

}  // namespace dyhead
