// How a kernel is launched: on the device and the current stream of the tensors at hand, checked; or, where the sources
// are compiled for the host, run by csrc/emulation.
//
// A kernel is a struct with kThreads, kMinBlocks (per multiprocessor, for the compiler), kSharedBytes, Params, and
// run(params), which every thread executes.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "../arguments.h"
#include "intrinsics.h"

#if !defined(__CUDACC__)
#include "../emulation/device.h"
#else
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#endif

namespace dyhead::cuda {

inline int64_t blocks_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Into how many parts, at most `most`, to cut each of `rows` rows of `work` steps, for which a block each runs: so that
// all blocks take the shortest time if `wave` of them run at a time and every block takes `extra` steps more than its
// part has. A few blocks in a last wave would take as long as a whole one.
inline int64_t best_parts(int64_t rows, int64_t work, int64_t wave, int64_t extra, int64_t most) {
  int64_t best = 1, least = std::numeric_limits<int64_t>::max();
  for (int64_t parts = 1; parts <= std::min(most, work); ++parts) {
    const int64_t time = blocks_of(rows * parts, wave) * (blocks_of(work, parts) + extra);
    if (time < least) best = parts, least = time;
  }
  return best;
}

#if defined(__CUDACC__)

// The shared memory is in the name for those who read the compiler's report.
template <typename Kernel, int kSharedBytes>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kMinBlocks)
    run_kernel(const __grid_constant__ typename Kernel::Params params) {
  Kernel::run(params);
}

// The device of a tensor, current until the end of the scope.
class Device {
 public:
  explicit Device(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    const int index = tensor.get_device_index();
    // Not by a macro of PyTorch's: that has another name in every version.
    if (aoti_torch_get_current_cuda_stream(index, &stream_) != 0) {
      detail::fail("device", "a current stream", detail::text("none on cuda:", index));
    }
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&processors_, cudaDevAttrMultiProcessorCount, index));
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&shared_limit_, cudaDevAttrMaxSharedMemoryPerBlockOptin, index));
    int major = 0, minor = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index));
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index));
    if (major < 8) detail::fail("device", "compute capability 8.0 or later", detail::text(major, ".", minor));
  }

  int processors() const { return processors_; }
  int shared_limit() const { return shared_limit_; }
  // How much working memory to take at a time where more would only save launches.
  int64_t working_bytes() const { return int64_t(256) << 20; }

  template <typename Kernel>
  void run(int64_t blocks, const typename Kernel::Params& params) const {
    constexpr int bytes = Kernel::kSharedBytes, without_asking = 48 << 10;
    const auto kernel = run_kernel<Kernel, bytes>;
    if (bytes > without_asking) {
      STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    }
    kernel<<<static_cast<unsigned>(blocks), Kernel::kThreads, bytes, static_cast<cudaStream_t>(stream_)>>>(params);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
  int processors_ = 0, shared_limit_ = 0;
};

#endif

template <typename Kernel>
void launch(const Device& device, int64_t blocks, const typename Kernel::Params& params) {
  constexpr int64_t most = std::numeric_limits<int32_t>::max();
  if (blocks == 0) return;
  if (blocks > most) detail::fail("features", "no more work than one launch takes", detail::text(blocks, " blocks"));
  if (Kernel::kSharedBytes > device.shared_limit()) {
    detail::fail("device", detail::text(Kernel::kSharedBytes, " bytes of shared memory a block"),
                 std::to_string(device.shared_limit()));
  }
  device.run<Kernel>(blocks, params);
}

}  // namespace dyhead::cuda
