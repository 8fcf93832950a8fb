// The inner loops of kernels.h, in vector types of GCC and Clang. A file that includes this one defines
//     DYHEAD_PATH    the namespace of the instruction set
//     DYHEAD_TARGET  the attribute that makes the compiler use it, on functions of this file only: no other function
//                    may come out of such a file using instructions that the machine at hand lacks
//     DYHEAD_BYTES   the width of a vector
//     DYHEAD_ROWS    rows of a block of the product, a multiple of 3; it has two vectors of columns
//     DYHEAD_PAIRS   where the instruction set multiplies pairs of bfloat16 (AVX512-BF16)

#include <algorithm>
#include <cstring>
#include <utility>

#if defined(DYHEAD_PAIRS)
#include <immintrin.h>
#endif

#include "kernels.h"

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

template <typename A>
DYHEAD_TARGET void locate(const Tap<A>& tap, const Pixel* pixels, int64_t count, Sample<A>* samples) {
  for (int64_t p = 0; p < count; ++p) {
    const Pixel& pixel = pixels[p];
    const A y = position<A>(tap.rows, pixel.row, tap.row, tap.dy[pixel.index]);
    const A x = position<A>(tap.columns, pixel.column, tap.column, tap.dx[pixel.index]);
    Sample<A>& sample = samples[p];
    sample.cell = dyhead::locate<A>(y, x, tap.height, tap.width);
    sample.mask = tap.mask == nullptr ? A(1) : tap.mask[pixel.index];
    corner_shares(sample.cell, sample.share);
    for (A& share : sample.share) share *= sample.mask * tap.factor;
  }
}

// The rows that a sample interpolates between, and what each counts.
template <typename T>
struct Corners {
  const T* row[4];
  Accumulator<T> share[4];
};

template <typename T>
DYHEAD_INLINE Corners<T> corners(const Sample<Accumulator<T>>& sample, const Channels<T>& from) {
  Corners<T> result;
  for (int i = 0; i < 4; ++i) {
    result.row[i] = from.at(sample.cell.corner[i]);
    result.share[i] = sample.share[i];
  }
  return result;
}

template <typename T>
DYHEAD_INLINE Vector<Accumulator<T>> interpolate(const Corners<T>& s, int64_t c) {
  return s.share[0] * load(s.row[0] + c) + s.share[1] * load(s.row[1] + c) + s.share[2] * load(s.row[2] + c) +
         s.share[3] * load(s.row[3] + c);
}

template <typename T>
DYHEAD_INLINE Accumulator<T> interpolate_one(const Corners<T>& s, int64_t c) {
  return s.share[0] * single(s.row[0][c]) + s.share[1] * single(s.row[1][c]) + s.share[2] * single(s.row[2][c]) +
         s.share[3] * single(s.row[3][c]);
}

// Samples so far ahead are fetched into the first-level cache: the processor itself looks less far.
constexpr int64_t kAhead = 2;

template <typename T>
DYHEAD_INLINE void prefetch(const T* const row[4], int64_t c) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) __builtin_prefetch(row[i] + c);
}

template <typename T>
DYHEAD_TARGET void sample(const Sample<Accumulator<T>>* samples, int64_t count, const Channels<T>& from, int64_t width,
                          Accumulator<T>* panel, int64_t stride) {
  using A = Accumulator<T>;
  for (int64_t p = 0; p < count; ++p, panel += stride) {
    const Corners<T> s = corners(samples[p], from), next = corners(samples[std::min(p + kAhead, count - 1)], from);
    int64_t c = 0;
    for (; c + kLanes<A> <= width; c += kLanes<A>) {
      prefetch(next.row, c);
      store(panel + c, interpolate(s, c));
    }
    for (; c < width; ++c) panel[c] = interpolate_one(s, c);
  }
}

// One step along the depth: total += left * right, where the left operand is the same for all columns.
template <typename A>
DYHEAD_INLINE Vector<A> load_operand(const A* from) {
  return load(from);
}
template <typename A>
DYHEAD_INLINE void multiply_add(Vector<A>& total, const A* left, Vector<A> right) {
  total += *left * right;
}

#if defined(DYHEAD_PAIRS)

DYHEAD_INLINE Vector<BFloat16> load_operand(const BFloat16* from) { return (Vector<BFloat16>)_mm512_loadu_si512(from); }
DYHEAD_INLINE void multiply_add(Vector<float>& total, const BFloat16* left, Vector<BFloat16> right) {
  int pair;
  std::memcpy(&pair, left, sizeof(pair));
  total = (Vector<float>)_mm512_dpbf16_ps((__m512)total, right, (Vector<BFloat16>)_mm512_set1_epi32(pair));
}

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

