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

#include "engine/engine.h"
#include "engine/machine_memory.h"
#include "engine/model/decoder.h"
#include "engine/model/down_norms.h"
#include "engine/model/files/model_file.h"
#include "engine/model/history_file.h"
#include "engine/model/model_executor.h"
#include "engine/model/policy_file.h"
#include "engine/model/pruning_file.h"
#include "engine/pruning/probe.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/nvml.h"
#include "policy/capped_policy.h"
#include "policy/ladder_policy.h"
#include "policy/level_policy.h"
#include "policy/shield.h"
#include "server/api_service.h"
#include "server/decision_log.h"
#include "server/engine_thread.h"
#include "server/front.h"
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

// Rows of a step that Probe Pruning learns from: an eighth of a whole one's.
constexpr int kLearnRows = 64;

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
    const Instant opened = SteadyNow();
    // Beside the weights: a tenth of their time, on one core.
    std::future<absl::Status> text =
        std::async(std::launch::async, [&] { return LoadText(file->vocabulary()); });
    absl::Status status = LoadWeights(file);
    const Instant packed = SteadyNow();
    absl::Status text_status = text.get();
    if (status.ok()) status = std::move(text_status);
    if (!status.ok()) return status;

    model_.config = executor_->config();
    model_.name = options_.model_name.empty() ? model_.config.name : options_.model_name;
    model_.max_sequence_tokens = engine_->scheduler().max_sequence_tokens();
    model_.weight_type = executor_->weight_types();
    model_.kv_type = KvTypeName(executor_->kv_type());
    model_.device = backend_->Describe();
    model_.ladder = executor_->ladder();
    model_.policy = options_.policy == ServerOptions::PolicyKind::kFixed
                        ? fmt::format("{}:{}", policy_->name(), options_.fixed_rung)
                        : std::string(policy_->name());
    Log(LogLevel::kInfo, "model loaded",
        {{"model", model_.name},
         {"weights", model_.weight_type},
         {"kv", model_.kv_type},
         {"kv_pages", engine_->scheduler().stats().pages_total},
         {"max_sequence_tokens", model_.max_sequence_tokens},
         {"rungs", model_.ladder.size()},
         {"policy", model_.policy},
         {"device", model_.device},
         {"open_seconds", Seconds(opened - began_)},
         {"pack_seconds", Seconds(packed - opened)}});
    return absl::OkStatus();
  }

  absl::Status LoadText(const Vocabulary& vocabulary) {
    absl::StatusOr<std::unique_ptr<const Tokenizer>> tokenizer = Tokenizer::Create(vocabulary);
    if (!tokenizer.ok()) return tokenizer.status();
    model_.tokenizer = *std::move(tokenizer);
    if (!vocabulary.chat_template.empty()) {
      const auto text = [this](int32_t token) { return model_.tokenizer->TokenBytes(token); };
      absl::StatusOr<std::unique_ptr<const ChatTemplate>> chat = ChatTemplate::Compile(
          vocabulary.chat_template, text(vocabulary.bos), text(vocabulary.eos));
      if (!chat.ok()) return chat.status();
      model_.chat_template = *std::move(chat);
    }
    encoder_ = std::make_unique<PromptEncoder>(model_.tokenizer.get(), model_.chat_template.get());
    return absl::OkStatus();
  }

  absl::Status MakePolicy() {
    using Kind = ServerOptions::PolicyKind;
    std::string version;  // of what was learned
    if (options_.policy == Kind::kFixed) {
      chosen_ = std::make_unique<FixedPolicy>(options_.fixed_rung);
    } else if (options_.policy == Kind::kLadder) {
      chosen_ = std::make_unique<LadderPolicy>(rule_);
    } else {
      const std::string& given = options_.policy_file;
      absl::StatusOr<PolicyFile> file = OpenPolicy(
          given.empty() ? PolicyPathOf(options_.ladder) : given, executor_->ladder().size());
      if (!file.ok()) return file.status();
      version = file->version;
      network_ = std::make_unique<QNetwork>(std::move(file->network));
      learned_ =
          std::make_unique<DqnPolicy>(LevelPolicyOptions{.ttft_target_s = rule_.ttft_target_s,
                                                         .tpot_target_s = rule_.tpot_target_s},
                                      network_.get());
      chosen_ = std::make_unique<Shield>(learned_.get(), rule_);
    }
    policy_ = chosen_.get();
    if (!options_.decision_log.empty()) {
      absl::StatusOr<std::unique_ptr<DecisionLog>> log =
          DecisionLog::Create(options_.decision_log, rule_, version);
      if (!log.ok()) return log.status();
      decisions_ = *std::move(log);
      logged_ = std::make_unique<LoggedPolicy>(policy_, decisions_.get());
      policy_ = logged_.get();
    }
    if (options_.quality_check > 0 && executor_->ladder().size() > 1) {
      quality_ = std::make_unique<QualityCheck>(
          QualityCheckOptions{.share = options_.quality_check, .bound = options_.quality_bound},
          executor_->ladder());
      capped_ = std::make_unique<CappedPolicy>(policy_);
      policy_ = capped_.get();
    }
    if (options_.shadow) {
      shadow_ = std::make_unique<ShadowPolicy>(policy_);
      policy_ = shadow_.get();
    }
    return absl::OkStatus();
  }

  absl::Status LoadWeights(const std::shared_ptr<const ModelFile>& opened) {
    const ModelFile& file = *opened;
    absl::StatusOr<std::unique_ptr<Backend>> backend =
        CreateCpuBackend({.isa = options_.isa, .threads = options_.threads});
    if (!backend.ok()) return backend.status();
    backend_ = *std::move(backend);
    absl::StatusOr<std::unique_ptr<ModelExecutor>> executor =
        ModelExecutor::Load(file, backend_.get(),
                            {.weights = options_.weights,
                             .kv = options_.kv_type,
                             .kv_bytes = options_.kv_memory,
                             .max_batch_tokens = options_.max_batch_tokens},
                            ShowProgress);
    if (!executor.ok()) return executor.status();
    executor_ = *std::move(executor);
    if (!options_.ladder.empty()) {
      absl::StatusOr<CalibratedLadder> ladder = OpenLadder(options_.ladder, file);
      if (!ladder.ok()) return ladder.status();
      if (options_.fixed_rung >= ladder->ladder.size()) {
        return absl::InvalidArgumentError(
            fmt::format("--policy: fixed:{}, and {} has rungs 0 to {}", options_.fixed_rung,
                        options_.ladder, ladder->ladder.size() - 1));
      }
      if (options_.probe.has_value() && ladder->refitted) {
        return absl::InvalidArgumentError(
            fmt::format("--probe: {} has weights or biases fitted to its own channels; make one "
                        "with `espalier calibrate --compensate none`",
                        options_.ladder));
      }
      absl::Status status = executor_->SetLadder(std::move(ladder->ladder), *ladder->channels);
      if (status.ok() && options_.probe.has_value()) status = MakeProbe(file);
      if (!status.ok()) return status;
      // Weights that rungs do not need may leave memory, and are read again from here.
      WeightSources sources{.model = opened, .channels = ladder->channels, .files = file.files()};
      sources.files.insert(sources.files.end(), ladder->files.begin(), ladder->files.end());
      executor_->KeepSources(std::move(sources));
    }

    // A learned policy is of a ladder of so many rungs, so not before there is one.
    if (absl::Status status = MakePolicy(); !status.ok()) return status;
    // The inbox is the queue's bound; the scheduler's own never bites.
    engine_ = std::make_unique<Engine>(
        SchedulerOptions{.max_batch_tokens = options_.max_batch_tokens,
                         .max_sequences = options_.max_sequences,
                         .max_waiting = options_.max_waiting + options_.max_sequences,
                         .reserve_output = options_.reserve_output,
                         .prefix_cache = options_.prefix_cache},
        executor_->kv_geometry(), executor_->ladder(), executor_.get(), policy_);
    return absl::OkStatus();
  }

  absl::Status MakeProbe(const ModelFile& file) {
    History history(file.config().layers, file.config().channels);
    if (!options_.history_file.empty()) {
      absl::StatusOr<History> read = ReadHistory(options_.history_file, file);
      if (!read.ok() && !absl::IsNotFound(read.status())) return read.status();
      if (read.ok()) history = *std::move(read);
      Log(LogLevel::kInfo, read.ok() ? "history read" : "history begins anew",
          {{"file", options_.history_file}});
    }
    absl::StatusOr<std::vector<std::vector<float>>> norms = PpspNorms(file);
    if (!norms.ok()) return norms.status();
    fingerprint_ = FingerprintOf(file);
    probe_ = std::make_unique<Probe>(ProbeOptions{.rows = *options_.probe,
                                                  .budget = options_.probe_budget,
                                                  .least_rows = options_.probe_least_rows,
                                                  .keep = options_.frozen_history ? 1 : 0.99,
                                                  .learn_rows = kLearnRows,
                                                  .refresh = options_.probe_refresh,
                                                  .whole = options_.probe_whole},
                                     std::move(history), *std::move(norms));
    executor_->set_probe(probe_.get());
    return absl::OkStatus();
  }

  // After the engine's last step.
  void KeepHistory() {
    if (probe_ == nullptr || options_.history_file.empty() || options_.frozen_history) return;
    const absl::Status status =
        WriteHistory(options_.history_file, fingerprint_, probe_->history());
    if (status.ok()) {
      Log(LogLevel::kInfo, "history written", {{"file", options_.history_file}});
    } else {
      Log(LogLevel::kError, "history lost", {{"error", Text(status)}});
    }
  }

  absl::Status ServeMetrics() {
    const KvGeometry kv = executor_->kv_geometry();
    metrics_ = std::make_unique<Metrics>(BuildInfo{.version = std::string(ServerVersion()),
                                                   .model_name = model_.name,
                                                   .weights = model_.weight_type,
                                                   .kv_type = model_.kv_type,
                                                   .device = model_.device,
                                                   .page_tokens = kv.page_tokens,
                                                   .kv_blocks = kv.pages / kv.layers},
                                         [] { return ForeignMemoryBytes(); });
    metrics_for_calls_.store(metrics_.get(), std::memory_order_release);
    if (options_.metrics_port < 0) return absl::OkStatus();
    const absl::StatusOr<int> port = metrics_->Serve(options_.host, options_.metrics_port);
    if (!port.ok()) return port.status();
    Log(LogLevel::kInfo, "metrics", {{"host", options_.host}, {"port", *port}});
    return absl::OkStatus();
  }

  // Runs one request through the engine, before anyone watches, starts its thread and opens for
  // everyone.
  absl::Status Open() {
    // Two tokens: a prefill and a decode step touch every weight and kernel.
    absl::Status status = engine_->Submit(
        {.id = 0, .prompt = {0}, .stop = {.max_tokens = 2}, .arrival = SteadyNow()});
    while (status.ok() && !engine_->idle()) status = engine_->Step(SteadyNow()).status();
    if (!status.ok()) return status;

    // All pages of the pool are given back or fresh but those of the two tokens above.
    const Ledger ledger = executor_->ledger(engine_->scheduler().stats());
    const KvGeometry kv = executor_->kv_geometry();
    const uint64_t kv_bytes = ledger.kv_used + ledger.kv_reusable + ledger.kv_free;

    hardest_ = model_.ladder.size() - 1;
    if (quality_ != nullptr) metrics_->OnCheck(*quality_, model_.ladder.size());
    ready_ = std::make_unique<ReadyQueue>(kWriters);
    thread_ = std::make_unique<EngineThread>(
        engine_.get(), ready_.get(), options_.max_waiting,
        EngineHooks{
            .ledger =
                [this](const SchedulerStats& stats) {
                  const Ledger ledger = executor_->ledger(stats);
                  released_.store(ledger.weights_released, std::memory_order_relaxed);
                  return ledger;
                },
            .on_step =
                [this](const StepReport& report, const LoadSnapshot& load, const StepTimes& times) {
                  metrics_->OnStep(report, load, times);
                  TellPolicy(load);
                  TellWeights(load);
                },
            .on_lost = [this](const absl::Status& lost) { Lose(lost); },
            .quality = quality_.get(),
            .on_check = [this] { Judge(); }});

    memory_ = std::make_unique<MemoryKeeper>(
        MemoryKeeper::Options{.budget = options_.memory_budget,
                              .page_bytes = kv_bytes / static_cast<uint64_t>(kv.pages),
                              .pages = kv.pages,
                              .other_bytes = ResidentMemoryBytes(),
                              .weight_pages = executor_->ReleasablePages(0)},
        [this](int pages) { LimitPages(pages); }, MemoryKeeper::Sources{.released = [this] {
          return released_.load(std::memory_order_relaxed);
        }});
    memory_->Look();
    thread_->SawMemory(SteadyNow());  // or from now on it has not been
    FindMemorySources();
    backstage_ = {.model = &model_,
                  .encoder = encoder_.get(),
                  .engine = thread_.get(),
                  .memory = memory_.get(),
                  .quality = quality_.get()};
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
    for (int rung = 0; rung < model_.ladder.size(); ++rung) {
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
  void Judge() {
    metrics_->OnCheck(*quality_, model_.ladder.size());
    const int hardest = quality_->hardest();
    if (hardest == hardest_) return;
    const int bad = std::min(hardest, hardest_) + 1;
    const QualityCheck::Figure figure = quality_->prompts(bad);
    Log(hardest < hardest_ ? LogLevel::kWarning : LogLevel::kInfo, "quality",
        {{"hardest_rung", hardest},
         {"was", hardest_},
         {"rung", bad},
         {"measured_loss", figure.mean},
         {"standard_error", figure.standard_error},
         {"price", model_.ladder.rung(bad).price.quality_loss_nats}});
    hardest_ = hardest;
    capped_->set_hardest(hardest);
  }

  void LimitPages(int pages) {
    Log(LogLevel::kInfo, "memory", {{"kv_pages", pages}, {"of", executor_->kv_geometry().pages}});
    thread_->LimitPages(pages);
  }

  // Until a signal comes, health follows the engine's progress, and KV memory what there is.
  void Supervise() {
    Watchdog watchdog(options_.stall_timeout);
    while (!stop_->WaitFor(std::min(watchdog.interval(), kMemoryInterval))) {
      if (memory_->Look()) thread_->SawMemory(SteadyNow());
      const auto device = nvml_ == nullptr ? std::nullopt : nvml_->Read();
      if (device.has_value()) metrics_->OnDeviceMemory(device->total, device->free);
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
    const bool all_finished = thread_->Drain(options_.drain_timeout);
    ready_.reset();                // the last tokens are on their way
    service_.WaitForCalls(until);  // slow readers may have some to read yet
    front_->Shutdown(kGoodbye);
    KeepHistory();
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
  ServedModel model_;
  std::unique_ptr<PromptEncoder> encoder_;
  const LadderPolicyOptions rule_{
      .ttft_target_s = std::chrono::duration<double>(options_.ttft_target).count(),
      .tpot_target_s = std::chrono::duration<double>(options_.tpot_target).count()};
  std::unique_ptr<DecisionLog> decisions_;
  std::unique_ptr<QNetwork> network_;
  std::unique_ptr<Policy> learned_, chosen_, logged_;
  std::unique_ptr<CappedPolicy> capped_;
  std::unique_ptr<QualityCheck> quality_;
  std::unique_ptr<Policy> shadow_;
  Policy* policy_ = nullptr;  // the outermost of these
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<Probe> probe_;
  std::string fingerprint_;            // of the model, if there is a probe
  int told_rung_ = 0;                  // engine thread
  WeightsReport told_weights_;         // engine thread
  std::atomic<uint64_t> released_{0};  // bytes of weights that are out of memory
  int hardest_ = 0;                    // engine thread; that may be served
  std::unique_ptr<ModelExecutor> executor_;
  std::unique_ptr<Engine> engine_;
  std::unique_ptr<ReadyQueue> ready_;
  std::unique_ptr<EngineThread> thread_;
  std::unique_ptr<MemoryKeeper> memory_;
  std::unique_ptr<Nvml> nvml_;  // null: no such device
  Backstage backstage_;
  ApiService service_;
  std::unique_ptr<Front> front_;
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
