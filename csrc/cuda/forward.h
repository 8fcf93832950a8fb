// The forward pass: a product of samples with weights, whose left operand is made on the way.
//
// A block sums up a patch of output pixels by a block of a group's output channels, in registers, over all levels, taps
// and slices of channels (128 bytes of a sample each). While tensor cores multiply one slice's samples, the same
// threads gather the next slice's: before each quarter of a product they load four corners of one vector, after it they
// interpolate and store it. So loads take 16 registers and have the time of a quarter to arrive, if the compiler issues
// all of them before the product and waits for none before its end; tools/machine_code.py reads from the machine code
// that it does. There is one synchronisation a slice. Producers of their own (warp specialisation) would need registers
// that the sums take: with mma.sync a block of 128 x 256 sums holds half of all registers, and only sm_90 can hand
// registers on between warps.
//
// Weights arrive by asynchronous copies, kStages - 1 slices ahead. The places of samples are found once per tap and
// level, one place ahead of the gathering, and lie in shared memory for all slices.

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
  static constexpr int kUnrolledSteps = kMinBlocks > 1 ? 1 : kSteps;     // registers
  static constexpr int kWarpRows = 64, kWarpColumns = kColumns / 4;      // 2 x 4 warps
  static_assert(kPixels * kChunks == kThreads * kSteps, "a thread gathers one vector a step");
  using Pack = PackWeights<T, kTensorCores, true, kColumns>;

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
    Table<A, kPixels> table[2];
  };
  // Afterwards: the results, in rows that a column of threads can write without meeting in a bank.
  static constexpr int kResultBytes = kColumns * static_cast<int>(sizeof(T)) + static_cast<int>(sizeof(Vector));
  static constexpr int kSharedBytes = std::max(static_cast<int>(sizeof(Shared)), kPixels* kResultBytes);

  // The channels of the block's group, and which of them share an offset.
  struct Channels {
    int first, end, offset_group, offset_channels;  // offset_group: of the first channel

    DYHEAD_DEVICE int run_end(int begin, int group) const {
      const int shared = (group + 1) * offset_channels, limit = shared < end ? shared : end;
      return limit - begin < kRow<T> ? limit : begin + kRow<T>;
    }
  };

  // What a table is made for.
  struct Spot {
    int level, tap, offset_group;

    DYHEAD_DEVICE void next(const Maps<A>& maps, const Channels& channels) {
      if (++offset_group * channels.offset_channels < channels.end) return;
      offset_group = channels.offset_group;
      if (++tap == maps.taps) tap = 0, ++level;
    }
  };

  // A slice of channels of a spot.
  struct Slice {
    Spot spot;
    int begin, end;

    // Whether the slice is of another spot.
    DYHEAD_DEVICE bool next(const Maps<A>& maps, const Channels& channels) {
      begin = end;
      const bool other = begin == channels.end || begin == (spot.offset_group + 1) * channels.offset_channels;
      if (other) spot.next(maps, channels);
      if (begin == channels.end) begin = channels.first;
      end = channels.run_end(begin, spot.offset_group);
      return other;
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
    const Channels channels{first, first + maps.group_channels, first / maps.offset_channels, maps.offset_channels};
    const int total = maps.levels * maps.taps * maps.runs(first, channels.end, kRow<T>);
    const char* const weights = params.weights + column * maps.levels * maps.taps * params.runs * Pack::kTileBytes;

    for (int i = 0; i < kStages - 1; ++i) {
      if (i < total)
        Pack::template copy_tile<kThreads>(weights + static_cast<int64_t>(i) * Pack::kTileBytes, shared.weights[i]);
      commit_copies();
    }

    const int pixel = thread < kPixels ? patch.pixel(maps, thread) : -1;
    // The tables' owners, a pixel each. What a table is made of is read a spot ahead of it, and tables are made before
    // a product, when few registers are taken.
    const bool owner = thread < kPixels;
    Spot spot{0, 0, channels.offset_group};  // that was read
    Reading<A> reading{A(0), A(0), A(0)};
    const auto read = [&] {
      if (spot.level < maps.levels) reading = read_offset(maps, patch.n, spot.offset_group, spot.tap, pixel);
    };
    const auto fill_table = [&](Table<A, kPixels>& table) {
      if (spot.level == maps.levels) return;
      table.set(thread, locate_sample(maps, spot.level, spot.tap, pixel, reading),
                reading.mask * maps.level_factor(patch.n, spot.level));
      spot.next(maps, channels);
      read();
    };
    const int chunk = thread % kChunks, pixel_bytes = maps.channels * static_cast<int>(sizeof(T));
    Gather<T, kTensorCores, kVectors> gather;
    // `from`: the slice's own chunk of the image's first pixel, of which `valid` channels exist.
    const auto load = [&](const T* from, int valid, const Table<A, kPixels>& table, int step) {
      gather.load(table, thread / kChunks + step * (kThreads / kChunks), from, pixel_bytes, valid);
    };
    const auto store = [&](const Table<A, kPixels>& table, int step, char* samples) {
      const int row = thread / kChunks + step * (kThreads / kChunks);
      gather.store(table, row, samples + tile_offset(row, chunk));
    };

    // Tables of the first two spots, and the first slice's samples.
    Slice slice{spot, first, channels.run_end(first, spot.offset_group)};
    const T* level_pixels = first_pixel(maps, patch.n, 0) + chunk * kVector<T>;
    int current = 0;  // the table of `slice`
    if (owner) {
      read();
      fill_table(shared.table[0]);
      fill_table(shared.table[1]);
    }
    sync_block();
#pragma unroll 1
    for (int step = 0; step < kSteps; ++step) {
      load(level_pixels + slice.begin, slice.end - slice.begin - chunk * kVector<T>, shared.table[0], step);
      store(shared.table[0], step, shared.samples[0]);
    }

    Sums<A, kWarpRows / 16, kWarpColumns / 8> sums;
    sums.clear();
    const int warp_row = warp % 2 * kWarpRows, warp_column = warp / 2 * kWarpColumns;
    int stage = 0;
#pragma unroll 1
    for (int s = 0; s < total; ++s) {
      // This slice's weights have landed, everybody's samples are stored, and nobody reads the slice before any more.
      wait_for_copies<kStages - 2>();
      sync_block();
      const int ahead = s + kStages - 1, free = stage == 0 ? kStages - 1 : stage - 1;
      if (ahead < total)
        Pack::template copy_tile<kThreads>(weights + static_cast<int64_t>(ahead) * Pack::kTileBytes,
                                           shared.weights[free]);
      commit_copies();

      const bool more = s + 1 < total;
      int valid = 0;
      if (more) {
        const int level = slice.spot.level;
        if (slice.next(maps, channels)) {
          // The table before was last read before this synchronisation; the one in its place is read after the next.
          if (owner) fill_table(shared.table[current]);
          current ^= 1;
        }
        if (slice.spot.level != level) level_pixels = first_pixel(maps, patch.n, slice.spot.level) + chunk * kVector<T>;
        valid = slice.end - slice.begin - chunk * kVector<T>;
      }
      const char* const samples = shared.samples[s % 2];
      // Branches of their own for loading and for storing: without them the compiler moves both into the product.
#pragma unroll kUnrolledSteps
      for (int step = 0; step < kSteps; ++step) {
        if (more) load(level_pixels + slice.begin, valid, shared.table[current], step);
        Multiply::add_rows(samples, warp_row, shared.weights[stage], warp_column, step, sums);
        if (more) store(shared.table[current], step, shared.samples[(s + 1) % 2]);
      }
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }

    wait_for_copies<0>();
    sync_block();
    write(params, patch, group, block, warp_row, warp_column, sums);
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
