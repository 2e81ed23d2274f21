// Replaces the model that is served by another: checks and loads it on a thread of its own, hands
// it to the engine thread, and lets the one before go once nobody is left there.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>

#include "absl/status/status.h"
#include "engine/model/files/model_file.h"
#include "engine/model/pruning_file.h"
#include "server/call.h"
#include "server/engine_thread.h"
#include "server/loaded_model.h"
#include "server/memory_keeper.h"
#include "server/options.h"
#include "server/served_model.h"

namespace espalier {

class Reloader {
 public:
  // What is served, and by whom; all of it outlives the reloader.
  struct Served {
    const ServerOptions* options = nullptr;
    EngineThread* engine = nullptr;
    MemoryKeeper* memory = nullptr;
    MomentsKeeper* moments = nullptr;
    ServedModels* models = nullptr;
    // Never null; the reload thread's until Join, and changed by it.
    std::unique_ptr<LoadedModel>* loaded = nullptr;
    uint64_t kv_bytes = 0;     // of a generation's pool
    uint64_t fixed_bytes = 0;  // of the weights that are served first, and workspace
  };
  struct Hooks {
    // A generation as calls see it, and as the engine thread drives it.
    std::function<std::shared_ptr<const ServedModel>(const LoadedModel&)> describe;
    std::function<NextEngine(LoadedModel*)> engine_of;
    // Engine thread: newcomers are served by `now`.
    std::function<void(const ServedModel& before, const ServedModel& now)> on_replaced;
  };

  Reloader(const Served& served, Hooks hooks);
  ~Reloader() { Join(); }

  // As Backstage::reload: begins on the reload thread, since gRPC's must not wait for seconds.
  void Reload(ReloadOrder order, Backstage::ReloadDone done);

  // No more of them, and one that still loads is given up.
  void Stop();
  // Waits for the end of the one that is under way: after Stop, and once the engine thread has
  // ended.
  void Join();

 private:
  std::optional<RpcError> Replace(const ReloadOrder& order, const Backstage::ReloadDone& done);
  absl::Status CheckFits(const ModelFile& file, const CalibratedLadder* ladder);
  // Why a reload ends although nothing is wrong with what was asked for.
  RpcError Over() const;

  const Served served_;
  const Hooks hooks_;
  // The reload thread's, and read before it is started.
  std::string path_, ladder_;
  int generation_ = 0;
  uint64_t fixed_bytes_;  // as Served::fixed_bytes, of those that are served now

  std::atomic<bool> stop_{false};
  std::mutex mutex_;
  bool reloading_ = false;
  std::thread thread_;
};

}  // namespace espalier
