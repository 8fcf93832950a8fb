// Channel-wise maps on the CPU: statistics of channels, and the maximum of two affine maps. One pass over memory each;
// what is read twice is a chunk that is in the cache.
//
// Pixels are read with their channels last; others are copied once per call. Sums over pixels are made of the sums of
// chunks of a fixed size, added in their order, so that they are the same for any number of threads.

#include <algorithm>
#include <vector>

#include "implementation.h"
#include "inputs.h"

namespace dyhead::cpu {
namespace {

constexpr int64_t kChunk = 256;    // pixels
constexpr int64_t kChannels = 64;  // channels at a time, whose intermediate results stay in the first-level cache

// Calls work(n, first, last, unit) for every chunk of pixels [first, last) of every image.
template <typename Work>
void for_chunks(int64_t batch, int64_t pixels, int64_t channels, const Work& work) {
  const int64_t chunks = blocks(pixels, kChunk), units = batch * chunks;
  parallel_units(units, worker_count(units, static_cast<double>(kChunk * channels) / 4), [&](int64_t unit, int64_t) {
    const int64_t first = unit % chunks * kChunk;
    work(unit / chunks, first, std::min(pixels, first + kChunk), unit);
  });
}

// result[n * chunk_stride + i] = sum over the chunks of image n of partial[unit * chunk_stride + i].
template <typename A, typename Partial>
void sum_chunks(const Partial* partial, int64_t batch, int64_t pixels, int64_t chunk_stride, A* result) {
  const int64_t chunks = blocks(pixels, kChunk);
  std::vector<double> total(static_cast<size_t>(chunk_stride));
  for (int64_t n = 0; n < batch; ++n) {
    std::fill(total.begin(), total.end(), 0.0);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      for (int64_t i = 0; i < chunk_stride; ++i)
        total[i] += static_cast<double>(partial[(n * chunks + chunk) * chunk_stride + i]);
    }
    for (int64_t i = 0; i < chunk_stride; ++i) result[n * chunk_stride + i] = static_cast<A>(total[i]);
  }
}

// Mean and variance by two passes over a chunk that is in the cache, then joined (Chan et al., 1983): no difference of
// large numbers.
template <typename T>
void statistics(const Tensor& x, Tensor& result) {
  using A = Accumulator<T>;
  const int64_t batch = x.size(0), channels = x.size(1), pixels = x.size(2) * x.size(3);
  const T* const data = static_cast<const T*>(x.const_data_ptr());
  const int64_t chunks = blocks(pixels, kChunk);
  const Buffer<A> partial(volume(batch * chunks, 2, channels));
  for_chunks(batch, pixels, channels, [&](int64_t n, int64_t first, int64_t last, int64_t unit) {
    A* const mean = partial.get() + unit * 2 * channels;
    A* const squares = mean + channels;
    std::fill(mean, mean + 2 * channels, A(0));
    const T* const from = data + (n * pixels + first) * channels;
    const int64_t count = last - first;
    for (int64_t p = 0; p < count; ++p) {
      for (int64_t c = 0; c < channels; ++c) mean[c] += static_cast<A>(from[p * channels + c]);
    }
    for (int64_t c = 0; c < channels; ++c) mean[c] /= static_cast<A>(count);
    for (int64_t p = 0; p < count; ++p) {
      for (int64_t c = 0; c < channels; ++c) {
        const A difference = static_cast<A>(from[p * channels + c]) - mean[c];
        squares[c] += difference * difference;
      }
    }
  });
  A* const to = static_cast<A*>(result.mutable_data_ptr());
  for (int64_t n = 0; n < batch; ++n) {
    for (int64_t c = 0; c < channels; ++c) {
      double mean = 0, squares = 0, seen = 0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const A* const own = partial.get() + (n * chunks + chunk) * 2 * channels + c;
        const double count = static_cast<double>(std::min(kChunk, pixels - chunk * kChunk));
        const double difference = static_cast<double>(own[0]) - mean, share = count / (seen + count);
        mean += difference * share;
        squares += static_cast<double>(own[channels]) + difference * difference * seen * share;
        seen += count;
      }
      to[n * 2 * channels + c] = static_cast<A>(mean);
      to[(n * 2 + 1) * channels + c] = static_cast<A>(squares / seen);
    }
  }
}

