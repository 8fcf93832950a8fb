#include "races.h"

#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "emulation.h"

namespace dyhead::cuda::emulation::races {
namespace {

constexpr uintptr_t kGranule = 1;
constexpr int64_t kNever = -1, kSeveral = -2;  // instead of a block

// Who touched a granule last. Of reads, those since the block's last synchronisation, as far as they matter: all of one
// warp's, or that there were several warps or blocks.
struct Granule {
  int64_t write_block = kNever, read_block = kNever;
  int write_thread = 0, write_block_syncs = 0, write_warp_syncs = 0;
  int read_warp = 0, read_block_syncs = 0, read_warp_syncs = 0;
  uint32_t read_lanes = 0;
  bool write_atomic = false, read_by_warps = false;
};

struct Range {
  uintptr_t begin = 0, end = 0;
  bool has(uintptr_t at) const { return begin <= at && at < end; }
};

bool announced = false;  // by the compiler: what kernels touch
bool watching = false;
Range shared, stacks;
std::vector<Granule> shared_granules;
std::unordered_map<uintptr_t, Granule> other_granules;

bool ordered_after_write(const Granule& granule) {
  if (granule.write_block == kNever) return true;
  if (granule.write_block != here.block) return false;
  if (granule.write_thread == here.thread || granule.write_block_syncs < here.block_syncs) return true;
  return granule.write_thread / kWarp == here.thread / kWarp && granule.write_warp_syncs < here.warp_syncs;
}

bool ordered_after_reads(const Granule& granule) {
  if (granule.read_block == kNever) return true;
  if (granule.read_block != here.block) return false;
  if (granule.read_block_syncs < here.block_syncs) return true;
  if (granule.read_by_warps || granule.read_warp != here.thread / kWarp) return false;
  return granule.read_warp_syncs < here.warp_syncs || granule.read_lanes == 1u << here.thread % kWarp;
}

void note_read(Granule& granule) {
  const int warp = here.thread / kWarp;
  const uint32_t lane = 1u << here.thread % kWarp;
  if (granule.read_block != kNever && granule.read_block != here.block) {
    granule.read_block = kSeveral;
  } else if (granule.read_block == kNever || granule.read_block_syncs < here.block_syncs) {
    granule.read_block = here.block;
    granule.read_block_syncs = here.block_syncs;
    granule.read_warp = warp;
    granule.read_warp_syncs = here.warp_syncs;
    granule.read_lanes = lane;
    granule.read_by_warps = false;
  } else if (granule.read_warp != warp) {
    granule.read_by_warps = true;
  } else if (granule.read_warp_syncs < here.warp_syncs) {
    granule.read_warp_syncs = here.warp_syncs;
    granule.read_lanes = lane;
  } else {
    granule.read_lanes |= lane;
  }
}

void note_write(Granule& granule, bool atomic) {
  granule.write_block = here.block;
  granule.write_thread = here.thread;
  granule.write_block_syncs = here.block_syncs;
  granule.write_warp_syncs = here.warp_syncs;
  granule.write_atomic = atomic;
}

std::string place(uintptr_t at) {
  if (!shared.has(at)) return "global memory";
  return "byte " + std::to_string(at - shared.begin) + " of shared memory";
}

[[noreturn]] void report(const Granule& granule, uintptr_t at, const char* what, bool with_write) {
  const std::string other = with_write ? "what thread " + std::to_string(granule.write_thread) + " of block " +
                                             std::to_string(granule.write_block) + " wrote"
                                       : "what another thread read";
  fail("a race: thread " + std::to_string(here.thread) + " of block " + std::to_string(here.block) + " " + what +
       " at " + place(at) + ", after " + std::to_string(here.block_syncs) + " synchronisations, " + other);
}

}  // namespace

void record(const void* from, size_t bytes, Access access) {
  if (!watching || here.thread < 0) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(from), end = begin + bytes;
  if (stacks.has(begin)) return;
  for (uintptr_t at = begin / kGranule; at < (end + kGranule - 1) / kGranule; ++at) {
    const uintptr_t address = at * kGranule;
    const bool in_shared = shared.has(address);
    Granule& granule = in_shared ? shared_granules[(address - shared.begin) / kGranule] : other_granules[at];
    if (access == Access::kRead) {
      if (!ordered_after_write(granule)) report(granule, address, "reads", true);
      if (in_shared && granule.write_block == kNever) {
        fail("thread " + std::to_string(here.thread) + " reads " + place(address) + ", which nobody has written");
      }
      note_read(granule);
      continue;
    }
    const bool both_atomic = access == Access::kAtomic && granule.write_atomic;
    if (!both_atomic && !ordered_after_write(granule)) report(granule, address, "writes", true);
    if (!ordered_after_reads(granule)) report(granule, address, "writes", false);
    note_write(granule, access == Access::kAtomic);
  }
}

Watch::Watch(const char* shared_begin, size_t shared_bytes, const char* stacks_begin, size_t stack_bytes) {
  const auto range = [](const char* begin, size_t bytes) {
    return Range{reinterpret_cast<uintptr_t>(begin), reinterpret_cast<uintptr_t>(begin) + bytes};
  };
  shared = range(shared_begin, shared_bytes);
  stacks = range(stacks_begin, stack_bytes);
  shared_granules.resize(shared_bytes / kGranule + 1);
  other_granules.clear();
  watching = announced;
}

Watch::~Watch() { watching = false; }

void start_block() {
  if (watching) shared_granules.assign(shared_granules.size(), Granule());
}

}  // namespace dyhead::cuda::emulation::races

// What -fsanitize=thread makes the compiler call.
using dyhead::cuda::emulation::races::Access;
using dyhead::cuda::emulation::races::record;

#define DYHEAD_ANNOUNCE(bytes)                                                          \
  void __tsan_read##bytes(void* from) { record(from, bytes, Access::kRead); }           \
  void __tsan_write##bytes(void* to) { record(to, bytes, Access::kWrite); }             \
  void __tsan_unaligned_read##bytes(void* from) { record(from, bytes, Access::kRead); } \
  void __tsan_unaligned_write##bytes(void* to) { record(to, bytes, Access::kWrite); }

extern "C" {
void __tsan_init() { dyhead::cuda::emulation::races::announced = true; }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
DYHEAD_ANNOUNCE(1)
DYHEAD_ANNOUNCE(2)
DYHEAD_ANNOUNCE(4)
DYHEAD_ANNOUNCE(8)
DYHEAD_ANNOUNCE(16)
void __tsan_read_range(void* from, size_t bytes) { record(from, bytes, Access::kRead); }
void __tsan_write_range(void* to, size_t bytes) { record(to, bytes, Access::kWrite); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
// Of the host's reference counts.
int __tsan_atomic32_fetch_add(volatile int* to, int value, int) {
  return __atomic_fetch_add(to, value, __ATOMIC_ACQ_REL);
}
}
