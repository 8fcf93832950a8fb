// Deformable RoI pooling on the CPU.
//
// Forward, and for the gradient of the offsets, a unit of work is a row of a region's cells. For the gradient of the
// map a unit owns some channels of an image, to which it adds region after region, so that the sums are the same for
// any number of threads. The map is read with its channels last.

#include <algorithm>
#include <vector>

#include "implementation.h"
#include "inputs.h"
#include "parts.h"

namespace dyhead::cpu {
namespace {

constexpr int64_t kChannels = 64;  // of an image, at most so many to a unit

template <typename A>
struct Regions {
  Regions(const RegionArguments& arguments, const RegionProblem& problem)
      : problem(problem), offset_tensor(arguments.offset) {
    const Tensor rois = as_contiguous(arguments.rois);
    const A* const data = static_cast<const A*>(rois.const_data_ptr());
    for (int64_t q = 0; q < problem.regions; ++q) {
      all.push_back(region_of(data + 5 * q, problem.pooling, problem.has_offset, problem.batch));
    }
    if (!offset_tensor) return;
    offset_tensor = as_contiguous(*offset_tensor);
    offset = static_cast<const A*>(offset_tensor->const_data_ptr());
  }

  RegionCell<A> cell(int64_t q, int64_t i, int64_t j) const {
    return cell_of(all[static_cast<size_t>(q)], problem.pooling, static_cast<int>(i), static_cast<int>(j),
                   offset == nullptr ? nullptr : offset + 2 * q * problem.cells(), problem.height, problem.width);
  }

  // The first pixel of a region's image; that of any image for a region without one.
  template <typename T>
  const T* image(const T* map, int64_t q) const {
    const int64_t n = std::max<int64_t>(all[static_cast<size_t>(q)].image, 0);
    return map + n * problem.pixels() * problem.channels;
  }

  // Of a row of cells at which every sample takes so many vector instructions for every 16 channels.
  double row_cost(int64_t channels, double instructions) const {
    const Pooling& pooling = problem.pooling;
    return static_cast<double>(pooling.side * pooling.samples * pooling.samples) *
           static_cast<double>(blocks(channels, 16)) * instructions;
  }

