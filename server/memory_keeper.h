// Keeps the process within its memory: what it may have, by its budget and by what the machine has
// left, less what is no KV, is the KV pages that the engine may use.
#pragma once

#include <cstdint>
#include <functional>
#include <mutex>
#include <optional>
#include <utility>

#include "engine/machine_memory.h"

namespace espalier {

class MemoryKeeper {
 public:
  struct Options {
    uint64_t budget = 0;  // bytes for the process; 0: what the machine has
    double share = 0;     // in (0, 1]: so much of that, whatever it comes to be, is the budget
    uint64_t page_bytes = 0;
    int pages = 0;             // of the whole KV pool
    uint64_t other_bytes = 0;  // resident, and no KV: weights, workspace, the process itself
    int weight_pages = 0;      // that weights are worth which may leave, as in SetOther
  };
  // Where it looks; for tests.
  struct Sources {
    std::function<MachineMemory()> machine = [] { return ReadMachineMemory(); };
    std::function<uint64_t()> resident = [] { return ResidentMemoryBytes(); };
    std::function<uint64_t()> released = [] { return uint64_t{0}; };  // weights, out of memory
    // That hold K and V, which may be more than were told: who runs keeps what it has.
    std::function<int()> kv_pages = [] { return 0; };
  };

  // What was seen.
  struct Shares {
    double free = 1;     // of what the process may hold, by budget and machine: not held yet
    double foreign = 0;  // of the machine's memory, held by others
    bool operator==(const Shares&) const = default;
  };

  // `limit` is told the pages there may be beside all weights whenever that changes, on the thread
  // that looked: less than none where weights have to leave.
  MemoryKeeper(const Options& options, std::function<void(int pages)> limit)
      : MemoryKeeper(options, std::move(limit), Sources()) {}
  MemoryKeeper(const Options& options, std::function<void(int pages)> limit, Sources sources);

  // Tells a limit that is smaller by a two-hundredth of the pool, or larger by a twentieth, or all
  // of it: a machine that breathes does not move pages to and fro. Nothing if the machine's memory
  // could not be seen. Any thread.
  //
  // While tasks wait for memory for a tenth of their time (MachineMemory::stalled), whatever the
  // machine says is available, four times as much is left to others, until it is a fiftieth.
  std::optional<Shares> Look();

  // As Options from now on. Looks, and tells the pages even if they are few more. Any thread.
  void SetBudget(uint64_t bytes, double share = 0);

  // Bytes that are no KV from now on, and the pages that those weights among them are worth which
  // may leave: weights came or went. Looks. Any thread.
  void SetOther(uint64_t bytes, int weight_pages);
  uint64_t other() const;
  int weight_pages() const;

  // Bytes that the process may still take, by what the machine has left beside what is others', and
  // by the budget if `held` of it are taken; all there could be where neither can be seen.
  uint64_t Room(uint64_t held) const;

  uint64_t budget() const;
  int pages() const;  // as last told; at first all
  // What KV may take while those weights are in memory that now are.
  uint64_t kv_bytes() const;

 private:
  std::optional<Shares> LookLocked(int worth_it);
  uint64_t LeftLocked(const MachineMemory& machine) const;  // to others
  int KvPagesLocked(uint64_t released) const;

  const Options options_;
  const std::function<void(int)> limit_;
  const Sources sources_;
  mutable std::mutex mutex_;
  uint64_t budget_;
  double share_;
  uint64_t other_;
  int weight_pages_;
  int pages_;
  bool stalled_ = false;
};

}  // namespace espalier
