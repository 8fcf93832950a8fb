// Samples: where a tap reads for every pixel of a tile, and what it interpolates there, channel by channel.

#pragma once

#include <algorithm>

#include "vectors.h"

namespace dyhead::cpu::DYHEAD_PATH {
namespace {

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
                          Accumulator<T>* panel, int64_t panel_stride) {
  using A = Accumulator<T>;
  for (int64_t p = 0; p < count; ++p, panel += panel_stride) {
    const Corners<T> s = corners(samples[p], from), next = corners(samples[std::min(p + kAhead, count - 1)], from);
    int64_t c = 0;
    for (; c + kLanes<A> <= width; c += kLanes<A>) {
      prefetch(next.row, c);
      store(panel + c, interpolate(s, c));
    }
    for (; c < width; ++c) panel[c] = interpolate_one(s, c);
  }
}

template <typename T>
DYHEAD_TARGET void pool(const Sample<Accumulator<T>>* samples, int64_t count, const Channels<T>& from, int64_t width,
                        Accumulator<T>* sums) {
  using A = Accumulator<T>;
  Corners<T> some[kPooled];
  for (int64_t p = 0; p < count; ++p) some[p] = corners(samples[p], from);
  int64_t c = 0;
  for (; c + kLanes<A> <= width; c += kLanes<A>) {
    Vector<A> total = load(sums + c);
    for (int64_t p = 0; p < count; ++p) total += interpolate(some[p], c);
    store(sums + c, total);
  }
  for (; c < width; ++c) {
    for (int64_t p = 0; p < count; ++p) sums[c] += interpolate_one(some[p], c);
  }
}

#if defined(DYHEAD_PAIRS)

// The even ones of channels c, c + 1, ... are the upper halves of words that have been shifted up, the odd ones those
// of words as they are.
DYHEAD_TARGET void sample(const Sample<float>* samples, int64_t count, const Channels<BFloat16>& from, int64_t width,
                          BFloat16* panel, int64_t panel_stride) {
  constexpr int64_t kChannels = 2 * kLanes<float>;
  for (int64_t p = 0; p < count; ++p, panel += panel_stride) {
    const Corners<BFloat16> s = corners(samples[p], from);
    const Corners<BFloat16> next = corners(samples[std::min(p + kAhead, count - 1)], from);
    int64_t c = 0;
    for (; c + kChannels <= width; c += kChannels) {
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
                                int64_t width, BFloat16* panel, int64_t panel_stride) {
  for (int64_t p = 0; p < count; p += 2, panel += panel_stride) {
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

}  // namespace
}  // namespace dyhead::cpu::DYHEAD_PATH
