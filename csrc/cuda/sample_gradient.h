// The gradients of samples, and from them those of features, offset, mask and level weight.
//
// The output's gradient times a tap's weights is the gradient of that tap's samples: a patch of 64 pixels by a run of
// channels, for several taps at a time (all nine of a 3x3 kernel, where shared memory is large enough). They go through
// shared memory, and never into main memory unless the gradients have to be deterministic. From there groups of lanes
//   * take a sample each, multiply it with the features at its four corners and sum up over channels by shuffles
//     (gradients of offset, mask and level weight);
//   * take a pixel of the level each and sum up what samples around it add to the features' gradient, which is added to
//     main memory once.
//
// What taps read lies around the patch. So a block lists, for every pixel of a window of kSide x kSide pixels of the
// level, the samples of which it is a corner; corners outside the window have a list of their own, and are added to
// main memory one by one. Lists are made once for a level and taps, and serve all runs of channels. Their order is the
// one in which threads arrive.
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

template <typename T, bool kTensorCores, bool kVectors, int kTapsAtOnce>
struct SampleGradient {
  using A = Accumulator<T>;
  using Multiply = Product<T, kTensorCores>;
  static constexpr int kPixels = 64, kTaps = kTapsAtOnce, kRun = kRowBytes / static_cast<int>(sizeof(A));
  // A column of warps for each tap.
  static constexpr int kWarpsDown = kTaps > 4 ? 2 : 4, kWarpRows = kPixels / kWarpsDown;
  static constexpr int kThreads = kTaps * kWarpsDown * kWarp, kMinBlocks = 1;
  static constexpr int kPanel = 4;   // slices of the output's gradient that stay
  static constexpr int kStages = 2;  // a tile of weights is on its way while the one before is multiplied with
  static constexpr int kCount = kVector<A>, kLanes = kRun / kCount;  // channels of a lane, lanes of a row of sums
  static constexpr int kCornerLanes = kRun / kVector<T>;             // lanes of a sample and its corners
  static constexpr int kSamples = kTaps * kPixels;                   // tap * kPixels + pixel
  static constexpr int kSide = kTaps > 4 ? 24 : 20;                  // of the window: as shared memory allows
  static constexpr int kPlaces = kSide * kSide;
  static_assert(kSamples <= kThreads, "a thread owns a sample");
  using Pack = PackWeights<T, kTensorCores, false, kTaps * kRun, kTaps>;
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
    A* level_weight;                     // (N, L, steps of a level, patches), 0, to be summed; null: not wanted

