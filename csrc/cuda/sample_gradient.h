// The gradients of samples, and from them those of features, offset, mask and level weight.
//
// The output's gradient times a tap's weights is the gradient of that tap's samples: a patch of 64 pixels by a run of
// channels, for several taps at a time. A tap after the other goes through shared memory, and never into main memory
// unless the gradients have to be deterministic. There groups of lanes take a pixel each, a lane 16 bytes of channels:
// they multiply with the four corners' features and sum up over channels by shuffles (gradients of offset, mask and
// level weight).
//
// A block owns a patch of output pixels and goes over runs of channels, levels and taps, in this order. What taps read
// lies around the patch, so that the features' gradient of a run and level is summed up over all taps in a window of
// shared memory, kSide x kSide pixels of the level, and added to main memory once. Only corners outside the window are
// added there one by one. A thread owns a channel of the window's pixels in even or odd rows, even or odd columns: of a
// sample's four corners each of these four kinds has one, so no two threads meet.
//
// Where the features' gradient has to be deterministic the block writes the samples' gradients out instead, for
// feature_gradient.h; everything else has a fixed order anyway.

#pragma once

#include "inputs.h"
#include "output_gradient.h"
#include "weights.h"

namespace dyhead::cuda {

// How samples' gradients lie in main memory: half of the bytes where the features have the range.
template <typename T>
using StoredSample = std::conditional_t<std::is_same_v<T, BFloat16>, BFloat16, Accumulator<T>>;

template <typename T, bool kTensorCores, bool kVectors, int kRunChannels, int kTapsAtOnce>
struct SampleGradient {
  using A = Accumulator<T>;
  using Multiply = Product<T, kTensorCores>;
  static constexpr int kThreads = 256, kPixels = 64, kRun = kRunChannels, kTaps = kTapsAtOnce;
  static constexpr int kMinBlocks = 1;
  static constexpr int kPanel = kTaps > 1 ? 256 / kRow<T> : 4;  // slices of the output's gradient that stay
  static constexpr int kStages = kPanel > 4 ? 2 : 3;
  static constexpr int kColumns = kTaps * kRun, kWarpsAcross = kColumns >= 64 ? 4 : 2;
  static constexpr int kWarpColumns = kColumns / kWarpsAcross;
  static constexpr int kWarpRows = kPixels / (kThreads / kWarp / kWarpsAcross);
  static constexpr int kCount = kVector<A>, kLanes = kRun / kCount;  // channels of a lane, lanes of a pixel
  static constexpr int kSide = kRun == 64 ? 18 : 16;                 // of the window: as shared memory allows
  static constexpr int kKinds = kThreads / kRun, kSubkinds = kKinds / 4;
  static constexpr int kOwners = kTaps * kPixels;  // of a tap's sample at a pixel
  static_assert(kOwners <= kThreads && kPixels % kWarp == 0, "owners are whole warps");
  static_assert(kSubkinds == 1 || kSubkinds == 2 || kSubkinds == 4);
  using Pack = PackWeights<T, kTensorCores, false, kColumns, kTaps>;
  using Stored = StoredSample<T>;

  struct Params {
    Maps<A> maps;
    OutputGradient<T> gradient;
    const char* weights;  // of Pack
    int slices, runs;     // of Pack
    // What this launch goes over, in `splits` parts with blocks of their own; and the first of the patches of all
    // images that it works on.
    int first_run, run_count, first_level, level_count, splits;
    int64_t first_patch;
    A* features[kMaxLevels];  // (N, H_l, W_l, C), to be added to; null: not wanted
    Stored* samples;          // (image, run, tap, pixel, kRun) of this launch's images and runs; null: not wanted
    A *offset, *mask;         // (splits, N, ...), to be added to; null: not wanted
    int64_t offset_stride, mask_stride;  // of a split
    A* level_weight;                     // (N, L, runs, patches), to be summed; null: not wanted
  };

  static constexpr int kPlaces = kSide * kSide;

