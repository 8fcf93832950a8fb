// Border alignment on the CPU.
//
// Maps are read with their channels last; others are copied once per call. In the backward pass a unit of work owns
// channels of an image's gradient and takes the boxes in their order, so that the sums are the same for any number of
// threads.

#include <algorithm>
#include <array>
#include <bitset>
#include <vector>

#include "implementation.h"
#include "inputs.h"

namespace dyhead::cpu {
namespace {

constexpr int64_t kChunk = 16;      // boxes
constexpr int64_t kChannels = 256;  // channels at a time, whose maxima stay in the first-level cache

// Boxes (N, 4, cells).
template <typename A>
struct Boxes {
  Boxes(const Tensor& boxes, const BorderProblem& problem)
      : problem(problem), tensor(as_contiguous(boxes)), data(static_cast<const A*>(tensor.const_data_ptr())) {}

  Border<A> border(int64_t n, int64_t cell, int which) const {
    const A* const box = data + n * 4 * problem.cells + cell;
    const int64_t stride = problem.cells;
    return border_of_box(box[0], box[stride], box[2 * stride], box[3 * stride], which, problem.pool_size);
  }

  const BorderProblem& problem;
  Tensor tensor;
  const A* data;
};

template <typename T, typename P>
void maxima_of(const Tensor& x, const Tensor& boxes_tensor, const BorderProblem& problem, Maxima& maxima) {
  using A = Accumulator<T>;
  const Kernels<T, P>& kernel = kernels<T, P>();
  const Tensor last = as_channels_last(x);
  const T* const data = static_cast<const T*>(last.const_data_ptr());
  const Boxes<A> boxes(boxes_tensor, problem);
  T* const values = static_cast<T*>(maxima.values.mutable_data_ptr());
  uint8_t* const index = static_cast<uint8_t*>(maxima.index.mutable_data_ptr());
  const int64_t channels = problem.channels, border_channels = problem.border_channels();
  const std::vector<T> outside(static_cast<size_t>(border_channels), T(0));
  const int64_t chunks = blocks(problem.cells, kChunk), units = problem.batch * chunks;
  const double cost = static_cast<double>(kChunk * (problem.pool_size + 1)) * static_cast<double>(channels) / 2;
  parallel_units(units, worker_count(units, cost), [&](int64_t unit, int64_t) {
    A best[kChannels], point[kChannels];
    const int64_t n = unit / chunks, begin = unit % chunks * kChunk, end = std::min(problem.cells, begin + kChunk);
    const T* const image = data + n * problem.pixels() * channels;
    for (int64_t cell = begin; cell < end; ++cell) {
      for (int which = 0; which < kBorders; ++which) {
        const Border<A> border = boxes.border(n, cell, which);
        for (int64_t c = 0; c < border_channels; c += kChannels) {
          const int64_t width = std::min(kChannels, border_channels - c), channel = which * border_channels + c;
          kernel.maximum(border, problem.pool_size, problem.height, problem.width,
                         {image + channel, channels, outside.data()}, width, best, point);
          const int64_t at = (n * problem.cells + cell) * channels + channel;
          for (int64_t i = 0; i < width; ++i) values[at + i] = static_cast<T>(best[i]);
          for (int64_t i = 0; i < width; ++i) index[at + i] = static_cast<uint8_t>(static_cast<int32_t>(point[i]));
        }
      }
    }
  });
}

// The cells of a border's points, each of them located when it is first asked for.
template <typename A>
class Points {
 public:
  struct Point {
    Cell<A> cell;
    A share[4];
  };

  void begin(const Border<A>& border) {
    border_ = border;
    known_.reset();
  }
  const Point& at(int point, const BorderProblem& problem) {
    Point& result = points_[point];
    if (!known_[point]) {
      known_.set(point);
      result.cell = locate(border_, point, problem.height, problem.width);
      corner_shares(result.cell, result.share);
    }
    return result;
  }

 private:
  Border<A> border_;
  std::bitset<kMostPoolSize + 1> known_;
  std::array<Point, kMostPoolSize + 1> points_;
};

template <typename T>
void gradient_of(const Tensor& grad_tensor, const Tensor& boxes_tensor, const Tensor& index_tensor,
                 const BorderProblem& problem, Tensor& sums_tensor) {
  using A = Accumulator<T>;
  const Boxes<A> boxes(boxes_tensor, problem);
  const T* const grad = static_cast<const T*>(grad_tensor.const_data_ptr());
  const uint8_t* const index = static_cast<const uint8_t*>(index_tensor.const_data_ptr());
  A* const sums = static_cast<A*>(sums_tensor.mutable_data_ptr());
  // A unit takes so many channels of a border: whole lines of the cache, and few enough to give all threads work.
  const int64_t channels = problem.channels, border_channels = problem.border_channels();
  const int64_t threads = torch::stable::get_num_threads();
  int64_t size = 64;
  while (size > 16 && problem.batch * kBorders * blocks(border_channels, size) < 4 * threads) size /= 2;
  const int64_t runs = blocks(border_channels, size), units = problem.batch * kBorders * runs;
  const double cost = static_cast<double>(problem.cells) * static_cast<double>(std::min(size, border_channels)) * 8;
  const int64_t workers = worker_count(units, cost);
  std::vector<Points<A>> of_workers(static_cast<size_t>(workers));
  parallel_units(units, workers, [&](int64_t unit, int64_t worker) {
    Points<A>& points = of_workers[static_cast<size_t>(worker)];
    const int64_t run = unit % runs * size, n = unit / runs / kBorders;
    const int which = static_cast<int>(unit / runs % kBorders);
    const int64_t channel = which * border_channels + run, width = std::min(size, border_channels - run);
    A* const image = sums + n * problem.pixels() * channels + channel;
    for (int64_t cell = 0; cell < problem.cells; ++cell) {
      const int64_t at = (n * problem.cells + cell) * channels + channel;
      points.begin(boxes.border(n, cell, which));
      for (int64_t i = 0; i < width; ++i) {
        const auto& point = points.at(index[at + i], problem);
        const A g = static_cast<A>(grad[at + i]);
        for (int corner = 0; corner < 4; ++corner) {
          const int64_t pixel = point.cell.corner[corner];
          if (pixel >= 0) image[pixel * channels + i] += point.share[corner] * g;
        }
      }
    }
  });
}

}  // namespace

void Implementation::border_align(const Tensor& x, const Tensor& boxes, const BorderProblem& problem, Maxima& maxima) {
  dispatch(problem.dtype,
           [&](auto value, auto operand) { maxima_of<decltype(value), decltype(operand)>(x, boxes, problem, maxima); });
}

void Implementation::border_align_backward(const Tensor& grad, const Tensor& boxes, const Tensor& index,
                                           const BorderProblem& problem, bool /*deterministic*/, Tensor& sums) {
  const Tensor grad_last = as_channels_last(grad), index_last = as_channels_last(index);
  dispatch(problem.dtype,
           [&](auto value, auto) { gradient_of<decltype(value)>(grad_last, boxes, index_last, problem, sums); });
}

}  // namespace dyhead::cpu
