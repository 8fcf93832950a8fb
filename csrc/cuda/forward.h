// The forward pass: a product of samples with weights, whose left operand is made on the way.
//
// A block sums up a patch of output pixels by a block of a group's output channels, in registers, over all levels, taps
// and slices of channels (128 bytes of a sample each). While tensor cores multiply one slice's samples, the same
// threads gather the next slice's. Products of warp groups (warp_groups.h) go on by themselves meanwhile. Where there
// are none, threads load four corners of one vector before each quarter of a product, after it they interpolate and
// store it: so loads take 16 registers and have the time of a quarter to arrive, if the compiler issues all of them
// before the product and waits for none before its end; tools/machine_code.py reads from the machine code that it does.
// There is one synchronisation a slice. Producers of their own (warp specialisation) would need registers that the sums
// take: with mma.sync a block of 128 x 256 sums holds half of all registers, and only sm_90 can hand registers on
// between warps.
//
// Taps follow each other while the slice of channels stays: what they read overlaps, and so is in the first-level
// cache. The places of several taps' samples lie in tables in shared memory, for all slices. Weights arrive by
// asynchronous copies, kStages - 1 slices ahead.

#pragma once

#include "inputs.h"
#include "weights.h"

namespace dyhead::cuda {

template <typename T, bool kTensorCores, bool kVectors, int kColumns>
struct Forward {
  using A = Accumulator<T>;
  using Multiply = Product<T, kTensorCores>;
  static constexpr int kThreads = 256, kMinBlocks = kTensorCores && kVectors && kColumns == 128 ? 2 : 1;
  static constexpr int kPixels = 128, kStages = kColumns > 128 ? 3 : 2;  // 2: two blocks fit a multiprocessor
  static constexpr int kTables = kColumns > 128 ? 9 : 3;                 // all taps of a 3 x 3 kernel; a row of them
  static constexpr int kUnrolledSteps = kMinBlocks > 1 ? 1 : kSteps;     // registers
  // Where a device has products of warp groups, these do a slice's at once, while threads gather the next one.
  static constexpr bool kGroups = kWarpGroups<T> && kTensorCores && kColumns == 256;
  // 2 x 4 warps; of groups 8 x 1.
  static constexpr int kWarpRows = kGroups ? 16 : 64, kWarpColumns = kGroups ? kColumns : kColumns / 4;
  static_assert(kPixels * kChunks == kThreads * kSteps, "a thread gathers one vector a step");
  using Pack = PackWeights<T, kTensorCores, true, kColumns, kTables>;

  struct Params {
    Maps<A> maps;
    const char* weights;  // of Pack
    const T* bias;        // null: none
    T* out;
    int blocks, runs;  // of Pack
    bool channels_last, out_vectors;
  };

  struct Shared {
    char samples[2][kPixels * kRowBytes];
    char weights[kStages][Pack::kTileBytes];
    Table<A, kPixels> table[kTables];
  };
  // Afterwards: the results, in rows that a column of threads can write without meeting in a bank.
  static constexpr int kResultBytes = kColumns * static_cast<int>(sizeof(T)) + static_cast<int>(sizeof(Vector));
  static constexpr int kSharedBytes = std::max(static_cast<int>(sizeof(Shared)), kPixels* kResultBytes);

  // The channels of the block's group, and the end of those that share the first one's offset.
  struct Channels {
    int first, limit, offset_end;
  };

  // A run of these at a tap of a level. Taps that have tables follow each other, then runs, then taps again, then
  // levels.
  struct Slice {
    int level, first_tap, tap, begin, end, offset_end;

    static DYHEAD_DEVICE Slice first(const Channels& channels) {
      Slice slice{0, 0, 0, 0, channels.first, channels.offset_end};
      slice.next_run(channels);
      return slice;
    }
    DYHEAD_DEVICE void next_run(const Channels& channels) {
      begin = end;
      end = offset_end < channels.limit ? offset_end : channels.limit;
      if (end - begin > kRow<T>) end = begin + kRow<T>;
    }
    // Whether other tables are needed.
    DYHEAD_DEVICE bool next(const Maps<A>& maps, const Channels& channels) {
      if (++tap < maps.taps && tap < first_tap + kTables) return false;
      bool others = true;
      if (end == channels.limit) {
        if ((first_tap += kTables) >= maps.taps) first_tap = 0, ++level;
        end = channels.first;
        offset_end = channels.offset_end;
      } else if (end == offset_end) {
        offset_end += maps.offset_channels;
      } else {
        others = false;
      }
      tap = first_tap;
      next_run(channels);
      return others;
    }
  };

