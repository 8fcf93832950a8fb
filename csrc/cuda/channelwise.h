// Channel-wise maps: statistics of channels, and the maximum of two affine maps. What bounds them is memory: a thread
// takes 16 bytes of channels (kCount of them; or one, where channels are no whole vectors), a block a chunk of pixels.
// Sums over pixels are made of the chunks' sums, added in their order, so that they are the same every time.

#pragma once

#include <cmath>
#include <cstring>

#include "inputs.h"

namespace dyhead::cuda {

constexpr int kChunkPixels = 128;

// kCount elements from `from` on, on a boundary of 16 bytes if they fill vectors, as E.
template <int kCount, typename E, typename T>
DYHEAD_DEVICE void load_run(const T* from, E (&result)[kCount]) {
  T values[kCount];
  if constexpr (kCount * sizeof(T) % sizeof(Vector) == 0) {
#pragma unroll
    for (int i = 0; i < kCount / kVector<T>; ++i) {
      const Vector vector = load_vector(from + i * kVector<T>);
      std::memcpy(values + i * kVector<T>, &vector, sizeof(vector));
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = from[i];
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) result[i] = static_cast<E>(values[i]);
}

template <int kCount, typename T, typename A>
DYHEAD_DEVICE void store_run(T* to, const A (&values)[kCount]) {
  T rounded[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) rounded[i] = static_cast<T>(values[i]);
  if constexpr (kCount * sizeof(T) == sizeof(Vector)) {
    Vector vector;
    std::memcpy(&vector, rounded, sizeof(vector));
    store_vector(to, vector);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) to[i] = rounded[i];
  }
}

// A block's share of the work: kLanes threads side by side take kLanes * kCount channels, kLines of such rows pixels of
// a chunk in turn.
template <int kCount>
struct Share {
  static constexpr int kThreads = 256, kLanes = 32, kLines = kThreads / kLanes, kChannels = kLanes * kCount;

  int64_t n, chunk, chunks, first, last;  // image, chunk of it, and the chunk's pixels [first, last)
  int term, line, lane, channel;          // term: what else blocks are divided by

  DYHEAD_DEVICE Share(int64_t pixels, int channels, int terms) {
    int64_t rest = block_index();
    const int column_blocks = (channels + kChannels - 1) / kChannels;
    lane = thread_index() % kLanes;
    line = thread_index() / kLanes;
    channel = (static_cast<int>(rest % column_blocks) * kLanes + lane) * kCount;
    rest /= column_blocks;
    term = static_cast<int>(rest % terms);
    rest /= terms;
    chunks = (pixels + kChunkPixels - 1) / kChunkPixels;
    chunk = rest % chunks;
    n = rest / chunks;
    first = chunk * kChunkPixels;
    last = first + kChunkPixels < pixels ? first + kChunkPixels : pixels;
  }

  // What the lines have of channel `i` of the block stands at place(i, line) of an array in shared memory with kCount
  // elements of every thread; i may go on into a next such array.
  DYHEAD_DEVICE int channel_of(int i) const { return channel - lane * kCount + i % kLanes * kCount + i / kLanes; }
  static DYHEAD_DEVICE int place(int i, int line) { return i / kLanes * kThreads + line * kLanes + i % kLanes; }
  // How many of a chunk's pixels a line takes.
  static DYHEAD_DEVICE int pixels_of_line(int pixels, int line) {
    return pixels > line ? (pixels - line - 1) / kLines + 1 : 0;
  }

  static int64_t blocks(int64_t batch, int64_t pixels, int64_t channels, int64_t terms) {
    return blocks_of(channels, kChannels) * terms * blocks_of(pixels, kChunkPixels) * batch;
  }
};

// Mean and sum of squared differences from it, of `count` values so far (Welford, 1962; joined after Chan et al.,
// 1983): no difference of large numbers.
template <typename A>
struct Moments {
  A mean, squares;

  DYHEAD_DEVICE void add(A value, A share) {  // share: 1 / the new count
    const A difference = value - mean;
    mean += difference * share;
    squares += difference * (value - mean);
  }
  DYHEAD_DEVICE void join(const Moments& other, A count, A other_count) {
    if (other_count == A(0)) return;
    const A share = other_count / (count + other_count), difference = other.mean - mean;
    mean += difference * share;
    squares += other.squares + difference * difference * count * share;
  }
};

// Moments of the chunks, (image, chunk, channel).
template <typename T, int kCount>
struct ChunkMoments {
  using A = Accumulator<T>;
  using Part = Share<kCount>;
  static constexpr int kThreads = Part::kThreads, kMinBlocks = 1;
  static constexpr int kSharedBytes = kThreads * kCount * static_cast<int>(sizeof(Moments<A>));

