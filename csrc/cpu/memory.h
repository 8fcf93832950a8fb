// Working memory and worker threads of the CPU operator.

#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <vector>

namespace dyhead::cpu {

// Rounded up to a multiple of `block`.
inline int64_t round_up(int64_t value, int64_t block) { return (value + block - 1) / block * block; }
inline int64_t blocks(int64_t value, int64_t block) { return (value + block - 1) / block; }

// The number of elements of an array with these dimensions; throws std::bad_alloc where no memory could hold it.
template <typename... Sizes>
int64_t volume(Sizes... sizes) {
  int64_t result = 1;
  for (const int64_t size : {static_cast<int64_t>(sizes)...}) {
    if (__builtin_mul_overflow(result, size, &result)) throw std::bad_alloc();
  }
  return result;
}

// Uninitialised elements on a cache line's boundary.
template <typename T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count) {
    constexpr int64_t line = 64;
    if (count > std::numeric_limits<int64_t>::max() / static_cast<int64_t>(sizeof(T)) - line) throw std::bad_alloc();
    const int64_t bytes = round_up(std::max<int64_t>(count, 1) * static_cast<int64_t>(sizeof(T)), line);
    data_.reset(static_cast<T*>(std::aligned_alloc(line, static_cast<size_t>(bytes))));
    if (data_ == nullptr) throw std::bad_alloc();
  }
  T* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(T* data) const { std::free(data); }
  };
  std::unique_ptr<T, Free> data_;
};

// For every worker one of these dimensions.
template <typename T, typename... Sizes>
std::vector<Buffer<T>> buffers(int64_t workers, Sizes... sizes) {
  std::vector<Buffer<T>> result;
  for (int64_t worker = 0; worker < workers; ++worker) result.emplace_back(volume(sizes...));
  return result;
}

// How many threads `units` pieces of work are worth, each of about `cost` vector instructions: a thread takes some
// microseconds to wake, and much longer where other programs keep the machine busy.
inline int64_t worker_count(int64_t units, double cost) {
  constexpr double grain = 1 << 16;
  const double worth = static_cast<double>(units) * cost / grain;
  const int64_t threads = std::min<int64_t>(units, torch::stable::get_num_threads());
  return worth < static_cast<double>(threads) ? std::max<int64_t>(1, static_cast<int64_t>(worth)) : threads;
}

// Calls work(unit, worker) for every unit, worker < workers. Units go to whichever worker is free, so a unit must not
// depend on another, nor its result on the worker. Nothing may throw: PyTorch before 2.13 would lose the text.
template <typename Work>
void parallel_units(int64_t units, int64_t workers, const Work& work) {
  if (workers == 1 || units <= 1) {
    for (int64_t unit = 0; unit < units; ++unit) work(unit, 0);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t unit = next++; unit < units; unit = next++) work(unit, worker);
    }
  });
}

}  // namespace dyhead::cpu
