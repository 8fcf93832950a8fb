// Border alignment: the largest value along a border, channel by channel.

#pragma once

#include "sampling.h"

namespace dyhead::cpu::DYHEAD_PATH {
namespace {

// Points whose places are kept at a time.
constexpr int kPoints = 32;

// kVectors vectors of channels from c on, at points [first, first + count); goes on from what is in `values` if there
// are points before.
template <typename A, int kVectors>
DYHEAD_INLINE void maximum_of(const Corners<A>* corners, int first, int count, int64_t c, A* values, A* points) {
  Vector<A> best[kVectors], at[kVectors];
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) {
    const int64_t channel = c + v * kLanes<A>;
    best[v] = first == 0 ? interpolate(corners[0], channel) : load(values + channel);
    at[v] = first == 0 ? Vector<A>{} : load(points + channel);
  }
  for (int k = first == 0 ? 1 : 0; k < count; ++k) {
    const Vector<A> point = static_cast<A>(first + k) - Vector<A>{};
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      const Vector<A> value = interpolate(corners[k], c + v * kLanes<A>);
      // False if either is NaN.
      const auto kept = (value <= best[v]) | (best[v] != best[v]);
      best[v] = kept ? best[v] : value;
      at[v] = kept ? at[v] : point;
    }
  }
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) {
    store(values + c + v * kLanes<A>, best[v]);
    store(points + c + v * kLanes<A>, at[v]);
  }
}

template <typename A>
DYHEAD_TARGET void maximum(const Border<A>& border, int pool_size, int64_t map_height, int64_t map_width,
                           const Channels<A>& from, int64_t width, A* values, A* points) {
  Corners<A> corners[kPoints];
  for (int first = 0; first <= pool_size; first += kPoints) {
    const int count = std::min(kPoints, pool_size + 1 - first);
    for (int k = 0; k < count; ++k) {
      const Cell<A> cell = dyhead::locate<A>(border, first + k, map_height, map_width);
      corner_shares(cell, corners[k].share);
      for (int i = 0; i < 4; ++i) corners[k].row[i] = from.at(cell.corner[i]);
    }
    int64_t c = 0;
    for (; c + 2 * kLanes<A> <= width; c += 2 * kLanes<A>) maximum_of<A, 2>(corners, first, count, c, values, points);
    for (; c + kLanes<A> <= width; c += kLanes<A>) maximum_of<A, 1>(corners, first, count, c, values, points);
    for (; c < width; ++c) {
      A best = first == 0 ? interpolate_one(corners[0], c) : values[c], at = first == 0 ? A(0) : points[c];
      for (int k = first == 0 ? 1 : 0; k < count; ++k) {
        const A value = interpolate_one(corners[k], c);
        if (value <= best || best != best) continue;
        best = value;
        at = static_cast<A>(first + k);
      }
      values[c] = best;
      points[c] = at;
    }
  }
}

}  // namespace
}  // namespace dyhead::cpu::DYHEAD_PATH