  struct Params {
    const T* x;
    Moments<A>* moments;
    int64_t pixels;
    int channels;
  };

  static DYHEAD_DEVICE void run(const Params& params) {
    const Part part(params.pixels, params.channels, 1);
    const bool exists = part.channel < params.channels;
    Moments<A> own[kCount];
#pragma unroll
    for (int c = 0; c < kCount; ++c) own[c] = {A(0), A(0)};
    int count = 0;
    for (int64_t p = part.first + part.line; exists && p < part.last; p += Part::kLines) {
      A value[kCount];
      load_run(params.x + (part.n * params.pixels + p) * params.channels + part.channel, value);
      const A share = A(1) / static_cast<A>(++count);
#pragma unroll
      for (int c = 0; c < kCount; ++c) own[c].add(value[c], share);
    }
    // The lines of a block, one after the other; a thread takes a channel.
    Moments<A>* const lines = reinterpret_cast<Moments<A>*>(shared_memory());
#pragma unroll
    for (int c = 0; c < kCount; ++c) lines[c * kThreads + thread_index()] = own[c];
    sync_block();
    const int pixels = static_cast<int>(part.last - part.first);
    Moments<A>* const to = params.moments + (part.n * part.chunks + part.chunk) * params.channels;
    for (int i = thread_index(); i < Part::kChannels; i += kThreads) {
      const int channel = part.channel_of(i);
      if (channel >= params.channels) continue;
      Moments<A> all = lines[Part::place(i, 0)];
      int before = Part::pixels_of_line(pixels, 0);
      for (int line = 1; line < Part::kLines; ++line) {
        const int more = Part::pixels_of_line(pixels, line);
        all.join(lines[Part::place(i, line)], static_cast<A>(before), static_cast<A>(more));
        before += more;
      }
      to[channel] = all;
    }
  }
};

// Sums of columns over chunks. A block takes kLanes columns, kLines threads each: they take turns with the chunks, so
// that loads are under way together, and then add up pairwise, always in the same order.
struct ChunkSums {
  static constexpr int kThreads = 256, kLanes = 8, kLines = kThreads / kLanes;
  static constexpr int kSharedBytes = kThreads * static_cast<int>(sizeof(double));

  int64_t n, column;  // the image, and this thread's column of it
  int line;

  DYHEAD_DEVICE explicit ChunkSums(int64_t columns) {
    const int64_t blocks = (columns + kLanes - 1) / kLanes;
    n = block_index() / blocks;
    column = block_index() % blocks * kLanes + thread_index() % kLanes;
    line = thread_index() / kLanes;
  }

  static int64_t blocks(int64_t batch, int64_t columns) { return batch * blocks_of(columns, kLanes); }

  // The sum of term(chunk), for every thread of the column. All threads of the block take part.
  template <typename Term>
  DYHEAD_DEVICE double sum(int64_t chunks, const Term& term) const {
    double* const sums = reinterpret_cast<double*>(shared_memory());
    double own = 0;
    for (int64_t chunk = line; chunk < chunks; chunk += kLines) own += term(chunk);
    sums[thread_index()] = own;
    for (int half = kLines / 2; half > 0; half /= 2) {
      sync_block();
      if (line < half) sums[thread_index()] += sums[thread_index() + half * kLanes];
    }
    sync_block();
    const double result = sums[thread_index() % kLanes];
    sync_block();  // before the next sum
    return result;
  }
};

// The moments of all chunks, as (N, 2, C) means and variances: first the mean of all, then the squares about it, in
// double. Unlike joining chunk by chunk, neither has a chain of divisions.
template <typename A>
struct JoinMoments {
  static constexpr int kThreads = ChunkSums::kThreads, kMinBlocks = 1, kSharedBytes = ChunkSums::kSharedBytes;

  struct Params {
    const Moments<A>* moments;
    A* result;
    int64_t pixels;
    int channels;
  };

