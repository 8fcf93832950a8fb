// The gradient of samples spread over what they were read from: the features' gradient and the corners' products.

#pragma once

#include "vectors.h"

namespace dyhead::cpu::DYHEAD_PATH {
namespace {

// One sample with all corners inside the map, or, with kCorners = 1, one corner.
template <typename T, int kCorners, bool kProducts, bool kGradient>
DYHEAD_INLINE void scatter_corners(const int64_t* corner, const Accumulator<T>* share, const Channels<T>& from,
                                   int64_t width, const Accumulator<T>* panel, Accumulator<T>* corner_products,
                                   Accumulator<T>* gradient) {
  using A = Accumulator<T>;
  const T* features[kCorners];
  A* sums[kCorners];
  for (int i = 0; i < kCorners; ++i) {
    features[i] = from.data + corner[i] * from.pixel_stride;
    if constexpr (kGradient) sums[i] = gradient + corner[i] * from.pixel_stride;
  }
  Vector<A> total[kCorners] = {};
  int64_t c = 0;
  for (; c + kLanes<A> <= width; c += kLanes<A>) {
    const Vector<A> g = load(panel + c);
#pragma GCC unroll 4
    for (int i = 0; i < kCorners; ++i) {
      if constexpr (kProducts) total[i] += g * load(features[i] + c);
      if constexpr (kGradient) store(sums[i] + c, load(sums[i] + c) + share[i] * g);
    }
  }
  A rest[kCorners] = {};
  for (; c < width; ++c) {
    for (int i = 0; i < kCorners; ++i) {
      if constexpr (kProducts) rest[i] += panel[c] * single(features[i][c]);
      if constexpr (kGradient) sums[i][c] += share[i] * panel[c];
    }
  }
  if constexpr (kProducts) {
    for (int i = 0; i < kCorners; ++i) corner_products[i] += sum<A>(total[i]) + rest[i];
  }
}

template <typename T, bool kProducts, bool kGradient>
DYHEAD_INLINE void scatter_all(const Sample<Accumulator<T>>* samples, int64_t count, const Channels<T>& from,
                               int64_t width, const Accumulator<T>* panel, int64_t panel_stride,
                               Accumulator<T>* corner_products, Accumulator<T>* gradient) {
  for (int64_t p = 0; p < count; ++p, panel += panel_stride, corner_products += kProducts ? 4 : 0) {
    const Sample<Accumulator<T>>& s = samples[p];
    const int64_t* const corner = s.cell.corner;
    if (corner[0] >= 0 && corner[3] >= 0) {
      scatter_corners<T, 4, kProducts, kGradient>(corner, s.share, from, width, panel, corner_products, gradient);
      continue;
    }
    for (int i = 0; i < 4; ++i) {
      if (corner[i] < 0) continue;
      scatter_corners<T, 1, kProducts, kGradient>(corner + i, s.share + i, from, width, panel,
                                                  kProducts ? corner_products + i : nullptr, gradient);
    }
  }
}

template <typename T>
DYHEAD_TARGET void scatter(const Sample<Accumulator<T>>* samples, int64_t count, const Channels<T>& from, int64_t width,
                           const Accumulator<T>* panel, int64_t panel_stride, Accumulator<T>* corner_products,
                           Accumulator<T>* gradient) {
  if (corner_products != nullptr && gradient != nullptr) {
    scatter_all<T, true, true>(samples, count, from, width, panel, panel_stride, corner_products, gradient);
  } else if (corner_products != nullptr) {
    scatter_all<T, true, false>(samples, count, from, width, panel, panel_stride, corner_products, gradient);
  } else if (gradient != nullptr) {
    scatter_all<T, false, true>(samples, count, from, width, panel, panel_stride, corner_products, gradient);
  }
}

}  // namespace
}  // namespace dyhead::cpu::DYHEAD_PATH
