#include "server/server.h"

#include <fmt/format.h>
#include <google/protobuf/stubs/logging.h>
#include <grpc/support/log.h>
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
#include <utility>

#include "engine/machine_memory.h"
#include "engine/model/files/model_file.h"
#include "kernels/nvml.h"
#include "server/api_service.h"
#include "server/engine_thread.h"
#include "server/front.h"
#include "server/loaded_model.h"
#include "server/logging.h"
#include "server/memory_keeper.h"
#include "server/metrics.h"
#include "server/moments_keeper.h"
#include "server/quality_check.h"
#include "server/ready_queue.h"
#include "server/reloader.h"
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
    absl::StatusOr<std::unique_ptr<MomentsKeeper>> moments = MomentsKeeper::Open(options_, *file);
    if (!moments.ok()) return moments.status();
    moments_ = *std::move(moments);
    const Instant opened = SteadyNow();
    // Beside the weights: a tenth of their time, on one core.
    std::future<absl::Status> text =
        std::async(std::launch::async, [&] { return LoadText(file->vocabulary()); });
    absl::StatusOr<std::unique_ptr<LoadedModel>> loaded =
        LoadedModel::Load(options_, file,
                          {.ladder = options_.ladder,
                           .kv_bytes = options_.kv_memory,
                           .decision_log = options_.decision_log,
                           .moments = moments_.get(),
                           .progress = [](int done, int total) {
                             ShowProgress(done, total);
                             return true;
                           }});
    const Instant packed = SteadyNow();
    if (absl::Status status = text.get(); !loaded.ok() || !status.ok()) {
      return loaded.ok() ? status : loaded.status();
    }
    loaded_ = *std::move(loaded);
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
    const int weight_pages = loaded_->engine()->weight_pages();

    hardest_ = models_->of(0)->ladder.size() - 1;
    metrics_->OnLadder(hardest_ + 1);
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
                  metrics_->OnGathered(moments_->input_tokens(), moments_->channel_tokens());
                  released_.store(load.ledger.weights_released, std::memory_order_relaxed);
                  TellPolicy(load);
                  TellWeights(load);
                },
            .on_lost = [this](const absl::Status& lost) { Lose(lost); },
            .quality = first.quality,
            .on_check = std::move(first.on_check)});

    memory_ = std::make_unique<MemoryKeeper>(
        MemoryKeeper::Options{.budget = options_.memory_budget,
                              .share = options_.memory_share,
                              .page_bytes = page_bytes_,
                              .pages = kv_.pages,
                              .other_bytes = ResidentMemoryBytes(),
                              .weight_pages = weight_pages},
        [this](int pages) { LimitPages(pages); },
        MemoryKeeper::Sources{
            .released = [this] { return released_.load(std::memory_order_relaxed); },
            .kv_pages =
                [this] {
                  const SchedulerStats stats = thread_->load().stats;
                  return stats.pages_used + stats.pages_cached;
                }});
    thread_->SawMemory({.at = SteadyNow()});  // or from now on it has not been
    TendMemory();
    MakeReloader(ledger.weights + ledger.workspace);
    backstage_ = {.models = &*models_,
                  .encoder = encoder_.get(),
                  .engine = thread_.get(),
                  .memory = memory_.get(),
                  .reload = [this](ReloadOrder order, Backstage::ReloadDone done) {
                    reloader_->Reload(std::move(order), std::move(done));
                  }};
    stop_->set_nothing_to_finish(false);
    service_.Open(&backstage_);
    SetHealth(&Health::open, true);
    Log(LogLevel::kInfo, "serving",
        {{"host", options_.host},
         {"port", front_->port()},
         {"ready_seconds", Seconds(SteadyNow() - began_)}});
    FindMemorySources();  // a device's takes its time
    return absl::OkStatus();
  }

  void MakeReloader(uint64_t fixed_bytes) {
    reloader_ = std::make_unique<Reloader>(
        Reloader::Served{.options = &options_,
                         .engine = thread_.get(),
                         .memory = memory_.get(),
                         .moments = moments_.get(),
                         .models = &*models_,
                         .loaded = &loaded_,
                         .kv_bytes = page_bytes_ * static_cast<uint64_t>(kv_.pages),
                         .fixed_bytes = fixed_bytes},
        Reloader::Hooks{.describe = [this](const LoadedModel& loaded) { return Serve(loaded); },
                        .engine_of = [this](LoadedModel* loaded) { return EngineOf(loaded); },
                        .on_replaced =
                            [this](const ServedModel& before, const ServedModel& now) {
                              metrics_->OnReload(BuildOf(now), now.ladder.size(),
                                                 before.ladder.size());
                              hardest_ = now.ladder.size() - 1;
                            }});
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
      if (Has(now.rungs, rung)) rungs += fmt::format("{}{}", rungs.empty() ? "" : ",", rung);
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
    Log(LogLevel::kInfo, "memory",
        {{"kv_pages", std::max(pages, 0)},
         {"of", kv_.pages},
         {"pages_of_weights_to_leave", std::max(-pages, 0)}});
    thread_->LimitPages(pages);
  }

  // Looks for memory and says so; where it cannot be seen, what is known of it grows old.
  void TendMemory() {
    if (const auto seen = memory_->Look()) {
      thread_->SawMemory({.at = SteadyNow(), .free = seen->free, .foreign = seen->foreign});
    }
    metrics_->OnMemory(ResidentMemoryBytes(), memory_->budget(), memory_->kv_bytes());
  }

  // Until a signal comes, health follows the engine's progress, and KV memory what there is.
  void Supervise() {
    Watchdog watchdog(options_.stall_timeout);
    while (!stop_->WaitFor(std::min(watchdog.interval(), kMemoryInterval))) {
      TendMemory();
      const auto device = nvml_ == nullptr ? std::nullopt : nvml_->Read();
      if (device.has_value()) metrics_->OnDeviceMemory(device->total, device->free);
      moments_->Tend(SteadyNow(), thread_.get());
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
    reloader_->Stop();
    const bool all_finished = thread_->Drain(options_.drain_timeout);
    reloader_->Join();
    ready_.reset();                // the last tokens are on their way
    service_.WaitForCalls(until);  // slow readers may have some to read yet
    front_->Shutdown(kGoodbye);
    loaded_->KeepHistory();
    moments_->Close();
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
  std::unique_ptr<MomentsKeeper> moments_;
  std::unique_ptr<LoadedModel> loaded_;  // the reload thread's while that replaces it
  std::optional<ServedModels> models_;
  int told_rung_ = 0;                  // engine thread
  WeightsReport told_weights_;         // engine thread
  std::atomic<uint64_t> released_{0};  // bytes of weights that are out of memory
  int hardest_ = 0;                    // engine thread; that may be served
  std::unique_ptr<ReadyQueue> ready_;
  std::unique_ptr<EngineThread> thread_;
  std::unique_ptr<MemoryKeeper> memory_;
  std::unique_ptr<Nvml> nvml_;  // null: no such device
  Backstage backstage_;
  ApiService service_;
  std::unique_ptr<Front> front_;
  std::unique_ptr<Reloader> reloader_;
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