  // Where a corner's gradient goes: a place of the window, ~corner, a pixel of the level, or a place of no use.
  struct Entry {
    int target;
    A share;
  };
  struct alignas(16) Corners {
    int at[4];  // pixels of the level, -1: outside
  };
  struct Shared {
    char gradient[kPanel][kPixels * kRowBytes];
    char weights[kStages][Pack::kTileBytes];
    A window[kPlaces + kKinds][kRun];  // the last ones, one for each kind, take what is not to be summed
    // The gradients of a tap's samples; padded, so that the rows that a warp writes at a time lie in different banks.
    A samples[kPixels][kRun + 32 / sizeof(A)];
    Corners corner[kTaps][kPixels];
    Entry entry[kTaps][kPixels][4];  // by kind: 2 * (row & 1) + (column & 1) of the window
    A corner_products[kTaps][kPixels][4];
    A level_sums[kOwners / kWarp];
  };
  static constexpr int kSharedBytes = static_cast<int>(sizeof(Shared));

  // A run of channels of a level.
  struct Unit {
    int run, level, begin, end;
    int group, offset_group;  // of the run

    // Number `index` of a launch.
    static DYHEAD_DEVICE Unit at(const Params& params, int index) {
      Unit unit{params.first_run + index / params.level_count, params.first_level + index % params.level_count};
      for (int i = 0; i < unit.run; ++i) unit.begin = params.maps.run_end(unit.begin, kRun);
      unit.find(params.maps);
      return unit;
    }
    DYHEAD_DEVICE void find(const Maps<A>& maps) {
      group = begin / maps.group_channels;
      offset_group = begin / maps.offset_channels;
      end = maps.run_end(begin, kRun);
    }
    DYHEAD_DEVICE void next(const Params& params) {
      if (++level < params.first_level + params.level_count) return;
      level = params.first_level;
      ++run;
      begin = end;
      if (begin < params.maps.channels) find(params.maps);
    }
  };

  // Taps of a unit that are worked on together.
  struct Step {
    Unit unit;
    int first_tap;

    DYHEAD_DEVICE void next(const Params& params) {
      if ((first_tap += kTaps) < params.maps.taps) return;
      first_tap = 0;
      unit.next(params);
    }
  };