    DYHEAD_DEVICE bool wants_positions() const {
      return offset != nullptr || mask != nullptr || level_weight != nullptr;
    }
  };

  // What a block works on at a time: taps of a level, a run of channels. Runs follow each other, then taps, then
  // levels.
  struct Step {
    int level, tap, run;  // tap: the first one
    int begin, end;       // channels of the run
    int group, offset_group;

    // Becomes number `index` of a launch.
    DYHEAD_DEVICE void start(const Params& params, int index) {
      const int row = index / params.run_count, groups = Pack::tap_groups(params.maps);
      level = params.first_level + row / groups;
      tap = row % groups * kTaps;
      rewind(params);
      for (int i = index % params.run_count; i > 0; --i) next(params);
    }
    // Becomes the one after `other`.
    DYHEAD_DEVICE void follow(const Step& other, const Params& params) {
      level = other.level;
      tap = other.tap;
      run = other.run;
      end = other.end;
      next(params);
    }
    DYHEAD_DEVICE void rewind(const Params& params) {
      run = params.first_run;
      begin = 0;
      for (int i = 0; i < run; ++i) begin = params.maps.run_end(begin, kRun);
      find(params.maps);
    }
    DYHEAD_DEVICE void find(const Maps<A>& maps) {
      end = maps.run_end(begin, kRun);
      group = begin / maps.group_channels;
      offset_group = begin / maps.offset_channels;
    }
    DYHEAD_DEVICE void next(const Params& params) {
      if (++run < params.first_run + params.run_count) {
        begin = end;
        return find(params.maps);
      }
      if ((tap += kTaps) >= params.maps.taps) tap = 0, ++level;
      rewind(params);
    }
    // Whether the same samples are read.
    DYHEAD_DEVICE bool shares_terms(const Step& other) const {
      return level == other.level && tap == other.tap && offset_group == other.offset_group;
    }
  };

  struct alignas(16) Corners {
    int at[4];  // pixels of the level, -1: outside
  };
  // What a sample adds to a pixel. 4 * sample + corner.
  struct Term {
    int corner;
    A share;
  };
  struct Shared {
    char gradient[kPanel][kPixels * kRowBytes];
    char weights[kStages][Pack::kTileBytes];
    char samples[kSamples * kRowBytes];  // their gradients, as `sample_at` says
    Corners corners[kSamples];
    A products[kSamples][4];  // of samples' gradients with corners, summed up over runs
    // By places of the window, and last what lies outside.
    int term_count[kPlaces + 1], first_term[kPlaces + 1];
    Term terms[4 * kSamples];
    int listed;  // terms
    A level_sums[kThreads / kWarp];
    // What the block works on is here, because registers are few.
    Patch<kPixels> patch;
    Step steps[2];
  };
  static constexpr int kSharedBytes = static_cast<int>(sizeof(Shared));

  // Channel c of a sample's gradient. Chunks of 16 bytes stand in an order that puts what a warp writes at a time, a
  // few neighbours in 8 rows, into different banks.
  template <typename SharedMemory>
  static DYHEAD_DEVICE auto sample_at(SharedMemory& shared, int sample, int c) {
    const int chunk = c / kCount ^ (sample & 3) * 2;
    using Element = std::conditional_t<std::is_const_v<SharedMemory>, const A, A>;
    return reinterpret_cast<Element*>(shared.samples + sample * kRowBytes) + chunk * kCount + c % kCount;
  }

  // A thread's own sample. It is found twice for a level and taps, because registers are few.
  struct Sample {
    int tap, pixel;  // pixel: -1 where there is none
    A mask;
    Cell<A> cell;

    static DYHEAD_DEVICE Sample own(const Maps<A>& maps, const Patch<kPixels>& patch, const Step& step) {
      const int tap = step.tap + thread_index() / kPixels;
      const bool exists = thread_index() < kSamples && tap < maps.taps;
      const int pixel = exists ? patch.pixel(maps, thread_index() % kPixels) : -1;
      const Reading<A> reading = read_offset(maps, patch.n, step.offset_group, tap, pixel);
      return {tap, pixel, reading.mask, locate_sample(maps, step.level, tap, pixel, reading)};
    }
  };

  static DYHEAD_DEVICE void run(const Params& params) {
    const Maps<A>& maps = params.maps;
    Shared& shared = *reinterpret_cast<Shared*>(shared_memory());
    const int thread = thread_index(), warp = thread / kWarp;
    const int split = static_cast<int>(block_index() % params.splits);
    const int64_t all = static_cast<int64_t>(params.run_count) * params.level_count * Pack::tap_groups(maps);
    const int first = static_cast<int>(all * split / params.splits);
    const int steps = static_cast<int>(all * (split + 1) / params.splits) - first;
    if (steps == 0) return;
    if (thread == 0) {
      // Member by member, because the search for races does not see copies of structs.
      const auto patch = Patch<kPixels>::at(maps, params.first_patch + block_index() / params.splits);
      shared.patch.n = patch.n;
      shared.patch.row = patch.row;
      shared.patch.column = patch.column;
      shared.steps[0].start(params, first);
    }
    sync_block();

    // Weights lie in the order of steps, but for runs that are not this launch's.
    const Step& begin = shared.steps[0];
    const int64_t row = static_cast<int64_t>(begin.level) * Pack::tap_groups(maps) + begin.tap / kTaps;
    const char* weights = params.weights + (row * params.runs + begin.run) * params.slices * Pack::kTileBytes;
    Pack::template copy_tile<kThreads>(weights, shared.weights[0]);

    const int warp_row = warp % kWarpsDown * kWarpRows, warp_tap = warp / kWarpsDown;
    A level_sum = A(0);
    const int panels = (params.slices + kPanel - 1) / kPanel;
    int loaded = -1;      // group * panels + panel
    bool listed = false;  // whether the terms are the step's
#pragma unroll 1
    for (int s = 0; s < steps; ++s) {
      const Step& step = shared.steps[s % 2];
      Sums<A, kWarpRows / 16, kRun / 8> sums;
      sums.clear();
#pragma unroll 1
      for (int slice = 0; slice < params.slices; ++slice) {
        const int panel = slice / kPanel, wanted = step.group * panels + panel;
        if (loaded != wanted) {
          loaded = wanted;
          sync_block();  // nobody reads the last one any more
          load_panel(params, shared.patch, step.group, panel * kPanel, shared);
        }
        // This slice's weights have landed, and nobody reads the slice before, nor the last step's samples, any more.
        commit_copies();
        wait_for_copies<0>();
        sync_block();
        const int stage = (s * params.slices + slice) % kStages;
        if (s + 1 < steps || slice + 1 < params.slices) {
          const bool end = slice + 1 == params.slices && step.run + 1 == params.first_run + params.run_count;
          const int64_t others = end ? params.runs - params.run_count : 0;
          weights += (1 + others * params.slices) * Pack::kTileBytes;
          Pack::template copy_tile<kThreads>(weights, shared.weights[stage ^ 1]);
        }
        if (step.tap + warp_tap < maps.taps) {
#pragma unroll 1  // registers
          for (int i = 0; i < kSteps; ++i) {
            Multiply::add_rows(shared.gradient[slice % kPanel], warp_row, shared.weights[stage], warp_tap * kRun, i,
                               sums);
          }
        }
      }
      sums.visit_pairs([&](int row, int column, A value0, A value1) {
        store_pair(sample_at(shared, warp_tap * kPixels + warp_row + row, column), value0, value1);
      });
      const bool more = s + 1 < steps;
      if (thread == 0 && more) shared.steps[(s + 1) % 2].follow(step, params);
      if (!listed) list_terms(maps, step, shared);
      sync_block();

      if (params.wants_positions()) multiply_corners(maps, step, shared);
      if (params.features[step.level] != nullptr) add_features(params, step, shared);
      if (params.samples != nullptr) write_samples(params, step, shared);

      const Step& next = shared.steps[(s + 1) % 2];
      listed = more && next.shares_terms(step);
      if (listed || !params.wants_positions()) continue;
      sync_block();  // the products are complete
      add_positions(params, step, shared, level_sum);
      if (params.level_weight == nullptr || (more && next.level == step.level)) continue;
#pragma unroll
      for (int mask = kWarp / 2; mask > 0; mask /= 2) level_sum += shuffle_xor(level_sum, mask);
      if (thread % kWarp == 0) shared.level_sums[warp] = level_sum;
      level_sum = A(0);
      sync_block();
      if (thread == 0) {
        A sum = A(0);
        for (int w = 0; w < kThreads / kWarp; ++w) sum += shared.level_sums[w];
        // The place of the last step, which no other block has.
        const int64_t row = static_cast<int64_t>(shared.patch.n) * maps.levels + step.level;
        const int64_t place = (row * Pack::tap_groups(maps) + step.tap / kTaps) * params.runs + step.run;
        const int64_t patches = Patch<kPixels>::count(maps), patch = params.first_patch + block_index() / params.splits;
        params.level_weight[place * patches + patch % patches] = sum;
      }
    }
    wait_for_copies<0>();
  }

  static DYHEAD_DEVICE void load_panel(const Params& params, const Patch<kPixels>& patch, int group, int first_slice,
                                       Shared& shared) {
    const Maps<A>& maps = params.maps;
    constexpr int kRowsAtOnce = kThreads >= kPixels * kChunks ? kPixels : kPixels / 2;
    const int chunk = thread_index() % kChunks, out = first_slice * kRow<T> + chunk * kVector<T>;
    if (thread_index() >= kRowsAtOnce * kChunks) return;
#pragma unroll 1  // registers
    for (int row = thread_index() / kChunks; row < kPixels; row += kRowsAtOnce) {
      const int pixel = patch.pixel(maps, row);
      const T* from =
          params.gradient.at(static_cast<int64_t>(patch.n) * maps.pixels + (pixel < 0 ? 0 : pixel), group, out);
      char* to = shared.gradient[0] + tile_offset(row, chunk);
#pragma unroll 1
      for (int i = 0; i < kPanel; ++i) {
        const bool valid = pixel >= 0 && out + i * kRow<T> < params.gradient.group_stride;
        copy_async(to, valid ? from : params.gradient.data, valid);
        from += kRow<T>;
        to += kPixels * kRowBytes;
      }
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

  // Lists what all samples add to which pixels.
  static DYHEAD_DEVICE void list_terms(const Maps<A>& maps, const Step& step, Shared& shared) {
    const Patch<kPixels>& patch = shared.patch;
    const int level = step.level;
    const Sample own = Sample::own(maps, patch, step);
    const Cell<A>& cell = own.cell;
    const int thread = thread_index();
    for (int i = thread; i <= kPlaces; i += kThreads) shared.term_count[i] = 0;
    if (thread == 0) shared.listed = 0;
    sync_block();
    int place[4] = {}, rank[4] = {};
    if (thread < kSamples) {
      const Corners begin = window_begins(maps, patch, level);
      const int width = maps.level[level].width;
      Corners corners;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int corner = static_cast<int>(cell.corner[i]);
        corners.at[i] = corner;
        if (corner < 0) continue;
        const int64_t y = static_cast<int64_t>(corner / width) - begin.at[0];
        const int64_t x = static_cast<int64_t>(corner % width) - begin.at[1];
        const bool near = y >= 0 && y < kSide && x >= 0 && x < kSide;
        place[i] = near ? static_cast<int>(y * kSide + x) : kPlaces;
        rank[i] = shared_fetch_add(&shared.term_count[place[i]], 1);
      }
      shared.corners[thread] = corners;
#pragma unroll
      for (int i = 0; i < 4; ++i) shared.products[thread][i] = A(0);
    }
    sync_block();
    for (int i = thread; i <= kPlaces; i += kThreads) {
      shared.first_term[i] = shared_fetch_add(&shared.listed, shared.term_count[i]);
    }
    sync_block();
    if (thread < kSamples) {
      const A factor = own.mask * maps.level_factor(patch.n, level);
      A shares[4];
      corner_shares(cell, shares);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (cell.corner[i] < 0) continue;
        shared.terms[shared.first_term[place[i]] + rank[i]] = {4 * thread + i, shares[i] * factor};
      }
    }
  }

  // Adds a run's part of the features' gradient to main memory.
  static DYHEAD_DEVICE void add_features(const Params& params, const Step& step, const Shared& shared) {
    const Maps<A>& maps = params.maps;
    const Patch<kPixels>& patch = shared.patch;
    const Corners begin = window_begins(maps, patch, step.level);
    const int c = thread_index() % kLanes * kCount, valid = step.end - step.begin - c;
    const int width = maps.level[step.level].width;
    A* const gradient = params.features[step.level] + patch.n * maps.image_stride(step.level) + step.begin + c;
    const auto add = [&](int64_t pixel, const A(&sum)[kCount]) {
      A* const to = gradient + pixel * maps.channels;
      if constexpr (kVectors) {
        if (valid > 0) atomic_add(to, sum);
      } else {
#pragma unroll
        for (int k = 0; k < kCount; ++k) {
          if (k < valid) atomic_add(to + k, sum[k]);
        }
      }
    };
    const auto add_term = [&](const Term& term, A(&sum)[kCount]) {
      A sample[kCount];
      const Vector vector = read_vector(sample_at(shared, term.corner / 4, c));
      std::memcpy(sample, &vector, sizeof(vector));
#pragma unroll
      for (int k = 0; k < kCount; ++k) sum[k] += term.share * sample[k];
    };
    constexpr int kGroups = kThreads / kLanes;
#pragma unroll 1
    for (int place = thread_index() / kLanes; place < kPlaces; place += kGroups) {
      const int count = shared.term_count[place];
      if (count == 0) continue;
      const Term* const terms = shared.terms + shared.first_term[place];
      A sum[kCount] = {};
#pragma unroll 4
      for (int i = 0; i < count; ++i) add_term(terms[i], sum);
      bool any = false;  // NaN is something
#pragma unroll
      for (int k = 0; k < kCount; ++k) any = any || sum[k] != A(0);
      if (!any) continue;
      add(static_cast<int64_t>(begin.at[0] + place / kSide) * width + begin.at[1] + place % kSide, sum);
    }
    const Term* const outside = shared.terms + shared.first_term[kPlaces];
#pragma unroll 1
    for (int i = thread_index() / kLanes; i < shared.term_count[kPlaces]; i += kGroups) {
      A sum[kCount] = {};
      add_term(outside[i], sum);
      add(shared.corners[outside[i].corner / 4].at[outside[i].corner % 4], sum);
    }
  }

  static DYHEAD_DEVICE void write_samples(const Params& params, const Step& step, const Shared& shared) {
    const Maps<A>& maps = params.maps;
    const Patch<kPixels>& patch = shared.patch;
    const int64_t image = patch.n - params.first_patch / Patch<kPixels>::count(maps);
    const int c = thread_index() % kLanes * kCount;
    for (int s = thread_index() / kLanes; s < kSamples; s += kThreads / kLanes) {
      const int tap = step.tap + s / kPixels, pixel = patch.pixel(maps, s % kPixels);
      if (tap >= maps.taps || pixel < 0) continue;
      const int64_t plane = (image * params.run_count + step.run - params.first_run) * maps.taps + tap;
      Stored* const to = params.samples + (plane * maps.pixels + pixel) * kRun + c;
      A value[kCount];
      const Vector vector = read_vector(sample_at(shared, s, c));
      std::memcpy(value, &vector, sizeof(vector));
#pragma unroll
      for (int k = 0; k < kCount; k += 2) store_pair(to + k, value[k], value[k + 1]);
    }
  }

  // Adds the products of samples' gradients with the features at their four corners, summed up over a run.
  static DYHEAD_DEVICE void multiply_corners(const Maps<A>& maps, const Step& step, Shared& shared) {
    constexpr int kWide = kVector<T>;
    const int lane = thread_index() % kCornerLanes, c = lane * kWide, valid = step.end - step.begin - c;
    const T* const features = static_cast<const T*>(maps.level[step.level].features) +
                              shared.patch.n * maps.image_stride(step.level) + step.begin + c;
    const bool below = lane & kCornerLanes / 2, beside = lane & kCornerLanes / 4;
    // Of kBatch samples all corners are under way before the first one is used.
    constexpr int kBatch = 2, kSamplesAtOnce = kThreads / kCornerLanes;
    static_assert(kSamples % (kBatch * kSamplesAtOnce) == 0);
#pragma unroll 1
    for (int first = thread_index() / kCornerLanes; first < kSamples; first += kBatch * kSamplesAtOnce) {
      T value[kBatch][4][kWide];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const Corners corners = shared.corners[first + b * kSamplesAtOnce];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          load_channels<kVectors>(features, corners.at[i], maps.channels * static_cast<int>(sizeof(T)), valid,
                                  value[b][i]);
        }
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int sample = first + b * kSamplesAtOnce;
        A gradient[kWide];
#pragma unroll
        for (int k = 0; k < kWide; k += kCount) {
          const Vector vector = read_vector(sample_at(std::as_const(shared), sample, c + k));
          std::memcpy(gradient + k, &vector, sizeof(vector));
        }
        A product[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          A wide[kWide];
          widen(value[b][i], wide);
          product[i] = A(0);
#pragma unroll
          for (int k = 0; k < kWide; ++k) product[i] += gradient[k] * wide[k];
        }
        // Two exchanges leave every lane the part of one corner; the rest sums it up over the lanes that have the same.
        const A kept0 = below ? product[2] : product[0], kept1 = below ? product[3] : product[1];
        const A row0 = kept0 + shuffle_xor(below ? product[0] : product[2], kCornerLanes / 2);
        const A row1 = kept1 + shuffle_xor(below ? product[1] : product[3], kCornerLanes / 2);
        A sum = (beside ? row1 : row0) + shuffle_xor(beside ? row0 : row1, kCornerLanes / 4);
#pragma unroll
        for (int mask = kCornerLanes / 8; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
        if (lane % (kCornerLanes / 4) == 0) shared.products[sample][2 * below + beside] += sum;
      }
    }
  }

  // Adds what runs of a level give of the gradients at one pixel and tap. The same thread adds all of them, in order.
  static DYHEAD_DEVICE void add_positions(const Params& params, const Step& step, const Shared& shared, A& level_sum) {
    const Maps<A>& maps = params.maps;
    const Sample own = Sample::own(maps, shared.patch, step);
    if (own.pixel < 0) return;
    const auto& axes = maps.level[step.level];
    const SampleGradients<A> more = sample_gradients(
        own.cell, shared.products[thread_index()], own.mask, maps.level_factor(shared.patch.n, step.level),
        static_cast<A>(axes.rows.shift), static_cast<A>(axes.columns.shift));
    const int64_t split = block_index() % params.splits;
    const int64_t begin = plane(shared.patch.n, maps.offset_groups, step.offset_group, maps.taps, own.tap, maps.pixels);
    if (params.offset != nullptr) {
      A* const to = params.offset + split * params.offset_stride + 2 * begin + own.pixel;
      owned_atomic_add(to, more.dy);
      owned_atomic_add(to + maps.pixels, more.dx);
    }
    if (params.mask != nullptr) {
      owned_atomic_add(params.mask + split * params.mask_stride + begin + own.pixel, more.mask);
    }
    level_sum += more.level_weight;
  }
};

}  // namespace dyhead::cuda
