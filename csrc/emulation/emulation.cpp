#include "emulation.h"

#include <cmath>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "races.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace dyhead::cuda::emulation {

Place here{-1, 0, nullptr, 0, 0};
int64_t additions = 0;

namespace {

constexpr size_t kStackBytes = 256 << 10;

// A thread of execution that is left and entered again by hand.
#if defined(__x86_64__)
// Saves what a call preserves on the stack of `from`, and goes on on the stack `to`. The system's own (ucontext) would
// call the kernel twice each time.
extern "C" void dyhead_switch_stack(void** from, void* to);
asm(R"(
.text
.type dyhead_switch_stack, @function
dyhead_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size dyhead_switch_stack, .-dyhead_switch_stack
)");
struct Context {
  void* stack_pointer = nullptr;
  void prepare(char* stack, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + kStackBytes);
    *--top = nullptr;                         // where entry() would return to
    *--top = reinterpret_cast<void*>(entry);  // where the first switch returns to
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    stack_pointer = top;
  }
};
void switch_context(Context& from, Context& to) { dyhead_switch_stack(&from.stack_pointer, to.stack_pointer); }
#else
struct Context {
  ucontext_t context;
  void prepare(char* stack, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
};
void switch_context(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
#endif

struct Copy {
  void* to;
  const void* from;
  bool valid;
};

enum class State { kReady, kAtWarp, kAtBlock, kDone };

struct Thread {
  Context context;
  State state = State::kReady;
  std::vector<std::vector<Copy>> groups{{}};  // asynchronous copies; the last group is open
};

struct Warp {
  void (*operation)(void* const lanes[kWarp]) = nullptr;
  void* lanes[kWarp];
  int arrived = 0, syncs = 0;
};

struct Block {
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Context scheduler;
  const std::function<void()>* body = nullptr;
  int running = 0;
  std::string problem;
};
Block* block = nullptr;
std::unordered_map<const void*, std::pair<int64_t, int>> owners;  // of what threads of a launch own

}  // namespace

// The thread's stack is given up.
void fail(const std::string& problem) {
  block->problem = problem;
  block->threads[block->running].state = State::kDone;
  switch_context(block->threads[block->running].context, block->scheduler);
  std::abort();
}

namespace {

void leave(State state) {
  const int own = block->running;
  block->threads[own].state = state;
  switch_context(block->threads[own].context, block->scheduler);
}

void enter() {
  (*block->body)();
  if (block->threads[block->running].groups.size() > 1 || !block->threads[block->running].groups[0].empty()) {
    fail("a thread ended with asynchronous copies under way");
  }
  leave(State::kDone);
}

void resume(int thread) {
  block->running = thread;
  here.thread = thread;
  here.warp_syncs = block->warps[thread / kWarp].syncs;
  switch_context(block->scheduler, block->threads[thread].context);
  here.thread = -1;
  if (!block->problem.empty()) throw std::runtime_error("emulation: " + block->problem);
}

// Runs a warp until all its threads wait for the block or have ended.
void run_warp(int warp) {
  bool progress = true;
  while (progress) {
    progress = false;
    for (int lane = 0; lane < kWarp; ++lane) {
      const int thread = warp * kWarp + lane;
      if (block->threads[thread].state != State::kReady) continue;
      resume(thread);
      progress = true;
    }
  }
  if (block->warps[warp].arrived > 0) {
    throw std::runtime_error("emulation: some lanes of a warp never reach an instruction that the others wait at");
  }
}

void run_block(const std::function<void()>& body, int threads, char* stacks) {
  Block own;
  own.threads.resize(threads);
  own.warps.resize(threads / kWarp);
  own.body = &body;
  block = &own;
#if defined(__SANITIZE_ADDRESS__)
  // The last block's threads never returned, so what surrounds their variables is still marked.
  __asan_unpoison_memory_region(stacks, static_cast<size_t>(threads) * kStackBytes);
#endif
  for (int i = 0; i < threads; ++i) own.threads[i].context.prepare(stacks + i * kStackBytes, enter);
  for (unsigned phase = 0;; ++phase) {
    here.block_syncs = static_cast<int>(phase);
    const int warps = threads / kWarp;
    const int first = static_cast<int>(phase * 2654435761u >> 16) % warps;
    for (int i = 0; i < warps; ++i) {
      const int step = phase % 2 == 0 ? i : warps - 1 - i;
      run_warp((first + step) % warps);
    }
    int waiting = 0;
    for (const Thread& thread : own.threads) waiting += thread.state == State::kAtBlock;
    if (waiting == 0) return;
    if (waiting < threads)
      throw std::runtime_error("emulation: some threads end before a synchronisation of the block");
    for (Thread& thread : own.threads) thread.state = State::kReady;
  }
}

}  // namespace

void run_blocks(int64_t blocks, int threads, int shared_bytes, const std::function<void()>& body) {
  const size_t stack_bytes = static_cast<size_t>(threads) * kStackBytes;
  const std::unique_ptr<char[]> stacks(new char[stack_bytes]);
  // Of exactly this size, so that an AddressSanitizer sees what is beyond.
  const std::unique_ptr<char, void (*)(void*)> shared(
      static_cast<char*>(std::aligned_alloc(128, static_cast<size_t>((shared_bytes + 127) / 128 * 128 + 128))),
      std::free);
  owners.clear();
  const races::Watch watch(shared.get(), shared_bytes, stacks.get(), stack_bytes);
  for (int64_t index = 0; index < blocks; ++index) {
    std::memset(shared.get(), 0xff, static_cast<size_t>(shared_bytes));  // NaN in every floating type
    here = {-1, index, shared.get(), 0, 0};
    races::start_block();
    run_block(body, threads, stacks.get());
  }
}

void sync_block() { leave(State::kAtBlock); }

void sync_warp() {
  collective([](void* const[kWarp]) { here.warp_syncs = ++block->warps[block->running / kWarp].syncs; }, nullptr);
}

void read(void* to, const void* from, size_t bytes) {
  races::record(from, bytes, races::Access::kRead);
  std::memcpy(to, from, bytes);
}

void write(void* to, const void* from, size_t bytes) {
  races::record(to, bytes, races::Access::kWrite);
  std::memcpy(to, from, bytes);
}

void atomic_add(float* to, float value) {
  ++additions;
  races::record(to, sizeof(*to), races::Access::kAtomic);
  *to += value;
}
void atomic_add(double* to, double value) {
  ++additions;
  races::record(to, sizeof(*to), races::Access::kAtomic);
  *to += value;
}

int fetch_add(int* to, int value) {
  races::record(to, sizeof(*to), races::Access::kAtomic);
  const int before = *to;
  *to += value;
  return before;
}

void collective(void (*operation)(void* const lanes[kWarp]), void* own) {
  const int thread = block->running, first = thread / kWarp * kWarp;
  Warp& warp = block->warps[thread / kWarp];
  if (warp.arrived > 0 && warp.operation != operation) fail("lanes of a warp wait at different instructions");
  warp.operation = operation;
  warp.lanes[thread - first] = own;
  if (++warp.arrived < kWarp) return leave(State::kAtWarp);
  operation(warp.lanes);
  warp.arrived = 0;
  for (int lane = 0; lane < kWarp; ++lane) {
    if (first + lane != thread) block->threads[first + lane].state = State::kReady;
  }
}

void check_alignment(const void* pointer, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0) fail("a vector is not aligned");
}