// The even ones of channels c, c + 1, ... are the upper halves of words that have been shifted up, the odd ones those
// of words as they are.
DYHEAD_TARGET void sample(const Sample<float>* samples, int64_t count, const Channels<BFloat16>& from, int64_t width,
                          BFloat16* panel, int64_t stride) {
  constexpr int64_t kStep = 2 * kLanes<float>;
  for (int64_t p = 0; p < count; ++p, panel += stride) {
    const Corners<BFloat16> s = corners(samples[p], from);
    const Corners<BFloat16> next = corners(samples[std::min(p + kAhead, count - 1)], from);
    int64_t c = 0;
    for (; c + kStep <= width; c += kStep) {
      prefetch(next.row, c);
      Vector<float> even = {}, odd = {};
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        Bits both;
        std::memcpy(&both, s.row[i] + c, sizeof(both));
        even += s.share[i] * (Vector<float>)(both << 16);
        odd += s.share[i] * (Vector<float>)(both & 0xffff0000);
      }
      store_pairs(panel + c, even, odd);
    }
    for (; c < width; ++c) panel[c] = rounded(interpolate_one(s, c));
  }
}

DYHEAD_TARGET void sample_units(const Sample<float>* samples, int64_t count, const Channels<BFloat16>& from,
                                int64_t width, BFloat16* panel, int64_t stride) {
  for (int64_t p = 0; p < count; p += 2, panel += stride) {
    const bool pair = p + 1 < count;
    const Corners<BFloat16> s0 = corners(samples[p], from), s1 = corners(samples[pair ? p + 1 : p], from);
    int64_t c = 0;
    for (; c + kLanes<float> <= width; c += kLanes<float>) {
      store_pairs(panel + 2 * c, interpolate(s0, c), pair ? interpolate(s1, c) : Vector<float>{});
    }
    for (; c < width; ++c) {
      panel[2 * c] = rounded(interpolate_one(s0, c));
      panel[2 * c + 1] = rounded(pair ? interpolate_one(s1, c) : 0.0f);
    }
  }
}

#endif

// Taps k, k + 1, ... of so many columns as a vector has lanes, one vector a tap.
template <typename T>
DYHEAD_INLINE void load_taps(const T* from, const T* end, int64_t column, int64_t taps,
                             Vector<Accumulator<T>> (&rows)[kLanes<Accumulator<T>>]) {
  constexpr int kCount = kLanes<Accumulator<T>>;
#pragma GCC unroll 16
  for (int i = 0; i < kCount; ++i, from += column) {
    // What follows the last tap is read, too, but nothing beyond the weights.
    if (end - from >= kCount) {
      rows[i] = load(from);
    } else {
      T some[kCount] = {};
      std::memcpy(some, from, static_cast<size_t>(taps) * sizeof(T));
      rows[i] = load(some);
    }
  }
  transpose<Accumulator<T>>(rows);
}

template <typename T, typename P>
DYHEAD_INLINE P operand(T value) {
  if constexpr (std::is_same_v<T, P>) {
    return value;
  } else {
    return single(value);
  }
}

template <typename T, typename P>
DYHEAD_TARGET void pack(const T* from, const T* end, int64_t column, int64_t depth, int64_t columns, int64_t depths,
                        int64_t taps, P* to, int64_t tap, int64_t unit) {
  using A = Accumulator<T>;
  constexpr int64_t kCount = kLanes<A>;
  const int64_t whole_columns = columns / kCount * kCount, whole_depths = depths / kUnit<P> * kUnit<P>;
  for (int64_t d = 0; d < whole_depths; d += kUnit<P>) {
    for (int64_t c = 0; c < whole_columns; c += kCount) {
      for (int64_t k = 0; k < taps; k += kCount) {
        const T* const some = from + c * column + d * depth + k;
        P* const there = to + k * tap + d / kUnit<P> * unit + c * kUnit<P>;
        const int64_t count = std::min(kCount, taps - k);
        Vector<A> rows[kCount];
        load_taps(some, end, column, count, rows);
        if constexpr (kUnit<P> == 1) {
          for (int64_t i = 0; i < count; ++i) store(there + i * tap, rows[i]);
        } else {
          Vector<A> next[kCount];
          load_taps(some + depth, end, column, count, next);
          for (int64_t i = 0; i < count; ++i) store_pairs(there + i * tap, rows[i], next[i]);
        }
      }
    }
  }
  for (int64_t d = 0; d < depths; ++d) {
    for (int64_t c = d < whole_depths ? whole_columns : 0; c < columns; ++c) {
      for (int64_t k = 0; k < taps; ++k) {
        to[k * tap + d / kUnit<P> * unit + c * kUnit<P> + d % kUnit<P>] =
            operand<T, P>(from[c * column + d * depth + k]);
      }
    }
  }
}

