#include "server/reloader.h"

#include <fmt/format.h>
#include <malloc.h>

#include <algorithm>
#include <future>
#include <string_view>
#include <utility>

#include "engine/machine_memory.h"
#include "server/logging.h"
#include "server/steady_clock.h"

namespace espalier {
namespace {

std::string_view Text(const absl::Status& status) {
  return {status.message().data(), status.message().size()};
}

}  // namespace

Reloader::Reloader(const Served& served, Hooks hooks)
    : served_(served),
      hooks_(std::move(hooks)),
      path_(served.options->model),
      ladder_(served.options->ladder),
      fixed_bytes_(served.fixed_bytes) {}

void Reloader::Reload(ReloadOrder order, Backstage::ReloadDone done) {
  std::lock_guard lock(mutex_);
  if (stop_ || !served_.engine->lost().ok()) {
    done({}, Over());
    return;
  }
  if (reloading_) {
    done({}, Reloading());
    return;
  }
  if (thread_.joinable()) thread_.join();  // it has nothing left to do
  reloading_ = true;
  thread_ = std::thread([this, order = std::move(order), done = std::move(done)] {
    if (std::optional<RpcError> error = Replace(order, done); error.has_value()) {
      Log(LogLevel::kWarning, "the model was not reloaded",
          {{"error", error->status.error_message()}});
      std::unique_lock lock(mutex_);
      reloading_ = false;
      lock.unlock();
      done({}, error);
    }
  });
}

void Reloader::Stop() {
  std::lock_guard lock(mutex_);
  stop_ = true;
}

void Reloader::Join() {
  if (thread_.joinable()) thread_.join();
}

RpcError Reloader::Over() const {
  const absl::Status lost = served_.engine->lost();
  return lost.ok() ? Draining() : EngineLost(lost, /*tokens_sent=*/false);
}

// All of a reload: from the file to the release of the weights before. Calls `done` when the new
// ones serve; an error means that nothing has changed.
std::optional<RpcError> Reloader::Replace(const ReloadOrder& order,
                                          const Backstage::ReloadDone& done) {
  const ServerOptions& options = *served_.options;
  const Instant began = SteadyNow();
  const std::shared_ptr<const ServedModel> before = served_.models->of(generation_);
  const std::string path = order.model.empty() ? path_ : order.model;
  const std::string ladder_path =
      order.without_ladder ? "" : (order.ladder.empty() ? ladder_ : order.ladder);
  if (options.probe.has_value()) {
    return NotReloaded("", absl::FailedPreconditionError(
                               "--probe: what it has learned is of the weights there are"));
  }
  absl::StatusOr<std::unique_ptr<ModelFile>> opened_file = ModelFile::Open(path);
  if (!opened_file.ok()) return NotReloaded("model", opened_file.status());
  std::shared_ptr<const ModelFile> file = *std::move(opened_file);
  absl::Status status = CheckReplaces(*before, *file);
  if (!status.ok()) return NotReloaded("model", status);

  // The ladder comes before the weights, as it is quick, and so that it is known whose fault it is.
  std::optional<CalibratedLadder> ladder;
  if (!ladder_path.empty()) {
    absl::StatusOr<CalibratedLadder> opened = OpenLadder(ladder_path, *file);
    if (!opened.ok() && !order.ladder.empty()) return NotReloaded("ladder", opened.status());
    if (!opened.ok()) {
      return NotReloaded(
          "ladder", absl::FailedPreconditionError(fmt::format(
                        "the served one does not fit: {}; name one that `espalier calibrate` made "
                        "for these weights, or ask for none: without_ladder",
                        Text(opened.status()))));
    }
    ladder = *std::move(opened);
  }
  status = CheckPolicy(options, ladder_path, ladder.has_value() ? ladder->ladder.size() : 1);
  if (!status.ok()) return NotReloaded("ladder", status);
  const uint64_t other = served_.memory->other();
  const int weight_pages = served_.memory->weight_pages();
  status = CheckFits(*file, ladder.has_value() ? &*ladder : nullptr);
  if (!status.ok()) return NotReloaded("model", status);
  ladder.reset();

  const std::string& log = options.decision_log;
  absl::StatusOr<std::unique_ptr<LoadedModel>> loaded = LoadedModel::Load(
      options, file,
      {.ladder = ladder_path,
       .name = before->name,
       .kv_bytes = served_.kv_bytes,
       .decision_log = log.empty() ? "" : fmt::format("{}.{}", log, generation_ + 1),
       .moments = served_.moments,
       .progress = [this](int, int) { return !stop_.load(); }});
  if (loaded.ok() && !stop_) status = (*loaded)->WarmUp();
  if (stop_ || !loaded.ok() || !status.ok()) {
    served_.memory->SetOther(other, weight_pages);
    if (stop_) return Over();
    if (!loaded.ok()) status = loaded.status();
    // What names an option is no fault of the model's.
    return NotReloaded(Text(status).starts_with("--") ? "" : "model", status);
  }
  std::unique_ptr<LoadedModel> next = *std::move(loaded);
  // Nobody is served by it yet: all of its weights are in memory.
  const Ledger ledger = next->executor().ledger({});
  const uint64_t fixed_bytes = ledger.weights + ledger.workspace;
  const int next_pages = next->engine()->weight_pages();
  served_.memory->SetOther(other + fixed_bytes, weight_pages + next_pages);

  Reloaded reloaded{.model = hooks_.describe(*next), .loading_s = Seconds(SteadyNow() - began)};
  served_.models->Set(generation_ + 1, reloaded.model);
  std::promise<void> left;
  const std::optional<int> requests_before =
      served_.engine->Replace(hooks_.engine_of(next.get()), [&] { left.set_value(); });
  if (!requests_before.has_value()) return Over();
  reloaded.before = *requests_before;
  ++generation_;
  served_.moments->Tell(*file);
  file.reset();
  path_ = path;
  ladder_ = ladder_path;
  served_.engine->BetweenSteps([&] { hooks_.on_replaced(*before, *reloaded.model); });
  Log(LogLevel::kInfo, "model reloaded",
      {{"model", reloaded.model->name},
       {"file", path},
       {"weights", reloaded.model->weight_type},
       {"rungs", reloaded.model->ladder.size()},
       {"load_seconds", reloaded.loading_s},
       {"requests_before", reloaded.before}});
  done(reloaded, std::nullopt);

  left.get_future().wait();
  const uint64_t held = ResidentMemoryBytes();
  std::unique_ptr<LoadedModel> gone = std::exchange(*served_.loaded, std::move(next));
  gone.reset();
  malloc_trim(0);
  const uint64_t both = other + fixed_bytes;
  served_.memory->SetOther(both - std::min(both, std::exchange(fixed_bytes_, fixed_bytes)),
                           next_pages);
  {
    std::lock_guard lock(mutex_);
    reloading_ = false;  // before it is told: who reads the log may ask for the next
  }
  Log(LogLevel::kInfo, "weights before released",
      {{"seconds", Seconds(SteadyNow() - began)},
       {"resident", ResidentMemoryBytes()},
       {"was", held}});
  return std::nullopt;
}

// That what a file's weights take is there beside those of now and the KV in use; KV is kept out
// of it from here on.
absl::Status Reloader::CheckFits(const ModelFile& file, const CalibratedLadder* ladder) {
  const LoadSnapshot load = served_.engine->load();
  if (load.ledger.weights_released > 0) {
    return absl::ResourceExhaustedError(
        fmt::format("{}: {} MiB of the served weights have left memory for want of it", file.path(),
                    load.ledger.weights_released >> 20));
  }
  MemoryKeeper& memory = *served_.memory;
  const uint64_t other = memory.other();
  const uint64_t need =
      EstimateWeightBytes(file, served_.options->weights, ladder) + load.ledger.workspace;
  if (const uint64_t left = memory.Room(other + load.ledger.kv_used); need > left) {
    return absl::ResourceExhaustedError(
        fmt::format("{}: weights and workspace take some {} MiB beside what is served, and {} MiB "
                    "are left",
                    file.path(), need >> 20, left >> 20));
  }
  memory.SetOther(other + need, memory.weight_pages());
  return absl::OkStatus();
}

}  // namespace espalier
