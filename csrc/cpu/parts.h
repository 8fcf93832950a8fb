// Maps of either layout, contiguous or with their channels last, as they are.

#pragma once

#include <algorithm>
#include <type_traits>

#include "../arguments.h"

namespace dyhead::cpu {

constexpr int64_t kLine = 16;  // pixels at a time, which are a line of the cache in either layout

// What an image has of some channels: those of pixel p are at data[p * pixel + c * channel].
template <typename T>
struct Part {
  T* data;
  int64_t pixel, channel;

  Part from(int64_t first) const { return {data + first * pixel, pixel, channel}; }
};

// Of a map that is contiguous or has its channels last.
template <typename T>
Part<T> part_of(const Tensor& map, T* data, int64_t n, int64_t channel) {
  const int64_t channels = map.size(1), pixels = map.size(2) * map.size(3);
  data += n * channels * pixels;
  if (has_channels_last_strides(map)) return {data + channel, channels, 1};
  return {data + channel * pixels, 1, pixels};
}

inline Tensor in_either_layout(const Tensor& map) { return has_channels_last_strides(map) ? map : as_contiguous(map); }

template <typename From, typename To>
void copy(const Part<From>& from, const Part<To>& to, int64_t pixels, int64_t channels) {
  using Value = std::remove_const_t<To>;
  if (from.channel == 1 && to.channel == 1) {
    for (int64_t p = 0; p < pixels; ++p) {
      const From* const source = from.data + p * from.pixel;
      To* const target = to.data + p * to.pixel;
      for (int64_t c = 0; c < channels; ++c) target[c] = static_cast<Value>(source[c]);
    }
    return;
  }
  for (int64_t first = 0; first < pixels; first += kLine) {
    const int64_t last = std::min(pixels, first + kLine);
    for (int64_t c = 0; c < channels; ++c) {
      const From* const source = from.data + c * from.channel;
      To* const target = to.data + c * to.channel;
      for (int64_t p = first; p < last; ++p) target[p * to.pixel] = static_cast<Value>(source[p * from.pixel]);
    }
  }
}

}  // namespace dyhead::cpu