template <typename A>
DYHEAD_TARGET void unpack(const A* from, int64_t tap, int64_t depth, int64_t columns, int64_t depths, int64_t taps,
                          A* to, int64_t column) {
  constexpr int64_t kCount = kLanes<A>;
  const int64_t elements = depths * taps;
  for (int64_t c = 0; c < columns; c += kCount) {
    int64_t d = 0, k = 0;
    for (int64_t e = 0; e < elements; e += kCount) {
      const int64_t some_columns = std::min(kCount, columns - c), some = std::min(kCount, elements - e);
      A block[kCount][kCount];
      Vector<A> rows[kCount];
      for (int64_t i = 0; i < some; ++i) {
        const A* const row = from + k * tap + d * depth + c;
        if (some_columns == kCount) {
          store(block[i], load(row));
        } else {
          std::memcpy(block[i], row, static_cast<size_t>(some_columns) * sizeof(A));
        }
        if (++k == taps) k = 0, ++d;
      }
#pragma GCC unroll 16
      for (int i = 0; i < kCount; ++i) rows[i] = load(block[i]);
      transpose<A>(rows);
#pragma GCC unroll 16
      for (int i = 0; i < kCount; ++i) store(block[i], rows[i]);
      for (int64_t i = 0; i < some_columns; ++i) {
        A* const there = to + (c + i) * column + e;
        if (some == kCount) {
          store(there, load(block[i]));
        } else {
          std::memcpy(there, block[i], static_cast<size_t>(some) * sizeof(A));
        }
      }
    }
  }
}

// One block: its sums stay in registers over the whole depth and are added to memory once.
template <int kRows, typename P, typename A>
DYHEAD_INLINE void product_block(int64_t units, const P* left, int64_t left_row, int64_t left_depth, const P* right,
                                 int64_t right_depth, A* sums, int64_t stride) {
  constexpr int64_t kVector = kLanes<A> * kUnit<P>;
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {  // needed at the end
    __builtin_prefetch(sums + r * stride, 1);
    __builtin_prefetch(sums + r * stride + kLanes<A>, 1);
  }
  Vector<A> total[kRows][2] = {};
  for (int64_t d = 0; d < units; ++d, left += left_depth, right += right_depth) {
    const Vector<P> right0 = load_operand(right), right1 = load_operand(right + kVector);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      multiply_add(total[r][0], left + r * left_row, right0);
      multiply_add(total[r][1], left + r * left_row, right1);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    A* row = sums + r * stride;
    store(row, load(row) + total[r][0]);
    store(row + kLanes<A>, load(row + kLanes<A>) + total[r][1]);
  }
}

template <int kRows, typename P, typename A>
DYHEAD_INLINE void product_rows(int64_t units, const P* left, Operand<P> strides, const P* right, int64_t right_depth,
                                A* sums, int64_t stride) {
  // A constant stride makes for shorter addresses.
  if (strides.row == kUnit<P>) {
    product_block<kRows>(units, left, kUnit<P>, strides.depth, right, right_depth, sums, stride);
  } else {
    product_block<kRows>(units, left, strides.row, kUnit<P>, right, right_depth, sums, stride);
  }
}

constexpr int kRowStep = DYHEAD_ROWS / 3;

