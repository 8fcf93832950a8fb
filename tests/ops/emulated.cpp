// The CUDA operators on CPU tensors, run by csrc/emulation: torch.ops.dyhead_emulated. What tests set of the emulated
// device and see of its launches. And kernels with races, which csrc/emulation/races.h has to find.

#include <torch/csrc/stable/library.h>

#include <utility>
#include <vector>

#include "../../csrc/cuda/implementation.h"
#include "../../csrc/cuda/intrinsics.h"
#include "../../csrc/emulation/device.h"
#include "../../csrc/operators.h"

namespace dyhead::cuda {
namespace {

// Two blocks of two warps hand a number on in the way `kind` says; `out` has 256 elements.
void hand_on(Tensor out, std::string kind) {
  float* const to = static_cast<float*>(out.mutable_data_ptr());
  constexpr int threads = 64;
  emulation::run_blocks(2, threads, threads * static_cast<int>(sizeof(float)), [&] {
    const int thread = thread_index(), block = static_cast<int>(block_index()), own = block * threads + thread;
    float* const shared = reinterpret_cast<float*>(shared_memory());
    // Volatile, so that the compiler does not see the number through.
    volatile float* const at = shared;
    const auto other_warp = [&] { return (thread + kWarp) % threads; };
    if (kind == "through shared memory") {
      at[thread] = static_cast<float>(own);
      sync_block();
      to[own] = at[other_warp()];
      sync_block();
      at[thread] = 0;
    } else if (kind == "without a synchronisation") {
      at[thread] = static_cast<float>(own);
      to[own] = at[other_warp()];
    } else if (kind == "written again too early") {
      at[thread] = static_cast<float>(own);
      sync_block();
      to[own] = at[other_warp()];
      at[thread] = 0;
    } else if (kind == "within a warp") {
      at[thread] = static_cast<float>(own);
      sync_warp();
      to[own] = at[thread ^ 1];
      sync_warp();
      at[thread] = 0;
    } else if (kind == "within a warp without a synchronisation") {
      at[thread] = static_cast<float>(own);
      to[own] = at[thread ^ 1];
    } else if (kind == "between warps with a warp's synchronisation") {
      at[thread] = static_cast<float>(own);
      sync_warp();
      to[own] = at[other_warp()];
    } else if (kind == "never written") {
      if (thread > 0) at[thread] = static_cast<float>(own);
      sync_block();
      to[own] = at[thread];
    } else if (kind == "from block to block") {
      to[thread] = static_cast<float>(own);
    } else if (kind == "by atomic additions") {
      atomic_add(to + thread % 2, 1.0f);
    } else if (kind == "by atomic additions to what others read") {
      if (block == 0) atomic_add(to + thread, 1.0f);
      if (block == 1) to[threads + thread] = to[thread];
    } else if (kind == "by a copy that is not waited for") {
      if (thread % 4 == 0) copy_async(shared + thread, to + 2 * threads, true);
      commit_copies();
      sync_block();
      to[own] = at[other_warp()];
      wait_for_copies<0>();
    } else {
      emulation::fail("an unknown kind");
    }
  });
}

void set_device(int64_t processors, int64_t shared_limit, int64_t working_bytes) {
  emulation::machine.processors = static_cast<int>(processors);
  emulation::machine.shared_limit = static_cast<int>(shared_limit);
  emulation::machine.working_bytes = working_bytes;
}

// Of all launches since the last call: blocks, bytes of shared memory.
std::vector<int64_t> take_launches() { return std::exchange(emulation::machine.launches, {}); }

// Elements added to global memory by atomic additions since the last call.
int64_t take_additions() { return std::exchange(emulation::additions, 0); }

}  // namespace
}  // namespace dyhead::cuda

STABLE_TORCH_LIBRARY(dyhead_emulated, library) {
  dyhead::define_operators(library);
  library.def("hand_on(Tensor(a!) out, str kind) -> ()");
  library.def("set_device(int processors=4, int shared_limit=232448, int working_bytes=268435456) -> ()");
  library.def("take_launches() -> int[]");
  library.def("take_additions() -> int");
}
STABLE_TORCH_LIBRARY_IMPL(dyhead_emulated, CompositeExplicitAutograd, library) {
  library.impl("set_device", TORCH_BOX(&dyhead::cuda::set_device));
  library.impl("take_launches", TORCH_BOX(&dyhead::cuda::take_launches));
  library.impl("take_additions", TORCH_BOX(&dyhead::cuda::take_additions));
}
STABLE_TORCH_LIBRARY_IMPL(dyhead_emulated, CPU, library) {
  dyhead::Operators<dyhead::cuda::Implementation>::implement(library);
  library.impl("hand_on", TORCH_BOX(&dyhead::cuda::hand_on));
}