  static DYHEAD_DEVICE void run(const Params& params) {
    const ChunkSums sums(params.channels);
    const bool exists = sums.column < params.channels;
    const int64_t chunks = exists ? (params.pixels + kChunkPixels - 1) / kChunkPixels : 0;
    const Moments<A>* const moments = params.moments + sums.n * chunks * params.channels + sums.column;
    const auto pixels = [&](int64_t chunk) {
      const int64_t left = params.pixels - chunk * kChunkPixels;
      return static_cast<double>(left < kChunkPixels ? left : kChunkPixels);
    };
    const double mean = sums.sum(chunks, [&](int64_t chunk) {
      return pixels(chunk) * static_cast<double>(moments[chunk * params.channels].mean);
    }) / static_cast<double>(params.pixels);
    const double squares = sums.sum(chunks, [&](int64_t chunk) {
      const Moments<A> one = moments[chunk * params.channels];
      const double difference = static_cast<double>(one.mean) - mean;
      return static_cast<double>(one.squares) + pixels(chunk) * difference * difference;
    });
    if (sums.line > 0 || !exists) return;
    params.result[sums.n * 2 * params.channels + sums.column] = static_cast<A>(mean);
    params.result[(sums.n * 2 + 1) * params.channels + sums.column] =
        static_cast<A>(squares / static_cast<double>(params.pixels));
  }
};

constexpr int kMaxTerms = 32;  // as many as a kernel's parameters are made for

// The arguments of affine_maximum.
template <typename T>
struct AffineMaps {
  using A = Accumulator<T>;

  const T* x[kMaxTerms];
  const A *slopes, *intercepts;
  int64_t batch, pixels;
  int channels, terms;

  DYHEAD_DEVICE const A* slope(int64_t n, int map, int term) const {
    return slopes + ((n * 2 + map) * terms + term) * channels;
  }

  // Both maps at kCount channels of a pixel.
  template <int kCount>
  DYHEAD_DEVICE void evaluate(int64_t n, int64_t pixel, int channel, A (&first)[kCount], A (&second)[kCount]) const {
    load_run(intercepts + n * 2 * channels + channel, first);
    load_run(intercepts + (n * 2 + 1) * channels + channel, second);
#pragma unroll 1  // registers
    for (int term = 0; term < terms; ++term) {
      A value[kCount], slope1[kCount], slope2[kCount];
      load_run(x[term] + (n * pixels + pixel) * channels + channel, value);
      load_run(slope(n, 0, term) + channel, slope1);
      load_run(slope(n, 1, term) + channel, slope2);
#pragma unroll
      for (int c = 0; c < kCount; ++c) {
        first[c] += slope1[c] * value[c];
        second[c] += slope2[c] * value[c];
      }
    }
  }
};

template <typename T, int kCount>
struct AffineMaximum {
  using A = Accumulator<T>;
  static constexpr int kThreads = 256, kMinBlocks = 1, kSharedBytes = 0;

  struct Params {
    AffineMaps<T> maps;
    T* result;
  };

  static DYHEAD_DEVICE void run(const Params& params) {
    const AffineMaps<T>& maps = params.maps;
    const int vectors = maps.channels / kCount;
    const int64_t index = block_index() * kThreads + thread_index(), row = index / vectors, n = row / maps.pixels;
    if (n >= maps.batch) return;
    const int channel = static_cast<int>(index % vectors) * kCount;
    A first[kCount], second[kCount];
    maps.evaluate(n, row % maps.pixels, channel, first, second);
#pragma unroll
    for (int c = 0; c < kCount; ++c) first[c] = larger(first[c], second[c]);
    store_run(params.result + row * maps.channels + channel, first);
  }

  // NaN in either is NaN, as in torch.maximum.
  static DYHEAD_DEVICE A larger(A first, A second) { return first > second || first != first ? first : second; }
};

// The gradient of one term's map, and the chunks' sums of what the gradients of its slopes are made of; with the first
// term those of the intercepts: (image, chunk, map, [terms..., 1], channel).
template <typename T, int kCount>
struct AffineMaximumGradient {
  using A = Accumulator<T>;
  using Part = Share<kCount>;
  static constexpr int kThreads = Part::kThreads, kMinBlocks = 2;
  static constexpr int kSharedBytes = 4 * kThreads * kCount * static_cast<int>(sizeof(A));