template <typename P, typename A>
DYHEAD_TARGET void product(int64_t row_blocks, int64_t column_blocks, int64_t units, Operand<P> left, const P* right,
                           int64_t right_block, int64_t right_depth, A* sums, int64_t stride) {
  const int64_t rows = row_blocks * kRowStep;
  for (int64_t column = 0; column < column_blocks; ++column, right += right_block, sums += 2 * kLanes<A>) {
    int64_t row = 0;
    for (; row + DYHEAD_ROWS <= rows; row += DYHEAD_ROWS) {
      product_rows<DYHEAD_ROWS>(units, left.data + row * left.row, left, right, right_depth, sums + row * stride,
                                stride);
    }
    if (rows - row == 2 * kRowStep) {
      product_rows<2 * kRowStep>(units, left.data + row * left.row, left, right, right_depth, sums + row * stride,
                                 stride);
    } else if (rows - row == kRowStep) {
      product_rows<kRowStep>(units, left.data + row * left.row, left, right, right_depth, sums + row * stride, stride);
    }
  }
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

// One sample with all corners inside the map, or, with kCorners = 1, one corner.
template <typename T, int kCorners, bool kDots, bool kGradient>
DYHEAD_INLINE void scatter_corners(const int64_t* corner, const Accumulator<T>* share, const Channels<T>& from,
                                   int64_t width, const Accumulator<T>* panel, Accumulator<T>* dots,
                                   Accumulator<T>* gradient) {
  using A = Accumulator<T>;
  const T* features[kCorners];
  A* sums[kCorners];
  for (int i = 0; i < kCorners; ++i) {
    features[i] = from.data + corner[i] * from.stride;
    if constexpr (kGradient) sums[i] = gradient + corner[i] * from.stride;
  }
  Vector<A> total[kCorners] = {};
  int64_t c = 0;
  for (; c + kLanes<A> <= width; c += kLanes<A>) {
    const Vector<A> g = load(panel + c);
#pragma GCC unroll 4
    for (int i = 0; i < kCorners; ++i) {
      if constexpr (kDots) total[i] += g * load(features[i] + c);
      if constexpr (kGradient) store(sums[i] + c, load(sums[i] + c) + share[i] * g);
    }
  }
  A rest[kCorners] = {};
  for (; c < width; ++c) {
    for (int i = 0; i < kCorners; ++i) {
      if constexpr (kDots) rest[i] += panel[c] * single(features[i][c]);
      if constexpr (kGradient) sums[i][c] += share[i] * panel[c];
    }
  }
  if constexpr (kDots) {
    for (int i = 0; i < kCorners; ++i) dots[i] += sum<A>(total[i]) + rest[i];
  }
}

template <typename T, bool kDots, bool kGradient>
DYHEAD_INLINE void scatter_all(const Sample<Accumulator<T>>* samples, int64_t count, const Channels<T>& from,
                               int64_t width, const Accumulator<T>* panel, int64_t stride, Accumulator<T>* dots,
                               Accumulator<T>* gradient) {
  for (int64_t p = 0; p < count; ++p, panel += stride, dots += kDots ? 4 : 0) {
    const Sample<Accumulator<T>>& s = samples[p];
    const int64_t* const corner = s.cell.corner;
    if (corner[0] >= 0 && corner[3] >= 0) {
      scatter_corners<T, 4, kDots, kGradient>(corner, s.share, from, width, panel, dots, gradient);
      continue;
    }
    for (int i = 0; i < 4; ++i) {
      if (corner[i] < 0) continue;
      scatter_corners<T, 1, kDots, kGradient>(corner + i, s.share + i, from, width, panel, kDots ? dots + i : nullptr,
                                              gradient);
    }
  }
}

template <typename T>
DYHEAD_TARGET void scatter(const Sample<Accumulator<T>>* samples, int64_t count, const Channels<T>& from, int64_t width,
                           const Accumulator<T>* panel, int64_t stride, Accumulator<T>* dots,
                           Accumulator<T>* gradient) {
  if (dots != nullptr && gradient != nullptr) {
    scatter_all<T, true, true>(samples, count, from, width, panel, stride, dots, gradient);
  } else if (dots != nullptr) {
    scatter_all<T, true, false>(samples, count, from, width, panel, stride, dots, gradient);
  } else if (gradient != nullptr) {
    scatter_all<T, false, true>(samples, count, from, width, panel, stride, dots, gradient);
  }
}

}  // namespace

#if defined(DYHEAD_PAIRS)

const Kernels<BFloat16, BFloat16>& kernels() {
  static constexpr Kernels<BFloat16, BFloat16> table{kRowStep,
                                                     2 * kLanes<float>,
                                                     locate<float>,
                                                     sample,
                                                     sample_units,
                                                     product<BFloat16, float>,
                                                     pack<BFloat16, BFloat16>,
                                                     unpack<float>,
                                                     scatter<BFloat16>};
  return table;
}

#else

template <typename T>
const Kernels<T, Accumulator<T>>& kernels() {
  using A = Accumulator<T>;
  static constexpr Kernels<T, A> table{kRowStep,      2 * kLanes<A>, locate<A>, sample<T>, sample<T>,
                                       product<A, A>, pack<T, A>,    unpack<A>, scatter<T>};
  return table;
}

template const Kernels<double, double>& kernels<double>();
template const Kernels<float, float>& kernels<float>();
template const Kernels<BFloat16, float>& kernels<BFloat16>();
template const Kernels<Half, float>& kernels<Half>();

#endif

}  // namespace dyhead::cpu::DYHEAD_PATH
