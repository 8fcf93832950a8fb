// The gradient of the weight: a product over pixels of the output's gradient with samples, which are made again in
// shared memory as in the forward pass.
//
// A block sums up, for a tap and level, a block of output channels by a run of input channels, over a part of all
// pixels, a patch at a time: what its pixels read overlaps, and so is in the cache. The parts lie in a workspace and
// are added in their order, so that the result is the same every time.

#pragma once

#include "inputs.h"
#include "output_gradient.h"

namespace dyhead::cuda {

template <typename T, bool kTensorCores, bool kVectors, int kRunPanels>
struct WeightGradient {
  using A = Accumulator<T>;
  using Multiply = Product<T, kTensorCores>;
  static constexpr int kThreads = 256, kMinBlocks = 1;
  static constexpr int kPanels = 4, kOuts = kPanels * kRow<T>, kRun = kRunPanels * kRow<T>;
  static constexpr int kWarpOuts = kOuts / 4, kWarpChannels = kRun / 2;  // 4 x 2 warps
  // Where a device has products of warp groups, each of the two does half of the output channels.
  static constexpr bool kGroups = kWarpGroups<T> && kTensorCores && kRunPanels == 2 && sizeof(T) == 2;
  static constexpr int kTileBytes = kPanelRows * kRowBytes;

  struct Params {
    Maps<A> maps;
    OutputGradient<T> gradient;
    A* parts;          // (part, level, tap, C_out, C_in/groups)
    int blocks, runs;  // of output channels in a group; of all input channels
    int64_t part_slices;
  };

  struct Shared {
    char gradient[2][kPanels * kTileBytes];
    char samples[2][kRunPanels * kTileBytes];
    Table<A, kPanelRows> table[2];
    int64_t first_pixel[2];  // element of the level's features that begins the slice's image
  };
  static constexpr int kSharedBytes = static_cast<int>(sizeof(Shared));

  // A slice is a patch.
  using Slice = Patch<kPanelRows>;
  static int64_t slices(const Maps<A>& maps) { return maps.batch * Slice::count(maps); }