void check_owner(const void* pointer) {
  const std::pair<int64_t, int> own{here.block, here.thread};
  if (owners.try_emplace(pointer, own).first->second != own) fail("two threads add to what each takes for its own");
}

void copy_async(void* shared, const void* global, bool valid) {
  check_alignment(shared);
  check_alignment(global);
  races::record(shared, sizeof(Vector), races::Access::kWrite);
  std::memset(shared, 0xff, sizeof(Vector));
  block->threads[block->running].groups.back().push_back({shared, global, valid});
}

void commit_copies() { block->threads[block->running].groups.emplace_back(); }

void wait_for_copies(int pending) {
  auto& groups = block->threads[block->running].groups;
  while (static_cast<int>(groups.size()) - 1 > pending) {
    for (const Copy& copy : groups.front()) {
      races::record(copy.to, sizeof(Vector), races::Access::kWrite);
      if (copy.valid) races::record(copy.from, sizeof(Vector), races::Access::kRead);
      if (copy.valid) {
        std::memcpy(copy.to, copy.from, sizeof(Vector));
      } else {
        std::memset(copy.to, 0, sizeof(Vector));
      }
    }
    groups.erase(groups.begin());
  }
}

namespace {

struct Matrices {
  uint32_t* result;
  const void* row;
};

template <bool kTransposed>
void load_matrices_of(void* const lanes[kWarp]) {
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int m = 0; m < 4; ++m) {
      uint16_t halves[2];
      for (int i = 0; i < 2; ++i) {
        // Element (row, column) of matrix m.
        const int row = kTransposed ? lane % 4 * 2 + i : lane / 4, column = kTransposed ? lane / 4 : lane % 4 * 2 + i;
        const char* from = static_cast<const char*>(static_cast<Matrices*>(lanes[m * 8 + row])->row);
        std::memcpy(&halves[i], from + 2 * column, 2);
      }
      std::memcpy(static_cast<Matrices*>(lanes[lane])->result + m, halves, sizeof(halves));
    }
  }
}