  static DYHEAD_DEVICE void run(const Params& params) {
    const Maps<A>& maps = params.maps;
    Shared& shared = *reinterpret_cast<Shared*>(shared_memory());
    const int thread = thread_index(), warp = thread / kWarp;
    // Blocks that follow each other share a patch, and so what they gather is in the cache.
    const int64_t columns = static_cast<int64_t>(maps.groups) * params.blocks, column = block_index() % columns;
    const auto patch = Patch<kPixels>::at(maps, block_index() / columns);
    const int group = static_cast<int>(column / params.blocks), block = static_cast<int>(column % params.blocks);
    const int first = group * maps.group_channels;
    const Channels channels{first, first + maps.group_channels,
                            first - first % maps.offset_channels + maps.offset_channels};
    const int total = maps.levels * maps.taps * maps.runs(first, channels.limit, kRow<T>);
    const char* const weights = params.weights + column * maps.levels * maps.taps * params.runs * Pack::kTileBytes;

    for (int i = 0; i < kStages - 1; ++i) {
      if (i < total)
        Pack::template copy_tile<kThreads>(weights + static_cast<int64_t>(i) * Pack::kTileBytes, shared.weights[i]);
      commit_copies();
    }

    const int chunk = thread % kChunks, pixel_bytes = maps.channels * static_cast<int>(sizeof(T));
    constexpr int kGathers = kGroups ? 3 : 1;
    Gather<T, kTensorCores, kVectors> gathers[kGathers];  // under way at a time
    // `from`: the slice's own chunk of the image's first pixel, of which `valid` channels exist.
    const auto load = [&](const T* from, int valid, const Table<A, kPixels>& table, int step) {
      gathers[step % kGathers].load(table, thread / kChunks + step * (kThreads / kChunks), from, pixel_bytes, valid);
    };
    const auto store = [&](const Table<A, kPixels>& table, int step, char* samples) {
      const int row = thread / kChunks + step * (kThreads / kChunks);
      gathers[step % kGathers].store(table, row, samples + tile_offset(row, chunk));
    };

    // The first tables, and the first slice's samples.
    Slice slice = Slice::first(channels);
    const T* level_pixels = first_pixel(maps, patch.n, 0) + chunk * kVector<T>;
    fill_tables(maps, patch, slice, shared);
    sync_block();
#pragma unroll kUnrolledSteps
    for (int step = 0; step < kSteps; ++step) {
      load(level_pixels + slice.begin, slice.end - slice.begin - chunk * kVector<T>, shared.table[0], step);
      store(shared.table[0], step, shared.samples[0]);
    }

    Sums<A, kWarpRows / 16, kWarpColumns / 8> sums;
    sums.clear();
    constexpr int kWarpsDown = kPixels / kWarpRows;
    const int warp_row = warp % kWarpsDown * kWarpRows, warp_column = warp / kWarpsDown * kWarpColumns;
    int stage = 0;
#pragma unroll 1
    for (int s = 0; s < total; ++s) {
      // This slice's weights have landed, everybody's samples are stored, and nobody reads the slice before any more.
      wait_for_copies<kStages - 2>();
      if constexpr (kGroups) fence_shared();
      sync_block();
      const char* const samples = shared.samples[s % 2];
      if constexpr (kGroups) {
        begin_products();
        Multiply::begin_rows(samples + warp / 4 * 64 * kRowBytes, shared.weights[stage], sums);
        end_products();
      }
      const int ahead = s + kStages - 1, free = stage == 0 ? kStages - 1 : stage - 1;
      if (ahead < total)
        Pack::template copy_tile<kThreads>(weights + static_cast<int64_t>(ahead) * Pack::kTileBytes,
                                           shared.weights[free]);
      commit_copies();

      const bool more = s + 1 < total;
      int valid = 0;
      if (more) {
        const int level = slice.level;
        if (slice.next(maps, channels)) {
          // The tables before were last read before this synchronisation.
          fill_tables(maps, patch, slice, shared);
          sync_block();
        }
        if (slice.level != level) level_pixels = first_pixel(maps, patch.n, slice.level) + chunk * kVector<T>;
        valid = slice.end - slice.begin - chunk * kVector<T>;
      }
      const auto& table = shared.table[slice.tap - slice.first_tap];
      if constexpr (kGroups) {
        if (more) {
#pragma unroll
          for (int step = 0; step < kSteps + kGathers - 1; ++step) {
            if (step < kSteps) load(level_pixels + slice.begin, valid, table, step);
            if (step >= kGathers - 1) store(table, step - kGathers + 1, shared.samples[(s + 1) % 2]);
          }
        }
        wait_for_products();
      } else {
        // Branches of their own for loading and for storing: without them the compiler moves both into the product.
#pragma unroll kUnrolledSteps
        for (int step = 0; step < kSteps; ++step) {
          if (more) load(level_pixels + slice.begin, valid, table, step);
          Multiply::add_rows(samples, warp_row, shared.weights[stage], warp_column, step, sums);
          if (more) store(table, step, shared.samples[(s + 1) % 2]);
        }
      }
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }

    wait_for_copies<0>();
    sync_block();
    write(params, patch, group, block, warp_row, warp_column, sums);
  }

