// Border alignment on the CPU.
//
// A unit of work owns some channels of a border in an image. Forward, it copies them from the map in the type of sums,
// so that they lie close together for the boxes to read in any order; backward, it sums up their gradient in such a
// buffer, box after box, so that the sums are the same for any number of threads. Maps of either layout are read and
// written as they are.

#include <algorithm>
#include <array>
#include <bitset>
#include <vector>

#include "implementation.h"
#include "inputs.h"
#include "parts.h"

namespace dyhead::cpu {
namespace {

constexpr int64_t kCells = kLine;  // boxes at a time
constexpr int64_t kChannels = 64;  // at most so many channels to a unit

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

struct Unit {
  int64_t n, channel, width;  // the image, and its channels [channel, channel + width)
  int border;
};

// Cuts the work into units: of fewer channels where the threads would not have enough of them. A result does not depend
// on its unit.
class Units {
 public:
  explicit Units(const BorderProblem& problem) : problem_(problem) {
    while (size_ > 16 && count() < 4 * static_cast<int64_t>(torch::stable::get_num_threads())) size_ /= 2;
  }

  int64_t count() const { return problem_.batch * kBorders * blocks(problem_.border_channels(), size_); }
  Unit at(int64_t index) const {
    const int64_t runs = blocks(problem_.border_channels(), size_), first = index % runs * size_;
    const int64_t border = index / runs % kBorders;
    return {index / runs / kBorders, border * problem_.border_channels() + first,
            std::min(size_, problem_.border_channels() - first), static_cast<int>(border)};
  }
  // Every thread's, if each box takes `cost` vector instructions for every 16 channels.
  int64_t workers(double cost) const {
    const int64_t width = std::min(size_, problem_.border_channels());
    return worker_count(count(), static_cast<double>(problem_.cells) * static_cast<double>(blocks(width, 16)) * cost);
  }

 private:
  const BorderProblem& problem_;
  int64_t size_ = kChannels;
};

template <typename T>
void maxima_of(const Tensor& x, const Tensor& boxes_tensor, const BorderProblem& problem, Maxima& maxima) {
  using A = Accumulator<T>;
  const Kernels<A, A>& kernel = kernels<A, A>();
  const Tensor map = in_either_layout(x);
  const T* const data = static_cast<const T*>(map.const_data_ptr());
  const Boxes<A> boxes(boxes_tensor, problem);
  T* const values = static_cast<T*>(maxima.values.mutable_data_ptr());
  uint8_t* const index = static_cast<uint8_t*>(maxima.index.mutable_data_ptr());
  const Units units(problem);
  const int64_t workers = units.workers(static_cast<double>(8 * (problem.pool_size + 1)));
  const std::vector<Buffer<A>> copies = buffers<A>(workers, problem.pixels(), kChannels);
  parallel_units(units.count(), workers, [&](int64_t number, int64_t worker) {
    const Unit unit = units.at(number);
    const Part<A> part{copies[static_cast<size_t>(worker)].get(), unit.width, 1};
    copy(part_of(map, data, unit.n, unit.channel), part, problem.pixels(), unit.width);
    const Part<T> to = part_of(maxima.values, values, unit.n, unit.channel);
    const Part<uint8_t> to_index = part_of(maxima.index, index, unit.n, unit.channel);
    const std::array<A, kChannels> outside{};
    A best[kCells * kChannels], point[kCells * kChannels];
    for (int64_t first = 0; first < problem.cells; first += kCells) {
      const int64_t count = std::min(kCells, problem.cells - first);
      for (int64_t i = 0; i < count; ++i) {
        kernel.maximum(boxes.border(unit.n, first + i, unit.border), problem.pool_size, problem.height, problem.width,
                       {part.data, part.pixel, outside.data()}, unit.width, best + i * kChannels,
                       point + i * kChannels);
      }
      copy(Part<const A>{best, kChannels, 1}, to.from(first), count, unit.width);
      copy(Part<const A>{point, kChannels, 1}, to_index.from(first), count, unit.width);
    }
  });
}

// Where the gradients of a border's points go, each located when it is first asked for.
template <typename A>
class Points {
 public:
  struct Point {
    int64_t at[4];  // the corners' pixels times `stride`
    A share[4];
  };