// The arguments of affine_maximum.
template <typename T>
struct Maps {
  using A = Accumulator<T>;

  Maps(const std::vector<Tensor>& xs, const Tensor& slopes, const Tensor& intercepts)
      : terms(static_cast<int64_t>(xs.size())),
        batch(xs[0].size(0)),
        channels(xs[0].size(1)),
        pixels(xs[0].size(2) * xs[0].size(3)),
        slopes_tensor(as_contiguous(slopes)),
        intercepts_tensor(as_contiguous(intercepts)),
        slopes(static_cast<const A*>(slopes_tensor.const_data_ptr())),
        intercepts(static_cast<const A*>(intercepts_tensor.const_data_ptr())) {
    for (const Tensor& x : xs) {
      tensors.push_back(as_channels_last(x));
      data.push_back(static_cast<const T*>(tensors.back().const_data_ptr()));
    }
  }

  const A* slope(int64_t n, int64_t j, int64_t term) const { return slopes + ((n * 2 + j) * terms + term) * channels; }

  // The two maps' values at `width` channels of a pixel, from `channel` on.
  void evaluate(int64_t n, int64_t pixel, int64_t channel, int64_t width, A* first, A* second) const {
    const A* const intercept = intercepts + n * 2 * channels + channel;
    for (int64_t c = 0; c < width; ++c) first[c] = intercept[c];
    for (int64_t c = 0; c < width; ++c) second[c] = intercept[channels + c];
    for (int64_t term = 0; term < terms; ++term) {
      const T* const x = data[term] + (n * pixels + pixel) * channels + channel;
      const A *slope1 = slope(n, 0, term) + channel, *slope2 = slope(n, 1, term) + channel;
      for (int64_t c = 0; c < width; ++c) {
        const A value = static_cast<A>(x[c]);
        first[c] += slope1[c] * value;
        second[c] += slope2[c] * value;
      }
    }
  }

  int64_t terms, batch, channels, pixels;
  Tensor slopes_tensor, intercepts_tensor;
  const A *slopes, *intercepts;
  std::vector<Tensor> tensors;
  std::vector<const T*> data;
};

template <typename T>
void maximum(const Maps<T>& maps, Tensor& result) {
  using A = Accumulator<T>;
  T* const out = static_cast<T*>(result.mutable_data_ptr());
  for_chunks(maps.batch, maps.pixels, maps.channels, [&](int64_t n, int64_t first, int64_t last, int64_t) {
    A u[kChannels], v[kChannels];
    for (int64_t p = first; p < last; ++p) {
      T* const to = out + (n * maps.pixels + p) * maps.channels;
      for (int64_t channel = 0; channel < maps.channels; channel += kChannels) {
        const int64_t width = std::min(kChannels, maps.channels - channel);
        maps.evaluate(n, p, channel, width, u, v);
        // NaN in either is NaN, as in torch.maximum.
        for (int64_t c = 0; c < width; ++c) to[channel + c] = static_cast<T>(u[c] > v[c] || u[c] != u[c] ? u[c] : v[c]);
      }
    }
  });
}

