// The gradients of samples, and from them those of features, offset, mask and level weight.
//
// The output's gradient times a tap's weights is the gradient of that tap's samples: 64 pixels by at most 64 channels
// at a time, which go through shared memory and never into main memory. There groups of lanes take a pixel each, a lane
// 16 bytes of channels: they multiply with the four corners' features and sum up over channels by shuffles (gradients
// of offset, mask and level weight), and add to the features' gradient at the four corners.
//
// A block owns a patch of pixels and goes over everything that they read, so that sums over channels and levels stay in
// it; to features' gradients blocks add atomically. Where that has to be deterministic, the kernel runs twice: once
// without features' gradients, and once (kOrdered) with blocks that own a run of channels of an image's level and go
// over all pixels in their order. There a thread owns a channel of every fourth pixel of the level: those in even or
// odd rows, even or odd columns. Of a sample's four corners each of the four kinds has one, so no two threads meet.

#pragma once

#include "inputs.h"
#include "output_gradient.h"
#include "weights.h"

namespace dyhead::cuda {

template <typename T, bool kTensorCores, bool kVectors, bool kOrdered>
struct SampleGradient {
  using A = Accumulator<T>;
  using Multiply = Product<T, kTensorCores>;
  static constexpr int kThreads = 256, kMinBlocks = 2;
  static constexpr int kPixels = 64, kRun = 64, kStages = 3;
  static constexpr int kPanel = 4;                                   // slices of the output's gradient that stay
  static constexpr int kWarpRows = 32, kWarpColumns = 16;            // 2 x 4 warps
  static constexpr int kCount = kVector<A>, kLanes = kRun / kCount;  // channels of a lane, lanes of a pixel
  using Pack = PackWeights<T, kTensorCores, false, kRun>;

  struct Params {
    Maps<A> maps;
    OutputGradient<T> gradient;
    const char* weights;      // of Pack
    int slices, runs;         // of Pack
    A* features[kMaxLevels];  // (N, H_l, W_l, C), 0 at first; null: not wanted
    A *offset, *mask;         // null: not wanted
    A* level_weight;          // (N, L, patches), to be summed; null: not wanted
  };

  struct Shared {
    char gradient[kPanel][kPixels * kRowBytes];
    char weights[kStages][Pack::kTileBytes];
    // The gradients of samples; padded, so that the rows that a warp writes at a time lie in different banks.
    A samples[kPixels][kRun + 32 / sizeof(A)];
    Table<A, kPixels> table;
    A corner_products[kPixels][4];
    int parity[kPixels];                        // 2 * (row & 1) + (column & 1) of the top left corner
    A level_sums[kPixels / kWarp][kMaxLevels];  // of each warp of owners
  };
  static constexpr int kSharedBytes = static_cast<int>(sizeof(Shared));
  static int64_t block_count(const Maps<A>& maps, int runs) {
    return maps.batch * (kOrdered ? static_cast<int64_t>(maps.levels) * runs : Patch<kPixels>::count(maps));
  }

  // What a block does one after the other: a run of channels of a tap and level, at a patch.
  struct Unit {
    int64_t patch;  // of all images
    int tap, level, run, begin, end;
    int group, offset_group;  // of the run
    int offset_run;           // the first run of the offset group

    static DYHEAD_DEVICE Unit first(const Params& params) {
      const Maps<A>& maps = params.maps;
      Unit unit{};
      if constexpr (kOrdered) {
        const int64_t rest = block_index() / params.runs;
        unit.run = static_cast<int>(block_index() % params.runs);
        unit.level = static_cast<int>(rest % maps.levels);
        unit.patch = rest / maps.levels * Patch<kPixels>::count(maps);
        for (int i = 0; i < unit.run; ++i) unit.begin = maps.run_end(unit.begin, kRun);
        unit.group = unit.begin / maps.group_channels;
        unit.offset_group = unit.begin / maps.offset_channels;
      } else {
        unit.patch = block_index();
      }
      unit.find_end(maps);
      return unit;
    }
    DYHEAD_DEVICE void find_end(const Maps<A>& maps) {
      const int group_end = (group + 1) * maps.group_channels, offset_end = (offset_group + 1) * maps.offset_channels;
      const int limit = group_end < offset_end ? group_end : offset_end;
      end = limit - begin < kRun ? limit : begin + kRun;
    }
    DYHEAD_DEVICE bool starts_offset_group(const Maps<A>& maps) const {
      return begin == offset_group * maps.offset_channels;
    }
    DYHEAD_DEVICE bool ends_offset_group(const Maps<A>& maps) const {
      return end == (offset_group + 1) * maps.offset_channels;
    }
    DYHEAD_DEVICE void next(const Maps<A>& maps) {
      if constexpr (kOrdered) {
        if (++tap == maps.taps) tap = 0, ++patch;
        return;
      }
      const bool ends = ends_offset_group(maps);
      if (ends && ++level < maps.levels) {
        run = offset_run;
        begin = offset_group * maps.offset_channels;
        group = begin / maps.group_channels;
      } else {
        begin = end;
        ++run;
        if (begin == (group + 1) * maps.group_channels) ++group;
        if (ends) {
          level = 0;
          ++offset_group;
          if (begin == maps.channels) begin = run = group = offset_group = 0, ++tap;
          offset_run = run;
        }
      }
      find_end(maps);
    }
  };

