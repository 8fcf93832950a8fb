// The device that kernels run on where the sources are compiled for the host: csrc/cuda/launch.h's other Device.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "emulation.h"

namespace dyhead::cuda {

class Device {
 public:
  explicit Device(const torch::stable::Tensor&) {}

  // Few, so that small tests have work for all of them and for more.
  int processors() const { return 4; }
  int shared_limit() const { return 227 << 10; }

  template <typename Kernel>
  void run(int64_t blocks, const typename Kernel::Params& params) const {
    emulation::run_blocks(blocks, Kernel::kThreads, Kernel::kSharedBytes, [&] { Kernel::run(params); });
  }
};

}  // namespace dyhead::cuda