  static DYHEAD_DEVICE void run(const Params& params) {
    const Maps<A>& maps = params.maps;
    Shared& shared = *reinterpret_cast<Shared*>(shared_memory());
    const int thread = thread_index(), warp = thread / kWarp;
    int64_t rest = block_index();
    const auto take = [&rest](int size) {
      const int result = static_cast<int>(rest % size);
      rest /= size;
      return result;
    };
    // Blocks that follow each other read the same pixels.
    const int block = take(params.blocks), run = take(params.runs), tap = take(maps.taps), level = take(maps.levels);
    int begin = 0;
    for (int i = 0; i < run; ++i) begin = maps.run_end(begin, kRun);
    const int end = maps.run_end(begin, kRun), group = begin / maps.group_channels;
    const int offset_group = begin / maps.offset_channels;

    const int64_t first = rest * params.part_slices, left = maps.batch * Slice::count(maps) - first;
    const int slices = static_cast<int>(left < params.part_slices ? left : params.part_slices);

    // A thread copies the same chunk of a column of the patch.
    constexpr int kChunksAcross = kPanels * kChunks, kLines = kThreads / kChunksAcross;
    static_assert(kLines == Slice::kWidth && kLines == 8, "its rows have their chunks in the same order");
    const int column = thread % kChunksAcross, line = thread / kChunksAcross;
    const int out = block * kOuts + column * kVector<T>;
    Slice copied = Slice::at(maps, first), read = copied;
    const auto copy_gradient = [&](char* to) {
      const bool exists = out < params.gradient.group_stride && copied.column + line < maps.width;
      const int64_t pixel = static_cast<int64_t>(copied.row) * maps.width + copied.column + line;
      const T* from = params.gradient.at(static_cast<int64_t>(copied.n) * maps.pixels + pixel, group, exists ? out : 0);
      to += panel_offset(line, column);
#pragma unroll
      for (int i = 0; i < Slice::kHeight; ++i) {
        const bool valid = exists && copied.row + i < maps.height;
        copy_async(to + i * kLines * kRowBytes, valid ? from : params.gradient.data, valid);
        from += maps.width * params.gradient.pixel_stride;
      }
      copied.next(maps);
    };
    // The tables' owners, a pixel of the patch each. What a table is made of is read a slice ahead of it, and tables
    // are made before the product, when few registers are taken.
    const bool owner = thread < kPanelRows;
    int n = 0, pixel = -1;
    Reading<A> reading{A(0), A(0), A(0)};
    const auto read_next = [&](int slice) {
      pixel = -1;
      if (slice >= slices) return;
      n = read.n;
      pixel = read.pixel(maps, thread);
      reading = read_offset(maps, n, offset_group, tap, pixel);
      read.next(maps);
    };
    const auto fill_table = [&](int slice) {
      const Cell<A> cell = locate_sample(maps, level, tap, pixel, reading);
      shared.table[slice % 2].set(thread, cell, pixel < 0 ? A(0) : reading.mask * maps.level_factor(n, level));
      if (thread == 0) shared.first_pixel[slice % 2] = n * maps.image_stride(level);
    };
    // A thread gathers kParts vectors a slice, of two rows, while as many parts of a product run.
    constexpr int kParts = 2 * kRunPanels;
    static_assert(kPanelRows * kChunks == 2 * kThreads && Multiply::kPanelSteps % kParts == 0);
    const int chunk = thread % kChunks;
    const T* const features = static_cast<const T*>(maps.level[level].features) + begin + chunk * kVector<T>;
    constexpr int kGathers = kGroups ? 2 : 1;
    Gather<T, kTensorCores, kVectors> gathers[kGathers];
    const auto load = [&](int slice, int part) {
      const int row = thread / kChunks + part % 2 * (kThreads / kChunks), channel = part / 2 * kRow<T>;
      gathers[part % kGathers].load(shared.table[slice % 2], row, features + shared.first_pixel[slice % 2] + channel,
                                    maps.channels * static_cast<int>(sizeof(T)),
                                    end - begin - chunk * kVector<T> - channel);
    };
    const auto store = [&](int slice, int part) {
      const int row = thread / kChunks + part % 2 * (kThreads / kChunks);
      gathers[part % kGathers].store(shared.table[slice % 2], row,
                                     shared.samples[slice % 2] + panel_offset(row, part / 2 * kChunks + chunk));
    };

    copy_gradient(shared.gradient[0]);
    commit_copies();
    if (owner) {
      read_next(0);
      fill_table(0);
      read_next(1);
      fill_table(1);
      read_next(2);
    }
    sync_block();
#pragma unroll kGathers
    for (int part = 0; part < kParts; ++part) {
      load(0, part);
      store(0, part);
    }

    Sums<A, kWarpOuts / 16, kWarpChannels / 8> sums;
    Sums<A, 1, 16> group_sums[2];  // of 64 output channels each
    if constexpr (kGroups) {
      group_sums[0].clear();
      group_sums[1].clear();
    } else {
      sums.clear();
    }
    const int warp_out = warp % 4 * kWarpOuts, warp_channel = warp / 4 * kWarpChannels;
#pragma unroll 1
    for (int slice = 0; slice < slices; ++slice) {
      // This slice has landed and is stored, and nobody reads the one before any more.
      wait_for_copies<0>();
      if constexpr (kGroups) fence_shared();
      sync_block();
      if constexpr (kGroups) {
        begin_products();
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          Multiply::begin_panels(shared.gradient[slice % 2] + (2 * (warp / 4) + half) * kTileBytes,
                                 shared.samples[slice % 2], group_sums[half]);
        }
        end_products();
      }
      const bool more = slice + 1 < slices;
      if (more) copy_gradient(shared.gradient[(slice + 1) % 2]);
      commit_copies();
      // This slice's table was last read before this synchronisation; the next table in its place is read after the
      // next.
      if (owner && more) {
        fill_table(slice + 2);
        read_next(slice + 3);
      }
      if constexpr (kGroups) {
        if (more) {
          load(slice + 1, 0);
#pragma unroll
          for (int part = 0; part < kParts; ++part) {
            if (part + 1 < kParts) load(slice + 1, part + 1);
            store(slice + 1, part);
          }
        }
        wait_for_products();
      } else {
#pragma unroll 1
        for (int part = 0; part < kParts; ++part) {
          if (more) load(slice + 1, part);
#pragma unroll
          for (int step = 0; step < Multiply::kPanelSteps / kParts; ++step) {
            Multiply::add_panels(shared.gradient[slice % 2], warp_out, shared.samples[slice % 2], warp_channel,
                                 part * (Multiply::kPanelSteps / kParts) + step, sums);
          }
          if (more) store(slice + 1, part);
        }
      }
    }
    wait_for_copies<0>();

    const int64_t matrix = (rest * maps.levels + level) * maps.taps + tap;
    const int group_channels = maps.group_channels, outs = maps.group_out_channels;
    A* const part = params.parts + matrix * maps.out_channels * group_channels;
    const auto write = [&](int row, int column, A value0, A value1) {
      const int out = block * kOuts + row, channel = begin + column;
      if (out >= outs) return;
      A* const to = part + static_cast<int64_t>(group * outs + out) * group_channels + channel % group_channels;
      if (channel < end) to[0] = value0;
      if (channel + 1 < end) to[1] = value1;
    };
    if constexpr (kGroups) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int first_row = (2 * (warp / 4) + half) * 64 + warp % 4 * 16;
        group_sums[half].visit_pairs(
            [&](int row, int column, A value0, A value1) { write(first_row + row, column, value0, value1); });
      }
    } else {
      sums.visit_pairs([&](int row, int column, A value0, A value1) {
        write(warp_out + row, warp_channel + column, value0, value1);
      });
    }
  }
};

}  // namespace dyhead::cuda
