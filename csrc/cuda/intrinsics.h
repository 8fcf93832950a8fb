// What kernels use of the machine, under names of their own: inline PTX on a device; on the host, where tests run the
// same kernel bodies, csrc/emulation/emulation.h. So a kernel's body has no conditional compilation.

#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../geometry.h"

namespace dyhead::cuda {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr int kWarp = 32;

// What one instruction moves: 16 bytes on a boundary of 16 bytes.
struct alignas(16) Vector {
  uint32_t word[4];
};

}  // namespace dyhead::cuda

#if !defined(__CUDACC__)
#include "../emulation/emulation.h"
#else

#define DYHEAD_DEVICE __device__ __forceinline__

namespace dyhead::cuda {

DYHEAD_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
DYHEAD_DEVICE int64_t block_index() { return static_cast<int64_t>(blockIdx.x); }

// The block's dynamic shared memory.
DYHEAD_DEVICE char* shared_memory() {
  extern __shared__ __align__(1024) char memory[];
  return memory;
}

DYHEAD_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

DYHEAD_DEVICE void sync_block() { __syncthreads(); }
DYHEAD_DEVICE void sync_warp() { __syncwarp(); }

// Loads through the cache for data that no one writes during the kernel.
DYHEAD_DEVICE Vector load_vector(const void* from) {
  const uint4 value = __ldg(reinterpret_cast<const uint4*>(from));
  return {{value.x, value.y, value.z, value.w}};
}

// The same for an E of 2, 4, 8 or 16 bytes that lies `offset` bytes behind `from`; where `valid` is false it is 0 and
// nothing is read. In PTX, because after a load that the compiler predicates itself a move may stand, which waits for
// the load; volatile, so that it stays ahead of the products that follow it.
template <typename E>
DYHEAD_DEVICE E load_if(bool valid, const void* from, int64_t offset) {
  static_assert(sizeof(E) == 2 || sizeof(E) == 4 || sizeof(E) == 8 || sizeof(E) == 16);
  const size_t address = __cvta_generic_to_global(from) + offset;
  const int predicate = valid ? 1 : 0;
  E result;
  if constexpr (sizeof(E) == 2) {
    uint16_t bits = 0;
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %2, 0; @p ld.global.nc.b16 %0, [%1]; }\n"
                 : "+h"(bits)
                 : "l"(address), "r"(predicate));
    std::memcpy(&result, &bits, sizeof(bits));
  } else if constexpr (sizeof(E) == 4) {
    uint32_t bits = 0;
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %2, 0; @p ld.global.nc.b32 %0, [%1]; }\n"
                 : "+r"(bits)
                 : "l"(address), "r"(predicate));
    std::memcpy(&result, &bits, sizeof(bits));
  } else if constexpr (sizeof(E) == 8) {
    uint32_t bits[2] = {0, 0};
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %3, 0; @p ld.global.nc.v2.b32 {%0, %1}, [%2]; }\n"
                 : "+r"(bits[0]), "+r"(bits[1])
                 : "l"(address), "r"(predicate));
    std::memcpy(&result, bits, sizeof(bits));
  } else {
    uint32_t bits[4] = {0, 0, 0, 0};
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %5, 0; @p ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4]; }\n"
                 : "+r"(bits[0]), "+r"(bits[1]), "+r"(bits[2]), "+r"(bits[3])
                 : "l"(address), "r"(predicate));
    std::memcpy(&result, bits, sizeof(bits));
  }
  return result;
}

// Reads memory that threads of this block have written.
DYHEAD_DEVICE Vector read_vector(const void* from) {
  const uint4 value = *reinterpret_cast<const uint4*>(from);
  return {{value.x, value.y, value.z, value.w}};
}
DYHEAD_DEVICE void store_vector(void* to, const Vector& value) {
  *reinterpret_cast<uint4*>(to) = make_uint4(value.word[0], value.word[1], value.word[2], value.word[3]);
}

