// The features' gradient with the same bits in every run: gathered from samples' gradients in main memory.
//
// The samples of a level are sorted by the cell between four pixels that they lie in; a sort that keeps the order of
// equals leaves only one order. Then every pixel's gradient is a sum over the samples in the four cells around it,
// which is made and written by one thread for a few channels.

#pragma once

#include "inputs.h"
#include "sample_gradient.h"

namespace dyhead::cuda {

// A level's cells: those with a corner inside, row by row, and one for all samples outside.
DYHEAD_HOST_DEVICE int64_t cell_count(int height, int width) {
  return (static_cast<int64_t>(height) + 1) * (static_cast<int64_t>(width) + 1) + 1;
}

// Cells and shares of a level's samples, (image, offset group, tap, pixel).
template <typename A>
struct LocateSamples {
  static constexpr int kThreads = 256, kMinBlocks = 1, kSharedBytes = 0;

  struct Params {
    Maps<A> maps;
    int level, first_image, images;
    int64_t* cells;
    A* shares;  // of the four corners
  };

  static DYHEAD_DEVICE void run(const Params& params) {
    const Maps<A>& maps = params.maps;
    const int64_t index = block_index() * kThreads + thread_index();
    const int pixel = static_cast<int>(index % maps.pixels), tap = static_cast<int>(index / maps.pixels % maps.taps);
    const int64_t row = index / maps.pixels / maps.taps;
    const int group = static_cast<int>(row % maps.offset_groups);
    const int image = static_cast<int>(row / maps.offset_groups);
    if (image >= params.images) return;
    const int n = params.first_image + image;
    const auto& level = maps.level[params.level];
    const Reading<A> reading = read_offset(maps, n, group, tap, pixel);
    const Cell<A> cell = locate_sample(maps, params.level, tap, pixel, reading);
    int64_t found = cell_count(level.height, level.width) - 1;
    for (int i = 3; i >= 0; --i) {
      if (cell.corner[i] < 0) continue;
      const int corner = static_cast<int>(cell.corner[i]);
      const int64_t bottom = corner / level.width + 1 - i / 2, right = corner % level.width + 1 - i % 2;
      found = bottom * (static_cast<int64_t>(level.width) + 1) + right;
    }
    params.cells[index] = found;
    A* const shares = params.shares + 4 * index;
    corner_shares(cell, shares);
    const A factor = reading.mask * maps.level_factor(n, params.level);
    for (int i = 0; i < 4; ++i) shares[i] *= factor;
  }
};

// Where each cell's samples begin in a row of sorted ones.
struct FindCells {
  static constexpr int kThreads = 256, kMinBlocks = 1, kSharedBytes = 0;

  struct Params {
    const int64_t* sorted;  // (rows, length)
    int64_t* begins;        // (rows, cells)
    int64_t rows, length, cells;
  };

  static DYHEAD_DEVICE void run(const Params& params) {
    const int64_t index = block_index() * kThreads + thread_index();
    const int64_t row = index / params.cells, cell = index % params.cells;
    if (row >= params.rows) return;
    const int64_t* const sorted = params.sorted + row * params.length;
    int64_t begin = 0, end = params.length;
    while (begin < end) {
      const int64_t middle = begin + (end - begin) / 2;
      if (sorted[middle] < cell) {
        begin = middle + 1;
      } else {
        end = middle;
      }
    }
    params.begins[index] = begin;
  }
};

// The features' gradient of a level in some images and runs of channels.
template <typename T, bool kVectors, int kRun>
struct SumSamples {
  using A = Accumulator<T>;
  static constexpr int kThreads = 256, kMinBlocks = 1, kSharedBytes = 0;
  static constexpr int kCount = kVector<A>, kLanes = kRun / kCount, kPixels = kThreads / kLanes;
  // Pixels of a block: a rectangle, whose cells are few.
  static constexpr int kWidth = 4, kHeight = kPixels / kWidth;

  struct Params {
    Maps<A> maps;
    int level, first_image, images, first_run, run_count;
    const StoredSample<T>* samples;  // of SampleGradient
    const A* shares;                 // of LocateSamples
    const int64_t *order, *begins;   // of sorted samples; of FindCells
    A* result;                       // (N, H_l, W_l, C)
  };

  static int64_t block_count(const Params& params) {
    const auto& level = params.maps.level[params.level];
    return blocks_of(level.height, kHeight) * blocks_of(level.width, kWidth) * params.images * params.run_count;
  }

  static DYHEAD_DEVICE void run(const Params& params) {
    const Maps<A>& maps = params.maps;
    const auto& level = maps.level[params.level];
    int64_t rest = block_index();
    const auto take = [&rest](int size) {
      const int result = static_cast<int>(rest % size);
      rest /= size;
      return result;
    };
    const int place = thread_index() / kLanes;
    const int column = take((level.width + kWidth - 1) / kWidth) * kWidth + place % kWidth;
    const int row = take((level.height + kHeight - 1) / kHeight) * kHeight + place / kWidth;
    const int run = take(params.run_count), image = static_cast<int>(rest);
    int begin = 0;
    for (int i = params.first_run + run; i > 0; --i) begin = maps.run_end(begin, kRun);
    const int c = thread_index() % kLanes * kCount, valid = maps.run_end(begin, kRun) - begin - c;
    if (row >= level.height || column >= level.width || valid <= 0) return;

    const int64_t length = static_cast<int64_t>(maps.taps) * maps.pixels;
    const int64_t group = static_cast<int64_t>(image) * maps.offset_groups + begin / maps.offset_channels;
    const int64_t* const order = params.order + group * length;
    const int64_t* const begins = params.begins + group * cell_count(level.height, level.width);
    const A* const shares = params.shares + 4 * group * length;
    const auto* const samples =
        params.samples + (static_cast<int64_t>(image) * params.run_count + run) * length * kRun + c;
    A sum[kCount] = {};
    // The cells above and below the pixel, left and right of it: it is their samples' corner 3, 2, 1 and 0.
#pragma unroll 1
    for (int i = 0; i < 4; ++i) {
      const int64_t cell =
          (static_cast<int64_t>(row) + i / 2) * (static_cast<int64_t>(level.width) + 1) + column + i % 2;
      const A* const share = shares + 3 - i;
      const int64_t end = begins[cell + 1];
#pragma unroll 4
      for (int64_t at = begins[cell]; at < end; ++at) {
        const int64_t sample = order[at];
        StoredSample<T> value[kCount];
        load_channels<true>(samples + sample * kRun, 0, 0, kCount, value);
#pragma unroll
        for (int k = 0; k < kCount; ++k) sum[k] += share[4 * sample] * static_cast<A>(value[k]);
      }
    }
    A* const to = params.result +
                  (static_cast<int64_t>(params.first_image + image) * level.height * level.width +
                   static_cast<int64_t>(row) * level.width + column) *
                      maps.channels +
                  begin + c;
    if constexpr (kVectors) {
      Vector vector;
      std::memcpy(&vector, sum, sizeof(vector));
      store_vector(to, vector);
    } else {
      for (int k = 0; k < kCount; ++k) {
        if (k < valid) to[k] = sum[k];
      }
    }
  }
};

}  // namespace dyhead::cuda