  static DYHEAD_DEVICE void run(const Params& params) {
    const Maps<A>& maps = params.maps;
    Shared& shared = *reinterpret_cast<Shared*>(shared_memory());
    const int thread = thread_index(), warp = thread / kWarp;
    const int64_t all = static_cast<int64_t>(params.run_count) * params.level_count;
    const int split = static_cast<int>(block_index() % params.splits);
    const int first = static_cast<int>(all * split / params.splits);
    const int units = static_cast<int>(all * (split + 1) / params.splits) - first;
    if (units == 0) return;
    const int64_t patch_index = params.first_patch + block_index() / params.splits;
    const auto patch = Patch<kPixels>::at(maps, patch_index);
    const int tap_groups = (maps.taps + kTaps - 1) / kTaps, tiles = tap_groups * params.slices;  // of a unit

    // Weights arrive in the order of their tiles in memory, from one unit's to the next one's.
    const auto first_weights = [&](int index) {
      const int64_t run = params.first_run + index / params.level_count;
      return params.weights +
             (run * maps.levels + params.first_level + index % params.level_count) * tiles * Pack::kTileBytes;
    };
    const char* weights = first_weights(first);
    int tiles_ahead = tiles, unit_ahead = first;
    const auto copy_ahead = [&](int stage) {
      if (unit_ahead < first + units) {
        Pack::template copy_tile<kThreads>(weights, shared.weights[stage]);
        weights += Pack::kTileBytes;
        if (--tiles_ahead == 0) {
          tiles_ahead = tiles;
          if (++unit_ahead < first + units) weights = first_weights(unit_ahead);
        }
      }
      commit_copies();
    };
    for (int i = 0; i < kStages - 1; ++i) copy_ahead(i);

    // The owner of a tap's sample at a pixel. What a place is made of is read a step ahead of it.
    const bool owner = thread < kOwners;
    const int own_tap = thread / kPixels, own_pixel = thread % kPixels;
    const int pixel = owner ? patch.pixel(maps, own_pixel) : -1;
    Step step{Unit::at(params, first), 0};
    Cell<A> cell{{-1, -1, -1, -1}, A(0), A(0)};
    Reading<A> reading{A(0), A(0), A(0)}, next_reading = reading;
    const auto read = [&](const Step& step) {
      const int tap = step.first_tap + own_tap;
      next_reading = read_offset(maps, patch.n, step.unit.offset_group, tap, tap < maps.taps ? pixel : -1);
    };
    const auto fill_tables = [&](bool more) {
      const int tap = step.first_tap + own_tap;
      reading = next_reading;
      cell = locate_sample(maps, step.unit.level, tap, tap < maps.taps ? pixel : -1, reading);
      set_tables(maps, patch, step.unit.level, cell, reading.mask * maps.level_factor(patch.n, step.unit.level),
                 shared.corner[own_tap][own_pixel], shared.entry[own_tap][own_pixel]);
      if (!more) return;
      Step next = step;
      next.next(params);
      read(next);
    };
    const int steps = units * tap_groups;
    if (owner) {
      read(step);
      fill_tables(steps > 1);
    }
    for (int i = thread; i < (kPlaces + kKinds) * kLanes; i += kThreads) {
      store_vector(&shared.window[i / kLanes][i % kLanes * kCount], Vector{});
    }

    A level_sum = A(0);  // of this thread's samples of a unit
    int loaded_group = -1, loaded_panel = -1, stage = 0;
    const int warp_row = warp / kWarpsAcross * kWarpRows, warp_column = warp % kWarpsAcross * kWarpColumns;
#pragma unroll 1
    for (int s = 0; s < steps; ++s) {
      const Unit unit = step.unit;
      const int first_tap = step.first_tap, left = maps.taps - first_tap, taps = left < kTaps ? left : kTaps;
      Sums<A, kWarpRows / 16, kWarpColumns / 8> sums;
      sums.clear();
#pragma unroll 1
      for (int slice = 0; slice < params.slices; ++slice) {
        const int panel = slice / kPanel;
        if (loaded_group != unit.group || loaded_panel != panel) {
          loaded_group = unit.group, loaded_panel = panel;
          sync_block();  // nobody reads the last one any more
          load_panel(params, patch, unit.group, panel * kPanel, shared);
          commit_copies();
          wait_for_copies<0>();
        }
        // This slice's weights have landed, and nobody reads the slice before, nor the last step's samples, any more.
        wait_for_copies<kStages - 2>();
        sync_block();
        copy_ahead(stage == 0 ? kStages - 1 : stage - 1);
        if (warp_column < taps * kRun) {
#pragma unroll
          for (int i = 0; i < kSteps; ++i) {
            Multiply::add_rows(shared.gradient[slice % kPanel], warp_row, shared.weights[stage], warp_column, i, sums);
          }
        }
        stage = stage + 1 == kStages ? 0 : stage + 1;
      }

#pragma unroll 1
      for (int t = 0; t < taps; ++t) {
        if (t > 0) sync_block();  // nobody reads the tap before any more
#pragma unroll
        for (int block = 0; block < kWarpColumns / 8; ++block) {
          const int begin = warp_column + block * 8 - t * kRun;
          if (kTaps > 1 && (begin < 0 || begin >= kRun)) continue;
          sums.visit_pairs_of_block(block, [&](int row, int column, A value0, A value1) {
            store_pair(&shared.samples[warp_row + row][begin + column], value0, value1);
          });
        }
        sync_block();
        if (params.offset != nullptr || params.mask != nullptr || params.level_weight != nullptr) {
          multiply_corners(maps, patch, unit, t, shared);
        }
        if (params.features[unit.level] != nullptr) add_to_window(params, patch, unit, t, shared);
        if (params.samples != nullptr) write_samples(params, patch, unit, first_tap + t, shared);
      }
      sync_block();  // the products are complete, and nobody reads the tables or samples any more
      if (owner && pixel >= 0 && own_tap < taps) {
        add_positions(params, patch, unit, split, first_tap + own_tap, cell, reading.mask, pixel,
                      shared.corner_products[own_tap][own_pixel], level_sum);
      }
      step.next(params);
      if (owner && s + 1 < steps) fill_tables(s + 2 < steps);
      if (first_tap + taps < maps.taps) continue;
      if (params.features[unit.level] != nullptr) add_window(params, patch, unit, shared);
      if (params.level_weight != nullptr) {
#pragma unroll
        for (int mask = kWarp / 2; mask > 0; mask /= 2) level_sum += shuffle_xor(level_sum, mask);
        if (owner && thread % kWarp == 0) shared.level_sums[warp] = level_sum;
        level_sum = A(0);
        sync_block();
        if (thread == 0) {
          A sum = A(0);
          for (int w = 0; w < kOwners / kWarp; ++w) sum += shared.level_sums[w];
          const int64_t row = (static_cast<int64_t>(patch.n) * maps.levels + unit.level) * params.runs + unit.run;
          const int64_t patches = Patch<kPixels>::count(maps);
          params.level_weight[row * patches + patch_index % patches] = sum;
        }
      }
    }
    wait_for_copies<0>();
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

  // The first row or column of the window: its middle is the middle of what the patch reads without offsets. Beyond the
  // map a window would be of no use.
  static DYHEAD_DEVICE int window_begin(const AxisMap& axis, int first, int count, int taps, int size) {
    const double low = axis.step * first + axis.origin;
    const double high = axis.step * (first + count - 1) + axis.tap * (taps - 1) + axis.origin + 1;
    const double begin = std::floor((low + high + 1) / 2) - kSide / 2, least = -kSide, most = size;
    return static_cast<int>(begin < least ? least : begin < most ? begin : most);
  }

  static DYHEAD_DEVICE Corners window_begins(const Maps<A>& maps, const Patch<kPixels>& patch, int level) {
    const auto& to = maps.level[level];
    return {{window_begin(to.rows, patch.row, patch.kHeight, maps.kernel_height, to.height),
             window_begin(to.columns, patch.column, patch.kWidth, maps.kernel_width, to.width)}};
  }

  static DYHEAD_DEVICE void set_tables(const Maps<A>& maps, const Patch<kPixels>& patch, int level, const Cell<A>& cell,
                                       A factor, Corners& corners, Entry (&entries)[4]) {
    const Corners begin = window_begins(maps, patch, level);
    const int width = maps.level[level].width;
    // Of the top left corner, from the first one that is inside.
    int64_t row = 0, column = 0;
    for (int i = 3; i >= 0; --i) {
      if (cell.corner[i] < 0) continue;
      const int corner = static_cast<int>(cell.corner[i]);
      row = corner / width - i / 2;
      column = corner % width - i % 2;
    }
    row -= begin.at[0];
    column -= begin.at[1];
    A shares[4];
    corner_shares(cell, shares);
    Corners found;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t y = row + i / 2, x = column + i % 2;
      found.at[i] = static_cast<int>(cell.corner[i]);
      const bool near = y >= 0 && y < kSide && x >= 0 && x < kSide;
      const int place = static_cast<int>(y * kSide + x);
      const int slot = static_cast<int>((y & 1) * 2 + (x & 1));
      entries[slot] = {found.at[i] < 0 ? kPlaces + slot : near ? place : ~found.at[i], shares[i] * factor};
    }
    corners = found;
  }

