// The device that kernels run on where the sources are compiled for the host: csrc/cuda/launch.h's other Device.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

#include "emulation.h"

namespace dyhead::cuda {

namespace emulation {

// What tests set of the device, and see of its launches.
struct Machine {
  // Few, so that small tests have work for all of them and for more.
  int processors = 4;
  int shared_limit = 227 << 10;  // bytes a block: of sm_90
  int64_t working_bytes = 256 << 20;
  std::vector<int64_t> launches;  // blocks and bytes of shared memory, of one launch after the other
};
inline Machine machine;

}  // namespace emulation

class Device {
 public:
  explicit Device(const torch::stable::Tensor&) {}

  int processors() const { return emulation::machine.processors; }
  int shared_limit() const { return emulation::machine.shared_limit; }
  int64_t working_bytes() const { return emulation::machine.working_bytes; }

  template <typename Kernel>
  void run(int64_t blocks, const typename Kernel::Params& params) const {
    emulation::machine.launches.insert(emulation::machine.launches.end(), {blocks, Kernel::kSharedBytes});
    emulation::run_blocks(blocks, Kernel::kThreads, Kernel::kSharedBytes, [&] { Kernel::run(params); });
  }
};

}  // namespace dyhead::cuda