// The gradient goes to the larger map, half to each where they are equal, as in torch.maximum.
template <typename T>
void maximum_gradient(const Maps<T>& maps, const Tensor& gradient, MaximumGradients& gradients) {
  using A = Accumulator<T>;
  const int64_t channels = maps.channels, terms = maps.terms;
  const T* const grad = static_cast<const T*>(gradient.const_data_ptr());
  std::vector<T*> results;
  for (Tensor& x : gradients.xs) results.push_back(static_cast<T*>(x.mutable_data_ptr()));

  // Sums of a chunk as (map, [terms..., 1], channel).
  const int64_t map_stride = (terms + 1) * channels, chunk_stride = 2 * map_stride;
  const Buffer<A> partial(volume(maps.batch * blocks(maps.pixels, kChunk), chunk_stride));
  for_chunks(maps.batch, maps.pixels, channels, [&](int64_t n, int64_t first, int64_t last, int64_t unit) {
    A u[kChannels], v[kChannels];
    A* const sums = partial.get() + unit * chunk_stride;
    std::fill(sums, sums + chunk_stride, A(0));
    for (int64_t p = first; p < last; ++p) {
      const int64_t at = (n * maps.pixels + p) * channels;
      for (int64_t channel = 0; channel < channels; channel += kChannels) {
        const int64_t width = std::min(kChannels, channels - channel);
        maps.evaluate(n, p, channel, width, u, v);
        A *sum1 = sums + terms * channels + channel, *sum2 = sum1 + map_stride;
        for (int64_t c = 0; c < width; ++c) {
          const A g = static_cast<A>(grad[at + channel + c]), half = g / 2, a = u[c], b = v[c];
          u[c] = a < b ? A(0) : a == b ? half : g;
          v[c] = a > b ? A(0) : a == b ? half : g;
          sum1[c] += u[c];
          sum2[c] += v[c];
        }
        for (int64_t term = 0; term < terms; ++term) {
          const T* const x = maps.data[term] + at + channel;
          T* const to = results[term] + at + channel;
          const A *slope1 = maps.slope(n, 0, term) + channel, *slope2 = maps.slope(n, 1, term) + channel;
          sum1 = sums + term * channels + channel, sum2 = sum1 + map_stride;
          for (int64_t c = 0; c < width; ++c) {
            const A value = static_cast<A>(x[c]);
            to[c] = static_cast<T>(u[c] * slope1[c] + v[c] * slope2[c]);
            sum1[c] += u[c] * value;
            sum2[c] += v[c] * value;
          }
        }
      }
    }
  });

  std::vector<A> totals(static_cast<size_t>(maps.batch * chunk_stride));
  sum_chunks(partial.get(), maps.batch, maps.pixels, chunk_stride, totals.data());
  A* const to_slopes = static_cast<A*>(gradients.slopes.mutable_data_ptr());
  A* const to_intercepts = static_cast<A*>(gradients.intercepts.mutable_data_ptr());
  for (int64_t row = 0; row < 2 * maps.batch; ++row) {
    const A* const from = totals.data() + row * map_stride;
    std::copy(from, from + terms * channels, to_slopes + row * terms * channels);
    std::copy(from + terms * channels, from + map_stride, to_intercepts + row * channels);
  }
}

}  // namespace

void Implementation::channel_statistics(const Tensor& x, Tensor& result) {
  const Tensor last = as_channels_last(x);
  dispatch(x.scalar_type(), [&](auto value, auto) { statistics<decltype(value)>(last, result); });
}

void Implementation::affine_maximum(const std::vector<Tensor>& xs, const Tensor& slopes, const Tensor& intercepts,
                                    Tensor& result) {
  dispatch(xs[0].scalar_type(),
           [&](auto value, auto) { maximum(Maps<decltype(value)>(xs, slopes, intercepts), result); });
}

void Implementation::affine_maximum_backward(const Tensor& grad, const std::vector<Tensor>& xs, const Tensor& slopes,
                                             const Tensor& intercepts, MaximumGradients& gradients) {
  const Tensor last = as_channels_last(grad);
  dispatch(xs[0].scalar_type(),
           [&](auto value, auto) { maximum_gradient(Maps<decltype(value)>(xs, slopes, intercepts), last, gradients); });
}

}  // namespace dyhead::cpu
