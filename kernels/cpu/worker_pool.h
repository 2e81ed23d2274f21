// A persistent pool of workers for fork and join inside one op, where a join must cost
// microseconds and an idle server no CPU.
//
// The caller is worker 0 and takes part. Each worker has a part of the indices to itself, in order,
// so that neighbours find what they share in its cache, and then takes what others have left, so
// uneven work evens out. A worker that is late (asleep, preempted) is not waited for: a job is
// joined by whoever comes while it is open, and the caller waits only for those who joined. Between
// jobs a worker spins for some tens of microseconds, which covers the gaps between the ops of a
// step, then sleeps.
//
// One thread at a time may call; a task must not call the pool. Nothing allocates after
// construction.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace espalier {

class WorkerPool {
 public:
  // `threads` counts the caller; at least 1.
  explicit WorkerPool(int threads);
  ~WorkerPool();
  WorkerPool(const WorkerPool&) = delete;
  WorkerPool& operator=(const WorkerPool&) = delete;

  int threads() const { return static_cast<int>(threads_.size()) + 1; }

  // Runs fn(worker, index) for every index in [0, count) and waits; worker in [0, threads()).
  // What the caller wrote before is seen by every fn, what they wrote by the caller after.
  template <typename Fn>
  void Run(int count, const Fn& fn) {
    Run(
        count,
        [](const void* context, int worker, int index) {
          (*static_cast<const Fn*>(context))(worker, index);
        },
        &fn);
  }

 private:
  using Task = void (*)(const void* context, int worker, int index);

  void Run(int count, Task task, const void* context);
  void TakeIndices(int worker);
  void WorkerLoop(int worker);
  uint32_t AwaitOpen(uint32_t done) const;

  // The job at hand; written only while it is closed and nobody is inside.
  Task task_ = nullptr;
  const void* context_ = nullptr;

  // Indices that belong to one worker first; each on a line of its own, as it is written often.
  struct alignas(64) Part {
    std::atomic<int> next = 0;
    int end = 0;
  };

  // Job number << 16 | open << 15 | workers inside.
  alignas(64) std::atomic<uint32_t> state_ = 0;
  alignas(64) std::atomic<uint32_t> departures_ = 0;  // times the last inside left a closed job
  std::atomic<bool> stop_ = false;
  std::vector<Part> parts_;
  std::vector<std::thread> threads_;
};

}  // namespace espalier