  // Which of the kinds that share an entry's place in the table owns it; for what is nowhere, none that exists.
  static DYHEAD_DEVICE int subkind(int target) {
    if (target >= kPlaces) return kSubkinds;
    const int at = target < 0 ? ~target / 2 : target / 2, row = at / kSide % 2, column = at % 2;
    return kSubkinds == 2 ? row : 2 * row + column;
  }

  static DYHEAD_DEVICE void add_to_window(const Params& params, const Patch<kPixels>& patch, const Unit& unit, int t,
                                          Shared& shared) {
    const int c = thread_index() % kRun, kind = thread_index() / kRun, slot = kind % 4, unused = kPlaces + kind;
    if (unit.begin + c >= unit.end) return;
    A* const level = params.features[unit.level] + patch.n * params.maps.image_stride(unit.level) + unit.begin + c;
    // A few pixels at a time, so that they do not wait for each other's sums.
    constexpr int kBatch = 4;
#pragma unroll 1
    for (int first = 0; first < kPixels; first += kBatch) {
      int place[kBatch];
      A share[kBatch], sample[kBatch], sum[kBatch];
      bool far = false;
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        const Entry entry = shared.entry[t][first + k][slot];
        place[k] = kSubkinds == 1 || subkind(entry.target) == kind / 4 ? entry.target : unused;
        share[k] = entry.share;
        sample[k] = shared.samples[first + k][c];
        far = far || place[k] < 0;
      }
      if (far) {
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
          if (place[k] >= 0) continue;
          atomic_add(level + static_cast<int64_t>(~place[k]) * params.maps.channels, share[k] * sample[k]);
          place[k] = unused;
        }
      }
#pragma unroll
      for (int k = 0; k < kBatch; ++k) sum[k] = shared.window[place[k]][c];
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
#pragma unroll
        for (int j = 0; j < k; ++j) {
          if (place[j] == place[k]) sum[k] = sum[j];
        }
        sum[k] += share[k] * sample[k];
      }
#pragma unroll
      for (int k = 0; k < kBatch; ++k) shared.window[place[k]][c] = sum[k];
    }
  }

  // Adds the window to main memory, and clears it.
  static DYHEAD_DEVICE void add_window(const Params& params, const Patch<kPixels>& patch, const Unit& unit,
                                       Shared& shared) {
    const Maps<A>& maps = params.maps;
    const auto& to = maps.level[unit.level];
    const Corners begin = window_begins(maps, patch, unit.level);
    const int c = thread_index() % kLanes * kCount, valid = unit.end - unit.begin - c;
    A* const level = params.features[unit.level] + patch.n * maps.image_stride(unit.level) + unit.begin + c;
    for (int place = thread_index() / kLanes; place < kPlaces; place += kThreads / kLanes) {
      const int row = begin.at[0] + place / kSide, column = begin.at[1] + place % kSide;
      const Vector vector = read_vector(&shared.window[place][c]);
      store_vector(&shared.window[place][c], Vector{});
      A sum[kCount];
      std::memcpy(sum, &vector, sizeof(vector));
      bool any = false;  // NaN is something
#pragma unroll
      for (int k = 0; k < kCount; ++k) any = any || sum[k] != A(0);
      if (!any || valid <= 0 || row < 0 || row >= to.height || column < 0 || column >= to.width) continue;
      A* const pixel = level + (static_cast<int64_t>(row) * to.width + column) * maps.channels;
      if constexpr (kVectors) {
        atomic_add(pixel, sum);
      } else {
#pragma unroll
        for (int k = 0; k < kCount; ++k) {
          if (k < valid) atomic_add(pixel + k, sum[k]);
        }
      }
    }
  }

  static DYHEAD_DEVICE void write_samples(const Params& params, const Patch<kPixels>& patch, const Unit& unit, int tap,
                                          Shared& shared) {
    const Maps<A>& maps = params.maps;
    const int64_t image = patch.n - params.first_patch / Patch<kPixels>::count(maps);
    const int64_t plane = (image * params.run_count + unit.run - params.first_run) * maps.taps + tap;
    Stored* const to = params.samples + plane * maps.pixels * kRun;
    const int c = thread_index() % kLanes * kCount;
    for (int p = thread_index() / kLanes; p < kPixels; p += kThreads / kLanes) {
      const int pixel = patch.pixel(maps, p);
      if (pixel < 0) continue;
      A value[kCount];
      const Vector vector = read_vector(&shared.samples[p][c]);
      std::memcpy(value, &vector, sizeof(vector));
#pragma unroll
      for (int k = 0; k < kCount; k += 2) {
        store_pair(to + static_cast<int64_t>(pixel) * kRun + c + k, value[k], value[k + 1]);
      }
    }
  }

  // The products of samples' gradients with the features at their four corners, summed up over a run.
  static DYHEAD_DEVICE void multiply_corners(const Maps<A>& maps, const Patch<kPixels>& patch, const Unit& unit, int t,
                                             Shared& shared) {
    const int lane = thread_index() % kLanes, c = lane * kCount, valid = unit.end - unit.begin - c;
    const T* const features = static_cast<const T*>(maps.level[unit.level].features) +
                              patch.n * maps.image_stride(unit.level) + unit.begin + c;
    // Of two pixels all corners are under way before the first one is used.
    constexpr int kBatch = 2, kPixelsAtOnce = kThreads / kLanes;
    static_assert(kPixels % (kBatch * kPixelsAtOnce) == 0);
#pragma unroll 1
    for (int first = thread_index() / kLanes; first < kPixels; first += kBatch * kPixelsAtOnce) {
      T value[kBatch][4][kCount];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const Corners corners = shared.corner[t][first + b * kPixelsAtOnce];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          load_channels<kVectors>(features, corners.at[i], maps.channels * static_cast<int>(sizeof(T)), valid,
                                  value[b][i]);
        }
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int p = first + b * kPixelsAtOnce;
        A gradient[kCount];
        const Vector vector = read_vector(&shared.samples[p][c]);
        std::memcpy(gradient, &vector, sizeof(vector));
        A product[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          A wide[kCount];
          widen(value[b][i], wide);
          product[i] = A(0);
#pragma unroll
          for (int k = 0; k < kCount; ++k) product[i] += gradient[k] * wide[k];
        }
        // Two exchanges leave every lane the part of one corner; the rest sums it up over the lanes that have the same.
        const bool below = lane & kLanes / 2, beside = lane & kLanes / 4;
        const A kept0 = below ? product[2] : product[0], kept1 = below ? product[3] : product[1];
        const A row0 = kept0 + shuffle_xor(below ? product[0] : product[2], kLanes / 2);
        const A row1 = kept1 + shuffle_xor(below ? product[1] : product[3], kLanes / 2);
        A sum = (beside ? row1 : row0) + shuffle_xor(beside ? row0 : row1, kLanes / 4);
#pragma unroll
        for (int mask = kLanes / 8; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
        if (lane % (kLanes / 4) == 0) shared.corner_products[t][p][2 * below + beside] = sum;
      }
    }
  }

  // Adds a run's and level's part of the gradients at one pixel and tap. The same thread adds all of them, in order.
  static DYHEAD_DEVICE void add_positions(const Params& params, const Patch<kPixels>& patch, const Unit& unit,
                                          int split, int tap, const Cell<A>& cell, A mask, int pixel,
                                          const A (&products)[4], A& level_sum) {
    const Maps<A>& maps = params.maps;
    if (params.offset == nullptr && params.mask == nullptr && params.level_weight == nullptr) return;
    const auto& level = maps.level[unit.level];
    const SampleGradients<A> more =
        sample_gradients(cell, products, mask, maps.level_factor(patch.n, unit.level), static_cast<A>(level.rows.shift),
                         static_cast<A>(level.columns.shift));
    const int64_t begin = plane(patch.n, maps.offset_groups, unit.offset_group, maps.taps, tap, maps.pixels);
    if (params.offset != nullptr) {
      A* const to = params.offset + split * params.offset_stride + 2 * begin + pixel;
      owned_atomic_add(to, more.dy);
      owned_atomic_add(to + maps.pixels, more.dx);
    }
    if (params.mask != nullptr) owned_atomic_add(params.mask + split * params.mask_stride + begin + pixel, more.mask);
    level_sum += more.level_weight;
  }
};

}  // namespace dyhead::cuda