  // A corner outside the map goes to the pixel behind the last one.
  Points(const BorderProblem& problem, int64_t stride) : problem_(problem), stride_(stride) {}

  void begin(const Border<A>& border) {
    border_ = border;
    known_.reset();
  }
  const Point& get(int number) {
    Point& point = points_[number];
    if (!known_[number]) {
      known_.set(number);
      const Cell<A> cell = locate(border_, number, problem_.height, problem_.width);
      corner_shares(cell, point.share);
      for (int i = 0; i < 4; ++i) point.at[i] = (cell.corner[i] < 0 ? problem_.pixels() : cell.corner[i]) * stride_;
    }
    return point;
  }

 private:
  const BorderProblem& problem_;
  int64_t stride_;
  Border<A> border_;
  std::bitset<kMostPoolSize + 1> known_;
  std::array<Point, kMostPoolSize + 1> points_;
};

template <typename T>
void gradient_of(const Tensor& grad_tensor, const Tensor& boxes_tensor, const Tensor& index_tensor,
                 const BorderProblem& problem, Tensor& result) {
  using A = Accumulator<T>;
  const Boxes<A> boxes(boxes_tensor, problem);
  const T* const grad = static_cast<const T*>(grad_tensor.const_data_ptr());
  const uint8_t* const index = static_cast<const uint8_t*>(index_tensor.const_data_ptr());
  T* const data = static_cast<T*>(result.mutable_data_ptr());
  const Units units(problem);
  const int64_t workers = units.workers(16 * 8);
  const std::vector<Buffer<A>> sums = buffers<A>(workers, problem.pixels() + 1, kChannels);
  parallel_units(units.count(), workers, [&](int64_t number, int64_t worker) {
    const Unit unit = units.at(number);
    A* const sum = sums[static_cast<size_t>(worker)].get();
    std::fill(sum, sum + (problem.pixels() + 1) * unit.width, A(0));
    const Part<const T> from = part_of(grad_tensor, grad, unit.n, unit.channel);
    const Part<const uint8_t> from_index = part_of(index_tensor, index, unit.n, unit.channel);
    Points<A> points(problem, unit.width);
    A g[kCells * kChannels];
    uint8_t at[kCells * kChannels];
    for (int64_t first = 0; first < problem.cells; first += kCells) {
      const int64_t count = std::min(kCells, problem.cells - first);
      copy(from.from(first), Part<A>{g, kChannels, 1}, count, unit.width);
      copy(from_index.from(first), Part<uint8_t>{at, kChannels, 1}, count, unit.width);
      for (int64_t i = 0; i < count; ++i) {
        points.begin(boxes.border(unit.n, first + i, unit.border));
        for (int64_t c = 0; c < unit.width; ++c) {
          const auto& point = points.get(at[i * kChannels + c]);
          for (int k = 0; k < 4; ++k) sum[point.at[k] + c] += point.share[k] * g[i * kChannels + c];
        }
      }
    }
    copy(Part<const A>{sum, unit.width, 1}, part_of(result, data, unit.n, unit.channel), problem.pixels(), unit.width);
  });
}

}  // namespace

void Implementation::border_align(const Tensor& x, const Tensor& boxes, const BorderProblem& problem, Maxima& maxima) {
  dispatch(problem.dtype, [&](auto value, auto) { maxima_of<decltype(value)>(x, boxes, problem, maxima); });
}

void Implementation::border_align_backward(const Tensor& grad, const Tensor& boxes, const Tensor& index,
                                           const BorderProblem& problem, bool /*deterministic*/, Tensor& result) {
  const Tensor grad_read = in_either_layout(grad), index_read = in_either_layout(index);
  dispatch(problem.dtype,
           [&](auto value, auto) { gradient_of<decltype(value)>(grad_read, boxes, index_read, problem, result); });
}

}  // namespace dyhead::cpu