struct Fragments {
  float* sum;
  const uint32_t* left;
  uint32_t right[2];
};

// The fragments of mma.m16n8k(2 * kPerWord * 4): a word has kPerWord elements that follow each other along k.
template <int kPerWord, typename Unpack>
void multiply_add_of(void* const lanes[kWarp], const Unpack& unpack) {
  constexpr int kDepth = 8 * kPerWord;
  float left[16][kDepth], right[8][kDepth];
  for (int lane = 0; lane < kWarp; ++lane) {
    const Fragments& own = *static_cast<Fragments*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < kPerWord; ++i) {
      for (int half = 0; half < 2; ++half) {
        const int k = half * 4 * kPerWord + t * kPerWord + i;
        left[g][k] = unpack(own.left[2 * half], i);
        left[g + 8][k] = unpack(own.left[2 * half + 1], i);
        right[g][k] = unpack(own.right[half], i);
      }
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    float* const sum = static_cast<Fragments*>(lanes[lane])->sum;
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      float total = 0;
      for (int k = 0; k < kDepth; ++k) total += left[row][k] * right[column][k];
      sum[i] += total;
    }
  }
}

template <typename T>
void multiply_add_half_of(void* const lanes[kWarp]) {
  multiply_add_of<2>(lanes, [](uint32_t word, int i) {
    T values[2];
    std::memcpy(values, &word, sizeof(word));
    return static_cast<float>(values[i]);
  });
}

void multiply_add_tf32_of(void* const lanes[kWarp]) {
  multiply_add_of<1>(lanes, [](uint32_t word, int) {
    word &= ~0x1fffu;  // what the instruction does not read
    float value;
    std::memcpy(&value, &word, sizeof(word));
    return value;
  });
}

}  // namespace

void load_matrices(uint32_t (&result)[4], const void* row, bool transposed) {
  check_alignment(row);
  races::record(row, sizeof(Vector), races::Access::kRead);
  Matrices own{result, row};
  collective(transposed ? load_matrices_of<true> : load_matrices_of<false>, &own);
}

void multiply_add_half(float (&sum)[4], const uint32_t (&left)[4], uint32_t right0, uint32_t right1, bool bfloat16) {
  Fragments own{sum, left, {right0, right1}};
  collective(bfloat16 ? multiply_add_half_of<BFloat16> : multiply_add_half_of<Half>, &own);
}

void multiply_add_tf32(float (&sum)[4], const uint32_t (&left)[4], uint32_t right0, uint32_t right1) {
  Fragments own{sum, left, {right0, right1}};
  collective(multiply_add_tf32_of, &own);
}

}  // namespace dyhead::cuda::emulation
