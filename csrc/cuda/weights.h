// Weights in the order in which a kernel multiplies with them: in tiles as they lie in shared memory, so that a tile is
// copied as it is.

#pragma once

#include <utility>

#include "sampling.h"

namespace dyhead::cuda {

// For the forward pass (kForward) a tile's rows are output channels, its depth a run of channels. Tiles come as
//     (group, block of output channels, level, kTaps taps, run of the group, tap of these).
// For gradients of samples a tile's rows are a run of channels for each of kTaps taps, its depth output channels. Tiles
// come as
//     (level, taps, run of all channels, slice of output channels).
template <typename T, bool kTensorCores, bool kForward, int kRows, int kTaps = 1>
struct PackWeights {
  using A = Accumulator<T>;
  static constexpr int kThreads = 256, kMinBlocks = 1, kSharedBytes = 0;
  static constexpr int kTileBytes = kRows * kRowBytes;
  static constexpr int kRun = kForward ? kRow<T> : kRows / kTaps;  // channels of a run, at most

  struct Params {
    Maps<A> maps;
    const T* weight;
    char* packed;
    int64_t tiles;
    int blocks, runs;  // of output channels in a group; of channels in a group, at most (forward), or in all
  };

  static int64_t tiles(const Maps<A>& maps, int blocks, int runs) {
    const int64_t taps = kForward ? static_cast<int64_t>(maps.groups) * maps.taps : tap_groups(maps);
    return taps * maps.levels * blocks * runs;
  }
  static DYHEAD_HOST_DEVICE int tap_groups(const Maps<A>& maps) {
    return static_cast<int>((static_cast<int64_t>(maps.taps) + kTaps - 1) / kTaps);
  }

  // Starts to copy a tile into shared memory, by all threads of a block that multiplies with it.
  template <int kBlockThreads>
  static DYHEAD_DEVICE void copy_tile(const char* tile, char* to) {
    constexpr int kBytes = kBlockThreads * static_cast<int>(sizeof(Vector));
    const int at = thread_index() * static_cast<int>(sizeof(Vector));
    static_assert(kTileBytes % kBytes == 0 || kTileBytes < kBytes);
    if (at >= kTileBytes) return;
    [&]<int... kCopy>(std::integer_sequence<int, kCopy...>) {
      (copy_async<kCopy * kBytes>(to + at, tile + at, true), ...);
    }(std::make_integer_sequence<int, (kTileBytes + kBytes - 1) / kBytes>());
  }

  static DYHEAD_DEVICE void run(const Params& params) {
    const Maps<A>& maps = params.maps;
    const int64_t index = block_index() * kThreads + thread_index();
    const int chunk = static_cast<int>(index % kChunks), row = static_cast<int>(index / kChunks % kRows);
    const int64_t tile = index / (kChunks * kRows);
    if (tile >= params.tiles) return;
    int64_t rest = tile;
    const auto take = [&rest](int size) {
      const int result = static_cast<int>(rest % size);
      rest /= size;
      return result;
    };
    int level, tap, begin, end, out;
    bool exists = true;
    if constexpr (kForward) {
      const int stream = maps.levels * maps.taps * params.runs;
      int at = take(stream);
      const int block = take(params.blocks), group = take(maps.groups), first = group * maps.group_channels;
      // A group with fewer runs than others leaves the end of its stream unused.
      const int runs = maps.runs(first, first + maps.group_channels, kRun);
      exists = at < maps.levels * maps.taps * runs;
      if (!exists) at = 0;
      begin = first;
      level = at / (maps.taps * runs);
      at -= level * maps.taps * runs;
      const int first_tap = at / (kTaps * runs) * kTaps, left = maps.taps - first_tap,
                taps = left < kTaps ? left : kTaps;
      at -= first_tap * runs;
      for (int i = at / taps; i > 0; --i) begin = maps.run_end(begin, kRun);
      tap = first_tap + at % taps;
      end = maps.run_end(begin, kRun);
      out = group * maps.group_out_channels + block * kRows + row;
      exists = exists && block * kRows + row < maps.group_out_channels;
    } else {
      const int slice = take(params.blocks), run = take(params.runs);
      tap = take(tap_groups(maps)) * kTaps + row / kRun;
      level = take(maps.levels);
      begin = 0;
      for (int i = run; i > 0; --i) begin = maps.run_end(begin, kRun);
      end = maps.run_end(begin, kRun);
      out = begin / maps.group_channels * maps.group_out_channels + slice * kRow<T>;
      exists = tap < maps.taps && begin + row % kRun < end;
    }
    A value[kVector<T>];
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) {
      const int depth = chunk * kVector<T> + i;
      const int channel = kForward ? begin + depth : begin + row % kRun, o = kForward ? out : out + depth;
      const bool inside = kForward ? channel < end : o < (begin / maps.group_channels + 1) * maps.group_out_channels;
      value[i] = A(0);
      if (exists && inside) {
        const int64_t at =
            (static_cast<int64_t>(level) * maps.out_channels + o) * maps.group_channels + channel % maps.group_channels;
        value[i] = static_cast<A>(params.weight[at * maps.taps + tap]);
      }
    }
    store_vector(params.packed + tile * kTileBytes + tile_offset(row, chunk), Product<T, kTensorCores>::pack(value));
  }
};

// The packed weights, from PyTorch's allocator.
template <typename Pack, typename T>
Tensor pack_weights(const Device& device, const Inputs<T>& inputs, const Tensor& like, int blocks, int runs) {
  const int64_t tiles = Pack::tiles(inputs.maps, blocks, runs);
  Tensor packed = workspace(like, tiles * Pack::kTileBytes, ScalarType::Byte);
  launch<Pack>(device, blocks_of(tiles * Pack::kTileBytes / static_cast<int64_t>(sizeof(Vector)), Pack::kThreads),
               {inputs.maps, inputs.weight, static_cast<char*>(packed.mutable_data_ptr()), tiles, blocks, runs});
  return packed;
}

}  // namespace dyhead::cuda