  // A slice of a unit's depth.
  struct Slice {
    Unit unit;
    int slice;
    const char* weights;

    static DYHEAD_DEVICE Slice first(const Params& params, const Unit& unit) {
      return {unit, 0, first_weights(params, unit)};
    }
    DYHEAD_DEVICE void next(const Params& params) {
      weights += Pack::kTileBytes;
      if (++slice < params.slices) return;
      slice = 0;
      unit.next(params.maps);
      weights = first_weights(params, unit);
    }
    static DYHEAD_DEVICE const char* first_weights(const Params& params, const Unit& unit) {
      const int64_t tile = (static_cast<int64_t>(unit.tap) * params.maps.levels + unit.level) * params.runs + unit.run;
      return params.weights + tile * params.slices * Pack::kTileBytes;
    }
  };

  static DYHEAD_DEVICE void run(const Params& params) {
    const Maps<A>& maps = params.maps;
    Shared& shared = *reinterpret_cast<Shared*>(shared_memory());
    const int thread = thread_index(), warp = thread / kWarp;
    const bool owner = thread < kPixels;  // of a pixel of the patch

    Unit unit = Unit::first(params);
    // Without order a unit's slices are tiles of weights, which lie in memory: 32 bits count them.
    using Count = std::conditional_t<kOrdered, int64_t, int>;
    const Count units =
        maps.taps * (kOrdered ? static_cast<Count>(Patch<kPixels>::count(maps)) : params.runs * maps.levels);
    Slice ahead = Slice::first(params, unit);
    Count slices_ahead = units * params.slices;
    const auto copy_ahead = [&](int stage) {
      if (slices_ahead > 0) {
        Pack::template copy_tile<kThreads>(ahead.weights, shared.weights[stage]);
        if (--slices_ahead > 0) ahead.next(params);
      }
      commit_copies();
    };
    for (int i = 0; i < kStages - 1; ++i) copy_ahead(i);

    Cell<A> cell;
    Reading<A> reading;
    int pixel = -1;
    auto patch = Patch<kPixels>::at(maps, unit.patch);
    const auto fill_table = [&] {
      pixel = patch.pixel(maps, thread);
      reading = read_offset(maps, patch.n, unit.offset_group, unit.tap, pixel);
      cell = locate_sample(maps, unit.level, unit.tap, pixel, reading);
      shared.table.set(thread, cell, reading.mask * maps.level_factor(patch.n, unit.level));
      if constexpr (kOrdered) shared.parity[thread] = parity_of(cell, maps.level[unit.level].width);
    };
    static_assert(kPixels % kWarp == 0, "owners are whole warps");
    if (owner) {
      fill_table();
      for (int l = thread % kWarp; l < maps.levels; l += kWarp) shared.level_sums[warp][l] = A(0);
    }

    SampleGradients<A> own{A(0), A(0), A(0), A(0)};  // of a tap, summed over levels
    int64_t loaded_patch = -1;
    int loaded_group = -1, loaded_panel = -1, stage = 0;
    const int warp_row = warp % 2 * kWarpRows, warp_column = warp / 2 * kWarpColumns;

#pragma unroll 1
    for (Count u = 0; u < units; ++u) {
      const int group = unit.group;
      Sums<A, kWarpRows / 16, kWarpColumns / 8> sums;
      sums.clear();
#pragma unroll 1
      for (int slice = 0; slice < params.slices; ++slice) {
        const int panel = slice / kPanel;
        if ((kOrdered && loaded_patch != unit.patch) || loaded_group != group || loaded_panel != panel) {
          loaded_patch = unit.patch, loaded_group = group, loaded_panel = panel;
          sync_block();  // nobody reads the last one any more
          load_panel(params, patch, group, panel * kPanel, shared);
          commit_copies();
          wait_for_copies<0>();
        }
        // This slice's weights have landed, and nobody reads the slice before, nor the last unit's samples, any more.
        wait_for_copies<kStages - 2>();
        sync_block();
        copy_ahead(stage == 0 ? kStages - 1 : stage - 1);
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          Multiply::add_rows(shared.gradient[slice % kPanel], warp_row, shared.weights[stage], warp_column, step, sums);
        }
        stage = stage + 1 == kStages ? 0 : stage + 1;
      }
      sums.visit_pairs([&](int row, int column, A value0, A value1) {
        store_pair(&shared.samples[warp_row + row][warp_column + column], value0, value1);
      });
      sync_block();

      const bool ends = kOrdered || unit.ends_offset_group(maps), starts = unit.starts_offset_group(maps);
      if constexpr (kOrdered) {
        add_in_order(params, patch, unit, shared);
      } else {
        scatter(params, patch, unit, starts, shared);
      }
      if (ends) sync_block();  // the products are complete, and nobody reads the table any more
      if constexpr (!kOrdered) {
        if (ends && owner) add_positions(params, patch, unit, cell, reading.mask, pixel, own, shared);
      }
      unit.next(maps);
      if (kOrdered && unit.tap == 0) patch = Patch<kPixels>::at(maps, unit.patch);
      if (ends && owner && u + 1 < units) fill_table();
    }
    wait_for_copies<0>();

