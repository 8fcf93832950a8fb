// Vectors of an instruction set: loading, storing and rounding them, and moving their lanes.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(DYHEAD_PAIRS)
#include <immintrin.h>
#endif

#include "../kernels.h"

#define DYHEAD_INLINE static inline __attribute__((always_inline)) DYHEAD_TARGET

namespace dyhead::cpu::DYHEAD_PATH {
namespace {

template <typename A>
struct Lanes;
template <>
struct Lanes<float> {
  typedef float Vector __attribute__((vector_size(DYHEAD_BYTES)));
};
template <>
struct Lanes<double> {
  typedef double Vector __attribute__((vector_size(DYHEAD_BYTES)));
};
#if defined(DYHEAD_PAIRS)
template <>
struct Lanes<BFloat16> {
  typedef __m512bh Vector;
};
#endif

template <typename A>
using Vector = typename Lanes<A>::Vector;
template <typename A>
constexpr int kLanes = DYHEAD_BYTES / sizeof(A);

typedef uint32_t Bits __attribute__((vector_size(DYHEAD_BYTES)));
typedef uint16_t HalfBits __attribute__((vector_size(DYHEAD_BYTES / 2)));

template <typename A>
DYHEAD_INLINE Vector<A> load(const A* from) {
  Vector<A> result;
  std::memcpy(&result, from, sizeof(result));
  return result;
}

DYHEAD_INLINE Bits load_bits(const void* from) {
  HalfBits bits;
  std::memcpy(&bits, from, sizeof(bits));
  return __builtin_convertvector(bits, Bits);
}

DYHEAD_INLINE Vector<float> load(const BFloat16* from) { return (Vector<float>)(load_bits(from) << 16); }

// The exponent of a half is rebased by a multiplication, which also makes its subnormals normal.
DYHEAD_INLINE Vector<float> load(const Half* from) {
  const Bits bits = load_bits(from), magnitude = (bits & 0x7fff) << 13, sign = (bits & 0x8000) << 16;
  const Vector<float> finite = (Vector<float>)magnitude * 0x1p112f;
  const Bits not_finite = (Bits)(magnitude >= 0x0f800000) & 0x7f800000;
  return (Vector<float>)((Bits)finite | not_finite | sign);
}

template <typename A>
DYHEAD_INLINE void store(A* to, Vector<A> value) {
  std::memcpy(to, &value, sizeof(value));
}

// Not the conversion operator of the type: it is not compiled for this instruction set.
DYHEAD_INLINE float single(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.x) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}
DYHEAD_INLINE float single(Half value) {
  const uint32_t magnitude = (value.x & 0x7fffu) << 13, sign = (value.x & 0x8000u) << 16;
  float finite;
  std::memcpy(&finite, &magnitude, sizeof(finite));
  finite *= 0x1p112f;
  uint32_t bits;
  std::memcpy(&bits, &finite, sizeof(bits));
  bits |= sign | (magnitude >= 0x0f800000 ? 0x7f800000 : 0);
  std::memcpy(&finite, &bits, sizeof(finite));
  return finite;
}
DYHEAD_INLINE float single(float value) { return value; }
DYHEAD_INLINE double single(double value) { return value; }

// Lanes of two vectors, those of the second counted on from those of the first.
template <typename A, int... kFrom>
DYHEAD_INLINE Vector<A> shuffle(Vector<A> first, Vector<A> second) {
#if defined(__clang__)
  return __builtin_shufflevector(first, second, kFrom...);
#else
  typedef std::conditional_t<sizeof(A) == 8, int64_t, int32_t> Lane;
  typedef Lane Index __attribute__((vector_size(DYHEAD_BYTES)));
  return __builtin_shuffle(first, second, Index{kFrom...});
#endif
}

// Transposes a square of lanes: first its four quarters, then each of them in the same way.
template <typename A, int kHalf, int... kLane>
DYHEAD_INLINE void transpose_blocks(Vector<A> (&rows)[kLanes<A>], std::integer_sequence<int, kLane...> lanes) {
  if constexpr (kHalf > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<A>; ++i) {
      if (i & kHalf) continue;
      const Vector<A> upper = rows[i], lower = rows[i + kHalf];
      rows[i] = shuffle<A, (kLane & kHalf ? kLanes<A> + kLane - kHalf : kLane)...>(upper, lower);
      rows[i + kHalf] = shuffle<A, (kLane & kHalf ? kLanes<A> + kLane : kLane + kHalf)...>(upper, lower);
    }
    transpose_blocks<A, kHalf / 2>(rows, lanes);
  }
}
template <typename A>
DYHEAD_INLINE void transpose(Vector<A> (&rows)[kLanes<A>]) {
  transpose_blocks<A, kLanes<A> / 2>(rows, std::make_integer_sequence<int, kLanes<A>>());
}

// The sum of all lanes, halves added to halves.
template <typename A>
DYHEAD_INLINE A sum(Vector<A> value) {
  A lanes[kLanes<A>];
  store(lanes, value);
#pragma GCC unroll 4
  for (int half = kLanes<A> / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

#if defined(DYHEAD_PAIRS)

// Rounds both to bfloat16 and lays them out as low0, high0, low1, high1, ...
DYHEAD_INLINE void store_pairs(BFloat16* to, Vector<float> low, Vector<float> high) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi16(order, both));
}

DYHEAD_INLINE BFloat16 rounded(float value) {
  const __m256i bits = (__m256i)_mm512_cvtneps_pbh(_mm512_set1_ps(value));
  return BFloat16(static_cast<uint16_t>(_mm256_extract_epi16(bits, 0)), BFloat16::from_bits());
}

#endif

}  // namespace
}  // namespace dyhead::cpu::DYHEAD_PATH
