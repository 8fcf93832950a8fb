// The intrinsics of csrc/cuda/intrinsics.h on the host, for tests without a GPU. A block's threads run as fibers, one
// at a time, each as far as it can: up to the next synchronisation of the block, or up to an instruction that the whole
// warp executes. Which warp goes first changes from one synchronisation to the next, so that a missing one shows in the
// result. What a GPU would leave undefined is NaN here: shared memory before it is written, and the target of an
// asynchronous copy until it was waited for. Misuse (a misaligned vector, threads that part ways before an instruction
// of the warp, a synchronisation that some threads never reach, two threads that add to what each takes for its own)
// ends the launch with std::runtime_error. So does a race (races.h), if the kernels are compiled with
// -fsanitize=thread and without its runtime.

#pragma once

#if defined(__CUDACC__)
#error "emulation.h is for the host"
#endif

#include <cstring>
#include <functional>
#include <string>

#include "../cuda/intrinsics.h"

#define DYHEAD_DEVICE inline

namespace dyhead::cuda {

namespace emulation {

// Runs `body` as every thread of `blocks` blocks.
void run_blocks(int64_t blocks, int threads, int shared_bytes, const std::function<void()>& body);

// The running thread (-1: none), and how often its block and its warp have synchronised.
struct Place {
  int thread;
  int64_t block;
  char* shared;
  int block_syncs, warp_syncs;
};
extern Place here;

// Elements that atomic_add has added to, for those who count.
extern int64_t additions;

// Ends the launch from within a thread.
[[noreturn]] void fail(const std::string& problem);

// Every lane of a warp calls this with the same `operation`; it is called once, by the last one, with what all lanes
// passed.
void collective(void (*operation)(void* const lanes[kWarp]), void* own);

void copy_async(void* shared, const void* global, bool valid);
void commit_copies();
void wait_for_copies(int pending);
void sync_block();
void sync_warp();
void read(void* to, const void* from, size_t bytes);
void write(void* to, const void* from, size_t bytes);
void atomic_add(float* to, float value);
void atomic_add(double* to, double value);
int fetch_add(int* to, int value);
void check_alignment(const void* pointer, size_t bytes = sizeof(Vector));
void check_owner(const void* pointer);

void load_matrices(uint32_t (&result)[4], const void* row, bool transposed);
void multiply_add_half(float (&sum)[4], const uint32_t (&left)[4], uint32_t right0, uint32_t right1, bool bfloat16);
void multiply_add_tf32(float (&sum)[4], const uint32_t (&left)[4], uint32_t right0, uint32_t right1);

}  // namespace emulation

inline int thread_index() { return emulation::here.thread; }
inline int64_t block_index() { return emulation::here.block; }
inline char* shared_memory() { return emulation::here.shared; }
inline void sync_block() { emulation::sync_block(); }
inline void sync_warp() { emulation::sync_warp(); }

inline Vector load_vector(const void* from) {
  emulation::check_alignment(from);
  Vector result;
  emulation::read(&result, from, sizeof(result));
  return result;
}
template <typename E>
inline E load_if(bool valid, const void* from, int64_t offset) {
  E result{};
  if (!valid) return result;
  emulation::check_alignment(static_cast<const char*>(from) + offset, sizeof(E));
  emulation::read(&result, static_cast<const char*>(from) + offset, sizeof(E));
  return result;
}
inline Vector read_vector(const void* from) { return load_vector(from); }
inline void store_vector(void* to, const Vector& value) {
  emulation::check_alignment(to);
  emulation::write(to, &value, sizeof(value));
}

template <int kOffset = 0>
inline void copy_async(void* shared, const void* global, bool valid) {
  emulation::copy_async(static_cast<char*>(shared) + kOffset, static_cast<const char*>(global) + kOffset, valid);
}
inline void commit_copies() { emulation::commit_copies(); }
template <int kPending>
inline void wait_for_copies() {
  emulation::wait_for_copies(kPending);
}

inline void load_matrices(uint32_t (&result)[4], const void* row) { emulation::load_matrices(result, row, false); }
inline void load_matrices_transposed(uint32_t (&result)[4], const void* row) {
  emulation::load_matrices(result, row, true);
}

inline void multiply_add(BFloat16, float (&sum)[4], const uint32_t (&left)[4], uint32_t right0, uint32_t right1) {
  emulation::multiply_add_half(sum, left, right0, right1, true);
}
inline void multiply_add(Half, float (&sum)[4], const uint32_t (&left)[4], uint32_t right0, uint32_t right1) {
  emulation::multiply_add_half(sum, left, right0, right1, false);
}
inline void multiply_add(float, float (&sum)[4], const uint32_t (&left)[4], uint32_t right0, uint32_t right1) {
  emulation::multiply_add_tf32(sum, left, right0, right1);
}

// csrc/cuda/warp_groups.h, at once and each thread its own sums. A row's chunks of 16 bytes are in product.h's order.
// Only half types, so that what runs without such products is tested, too.
template <typename T>
constexpr bool kWarpGroups = sizeof(T) == 2;
inline void fence_shared() {}
inline void begin_products() {}
inline void end_products() {}
inline void wait_for_products() {}
template <typename T>
inline float element(const char* tile, int row, int byte) {
  T value;
  emulation::read(&value, tile + row * 128 + ((byte / 16) ^ (row & 7)) * 16 + byte % 16, sizeof(value));
  return static_cast<float>(value);
}
template <typename T>
inline void multiply_add_rows(T, float (&sum)[32][4], const char* left, const char* right, int begin) {
  const int lane = thread_index() % kWarp, row = thread_index() / kWarp % 4 * 16 + lane / 4;
  for (int byte = begin; byte < begin + 32; byte += static_cast<int>(sizeof(T))) {
    const float rows[2] = {element<T>(left, row, byte), element<T>(left, row + 8, byte)};
    for (int j = 0; j < 32; ++j) {
      for (int k = 0; k < 4; ++k) sum[j][k] += rows[k / 2] * element<T>(right, j * 8 + lane % 4 * 2 + k % 2, byte);
    }
  }
}
template <typename T>
inline void multiply_add_panels(T, float (&sum)[16][4], const char* left, const char* right, int panel_bytes,
                                int begin) {
  const int lane = thread_index() % kWarp, row = thread_index() / kWarp % 4 * 16 + lane / 4;
  for (int depth = begin / 128; depth < begin / 128 + 16; ++depth) {
    const float rows[2] = {element<T>(left, depth, row * 2), element<T>(left, depth, (row + 8) * 2)};
    for (int j = 0; j < 16; ++j) {
      for (int k = 0; k < 4; ++k) {
        const int column = j * 8 + lane % 4 * 2 + k % 2;
        sum[j][k] += rows[k / 2] * element<T>(right + column / 64 * panel_bytes, depth, column % 64 * 2);
      }
    }
  }
}

inline uint32_t round_to_tf32(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if ((bits & 0x7f800000u) == 0x7f800000u) return bits;
  return (bits + 0x1000u) & ~0x1fffu;  // ties away from zero
}

template <typename T>
inline uint32_t pack_pair(T, float first, float second) {
  const T values[2] = {static_cast<T>(first), static_cast<T>(second)};
  uint32_t result;
  std::memcpy(&result, values, sizeof(result));
  return result;
}

template <typename T>
inline T shuffle_xor(T value, int mask) {
  struct Lane {
    T value, result;
    int mask;
  } own{value, value, mask};
  emulation::collective(
      [](void* const lanes[kWarp]) {
        for (int i = 0; i < kWarp; ++i) {
          Lane* const lane = static_cast<Lane*>(lanes[i]);
          lane->result = static_cast<Lane*>(lanes[i ^ lane->mask])->value;
        }
      },
      &own);
  return own.result;
}

inline void atomic_add(float* to, const float (&value)[4]) {
  emulation::check_alignment(to);
  for (int i = 0; i < 4; ++i) emulation::atomic_add(to + i, value[i]);
}
inline void atomic_add(double* to, const double (&value)[2]) {
  emulation::check_alignment(to);
  for (int i = 0; i < 2; ++i) emulation::atomic_add(to + i, value[i]);
}
template <typename A>
inline void atomic_add(A* to, A value) {
  emulation::atomic_add(to, value);
}
template <typename A>
inline void owned_atomic_add(A* to, A value) {
  emulation::check_owner(to);
  *to += value;
}

inline int shared_fetch_add(int* to, int value) { return emulation::fetch_add(to, value); }

template <typename T, typename A>
inline void store_pair(T* to, A first, A second) {
  emulation::check_alignment(to, 2 * sizeof(T));
  to[0] = static_cast<T>(first);
  to[1] = static_cast<T>(second);
}

}  // namespace dyhead::cuda
