// What the server shows to Prometheus: vLLM's names where they are true here, and espalier_*.
//
// The engine thread reports once per step, gRPC threads once per request; a scrape reads atomics
// and takes only the short lock of one histogram at a time, never one of the scheduler's.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "engine/engine.h"
#include "server/load_snapshot.h"
#include "server/quality_check.h"
#include "server/request_summary.h"
#include "server/step_times.h"

namespace espalier {

// Labels of espalier_build_info.
struct BuildInfo {
  std::string version;
  std::string model_name;  // also the label `model_name` of vLLM's metrics
  std::string weights;
  std::string kv_type;
  std::string device;
  int page_tokens = 0;  // of a KV page
  int kv_blocks = 0;    // pages of one layer: page_tokens * kv_blocks tokens fit
};

class Metrics {
 public:
  // `foreign_bytes`, called from a scrape's thread at most once a second, says what other processes
  // hold of the machine's memory.
  Metrics(const BuildInfo& build, std::function<uint64_t()> foreign_bytes);
  ~Metrics();

  // Serves GET /metrics at host:port (0: a free one) on threads of its own, until destroyed. The
  // port, or why it cannot be listened at. Call once.
  absl::StatusOr<int> Serve(const std::string& host, int port);

  // Engine thread: after each step, and once more when the engine goes idle.
  void OnStep(const StepReport& report, const LoadSnapshot& load, const StepTimes& times);

  // Once per call of Generate or Score, however it ended; refused ones too. Thread-safe.
  void OnFinished(const RequestSummary& summary);

  // Engine thread: after each of its checks.
  void OnCheck(const QualityCheck& quality, int rungs);

  // All of the ladder's rungs may be served, before any check.
  void OnLadder(int rungs);

  // Engine thread: the model was reloaded. `build` tells it from now on, all of its `rungs` rungs
  // may be served, and what those of the one before, `rungs_before`, were seen to lose is
  // forgotten. vLLM's series keep the name that they began with.
  void OnReload(const BuildInfo& build, int rungs, int rungs_before);

  // Engine thread: rows in the sums of --moments-file and --channel-moments-file, if there are
  // such.
  void OnGathered(std::optional<int64_t> inputs, std::optional<int64_t> channels);

  // When the engine begins and ceases to be stuck (Watchdog). Thread-safe.
  void OnStall(bool stuck);

  // Of the process, whenever it was looked at: what it holds, may hold (0: what the machine has),
  // and may hold of K and V. Thread-safe.
  void OnMemory(uint64_t resident, uint64_t budget, uint64_t kv_allowed);

  // Of a device that NVML knows, whenever it was looked at. Thread-safe.
  void OnDeviceMemory(uint64_t total, uint64_t free);

  // What a scrape returns, in Prometheus' text format.
  std::string Text() const;

 private:
  struct Instruments;
  std::shared_ptr<Instruments> instruments_;
};

}  // namespace espalier
