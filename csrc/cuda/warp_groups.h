// Products of warp groups, four warps each, whose operands tensor cores of sm_90a read from shared memory by themselves
// while the threads go on. For other machines kWarpGroups is false.
//
// A product runs until it is waited for. Up to then no one may write to its operands or touch its sum. Operands are
// tiles in the order of product.h, on boundaries of 1024 bytes.

#pragma once

#include "intrinsics.h"

#if defined(__CUDACC__)

namespace dyhead::cuda {

// Whether there are products of operands of a type, rounded to TF32 where it is float.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
template <typename T>
constexpr bool kWarpGroups = sizeof(T) <= sizeof(float);
#else
template <typename T>
constexpr bool kWarpGroups = false;
#endif

// Makes what this thread has written to shared memory, by copies as well, visible to products that begin after the
// block's next synchronisation.
DYHEAD_DEVICE void fence_shared() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }

// Before the first of several products, after the last one, and to wait for all.
DYHEAD_DEVICE void begin_products() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
DYHEAD_DEVICE void end_products() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }
DYHEAD_DEVICE void wait_for_products() { asm volatile("wgmma.wait_group.sync.aligned 0;\n" ::: "memory"); }

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// What tells the tensor cores where an operand lies, `panel_bytes` from one panel to the next where it has several:
// swizzled by 128 bytes, eight rows in 1024 bytes.
DYHEAD_DEVICE uint64_t operand(const char* tile, int bytes, int panel_bytes) {
  return uint64_t(1) << 62 | uint64_t(1024 >> 4) << 32 | static_cast<uint64_t>(panel_bytes >> 4) << 16 |
         ((shared_address(tile) + bytes) >> 4 & 0x3fff);
}

// clang-format off
#define DYHEAD_FOUR(i) "+f"(sum[i][0]), "+f"(sum[i][1]), "+f"(sum[i][2]), "+f"(sum[i][3])
// The registers of 64 and of 128 sums: their names in an instruction, and what they hold.
#define DYHEAD_NAMES_64  \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "  \
  "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "  \
  "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "  \
  "%62, %63"
#define DYHEAD_NAMES_128 DYHEAD_NAMES_64 ", "  \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, "  \
  "%84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, "  \
  "%103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, "  \
  "%119, %120, %121, %122, %123, %124, %125, %126, %127"
#define DYHEAD_SUMS_64  \
  DYHEAD_FOUR(0), DYHEAD_FOUR(1), DYHEAD_FOUR(2), DYHEAD_FOUR(3), DYHEAD_FOUR(4), DYHEAD_FOUR(5),  \
  DYHEAD_FOUR(6), DYHEAD_FOUR(7), DYHEAD_FOUR(8), DYHEAD_FOUR(9), DYHEAD_FOUR(10), DYHEAD_FOUR(11),  \
  DYHEAD_FOUR(12), DYHEAD_FOUR(13), DYHEAD_FOUR(14), DYHEAD_FOUR(15)
#define DYHEAD_SUMS_128 DYHEAD_SUMS_64,  \
  DYHEAD_FOUR(16), DYHEAD_FOUR(17), DYHEAD_FOUR(18), DYHEAD_FOUR(19), DYHEAD_FOUR(20),  \
  DYHEAD_FOUR(21), DYHEAD_FOUR(22), DYHEAD_FOUR(23), DYHEAD_FOUR(24), DYHEAD_FOUR(25),  \
  DYHEAD_FOUR(26), DYHEAD_FOUR(27), DYHEAD_FOUR(28), DYHEAD_FOUR(29), DYHEAD_FOUR(30), DYHEAD_FOUR(31)
#define DYHEAD_PRODUCT(count, left_name, right_name, one, shape, transposed, left, right)  \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, " one ", 0; wgmma.mma_async.sync.aligned." shape  \
               " {" DYHEAD_NAMES_##count "}, " left_name ", " right_name ", p, 1, 1" transposed "; }\n"  \
               : DYHEAD_SUMS_##count  \
               : "l"(left), "l"(right), "r"(1))

// sum (64 x 256) += left (64 x k) * right^T (256 x k), for k of 32 bytes of the rows of both, from `begin` on. Warp w of
// the group has rows 16 w and further of the sum, spread over it as by multiply_add.
#define DYHEAD_ROWS_PRODUCT(type, shape, transposed)  \
  DYHEAD_DEVICE void multiply_add_rows(type, float (&sum)[32][4], const char* left, const char* right, int begin) {  \
    DYHEAD_PRODUCT(128, "%128", "%129", "%130", shape, transposed, operand(left, begin, 0), operand(right, begin, 0));  \
  }
DYHEAD_ROWS_PRODUCT(BFloat16, "m64n256k16.f32.bf16.bf16", ", 0, 0")
DYHEAD_ROWS_PRODUCT(Half, "m64n256k16.f32.f16.f16", ", 0, 0")
DYHEAD_ROWS_PRODUCT(float, "m64n256k8.f32.tf32.tf32", "")

// sum (64 x 128) += left^T (16 x 64) * right (16 x 128), of panels, whose rows are the depth: `left` is one of them,
// `right` two that lie panel_bytes apart; from `begin` bytes on.
#define DYHEAD_PANELS_PRODUCT(type, shape, transposed)  \
  DYHEAD_DEVICE void multiply_add_panels(type, float (&sum)[16][4], const char* left, const char* right,  \
                                         int panel_bytes, int begin) {  \
    DYHEAD_PRODUCT(64, "%64", "%65", "%66", shape, transposed,  \
                   operand(left, begin, 0), operand(right, begin, panel_bytes));  \
  }
DYHEAD_PANELS_PRODUCT(BFloat16, "m64n128k16.f32.bf16.bf16", ", 1, 1")
DYHEAD_PANELS_PRODUCT(Half, "m64n128k16.f32.f16.f16", ", 1, 1")

#undef DYHEAD_PANELS_PRODUCT
#undef DYHEAD_ROWS_PRODUCT
#undef DYHEAD_PRODUCT
#undef DYHEAD_SUMS_128
#undef DYHEAD_SUMS_64
#undef DYHEAD_NAMES_128
#undef DYHEAD_NAMES_64
#undef DYHEAD_FOUR
// clang-format on
#endif

}  // namespace dyhead::cuda

#endif
