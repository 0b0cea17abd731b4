// Runs tasks on torch's own thread pool. A task is the same whatever the number of threads, and no two of them write
// to the same place: so are the results.
#pragma once
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

#include "stable.h"

namespace ek {

// A thread's scratch, kept between calls while it is small: fresh memory costs a page fault every 4 KB.
class Scratch {
 public:
  static float* of_this_thread(int64_t floats) {
    static thread_local Scratch scratch;
    if (floats > scratch.floats_) {
      std::free(scratch.memory_);
      scratch.memory_ = static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>((floats * 4 + 63) / 64 * 64)));
      scratch.floats_ = scratch.memory_ ? floats : 0;
      if (!scratch.memory_) throw std::bad_alloc();
    }
    return scratch.memory_;
  }
  ~Scratch() { std::free(memory_); }

 private:
  float* memory_ = nullptr;
  int64_t floats_ = 0;
};

// task(i, scratch) for every i in [0, n), in this order: put the longest first. `work` is the cost of them all, in
// elements touched or products summed.
template <class Task>
void for_tasks(int64_t n, int64_t work, int64_t scratch_floats, const Task& task) {
  const int64_t threads = work < 32768 ? 1 : int64_t(torch::stable::get_num_threads());
  if (threads == 1 || n <= 1) {
    float* scratch = Scratch::of_this_thread(scratch_floats);
    for (int64_t i = 0; i < n; i++) task(i, scratch);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    float* scratch = Scratch::of_this_thread(scratch_floats);
    for (int64_t i = next++; i < n; i = next++) task(i, scratch);
  });
}

}  // namespace ek