    if constexpr (!kOrdered) {
      if (params.level_weight == nullptr) return;
      sync_block();
      const int64_t patches = Patch<kPixels>::count(maps), n = block_index() / patches, at = block_index() % patches;
      for (int l = thread; l < maps.levels; l += kThreads) {
        A sum = A(0);
        for (int w = 0; w < kPixels / kWarp; ++w) sum += shared.level_sums[w][l];
        params.level_weight[(n * maps.levels + l) * patches + at] = sum;
      }
    }
  }

  static DYHEAD_DEVICE void load_panel(const Params& params, const Patch<kPixels>& patch, int group, int first_slice,
                                       Shared& shared) {
    const Maps<A>& maps = params.maps;
    const int left = params.slices - first_slice, slices = left < kPanel ? left : kPanel;
    for (int i = thread_index(); i < slices * kPixels * kChunks; i += kThreads) {
      const int chunk = i % kChunks, row = i / kChunks % kPixels, slice = i / (kChunks * kPixels);
      const int pixel = patch.pixel(maps, row);
      const int64_t from = static_cast<int64_t>(patch.n) * maps.pixels + pixel;
      const int out = (first_slice + slice) * kRow<T> + chunk * kVector<T>;
      const bool valid = pixel >= 0 && out < params.gradient.group_stride;
      copy_async(shared.gradient[slice] + tile_offset(row, chunk),
                 valid ? params.gradient.at(from, group, out) : params.gradient.data, valid);
    }
  }

  static DYHEAD_DEVICE int parity_of(const Cell<A>& cell, int width) {
    for (int i = 0; i < 4; ++i) {
      if (cell.corner[i] < 0) continue;
      const int row = static_cast<int>(cell.corner[i]) / width, column = static_cast<int>(cell.corner[i]) % width;
      return (2 * (row & 1) + (column & 1)) ^ i;
    }
    return 0;
  }

  static DYHEAD_DEVICE void add_in_order(const Params& params, const Patch<kPixels>& patch, const Unit& unit,
                                         Shared& shared) {
    const Maps<A>& maps = params.maps;
    const int c = thread_index() % kRun, kind = thread_index() / kRun;
    if (unit.begin + c >= unit.end) return;
    A* const gradient = params.features[unit.level] + patch.n * maps.image_stride(unit.level) + unit.begin + c;
    for (int p = 0; p < kPixels; ++p) {
      const int i = kind ^ shared.parity[p], corner = shared.table.corner[p].at[i];
      if (corner < 0) continue;
      owned_atomic_add(gradient + static_cast<int64_t>(corner) * maps.channels,
                       shared.table.share[p].at[i] * shared.samples[p][c]);
    }
  }

