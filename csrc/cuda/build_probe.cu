// Tells whether the toolkit, the flags and PyTorch's stable ABI work together: it is compiled and linked by
// `python setup.py compile_cuda`, never loaded. It samples with the shared arithmetic, as a kernel would.

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../geometry.h"

namespace dyhead::cuda {
namespace {

// values[i] = the map (height, width) at positions[i] = (y, x).
__global__ void sample(const float* map, const float* positions, float* values, int64_t count, int64_t height,
                       int64_t width) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const Cell<float> cell = locate<float>(positions[2 * i], positions[2 * i + 1], height, width);
  float share[4], value = 0;
  corner_shares(cell, share);
  for (int corner = 0; corner < 4; ++corner) {
    if (cell.corner[corner] >= 0) value += share[corner] * map[cell.corner[corner]];
  }
  values[i] = value;
}

torch::stable::Tensor build_probe(torch::stable::Tensor map, torch::stable::Tensor positions) {
  STD_TORCH_CHECK(map.is_cuda() && map.dim() == 2 && map.is_contiguous(), "map: expected a contiguous CUDA matrix");
  STD_TORCH_CHECK(positions.is_cuda() && positions.dim() == 2 && positions.is_contiguous() && positions.size(1) == 2,
                  "positions: expected contiguous CUDA pairs");
  const torch::stable::accelerator::DeviceGuard guard(map.get_device_index());
  torch::stable::Tensor values = torch::stable::new_empty(map, {positions.size(0)});
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(map.get_device_index(), &stream));
  const int64_t count = positions.size(0);
  if (count > 0) {
    sample<<<static_cast<unsigned>((count + 255) / 256), 256, 0, static_cast<cudaStream_t>(stream)>>>(
        static_cast<const float*>(map.const_data_ptr()), static_cast<const float*>(positions.const_data_ptr()),
        static_cast<float*>(values.mutable_data_ptr()), count, map.size(0), map.size(1));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return values;
}

}  // namespace
}  // namespace dyhead::cuda

STABLE_TORCH_LIBRARY(dyhead_build_probe, library) { library.def("sample(Tensor map, Tensor positions) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(dyhead_build_probe, CUDA, library) {
  library.impl("sample", TORCH_BOX(&dyhead::cuda::build_probe));
}