  struct Params {
    AffineMaps<T> maps;
    const T* grad;
    T* x[kMaxTerms];
    A* sums;
  };

  static DYHEAD_DEVICE void run(const Params& params) {
    const AffineMaps<T>& maps = params.maps;
    const Part part(maps.pixels, maps.channels, maps.terms);
    const bool exists = part.channel < maps.channels;
    A sums[4][kCount];  // of the slopes of both maps, and of the intercepts
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int c = 0; c < kCount; ++c) sums[i][c] = A(0);
    }
    for (int64_t p = part.first + part.line; exists && p < part.last; p += Part::kLines) {
      const int64_t at = (part.n * maps.pixels + p) * maps.channels + part.channel;
      A first[kCount], second[kCount], grad[kCount], value[kCount], slope1[kCount], slope2[kCount];
      maps.evaluate(part.n, p, part.channel, first, second);
      load_run(params.grad + at, grad);
      load_run(maps.x[part.term] + at, value);
      load_run(maps.slope(part.n, 0, part.term) + part.channel, slope1);
      load_run(maps.slope(part.n, 1, part.term) + part.channel, slope2);
#pragma unroll
      for (int c = 0; c < kCount; ++c) {
        // To the larger map, half to each where they are equal, as in torch.maximum.
        const A a = first[c], b = second[c], half = grad[c] / 2;
        const A to_first = a < b ? A(0) : a == b ? half : grad[c];
        const A to_second = a > b ? A(0) : a == b ? half : grad[c];
        sums[0][c] += to_first * value[c];
        sums[1][c] += to_second * value[c];
        sums[2][c] += to_first;
        sums[3][c] += to_second;
        value[c] = to_first * slope1[c] + to_second * slope2[c];
      }
      store_run(params.x[part.term] + at, value);
    }
    A* const lines = reinterpret_cast<A*>(shared_memory());
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int c = 0; c < kCount; ++c) lines[(i * kCount + c) * kThreads + thread_index()] = sums[i][c];
    }
    sync_block();
    A* const chunk = params.sums + (part.n * part.chunks + part.chunk) * 2 * (maps.terms + 1) * maps.channels;
    // A thread takes a sum of a channel; only the first term's blocks those of the intercepts.
    for (int i = thread_index(); i < (part.term > 0 ? 2 : 4) * Part::kChannels; i += kThreads) {
      const int channel = part.channel_of(i % Part::kChannels), kind = i / Part::kChannels;
      if (channel >= maps.channels) continue;
      A sum = lines[Part::place(i, 0)];
      for (int line = 1; line < Part::kLines; ++line) sum += lines[Part::place(i, line)];
      chunk[(kind % 2 * (maps.terms + 1) + (kind < 2 ? part.term : maps.terms)) * maps.channels + channel] = sum;
    }
  }
};

// The gradients of slopes (N, 2, terms, C) and intercepts (N, 2, C) from the chunks' sums.
template <typename A>
struct JoinSums {
  static constexpr int kThreads = ChunkSums::kThreads, kMinBlocks = 1, kSharedBytes = ChunkSums::kSharedBytes;

  struct Params {
    const A* sums;
    A *slopes, *intercepts;
    int64_t chunks;
    int channels, terms;
  };

  static DYHEAD_HOST_DEVICE int64_t columns(int64_t channels, int64_t terms) { return 2 * (terms + 1) * channels; }

  static DYHEAD_DEVICE void run(const Params& params) {
    const int64_t stride = columns(params.channels, params.terms);
    const ChunkSums sums(stride);
    const bool exists = sums.column < stride;
    const A* const terms = params.sums + sums.n * params.chunks * stride + sums.column;
    const double sum =
        sums.sum(exists ? params.chunks : 0, [&](int64_t chunk) { return static_cast<double>(terms[chunk * stride]); });
    if (sums.line > 0 || !exists) return;
    const int64_t c = sums.column % params.channels, term = sums.column / params.channels % (params.terms + 1);
    const int64_t row = sums.n * 2 + sums.column / params.channels / (params.terms + 1);
    A* const to = term < params.terms ? params.slopes + (row * params.terms + term) * params.channels + c
                                      : params.intercepts + row * params.channels + c;
    *to = static_cast<A>(sum);
  }
};

}  // namespace dyhead::cuda