  // The tables of a slice's tap and those that follow it.
  static DYHEAD_DEVICE void fill_tables(const Maps<A>& maps, const Patch<kPixels>& patch, const Slice& slice,
                                        Shared& shared) {
    const int left = maps.taps - slice.first_tap, taps = left < kTables ? left : kTables;
    const int offset_group = slice.begin / maps.offset_channels;
#pragma unroll 1
    for (int i = thread_index(); i < taps * kPixels; i += kThreads) {
      const int tap = slice.first_tap + i / kPixels, pixel = patch.pixel(maps, i % kPixels);
      const Reading<A> reading = read_offset(maps, patch.n, offset_group, tap, pixel);
      shared.table[i / kPixels].set(i % kPixels, locate_sample(maps, slice.level, tap, pixel, reading),
                                    reading.mask * maps.level_factor(patch.n, slice.level));
    }
  }

  static DYHEAD_DEVICE const T* first_pixel(const Maps<A>& maps, int n, int level) {
    return static_cast<const T*>(maps.level[level].features) + n * maps.image_stride(level);
  }

  static DYHEAD_DEVICE void write(const Params& params, const Patch<kPixels>& patch, int group, int block, int warp_row,
                                  int warp_column, const Sums<A, kWarpRows / 16, kWarpColumns / 8>& sums) {
    const Maps<A>& maps = params.maps;
    const int begin = block * kColumns, left = maps.group_out_channels - begin;
    const int count = left < kColumns ? left : kColumns;
    const int first = group * maps.group_out_channels + begin;
    char* const results = shared_memory();
    sums.visit_pairs([&](int row, int column, A value0, A value1) {
      const int c = warp_column + column;
      T* const to = reinterpret_cast<T*>(results + (warp_row + row) * kResultBytes) + c;
      if (params.bias != nullptr) {
        if (c < count) value0 += static_cast<A>(params.bias[first + c]);
        if (c + 1 < count) value1 += static_cast<A>(params.bias[first + c + 1]);
      }
      store_pair(to, value0, value1);
    });
    sync_block();
    const auto result = [&](int row) { return reinterpret_cast<const T*>(results + row * kResultBytes); };
    if (params.channels_last) {
      const int width = params.out_vectors ? kVector<T> : 1, columns = count / width;
      for (int i = thread_index(); i < kPixels * columns; i += kThreads) {
        const int row = i / columns, c = i % columns * width, pixel = patch.pixel(maps, row);
        if (pixel < 0) continue;
        T* const to =
            params.out + (static_cast<int64_t>(patch.n) * maps.pixels + pixel) * maps.out_channels + first + c;
        if (params.out_vectors) {
          store_vector(to, read_vector(result(row) + c));
        } else {
          *to = result(row)[c];
        }
      }
    } else {
      for (int i = thread_index(); i < kPixels * count; i += kThreads) {
        const int row = i % kPixels, c = i / kPixels, pixel = patch.pixel(maps, row);
        if (pixel < 0) continue;
        params.out[(static_cast<int64_t>(patch.n) * maps.out_channels + first + c) * maps.pixels + pixel] =
            result(row)[c];
      }
    }
  }
};

}  // namespace dyhead::cuda
