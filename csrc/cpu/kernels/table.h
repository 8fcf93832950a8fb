// The inner loops of one instruction set, as kernels.h tells of them. A file that includes this one defines
//     DYHEAD_PATH    the namespace of the instruction set
//     DYHEAD_TARGET  the attribute that makes the compiler use it, on functions of this folder only: no other function
//                    may come out of such a file using instructions that the machine at hand lacks
//     DYHEAD_BYTES   the width of a vector
//     DYHEAD_ROWS    rows of a block of the product, a multiple of 3; it has two vectors of columns
//     DYHEAD_PAIRS   where the instruction set multiplies pairs of bfloat16 (AVX512-BF16)

#pragma once

#include "borders.h"
#include "packing.h"
#include "product.h"
#include "sampling.h"
#include "scattering.h"

namespace dyhead::cpu::DYHEAD_PATH {

#if defined(DYHEAD_PAIRS)

const Kernels<BFloat16, BFloat16>& kernels() {
  static constexpr Kernels<BFloat16, BFloat16> table{kBlockRows,
                                                     2 * kLanes<float>,
                                                     locate<float>,
                                                     sample,
                                                     pool<BFloat16>,
                                                     sample_units,
                                                     product<BFloat16, float>,
                                                     pack<BFloat16, BFloat16>,
                                                     unpack<float>,
                                                     scatter<BFloat16>,
                                                     maximum<float>};
  return table;
}

#else

template <typename T>
const Kernels<T, Accumulator<T>>& kernels() {
  using A = Accumulator<T>;
  static constexpr Kernels<T, A> table{kBlockRows,    2 * kLanes<A>, locate<A>, sample<T>,  pool<T>,   sample<T>,
                                       product<A, A>, pack<T, A>,    unpack<A>, scatter<T>, maximum<A>};
  return table;
}

template const Kernels<double, double>& kernels<double>();
template const Kernels<float, float>& kernels<float>();
template const Kernels<BFloat16, float>& kernels<BFloat16>();
template const Kernels<Half, float>& kernels<Half>();

#endif

}  // namespace dyhead::cpu::DYHEAD_PATH
