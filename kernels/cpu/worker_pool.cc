#include "kernels/cpu/worker_pool.h"

#include <pthread.h>

#include <algorithm>
#include <cstdio>

namespace espalier {
namespace {

constexpr uint32_t kJob = 1u << 16;
constexpr uint32_t kOpen = 1u << 15;
constexpr uint32_t kInside = kOpen - 1;

// A pause is 10 to 45 ns by processor, so this is some 20 to 90 microseconds.
constexpr int kSpins = 2000;

void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

}  // namespace

WorkerPool::WorkerPool(int threads) {
  threads = std::clamp(threads, 1, static_cast<int>(kInside));
  parts_ = std::vector<Part>(threads);
  threads_.reserve(threads - 1);
  for (int worker = 1; worker < threads; ++worker) {
    threads_.emplace_back([this, worker] { WorkerLoop(worker); });
    char name[16];
    std::snprintf(name, sizeof name, "kernels-%d", worker);
    pthread_setname_np(threads_.back().native_handle(), name);
  }
}

WorkerPool::~WorkerPool() {
  stop_.store(true, std::memory_order_relaxed);
  state_.fetch_add(kJob | kOpen);
  state_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void WorkerPool::Run(int count, Task task, const void* context) {
  if (count <= 1 || threads_.empty()) {
    for (int index = 0; index < count; ++index) task(context, 0, index);
    return;
  }
  task_ = task;
  context_ = context;
  const int64_t parts = threads();
  for (int64_t i = 0; i < parts; ++i) {
    parts_[i].next.store(static_cast<int>(count * i / parts), std::memory_order_relaxed);
    parts_[i].end = static_cast<int>(count * (i + 1) / parts);
  }
  state_.fetch_add(kJob | kOpen);
  state_.notify_all();
  TakeIndices(0);
  state_.fetch_and(~kOpen, std::memory_order_acq_rel);

  const auto alone = [this] { return (state_.load(std::memory_order_acquire) & kInside) == 0; };
  for (int spin = 0; spin < kSpins; ++spin) {
    if (alone()) return;
    Pause();
  }
  while (true) {
    const uint32_t departures = departures_.load(std::memory_order_acquire);
    if (alone()) return;
    departures_.wait(departures, std::memory_order_acquire);
  }
}

void WorkerPool::TakeIndices(int worker) {
  const int parts = static_cast<int>(parts_.size());
  for (int i = 0; i < parts; ++i) {
    Part& part = parts_[(worker + i) % parts];
    // Read first: most parts are empty when others come, and a write would take the line away.
    while (part.next.load(std::memory_order_relaxed) < part.end) {
      const int index = part.next.fetch_add(1, std::memory_order_relaxed);
      if (index < part.end) task_(context_, worker, index);
    }
  }
}

// Waits for an open job that is not job `done`, or for the end; returns the state seen. Who sleeps
// through exactly 2^16 jobs misses one, which others do then.
uint32_t WorkerPool::AwaitOpen(uint32_t done) const {
  const auto worth_joining = [&](uint32_t state) {
    return ((state & kOpen) != 0 && state / kJob != done) || stop_.load(std::memory_order_relaxed);
  };
  uint32_t state = state_.load(std::memory_order_acquire);
  for (int spin = 0; spin < kSpins && !worth_joining(state); ++spin) {
    Pause();
    state = state_.load(std::memory_order_acquire);
  }
  while (!worth_joining(state)) {
    state_.wait(state, std::memory_order_acquire);
    state = state_.load(std::memory_order_acquire);
  }
  return state;
}

void WorkerPool::WorkerLoop(int worker) {
  uint32_t done = 0;
  while (true) {
    uint32_t state = AwaitOpen(done);
    if (stop_.load(std::memory_order_relaxed)) return;
    if (!state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel)) continue;
    done = state / kJob;
    TakeIndices(worker);
    const uint32_t before = state_.fetch_sub(1, std::memory_order_acq_rel);
    if ((before & (kOpen | kInside)) == 1) {  // closed, and this was the last inside
      departures_.fetch_add(1);
      departures_.notify_one();
    }
  }
}

}  // namespace espalier