  const RegionProblem& problem;
  std::optional<Tensor> offset_tensor;
  const A* offset = nullptr;
  std::vector<Region<A>> all;
};

// Calls visit(samples, count) for all samples of a cell that count, at most kPooled at a time.
template <typename A, typename Visit>
void visit_samples(const RegionCell<A>& cell, const Visit& visit) {
  Sample<A> samples[kPooled];
  int64_t count = 0;
  cell.for_each_sample([&](const Cell<A>& pixels) {
    Sample<A>& sample = samples[count++];
    sample.cell = pixels;
    sample.mask = 1;
    corner_shares(sample.cell, sample.share);
    if (count < kPooled) return;
    visit(samples, count);
    count = 0;
  });
  if (count > 0) visit(samples, count);
}

template <typename T>
void pool(const RegionArguments& arguments, const RegionProblem& problem, Tensor& result) {
  using A = Accumulator<T>;
  const Kernels<T, A>& kernel = kernels<T, A>();
  const Regions<A> regions(arguments, problem);
  const Tensor map = as_channels_last(arguments.x);
  const T* const data = static_cast<const T*>(map.const_data_ptr());
  T* const to = static_cast<T*>(result.mutable_data_ptr());
  const int64_t channels = problem.channels, side = problem.pooling.side, units = problem.regions * side;
  const int64_t workers = worker_count(units, regions.row_cost(channels, 8));
  const std::vector<Buffer<A>> sums = buffers<A>(workers, side, channels);
  parallel_units(units, workers, [&](int64_t unit, int64_t worker) {
    const int64_t q = unit / side, i = unit % side;
    const Channels<T> from{regions.image(data, q), channels, nullptr};
    A* const row = sums[static_cast<size_t>(worker)].get();
    std::fill(row, row + side * channels, A(0));
    for (int64_t j = 0; j < side; ++j) {
      const RegionCell<A> cell = regions.cell(q, i, j);
      A* const sum = row + j * channels;
      visit_samples(cell,
                    [&](const Sample<A>* samples, int64_t count) { kernel.pool(samples, count, from, channels, sum); });
      const A divisor = cell.divisor();
      for (int64_t c = 0; c < channels; ++c) sum[c] /= divisor;
    }
    copy(Part<const A>{row, channels, 1}, part_of(result, to, q, 0).from(i * side), side, channels);
  });
}

// `grad`: in either layout.
template <typename T>
void offset_gradient(const Tensor& grad, const RegionArguments& arguments, const RegionProblem& problem,
                     const Regions<Accumulator<T>>& regions, Tensor& result) {
  using A = Accumulator<T>;
  const Kernels<T, A>& kernel = kernels<T, A>();
  const Tensor map = as_channels_last(arguments.x);
  const T* const data = static_cast<const T*>(map.const_data_ptr());
  const T* const grad_data = static_cast<const T*>(grad.const_data_ptr());
  A* const to = static_cast<A*>(result.mutable_data_ptr());
  const int64_t channels = problem.channels, side = problem.pooling.side, units = problem.regions * side;
  const int64_t workers = worker_count(units, regions.row_cost(channels, 8));
  const std::vector<Buffer<A>> rows = buffers<A>(workers, side, channels);
  parallel_units(units, workers, [&](int64_t unit, int64_t worker) {
    const int64_t q = unit / side, i = unit % side;
    const Channels<T> from{regions.image(data, q), channels, nullptr};
    A* const row = rows[static_cast<size_t>(worker)].get();
    copy(part_of(grad, grad_data, q, 0).from(i * side), Part<A>{row, channels, 1}, side, channels);
    for (int64_t j = 0; j < side; ++j) {
      const RegionCell<A> cell = regions.cell(q, i, j);
      A right = 0, down = 0;
      visit_samples(cell, [&](const Sample<A>* samples, int64_t count) {
        A products[4 * kPooled] = {};
        kernel.scatter(samples, count, from, channels, row + j * channels, 0, products, nullptr);
        for (int64_t p = 0; p < count; ++p) {
          right += derivative_x(samples[p].cell, products + 4 * p);
          down += derivative_y(samples[p].cell, products + 4 * p);
        }
      });
      const A divisor = cell.divisor();
      A* const at = to + 2 * q * problem.cells() + i * side + j;
      at[0] = cell.region.shift_x * right / divisor;
      at[problem.cells()] = cell.region.shift_y * down / divisor;
    }
  });
}

// `sums`: with its channels last.
template <typename T>
void map_gradient(const Tensor& grad, const RegionArguments& arguments, const RegionProblem& problem,
                  const Regions<Accumulator<T>>& regions, Tensor& sums) {
  using A = Accumulator<T>;
  const Kernels<T, A>& kernel = kernels<T, A>();
  const T* const data = static_cast<const T*>(arguments.x.const_data_ptr());  // not read
  const T* const grad_data = static_cast<const T*>(grad.const_data_ptr());
  A* const to = static_cast<A*>(sums.mutable_data_ptr());
  std::vector<std::vector<int64_t>> of_image(static_cast<size_t>(problem.batch));
  for (int64_t q = 0; q < problem.regions; ++q) {
    const int64_t n = regions.all[static_cast<size_t>(q)].image;
    if (n >= 0) of_image[static_cast<size_t>(n)].push_back(q);
  }
  // Narrower units where the threads would not have enough of them; a channel's sums are the same in any.
  const int64_t channels = problem.channels, side = problem.pooling.side;
  int64_t width = kChannels;
  const auto count = [&] { return problem.batch * blocks(channels, width); };
  while (width > 16 && count() < 4 * static_cast<int64_t>(torch::stable::get_num_threads())) width /= 2;
  const int64_t units = count(), runs = blocks(channels, width);
  const double rows = static_cast<double>(problem.regions * side) / static_cast<double>(std::max<int64_t>(units, 1));
  const int64_t workers = worker_count(units, rows * static_cast<double>(runs) * regions.row_cost(width, 12));
  const std::vector<Buffer<A>> rows_of_cells = buffers<A>(workers, side, width);
  parallel_units(units, workers, [&](int64_t unit, int64_t worker) {
    const int64_t n = unit / runs, first = unit % runs * width, own = std::min(width, channels - first);
    A* const image = to + n * problem.pixels() * channels + first;
    for (int64_t p = 0; p < problem.pixels(); ++p) std::fill(image + p * channels, image + p * channels + own, A(0));
    A* const row = rows_of_cells[static_cast<size_t>(worker)].get();
    for (const int64_t q : of_image[static_cast<size_t>(n)]) {
      for (int64_t i = 0; i < side; ++i) {
        copy(part_of(grad, grad_data, q, first).from(i * side), Part<A>{row, own, 1}, side, own);
        for (int64_t j = 0; j < side; ++j) {
          const RegionCell<A> cell = regions.cell(q, i, j);
          A* const g = row + j * own;
          const A divisor = cell.divisor();
          for (int64_t c = 0; c < own; ++c) g[c] /= divisor;
          visit_samples(cell, [&](const Sample<A>* samples, int64_t number) {
            kernel.scatter(samples, number, {data, channels, nullptr}, own, g, 0, nullptr, image);
          });
        }
      }
    }
  });
}

}  // namespace

void Implementation::deform_roi_pool(const RegionArguments& arguments, const RegionProblem& problem, Tensor& result) {
  dispatch(problem.dtype, [&](auto value, auto) { pool<decltype(value)>(arguments, problem, result); });
}

void Implementation::deform_roi_pool_backward(const Tensor& grad, const RegionArguments& arguments,
                                              const RegionProblem& problem, bool /*deterministic*/,
                                              RegionGradients& gradients) {
  const Tensor grad_read = in_either_layout(grad);
  dispatch(problem.dtype, [&](auto value, auto) {
    using T = decltype(value);
    const Regions<Accumulator<T>> regions(arguments, problem);
    if (gradients.needs_offset) offset_gradient<T>(grad_read, arguments, problem, regions, gradients.offset);
    if (!gradients.needs_x) return;
    Tensor sums = gradients.sums();
    map_gradient<T>(grad_read, arguments, problem, regions, sums);
    gradients.finish(sums);
  });
}

}  // namespace dyhead::cpu
