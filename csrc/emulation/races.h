// Finds races in emulated kernels: two threads touch the same memory, at least one of them writes and no
// synchronisation is between them. The emulation runs one thread at a time, so it would not show what a GPU makes of
// them.
//
// Memory is looked at byte by byte: kernels write some. Threads of a block are ordered by its synchronisations, those
// of a warp by the warp's as well; threads of different blocks by nothing. Atomic additions do not race with each
// other. Stacks are a thread's own.
//
// The intrinsics of emulation.h say what they touch, and of everything else the compiler does, as -fsanitize=thread
// makes it: races.cpp takes the place of that sanitizer's runtime. Without it nothing is recorded. Reading shared
// memory that nobody has written is found, too.

#pragma once

#include <cstddef>

namespace dyhead::cuda::emulation::races {

enum class Access { kRead, kWrite, kAtomic };

// Ends the launch (emulation.h: fail) if this access of the running thread races with an earlier one.
void record(const void* from, size_t bytes, Access access);

// Between a launch's begin and end.
class Watch {
 public:
  Watch(const char* shared, size_t shared_bytes, const char* stacks, size_t stack_bytes);
  ~Watch();
  Watch(const Watch&) = delete;
  Watch& operator=(const Watch&) = delete;
};

// Shared memory is new.
void start_block();

}  // namespace dyhead::cuda::emulation::races