// Asynchronous copies of a vector from global to shared memory. A copy has landed when its thread has waited for its
// group; other threads see it after the block's next synchronisation. Where `valid` is false the vector is 0 and
// nothing is read. Both lie kOffset bytes behind what is named, which the
// instruction adds by itself.
template <int kOffset = 0>
DYHEAD_DEVICE void copy_async(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0 + %3], [%1 + %3], 16, %2;\n" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0), "n"(kOffset)
               : "memory");
}
DYHEAD_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
// Waits until at most the latest `kPending` groups of this thread are still under way.
template <int kPending>
DYHEAD_DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// Four matrices of 8 rows of 16 bytes; lane i gives the address of row i % 8 of matrix i / 8. In result[m] a lane has
// the 4 bytes (row lane / 4, word lane % 4) of matrix m. All lanes of the warp take part.
DYHEAD_DEVICE void load_matrices(uint32_t (&result)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
               : "r"(shared_address(row))
               : "memory");
}
// The same for matrices of 2-byte elements, each transposed.
DYHEAD_DEVICE void load_matrices_transposed(uint32_t (&result)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
               : "r"(shared_address(row))
               : "memory");
}

// sum (16 x 8) += left (16 x k) * right (k x 8), spread over the warp as the PTX manual says of mma.m16n8k16 (half
// types) and mma.m16n8k8 (float, in TF32). With g = lane / 4 and t = lane % 4, sum holds (g, 2t), (g, 2t + 1),
// (g + 8, 2t), (g + 8, 2t + 1).
DYHEAD_DEVICE void multiply_add(BFloat16, float (&sum)[4], const uint32_t (&left)[4], uint32_t right0,
                                uint32_t right1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};\n"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right0), "r"(right1));
}
DYHEAD_DEVICE void multiply_add(Half, float (&sum)[4], const uint32_t (&left)[4], uint32_t right0, uint32_t right1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};\n"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right0), "r"(right1));
}
DYHEAD_DEVICE void multiply_add(float, float (&sum)[4], const uint32_t (&left)[4], uint32_t right0, uint32_t right1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};\n"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right0), "r"(right1));
}

// Rounded to the nearest value of TF32: mma itself would cut the lower bits off.
DYHEAD_DEVICE uint32_t round_to_tf32(float value) {
  uint32_t result;
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(result) : "f"(value));
  return result;
}

// Two values rounded to a half type, the first in the lower bytes.
DYHEAD_DEVICE uint32_t pack_pair(BFloat16, float first, float second) {
  uint32_t result;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(result) : "f"(second), "f"(first));
  return result;
}
DYHEAD_DEVICE uint32_t pack_pair(Half, float first, float second) {
  uint32_t result;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(result) : "f"(second), "f"(first));
  return result;
}

// The value of the lane whose number differs in the bits of `mask`. All lanes of the warp take part.
template <typename T>
DYHEAD_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// to[0..n) += value in global memory, n = 16 bytes' worth, on a boundary of 16 bytes; other blocks may do the same.
DYHEAD_DEVICE void atomic_add(float* to, const float (&value)[4]) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};\n" ::"l"(__cvta_generic_to_global(to)), "f"(value[0]),
               "f"(value[1]), "f"(value[2]), "f"(value[3])
               : "memory");
#else
  for (int i = 0; i < 4; ++i) atomicAdd(to + i, value[i]);
#endif
}
DYHEAD_DEVICE void atomic_add(double* to, const double (&value)[2]) {
  for (int i = 0; i < 2; ++i) atomicAdd(to + i, value[i]);
}
template <typename A>
DYHEAD_DEVICE void atomic_add(A* to, A value) {
  atomicAdd(to, value);
}
// The same where no other thread of the launch touches `to`: in the order of the program, as every two operations of a
// thread on one address are. A reduction nevertheless, because it need not wait for what is there.
template <typename A>
DYHEAD_DEVICE void owned_atomic_add(A* to, A value) {
  atomicAdd(to, value);
}

// *to += value in shared memory; what was there. Other threads of the block may do the same.
DYHEAD_DEVICE int shared_fetch_add(int* to, int value) { return atomicAdd(to, value); }

// Two neighbours at once, on a boundary of both; half types are rounded.
DYHEAD_DEVICE void store_pair(float* to, float first, float second) {
  *reinterpret_cast<float2*>(to) = make_float2(first, second);
}
DYHEAD_DEVICE void store_pair(double* to, double first, double second) {
  *reinterpret_cast<double2*>(to) = make_double2(first, second);
}
template <typename T>
DYHEAD_DEVICE void store_pair(T* to, float first, float second) {
  *reinterpret_cast<uint32_t*>(to) = pack_pair(T(), first, second);
}

}  // namespace dyhead::cuda

#endif
