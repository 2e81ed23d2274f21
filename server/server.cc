#include "server/server.h"

#include <fmt/format.h>
#include <google/protobuf/stubs/logging.h>
#include <grpc/support/log.h>
#include <malloc.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <future>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <utility>

#include "engine/machine_memory.h"
#include "engine/model/files/model_file.h"
#include "engine/model/moments_file.h"
#include "engine/model/pruning_file.h"
#include "kernels/nvml.h"
#include "server/api_service.h"
#include "server/engine_thread.h"
#include "server/front.h"
#include "server/loaded_model.h"
#include "server/logging.h"
#include "server/memory_keeper.h"
#include "server/metrics.h"
#include "server/quality_check.h"
#include "server/ready_queue.h"
#include "server/steady_clock.h"
#include "server/stop_signal.h"
#include "server/watchdog.h"

namespace espalier {
namespace {

using std::chrono::milliseconds;

// Health watchers and idle connections get this to see the end of a drained server.
constexpr milliseconds kGoodbye{500};
// One keeps up with some 70 k tokens/s without a backlog, and far more with one (messages then
// carry more tokens).
constexpr int kWriters = 1;

// How often memory is looked at, which takes some 300 us.
constexpr milliseconds kMemoryInterval{250};

// How often what is gathered is written, a megabyte or so.
constexpr milliseconds kMomentsInterval{60'000};

std::string_view Text(const absl::Status& status) {
  return {status.message().data(), status.message().size()};
}

// A line on a terminal, nothing in a log file.
void ShowProgress(int done, int total) {
  static const bool terminal = isatty(STDERR_FILENO) != 0;
  if (!terminal) return;
  const int filled = 32 * done / std::max(total, 1);
  fmt::print(stderr, "\rloading [{:=<{}}{:<{}}] {}/{}{}", "", filled, "", 32 - filled, done, total,
             done == total ? "\n" : "");
}

class Server {
 public:
  Server(const ServerOptions& options, StopSignal* stop)
      : options_(options),
        stop_(stop),
        service_({.stream_buffer_tokens = static_cast<size_t>(options.stream_buffer_tokens),
                  .log_prompts = options.log_prompts,
                  .admin = options.admin,
                  .on_finished = [this](const RequestSummary& summary) { Tell(summary); }},
                 std::string(ServerVersion()), [] { return ForeignMemoryBytes(); }) {}

  int Run() {
    stop_->set_nothing_to_finish(true);
    absl::Status status = Listen();
    if (status.ok()) status = Load();
    if (status.ok()) status = ServeMetrics();
    if (status.ok()) status = Open();
    if (!status.ok()) {
      Log(LogLevel::kError, Text(status));
      return 1;
    }
    Supervise();
    return Drain();
  }

 private:
  absl::Status Listen() {
    absl::StatusOr<std::unique_ptr<Front>> front = Front::Start(options_, &service_);
    if (!front.ok()) return front.status();
    front_ = *std::move(front);
    fmt::print("listening on {}:{}\n", options_.host, front_->port());
    std::fflush(stdout);
    if (!options_.port_file.empty()) {
      // In one piece: who waits for the file must not read half a number.
      const std::string temporary = options_.port_file + ".new";
      std::ofstream file(temporary);
      file << front_->port() << "\n";
      file.close();
      if (!file || std::rename(temporary.c_str(), options_.port_file.c_str()) != 0) {
        return absl::UnavailableError(fmt::format("{}: cannot be written", options_.port_file));
      }
    }
    return absl::OkStatus();
  }

  absl::Status Load() {
    absl::StatusOr<std::unique_ptr<ModelFile>> opened_file = ModelFile::Open(options_.model);
    if (!opened_file.ok()) return opened_file.status();
    const std::shared_ptr<const ModelFile> file = *std::move(opened_file);
    const Instant opened = SteadyNow();
    // Beside the weights: a tenth of their time, on one core.
    std::future<absl::Status> text =
        std::async(std::launch::async, [&] { return LoadText(file->vocabulary()); });
    absl::StatusOr<std::unique_ptr<LoadedModel>> loaded =
        LoadedModel::Load(options_, file,
                          {.ladder = options_.ladder,
                           .kv_bytes = options_.kv_memory,
                           .decision_log = options_.decision_log,
                           .gathers = !options_.moments_file.empty(),
                           .moments_file = options_.moments_file,
                           .progress = ShowProgress});
    const Instant packed = SteadyNow();
    if (absl::Status status = text.get(); !loaded.ok() || !status.ok()) {
      return loaded.ok() ? status : loaded.status();
    }
    loaded_ = *std::move(loaded);
    gathering_ = loaded_->moments();
    kv_ = loaded_->executor().kv_geometry();
    const std::shared_ptr<const ServedModel> model = Serve(*loaded_);
    models_.emplace(model);
    Log(LogLevel::kInfo, "model loaded",
        {{"model", model->name},
         {"weights", model->weight_type},
         {"kv", model->kv_type},
         {"kv_pages", kv_.pages},
         {"max_sequence_tokens", model->max_sequence_tokens},
         {"rungs", model->ladder.size()},
         {"policy", model->policy},
         {"device", model->device},
         {"open_seconds", Seconds(opened - began_)},
         {"pack_seconds", Seconds(packed - opened)}});
    return absl::OkStatus();
  }

  // A generation as calls see it, with the words of all of them.
  std::shared_ptr<const ServedModel> Serve(const LoadedModel& loaded) const {
    auto model = std::make_shared<ServedModel>(loaded.Describe());
    model->tokenizer = tokenizer_;
    model->chat_template = chat_template_;
    return model;
  }

  absl::Status LoadText(const Vocabulary& vocabulary) {
    absl::StatusOr<std::unique_ptr<const Tokenizer>> tokenizer = Tokenizer::Create(vocabulary);
    if (!tokenizer.ok()) return tokenizer.status();
    tokenizer_ = *std::move(tokenizer);
    if (!vocabulary.chat_template.empty()) {
      const auto text = [this](int32_t token) { return tokenizer_->TokenBytes(token); };
      absl::StatusOr<std::unique_ptr<const ChatTemplate>> chat = ChatTemplate::Compile(
          vocabulary.chat_template, text(vocabulary.bos), text(vocabulary.eos));
      if (!chat.ok()) return chat.status();
      chat_template_ = *std::move(chat);
    }
    encoder_ = std::make_unique<PromptEncoder>(tokenizer_.get(), chat_template_.get());
    return absl::OkStatus();
  }

  BuildInfo BuildOf(const ServedModel& model) const {
    return {.version = std::string(ServerVersion()),
            .model_name = model.name,
            .weights = model.weight_type,
            .kv_type = model.kv_type,
            .device = model.device,
            .page_tokens = kv_.page_tokens,
            .kv_blocks = kv_.pages / kv_.layers};
  }

  absl::Status ServeMetrics() {
    metrics_ =
        std::make_unique<Metrics>(BuildOf(*models_->of(0)), [] { return ForeignMemoryBytes(); });
    metrics_for_calls_.store(metrics_.get(), std::memory_order_release);
    if (options_.metrics_port < 0) return absl::OkStatus();
    const absl::StatusOr<int> port = metrics_->Serve(options_.host, options_.metrics_port);
    if (!port.ok()) return port.status();
    Log(LogLevel::kInfo, "metrics", {{"host", options_.host}, {"port", *port}});
    return absl::OkStatus();
  }

  // What the engine thread tells of a generation. The thread outlives neither.
  NextEngine EngineOf(LoadedModel* loaded) {
    return {.engine = loaded->engine(),
            .ledger = [loaded](const SchedulerStats& s) { return loaded->executor().ledger(s); },
            .quality = loaded->quality(),
            .on_check = [this, loaded] { Judge(loaded); }};
  }

  // Runs one request through the engine, before anyone watches, starts its thread and opens for
  // everyone.
  absl::Status Open() {
    if (absl::Status status = loaded_->WarmUp(); !status.ok()) return status;
    // All pages of the pool are given back or fresh but those of the warm-up's two tokens.
    const Ledger ledger = loaded_->executor().ledger(loaded_->engine()->scheduler().stats());
    page_bytes_ =
        (ledger.kv_used + ledger.kv_reusable + ledger.kv_free) / static_cast<uint64_t>(kv_.pages);

    hardest_ = models_->of(0)->ladder.size() - 1;
    if (loaded_->quality() != nullptr) metrics_->OnCheck(*loaded_->quality(), hardest_ + 1);
    ready_ = std::make_unique<ReadyQueue>(kWriters);
    NextEngine first = EngineOf(loaded_.get());
    thread_ = std::make_unique<EngineThread>(
        first.engine, ready_.get(), options_.max_waiting,
        EngineHooks{
            .ledger = std::move(first.ledger),
            .on_step =
                [this](const StepReport& report, const LoadSnapshot& load, const StepTimes& times) {
                  metrics_->OnStep(report, load, times);
                  if (gathering_ != nullptr) metrics_->OnGathered(gathering_->tokens());
                  released_.store(load.ledger.weights_released, std::memory_order_relaxed);
                  TellPolicy(load);
                  TellWeights(load);
                },
            .on_lost = [this](const absl::Status& lost) { Lose(lost); },
            .quality = first.quality,
            .on_check = std::move(first.on_check)});

    memory_ = std::make_unique<MemoryKeeper>(
        MemoryKeeper::Options{.budget = options_.memory_budget,
                              .page_bytes = page_bytes_,
                              .pages = kv_.pages,
                              .other_bytes = ResidentMemoryBytes(),
                              .weight_pages = loaded_->executor().ReleasablePages(0)},
        [this](int pages) { LimitPages(pages); }, MemoryKeeper::Sources{.released = [this] {
          return released_.load(std::memory_order_relaxed);
        }});
    memory_->Look();
    thread_->SawMemory(SteadyNow());  // or from now on it has not been
    FindMemorySources();
    backstage_ = {.models = &*models_,
                  .encoder = encoder_.get(),
                  .engine = thread_.get(),
                  .memory = memory_.get(),
                  .reload = [this](ReloadOrder order, Backstage::ReloadDone done) {
                    Reload(std::move(order), std::move(done));
                  }};
    stop_->set_nothing_to_finish(false);
    service_.Open(&backstage_);
    SetHealth(&Health::open, true);
    Log(LogLevel::kInfo, "serving",
        {{"host", options_.host},
         {"port", front_->port()},
         {"ready_seconds", Seconds(SteadyNow() - began_)}});
    return absl::OkStatus();
  }

  void FindMemorySources() {
    absl::StatusOr<std::unique_ptr<Nvml>> nvml = Nvml::Open();
    const std::string device = nvml.ok() ? "nvml" : std::string(Text(nvml.status()));
    if (nvml.ok()) nvml_ = *std::move(nvml);
    const MachineMemory machine = ReadMachineMemory();
    Log(LogLevel::kInfo, "memory sources",
        {{"machine_bytes", machine.total},
         {"stalls", machine.stalled.has_value() ? "psi" : "absent: no pressure stall information"},
         {"device", nvml_ != nullptr ? device : "absent: " + device}});
  }

  // On the engine's thread; a change of mind is rare beside steps.
  void TellPolicy(const LoadSnapshot& load) {
    const int before = std::exchange(told_rung_, load.stats.wanted_rung);
    if (before == told_rung_) return;
    Log(LogLevel::kInfo, "policy",
        {{"rung", told_rung_},
         {"was", before},
         {"reason", load.stats.reason},
         {"kv", load.kv_utilization()},
         {"running", load.stats.running},
         {"waiting", load.stats.waiting}});
  }

  // On the engine's thread.
  void TellWeights(const LoadSnapshot& load) {
    const WeightsReport& now = load.weights;
    const WeightsReport before = std::exchange(told_weights_, now);
    if (now.releases == before.releases && now.returns == before.returns) return;
    std::string rungs;
    for (int rung = 0; rung < kMostRungs; ++rung) {
      if ((now.rungs >> rung & 1) != 0)
        rungs += fmt::format("{}{}", rungs.empty() ? "" : ",", rung);
    }
    Log(LogLevel::kInfo, "weights",
        {{"rungs", rungs},
         {"bytes", load.ledger.weights},
         {"released", load.ledger.weights_released},
         {"return_seconds", now.returns > before.returns ? now.return_s : 0.0}});
  }

  // On the engine's thread, between steps, as the policy is asked.
  void Judge(LoadedModel* loaded) {
    const QualityCheck& quality = *loaded->quality();
    const Ladder& ladder = loaded->executor().ladder();
    metrics_->OnCheck(quality, ladder.size());
    const int hardest = quality.hardest();
    if (hardest == hardest_) return;
    const int bad = std::min(hardest, hardest_) + 1;
    const QualityCheck::Figure figure = quality.prompts(bad);
    Log(hardest < hardest_ ? LogLevel::kWarning : LogLevel::kInfo, "quality",
        {{"hardest_rung", hardest},
         {"was", hardest_},
         {"rung", bad},
         {"measured_loss", figure.mean},
         {"standard_error", figure.standard_error},
         {"price", ladder.rung(bad).price.quality_loss_nats}});
    hardest_ = hardest;
    loaded->set_hardest(hardest);
  }

  void LimitPages(int pages) {
    Log(LogLevel::kInfo, "memory", {{"kv_pages", pages}, {"of", kv_.pages}});
    thread_->LimitPages(pages);
  }

  // Begins on a thread of its own: gRPC's must not wait for seconds.
  void Reload(ReloadOrder order, Backstage::ReloadDone done) {
    std::lock_guard lock(reload_mutex_);
    if (reloading_ || no_more_reloads_) {
      done({}, no_more_reloads_ ? Draining() : Reloading());
      return;
    }
    if (reload_thread_.joinable()) reload_thread_.join();  // it has nothing left to do
    reloading_ = true;
    reload_thread_ = std::thread([this, order = std::move(order), done = std::move(done)] {
      if (std::optional<RpcError> error = ReplaceModel(order, done); error.has_value()) {
        Log(LogLevel::kWarning, "the model was not reloaded",
            {{"error", error->status.error_message()}});
        std::unique_lock lock(reload_mutex_);
        reloading_ = false;
        lock.unlock();
        done({}, error);
      }
    });
  }

  // All of a reload: from the file to the release of the weights before. Calls `done` when the new
  // ones serve; an error means that nothing has changed.
  std::optional<RpcError> ReplaceModel(const ReloadOrder& order,
                                       const Backstage::ReloadDone& done) {
    const Instant began = SteadyNow();
    const std::shared_ptr<const ServedModel> before = backstage_.model();
    const uint64_t other = memory_->other();
    const std::string path = order.model.empty() ? path_ : order.model;
    const std::string ladder =
        order.without_ladder ? "" : (order.ladder.empty() ? ladder_ : order.ladder);
    if (options_.probe.has_value()) {
      return NotReloaded("", absl::FailedPreconditionError(
                                 "--probe: what it has learned is of the weights there are"));
    }
    std::unique_ptr<LoadedModel> next;
    {
      absl::StatusOr<std::unique_ptr<ModelFile>> opened_file = ModelFile::Open(path);
      if (!opened_file.ok()) return NotReloaded("model", opened_file.status());
      const std::shared_ptr<const ModelFile> file = *std::move(opened_file);
      absl::Status status = CheckReplaces(*before, *file);
      if (!status.ok()) return NotReloaded("model", status);
      if (!ladder.empty()) {
        // First, as it is quick, and so that it is known whose fault it is.
        const absl::StatusOr<CalibratedLadder> opened = OpenLadder(ladder, *file);
        if (!opened.ok() && !order.ladder.empty()) return NotReloaded("ladder", opened.status());
        if (!opened.ok()) {
          return NotReloaded(
              "ladder", absl::FailedPreconditionError(fmt::format(
                            "the served one does not fit: {}; name one that `espalier calibrate` "
                            "made for these weights, or ask for none: without_ladder",
                            Text(opened.status()))));
        }
      }
      if (status = CheckFits(*file, other); !status.ok()) return NotReloaded("model", status);
      const std::string& log = options_.decision_log;
      absl::StatusOr<std::unique_ptr<LoadedModel>> loaded = LoadedModel::Load(
          options_, file,
          {.ladder = ladder,
           .kv_bytes = page_bytes_ * static_cast<uint64_t>(kv_.pages),
           .decision_log = log.empty() ? "" : fmt::format("{}.{}", log, generation_ + 1),
           .gathers = loaded_->moments() != nullptr && LineageOf(*file) == loaded_->lineage()});
      if (loaded.ok()) status = (*loaded)->WarmUp();
      if (!loaded.ok() || !status.ok()) {
        memory_->SetOther(other);
        return NotReloaded("model", loaded.ok() ? status : loaded.status());
      }
      next = *std::move(loaded);
    }
    const Reloaded reloaded{.model = Serve(*next),
                            .loading_s = Seconds(SteadyNow() - began),
                            .before = thread_->load().stats.running + thread_->load().waiting()};
    models_->Set(generation_ + 1, reloaded.model);
    std::promise<void> left;
    const bool replaced = thread_->Replace(EngineOf(next.get()), [this, &left, &next] {
      if (next->moments() != nullptr) next->moments()->Add(*gathering_);
      gathering_ = next->moments();
      left.set_value();
    });
    if (!replaced) return Draining();
    ++generation_;
    path_ = path;
    ladder_ = ladder;
    thread_->BetweenSteps([&] {
      metrics_->OnReload(BuildOf(*reloaded.model), before->ladder.size());
      hardest_ = reloaded.model->ladder.size() - 1;
    });
    Log(LogLevel::kInfo, "model reloaded",
        {{"model", reloaded.model->name},
         {"file", path},
         {"weights", reloaded.model->weight_type},
         {"rungs", reloaded.model->ladder.size()},
         {"load_seconds", reloaded.loading_s},
         {"requests_before", reloaded.before}});
    done(reloaded, std::nullopt);

    left.get_future().wait();
    ReleaseBefore(std::exchange(loaded_, std::move(next)), SteadyNow() - began);
    return std::nullopt;
  }

  // That what a file's weights take is there beside those of now and the KV in use; KV is kept out
  // of it from here on.
  absl::Status CheckFits(const ModelFile& file, uint64_t other) {
    const LoadSnapshot load = thread_->load();
    if (load.ledger.weights_released > 0) {
      return absl::ResourceExhaustedError(
          fmt::format("{}: {} MiB of the served weights have left memory for want of it",
                      file.path(), load.ledger.weights_released >> 20));
    }
    const uint64_t need = EstimateWeightBytes(file, options_.weights) + load.ledger.workspace;
    uint64_t left = ReadMachineMemory().available;
    if (const uint64_t budget = memory_->budget(); budget > 0) {
      left = std::min(left, budget - std::min(budget, other + load.ledger.kv_used));
    }
    if (need > left) {
      return absl::ResourceExhaustedError(
          fmt::format("{}: weights and workspace take some {} MiB beside what is served, and {} "
                      "MiB are left",
                      file.path(), need >> 20, left >> 20));
    }
    memory_->SetOther(other + need);
    return absl::OkStatus();
  }

  void ReleaseBefore(std::unique_ptr<LoadedModel> before, Instant took) {
    const uint64_t held = ResidentMemoryBytes();
    if (before->moments() != nullptr && loaded_->moments() == nullptr) {
      KeepMoments(*before, *before->moments());
      Log(LogLevel::kInfo, "moments are gathered no more: another model is served");
    }
    before.reset();
    malloc_trim(0);
    const uint64_t resident = ResidentMemoryBytes();
    const Ledger ledger = thread_->load().ledger;
    const uint64_t whole = resident + ledger.weights_released;
    memory_->SetOther(whole - std::min(whole, ledger.kv_used + ledger.kv_reusable));
    {
      std::lock_guard lock(reload_mutex_);
      reloading_ = false;  // before it is told: who reads the log may ask for the next
    }
    Log(LogLevel::kInfo, "weights before released",
        {{"seconds", Seconds(took)}, {"resident", resident}, {"was", held}});
  }

  void KeepMoments(const LoadedModel& loaded, const InputMoments& moments) {
    const absl::Status status =
        WriteMoments(options_.moments_file, loaded.lineage(), loaded.executor().config(), moments);
    if (!status.ok()) Log(LogLevel::kError, "moments lost", {{"error", Text(status)}});
  }

  // A copy of what is gathered goes to its file, if there is more of it than before.
  void KeepMomentsNow() {
    std::lock_guard lock(reload_mutex_);
    if (reloading_ || loaded_->moments() == nullptr) return;
    if (!kept_moments_.has_value()) kept_moments_.emplace(loaded_->executor().config());
    const int64_t kept = kept_moments_->tokens();
    if (!thread_->BetweenSteps([this] { *kept_moments_ = *loaded_->moments(); })) return;
    if (kept_moments_->tokens() > kept) KeepMoments(*loaded_, *kept_moments_);
  }

  // Until a signal comes, health follows the engine's progress, and KV memory what there is.
  void Supervise() {
    Watchdog watchdog(options_.stall_timeout);
    Instant moments_due = SteadyNow() + kMomentsInterval;
    while (!stop_->WaitFor(std::min(watchdog.interval(), kMemoryInterval))) {
      if (memory_->Look()) thread_->SawMemory(SteadyNow());
      const auto device = nvml_ == nullptr ? std::nullopt : nvml_->Read();
      if (device.has_value()) metrics_->OnDeviceMemory(device->total, device->free);
      if (SteadyNow() >= moments_due) {
        KeepMomentsNow();
        moments_due = SteadyNow() + kMomentsInterval;
      }
      const double still = thread_->seconds_without_progress();
      if (!watchdog.Look(still)) continue;
      SetHealth(&Health::stuck, watchdog.stuck());
      metrics_->OnStall(watchdog.stuck());
      if (watchdog.stuck()) {
        Log(LogLevel::kError, "the engine makes no progress", {{"seconds", still}});
      } else if (!lost_) {
        Log(LogLevel::kInfo, "the engine is back");
      }
    }
  }

  int Drain() {
    SetHealth(&Health::open, false);
    const LoadSnapshot load = thread_->load();
    Log(LogLevel::kInfo, "draining",
        {{"running", load.stats.running}, {"waiting", load.waiting()}});
    const Instant until = SteadyNow() + options_.drain_timeout;
    {
      std::lock_guard lock(reload_mutex_);
      no_more_reloads_ = true;
    }
    const bool all_finished = thread_->Drain(options_.drain_timeout);
    if (reload_thread_.joinable()) reload_thread_.join();
    ready_.reset();                // the last tokens are on their way
    service_.WaitForCalls(until);  // slow readers may have some to read yet
    front_->Shutdown(kGoodbye);
    loaded_->KeepHistory();
    if (loaded_->moments() != nullptr) KeepMoments(*loaded_, *loaded_->moments());
    Log(LogLevel::kInfo, "stopped", {{"all_finished", all_finished}});
    return lost_ ? 1 : 0;
  }

  void Lose(const absl::Status& status) {
    lost_ = true;
    SetHealth(&Health::lost, true);
    Log(LogLevel::kError, "the engine is lost", {{"error", Text(status)}});
  }

  // What health follows. Threads that learn of different things must not undo each other's.
  struct Health {
    bool open = false;
    bool stuck = false;
    bool lost = false;
  };

  void SetHealth(bool Health::* what, bool value) {
    std::lock_guard lock(health_mutex_);
    health_.*what = value;
    front_->SetServing(health_.open && !health_.stuck && !health_.lost);
  }

  void Tell(const RequestSummary& summary) {
    LogRequest(summary);
    Metrics* const metrics = metrics_for_calls_.load(std::memory_order_acquire);
    if (metrics != nullptr) metrics->OnFinished(summary);
  }

  const ServerOptions& options_;
  StopSignal* const stop_;
  const Instant began_ = SteadyNow();

  // In the order in which they are made; whoever uses another comes after it.
  std::unique_ptr<Metrics> metrics_;
  std::atomic<Metrics*> metrics_for_calls_{nullptr};
  std::atomic<bool> lost_{false};
  std::mutex health_mutex_;
  Health health_;
  std::shared_ptr<const Tokenizer> tokenizer_;
  std::shared_ptr<const ChatTemplate> chat_template_;
  std::unique_ptr<PromptEncoder> encoder_;
  KvGeometry kv_;  // of every generation
  uint64_t page_bytes_ = 0;
  std::unique_ptr<LoadedModel> loaded_;  // the reload thread's while that replaces it
  std::optional<ServedModels> models_;
  std::optional<InputMoments> kept_moments_;
  const InputMoments* gathering_ = nullptr;  // engine thread
  int told_rung_ = 0;                        // engine thread
  WeightsReport told_weights_;               // engine thread
  std::atomic<uint64_t> released_{0};        // bytes of weights that are out of memory
  int hardest_ = 0;                          // engine thread; that may be served
  // Of reloads: the reload thread's, and read before it is started.
  std::string path_ = options_.model;
  std::string ladder_ = options_.ladder;
  int generation_ = 0;
  std::unique_ptr<ReadyQueue> ready_;
  std::unique_ptr<EngineThread> thread_;
  std::unique_ptr<MemoryKeeper> memory_;
  std::unique_ptr<Nvml> nvml_;  // null: no such device
  Backstage backstage_;
  ApiService service_;
  std::unique_ptr<Front> front_;
  std::mutex reload_mutex_;
  bool reloading_ = false;
  bool no_more_reloads_ = false;
  std::thread reload_thread_;
};

}  // namespace

namespace {

// gRPC and protobuf write lines of their own to stderr, in no format of ours, for what a caller got
// wrong (text that is not UTF-8) or what we tell ourselves (a busy port).
void QuietLibraries() {
  gpr_set_log_function(
      [](gpr_log_func_args* args) { Log(LogLevel::kDebug, args->message, {{"from", "grpc"}}); });
  google::protobuf::SetLogHandler(
      [](google::protobuf::LogLevel, const char*, int, const std::string& message) {
        Log(LogLevel::kDebug, message, {{"from", "protobuf"}});
      });
}

}  // namespace

int RunServer(const ServerOptions& options) {
  StopSignal& stop = StopSignal::Install();
  StartLogging(options.log_level, options.log_format);
  QuietLibraries();
  return Server(options, &stop).Run();
}

}  // namespace espalier