  static DYHEAD_DEVICE void scatter(const Params& params, const Patch<kPixels>& patch, const Unit& unit, bool starts,
                                    Shared& shared) {
    const Maps<A>& maps = params.maps;
    const int c = thread_index() % kLanes * kCount, valid = unit.end - unit.begin - c;
    const bool positions = params.offset != nullptr || params.mask != nullptr || params.level_weight != nullptr;
    // Element of the channels of this lane in the image's first pixel.
    const int64_t first = patch.n * maps.image_stride(unit.level) + unit.begin + c;
    const T* const features = static_cast<const T*>(maps.level[unit.level].features) + first;
    A* const gradients = params.features[unit.level] == nullptr ? nullptr : params.features[unit.level] + first;
#pragma unroll 1
    for (int p = thread_index() / kLanes; p < kPixels; p += kThreads / kLanes) {
      const auto corners = shared.table.corner[p];
      A gradient[kCount];
      const Vector vector = read_vector(&shared.samples[p][c]);
      std::memcpy(gradient, &vector, sizeof(vector));
      if (positions) {
        // All four are under way before the first is used.
        T value[4][kCount];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          load_channels<kVectors>(features, corners.at[i], maps.channels * static_cast<int>(sizeof(T)), valid,
                                  value[i]);
        }
        A product[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          A wide[kCount];
          widen(value[i], wide);
          product[i] = A(0);
#pragma unroll
          for (int k = 0; k < kCount; ++k) product[i] += gradient[k] * wide[k];
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int mask = kLanes / 2; mask > 0; mask /= 2) product[i] += shuffle_xor(product[i], mask);
        }
        if (c == 0) {
#pragma unroll
          for (int i = 0; i < 4; ++i)
            shared.corner_products[p][i] = starts ? product[i] : shared.corner_products[p][i] + product[i];
        }
      }
      if (gradients == nullptr || valid <= 0) continue;
      const auto shares = shared.table.share[p];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (corners.at[i] < 0) continue;
        A* const to = gradients + static_cast<int64_t>(corners.at[i]) * maps.channels;
        A part[kCount];
#pragma unroll
        for (int k = 0; k < kCount; ++k) part[k] = shares.at[i] * gradient[k];
        if constexpr (kVectors) {
          atomic_add(to, part);
        } else {
#pragma unroll
          for (int k = 0; k < kCount; ++k) {
            if (k < valid) atomic_add(to + k, part[k]);
          }
        }
      }
    }
  }

  // The gradients at one pixel, of a tap and offset group: complete with the last level.
  static DYHEAD_DEVICE void add_positions(const Params& params, const Patch<kPixels>& patch, const Unit& unit,
                                          const Cell<A>& cell, A mask, int pixel, SampleGradients<A>& own,
                                          Shared& shared) {
    const Maps<A>& maps = params.maps;
    if (params.offset == nullptr && params.mask == nullptr && params.level_weight == nullptr) return;
    const auto& level = maps.level[unit.level];
    const int p = thread_index();
    const SampleGradients<A> more =
        sample_gradients(cell, shared.corner_products[p], mask, maps.level_factor(patch.n, unit.level),
                         static_cast<A>(level.rows.shift), static_cast<A>(level.columns.shift));
    own.dy += more.dy;
    own.dx += more.dx;
    own.mask += more.mask;
    if (params.level_weight != nullptr) {
      A sum = pixel < 0 ? A(0) : more.level_weight;
#pragma unroll
      for (int mask = kWarp / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
      if (p % kWarp == 0) shared.level_sums[p / kWarp][unit.level] += sum;
    }
    if (unit.level + 1 < maps.levels) return;
    if (pixel >= 0) {
      const int64_t begin = plane(patch.n, maps.offset_groups, unit.offset_group, maps.taps, unit.tap, maps.pixels);
      if (params.offset != nullptr) {
        params.offset[2 * begin + pixel] = own.dy;
        params.offset[2 * begin + maps.pixels + pixel] = own.dx;
      }
      if (params.mask != nullptr) params.mask[begin + pixel] = own.mask;
    }
    own = {A(0), A(0), A(0), A(0)};
  }
};

}  // namespace dyhead::cuda
