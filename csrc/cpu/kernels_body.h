// The inner loops of kernels.h, in vector types of GCC and Clang. A file that includes this one defines
//     DYHEAD_PATH    the namespace of the instruction set
//     DYHEAD_TARGET  the attribute that makes the compiler use it, on functions of this file only: no other function
//                    may come out of such a file using instructions that the machine at hand lacks
//     DYHEAD_BYTES   the width of a vector
//     DYHEAD_ROWS    rows of a block of the product; it has two vectors of columns

#include <cstring>

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

template <typename T>
DYHEAD_TARGET void sample(const Sample<T>* samples, int64_t count, int64_t channel, int64_t width,
                          Accumulator<T>* panel, int64_t stride) {
  using A = Accumulator<T>;
  for (int64_t p = 0; p < count; ++p, panel += stride) {
    const T *c0 = samples[p].corner[0] + channel, *c1 = samples[p].corner[1] + channel;
    const T *c2 = samples[p].corner[2] + channel, *c3 = samples[p].corner[3] + channel;
    const A s0 = samples[p].share[0], s1 = samples[p].share[1], s2 = samples[p].share[2], s3 = samples[p].share[3];
    int64_t c = 0;
    for (; c + kLanes<A> <= width; c += kLanes<A>) {
      store(panel + c, s0 * load(c0 + c) + s1 * load(c1 + c) + s2 * load(c2 + c) + s3 * load(c3 + c));
    }
    for (; c < width; ++c) {
      panel[c] = s0 * single(c0[c]) + s1 * single(c1[c]) + s2 * single(c2[c]) + s3 * single(c3[c]);
    }
  }
}

// One block: its sums stay in registers over the whole depth and are added to memory once.
template <typename A>
DYHEAD_INLINE void product_block(int64_t depth, const A* left, int64_t left_row, int64_t left_depth, const A* right,
                                 int64_t right_depth, A* sums, int64_t stride) {
  Vector<A> total[DYHEAD_ROWS][2] = {};
  for (int64_t d = 0; d < depth; ++d, left += left_depth, right += right_depth) {
    const Vector<A> right0 = load(right), right1 = load(right + kLanes<A>);
#pragma GCC unroll 16
    for (int r = 0; r < DYHEAD_ROWS; ++r) {
      total[r][0] += left[r * left_row] * right0;
      total[r][1] += left[r * left_row] * right1;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < DYHEAD_ROWS; ++r) {
    A* row = sums + r * stride;
    store(row, load(row) + total[r][0]);
    store(row + kLanes<A>, load(row + kLanes<A>) + total[r][1]);
  }
}

template <typename A>
DYHEAD_TARGET void product(int64_t row_blocks, int64_t column_blocks, int64_t depth, Operand<A> left, const A* right,
                           int64_t right_block, int64_t right_depth, A* sums, int64_t stride) {
  for (int64_t column = 0; column < column_blocks; ++column) {
    for (int64_t row = 0; row < row_blocks; ++row) {
      const A* rows = left.data + row * DYHEAD_ROWS * left.row;
      A* block = sums + row * DYHEAD_ROWS * stride + column * 2 * kLanes<A>;
      // A unit stride is a constant to the compiler, which makes for shorter addresses.
      if (left.row == 1) {
        product_block<A>(depth, rows, 1, left.depth, right + column * right_block, right_depth, block, stride);
      } else {
        product_block<A>(depth, rows, left.row, 1, right + column * right_block, right_depth, block, stride);
      }
    }
  }
}

template <typename A>
DYHEAD_INLINE A sum(Vector<A> value) {
  A result = 0;
  for (int i = 0; i < kLanes<A>; ++i) result += value[i];
  return result;
}

template <typename T, bool kDots, bool kGradient>
DYHEAD_INLINE void scatter_corner(int64_t width, const Accumulator<T>* panel, const T* feature, Accumulator<T>* dot,
                                  Accumulator<T> share, Accumulator<T>* gradient) {
  using A = Accumulator<T>;
  Vector<A> total = {};
  int64_t c = 0;
  for (; c + kLanes<A> <= width; c += kLanes<A>) {
    const Vector<A> g = load(panel + c);
    if constexpr (kDots) total += g * load(feature + c);
    if constexpr (kGradient) store(gradient + c, load(gradient + c) + share * g);
  }
  A rest = 0;
  for (; c < width; ++c) {
    if constexpr (kDots) rest += panel[c] * single(feature[c]);
    if constexpr (kGradient) gradient[c] += share * panel[c];
  }
  if constexpr (kDots) *dot += sum<A>(total) + rest;
}

template <typename T, bool kDots, bool kGradient>
DYHEAD_INLINE void scatter_all(const SampleGradient<Accumulator<T>>* samples, int64_t count, int64_t width,
                               const Accumulator<T>* panel, int64_t stride, const T* features, Accumulator<T>* dots,
                               Accumulator<T>* gradient) {
  for (int64_t p = 0; p < count; ++p, panel += stride) {
    for (int i = 0; i < 4; ++i) {
      const int64_t corner = samples[p].corner[i];
      if (corner < 0) continue;
      scatter_corner<T, kDots, kGradient>(width, panel, kDots ? features + corner : nullptr,
                                          kDots ? dots + 4 * p + i : nullptr, samples[p].share[i],
                                          kGradient ? gradient + corner : nullptr);
    }
  }
}

template <typename T>
DYHEAD_TARGET void scatter(const SampleGradient<Accumulator<T>>* samples, int64_t count, int64_t width,
                           const Accumulator<T>* panel, int64_t stride, const T* features, Accumulator<T>* dots,
                           Accumulator<T>* gradient) {
  if (dots != nullptr && gradient != nullptr) {
    scatter_all<T, true, true>(samples, count, width, panel, stride, features, dots, gradient);
  } else if (dots != nullptr) {
    scatter_all<T, true, false>(samples, count, width, panel, stride, features, dots, gradient);
  } else if (gradient != nullptr) {
    scatter_all<T, false, true>(samples, count, width, panel, stride, features, dots, gradient);
  }
}

}  // namespace

template <typename T>
const Kernels<T>& kernels() {
  using A = Accumulator<T>;
  static constexpr Kernels<T> table{DYHEAD_ROWS, 2 * kLanes<A>, sample<T>, product<A>, scatter<T>};
  return table;
}

template const Kernels<double>& kernels<double>();
template const Kernels<float>& kernels<float>();
template const Kernels<BFloat16>& kernels<BFloat16>();
template const Kernels<Half>& kernels<Half>();

}  // namespace dyhead::cpu::DYHEAD_PATH
