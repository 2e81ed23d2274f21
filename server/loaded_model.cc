#include "server/loaded_model.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <functional>
#include <map>
#include <set>
#include <utility>
#include <vector>

#include "engine/model/decoder.h"
#include "engine/model/history_file.h"
#include "engine/model/model_probe.h"
#include "engine/model/own_file.h"
#include "engine/model/policy_file.h"
#include "engine/model/pruning_file.h"
#include "kernels/cpu/cpu_backend.h"
#include "policy/ladder_policy.h"
#include "policy/level_policy.h"
#include "policy/shield.h"
#include "server/logging.h"
#include "server/steady_clock.h"

namespace espalier {
namespace {

// Rows of a step that Probe Pruning learns from: an eighth of a whole one's.
constexpr int kLearnRows = 64;

std::string_view Text(const absl::Status& status) {
  return {status.message().data(), status.message().size()};
}

absl::Status Differs(std::string_view path, std::string_view what, std::string_view served,
                     std::string_view found) {
  return absl::FailedPreconditionError(
      fmt::format("{}: {}: the served model has {}, this one {}", path, what, served, found));
}

}  // namespace

LoadedModel::LoadedModel(const ServerOptions& options)
    : options_(options),
      rule_{.ttft_target_s = std::chrono::duration<double>(options.ttft_target).count(),
            .tpot_target_s = std::chrono::duration<double>(options.tpot_target).count(),
            .load_loss = options.load_loss} {}

absl::StatusOr<std::unique_ptr<LoadedModel>> LoadedModel::Load(
    const ServerOptions& options, std::shared_ptr<const ModelFile> file, const Order& order) {
  std::unique_ptr<LoadedModel> loaded(new LoadedModel(options));
  loaded->fingerprint_ = FingerprintOf(*file);
  loaded->name_ = !order.name.empty()          ? order.name
                  : options.model_name.empty() ? file->config().name
                                               : options.model_name;
  absl::Status status = loaded->LoadWeights(file, order);
  if (!status.ok()) return status;
  if (order.moments != nullptr) order.moments->Attach(*file, loaded->executor_.get());
  return loaded;
}

absl::Status LoadedModel::MakePolicy(const Order& order) {
  using Kind = ServerOptions::PolicyKind;
  std::string version;  // of what was learned
  if (options_.policy == Kind::kFixed) {
    chosen_ = std::make_unique<FixedPolicy>(options_.fixed_rung);
  } else if (options_.policy == Kind::kLadder) {
    chosen_ = std::make_unique<LadderPolicy>(rule_);
  } else {
    const std::string& given = options_.policy_file;
    const std::string path = given.empty() ? PolicyPathOf(order.ladder) : given;
    absl::StatusOr<PolicyFile> file = OpenPolicy(path, executor_->ladder().size());
    if (!file.ok()) return file.status();
    if (file->trained.load_loss != rule_.load_loss) {
      Log(LogLevel::kWarning, "the policy was trained for another --load-loss",
          {{"file", path},
           {"trained_for", file->trained.load_loss},
           {"served_with", rule_.load_loss}});
    }
    version = file->version;
    network_ = std::make_unique<QNetwork>(std::move(file->network));
    learned_ = std::make_unique<DqnPolicy>(LevelOptionsOf(file->trained, rule_), network_.get());
    chosen_ = std::make_unique<Shield>(learned_.get(), rule_);
  }
  policy_ = chosen_.get();
  if (options_.quality_check > 0 && executor_->ladder().size() > 1) {
    quality_ = std::make_unique<QualityCheck>(
        QualityCheckOptions{.share = options_.quality_check, .bound = options_.quality_bound},
        executor_->ladder());
    capped_ = std::make_unique<CappedPolicy>(policy_);
    policy_ = capped_.get();
  }
  if (options_.policy != Kind::kFixed) {
    absl::StatusOr<std::unique_ptr<DecisionLog>> log =
        DecisionLog::Create(order.decision_log, rule_, version);
    if (!log.ok()) return log.status();
    decisions_ = *std::move(log);
    logged_ = std::make_unique<LoggedPolicy>(policy_, decisions_.get());
    policy_ = logged_.get();
  }
  if (options_.shadow) {
    shadow_ = std::make_unique<ShadowPolicy>(policy_);
    policy_ = shadow_.get();
  }
  return absl::OkStatus();
}

absl::Status LoadedModel::LoadWeights(const std::shared_ptr<const ModelFile>& opened,
                                      const Order& order) {
  const ModelFile& file = *opened;
  absl::StatusOr<std::unique_ptr<Backend>> backend =
      CreateCpuBackend({.isa = options_.isa, .threads = options_.threads});
  if (!backend.ok()) return backend.status();
  backend_ = *std::move(backend);
  absl::StatusOr<std::unique_ptr<ModelExecutor>> executor =
      ModelExecutor::Load(file, backend_.get(),
                          {.weights = options_.weights,
                           .kv = options_.kv_type,
                           .kv_bytes = order.kv_bytes,
                           .max_batch_tokens = options_.max_batch_tokens},
                          order.progress);
  if (!executor.ok()) return executor.status();
  executor_ = *std::move(executor);
  if (!order.ladder.empty()) {
    absl::StatusOr<CalibratedLadder> ladder = OpenLadder(order.ladder, file);
    if (!ladder.ok()) return ladder.status();
    if (absl::Status fits = CheckPolicy(options_, order.ladder, ladder->ladder.size());
        !fits.ok()) {
      return fits;
    }
    if (options_.probe.has_value() && ladder->refitted) {
      return absl::InvalidArgumentError(
          fmt::format("--probe: {} has weights or biases fitted to its own channels; make one "
                      "with `espalier calibrate --compensate none`",
                      order.ladder));
    }
    absl::Status status = executor_->SetLadder(std::move(ladder->ladder), *ladder->channels);
    if (status.ok() && options_.probe.has_value()) status = SetProbe(file);
    if (!status.ok()) return status;
    WeightSources sources{.model = opened, .channels = ladder->channels, .files = file.files()};
    sources.files.insert(sources.files.end(), ladder->files.begin(), ladder->files.end());
    executor_->KeepSources(std::move(sources));
  }

  // A learned policy is of a ladder of so many rungs, so not before there is one.
  if (absl::Status status = MakePolicy(order); !status.ok()) return status;
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

absl::Status LoadedModel::SetProbe(const ModelFile& file) {
  SiteHistories histories(file.config());
  if (!options_.history_file.empty()) {
    absl::StatusOr<SiteHistories> read = ReadHistory(options_.history_file, file);
    const bool begins = absl::IsNotFound(read.status()) && !options_.frozen_history;
    if (!read.ok() && !begins) return read.status();
    if (!options_.frozen_history) {
      if (absl::Status status = CheckFolder("--history-file", options_.history_file);
          !status.ok()) {
        return status;
      }
    }
    if (read.ok()) histories = *std::move(read);
    Log(LogLevel::kInfo, read.ok() ? "history read" : "history begins anew",
        {{"file", options_.history_file}});
  }
  absl::StatusOr<std::unique_ptr<Probe>> probe =
      MakeProbe({.rows = *options_.probe,
                 .budget = options_.probe_budget,
                 .least_rows = options_.probe_least_rows,
                 .keep = options_.frozen_history ? 1 : 0.99,
                 .learn_rows = kLearnRows,
                 .refresh = options_.probe_refresh,
                 .whole = options_.probe_whole,
                 .group = executor_->channel_group()},
                file, std::move(histories));
  if (!probe.ok()) return probe.status();
  probe_ = *std::move(probe);
  executor_->set_probe(probe_.get());
  return absl::OkStatus();
}

void LoadedModel::KeepHistory() const {
  if (probe_ == nullptr || options_.history_file.empty() || options_.frozen_history) return;
  const absl::Status status =
      WriteHistory(options_.history_file, fingerprint_, probe_->history(SiteKind::kChannels),
                   probe_->history(SiteKind::kHeads));
  if (status.ok()) {
    Log(LogLevel::kInfo, "history written", {{"file", options_.history_file}});
  } else {
    Log(LogLevel::kError, "history lost", {{"error", Text(status)}});
  }
}

absl::Status LoadedModel::WarmUp() {
  // Two tokens: a prefill and a decode step touch every weight and kernel.
  absl::Status status =
      engine_->Submit({.id = 0, .prompt = {0}, .stop = {.max_tokens = 2}, .arrival = SteadyNow()});
  while (status.ok() && !engine_->idle()) status = engine_->Step(SteadyNow()).status();
  return status;
}

ServedModel LoadedModel::Describe() const {
  ServedModel model;
  model.config = executor_->config();
  model.name = name_;
  model.max_sequence_tokens = engine_->scheduler().max_sequence_tokens();
  model.weight_type = executor_->weight_types();
  model.kv_type = KvTypeName(executor_->kv_type());
  model.device = backend_->Describe();
  model.ladder = executor_->ladder();
  model.decisions = decisions_;
  model.policy = policy_->name();
  if (model.policy == "fixed") {
    model.policy = options_.fixed_rung == 0 ? "off" : fmt::format("fixed:{}", options_.fixed_rung);
  }
  return model;
}

absl::Status CheckReplaces(const ServedModel& served, const ModelFile& file) {
  const ModelConfig &ours = served.config, &theirs = file.config();
  const auto number = [&](std::string_view name, auto mine, auto other) {
    return mine == other
               ? absl::OkStatus()
               : Differs(file.path(), name, fmt::format("{}", mine), fmt::format("{}", other));
  };
  absl::Status status = number("architecture", ArchitectureName(ours.architecture),
                               ArchitectureName(theirs.architecture));
  const auto compare = [&](std::string_view name, auto ModelConfig::* field) {
    status.Update(number(name, ours.*field, theirs.*field));
  };
  compare("layers", &ModelConfig::layers);
  compare("hidden size", &ModelConfig::hidden);
  compare("attention heads", &ModelConfig::heads);
  compare("KV heads", &ModelConfig::kv_heads);
  compare("head size", &ModelConfig::head_dim);
  compare("MLP channels", &ModelConfig::channels);
  compare("vocabulary size", &ModelConfig::vocabulary);
  compare("context", &ModelConfig::context);
  compare("RMS epsilon", &ModelConfig::rms_eps);
  compare("RoPE base", &ModelConfig::rope_theta);
  compare("bias of q, k and v", &ModelConfig::qkv_bias);
  compare("norms of q and k", &ModelConfig::qk_norm);
  const auto scaling = [](const RopeScaling& s) {
    return s.llama3 ? fmt::format("llama3 {} {} {} {}", s.factor, s.low_freq_factor,
                                  s.high_freq_factor, s.original_context)
                    : std::string("none");
  };
  status.Update(number("RoPE scaling", scaling(ours.rope_scaling), scaling(theirs.rope_scaling)));
  if (!status.ok()) return status;

  const Vocabulary& words = served.tokenizer->vocabulary();
  const Vocabulary& others = file.vocabulary();
  status.Update(number("tokens", words.tokens.size(), others.tokens.size()));
  for (size_t id = 0; status.ok() && id < words.tokens.size(); ++id) {
    const VocabularyToken &mine = words.tokens[id], &other = others.tokens[id];
    status = number(fmt::format("token {}", id), fmt::format("{:?}", mine.text),
                    fmt::format("{:?}", other.text));
    status.Update(number(fmt::format("kind of token {}", id), static_cast<int>(mine.kind),
                         static_cast<int>(other.kind)));
  }
  const auto same = [&](std::string_view name, const auto& mine, const auto& other) {
    if (status.ok() && mine != other) {
      status = Differs(file.path(), name, fmt::format("{} of them", mine.size()),
                       fmt::format("{}, or others", other.size()));
    }
  };
  same("merges", words.merges, others.merges);
  same("end tokens", words.end_tokens, others.end_tokens);
  same("chat template's characters", words.chat_template, others.chat_template);
  status.Update(number("pre-tokenizer", static_cast<int>(words.pre_tokenizer),
                       static_cast<int>(others.pre_tokenizer)));
  status.Update(number("BOS token", words.bos, others.bos));
  status.Update(number("EOS token", words.eos, others.eos));
  status.Update(number("added BOS token", words.add_bos, others.add_bos));
  return status;
}

absl::Status CheckPolicy(const ServerOptions& options, const std::string& ladder, int rungs) {
  using Kind = ServerOptions::PolicyKind;
  if (options.policy == Kind::kFixed && options.fixed_rung >= rungs) {
    return absl::FailedPreconditionError(
        fmt::format("--policy: fixed:{}, and {} has rungs 0 to {}", options.fixed_rung,
                    ladder.empty() ? "the full model alone" : ladder, rungs - 1));
  }
  if (options.policy != Kind::kDqn) return absl::OkStatus();
  if (ladder.empty()) {
    return absl::FailedPreconditionError(
        "--policy: dqn needs a ladder, of as many rungs as it had");
  }
  const std::string& given = options.policy_file;
  const absl::Status opened =
      OpenPolicy(given.empty() ? PolicyPathOf(ladder) : given, rungs).status();
  return opened.ok() ? opened : absl::FailedPreconditionError(opened.message());
}

namespace {

// The bytes of `values` of a tensor that is kept as `type`.
double BytesOf(WeightType type, double values) {
  switch (type) {
    case WeightType::kF32:
      return 4 * values;
    case WeightType::kBf16:
      return 2 * values;
    case WeightType::kInt4:
      return values * sizeof(FourBitGroup) / kQuantGroup;
    default:
      return values + values / kQuantGroup * sizeof(float);
  }
}

// What a layer's panels take, as Decoder::MakePanels makes them: `bytes` tells what its tensors do.
double PanelBytes(const ModelConfig& config, const CalibratedLadder& ladder, int layer,
                  const std::function<double(std::string_view part)>& bytes, bool four_bits) {
  int heads = 0;
  std::set<int> counts;
  for (int i = 0; i < ladder.ladder.size(); ++i) {
    const Rung& rung = ladder.ladder.rung(i);
    for (const KeepProfile* keep : {&rung.prefill, &rung.decode}) {
      if (const int kept = keep->kept(layer, SiteKind::kHeads); kept < config.heads) {
        heads = std::max(heads, kept);
      }
      const int kept = keep->kept(layer, SiteKind::kChannels);
      if (kept > 0 && kept < config.channels) counts.insert(kept);
    }
  }
  double sum = heads * (bytes("attn_q") + bytes("attn_output")) / config.heads;
  if (counts.empty()) return sum;
  sum += bytes("ffn_gate") + bytes("ffn_up");
  int widest = 0;  // of the counts that share one `down`
  for (const int count : counts) {
    if (ladder.channels->RefitOf(layer, count).down.empty()) {
      widest = count;
    } else if (four_bits) {
      sum += BytesOf(WeightType::kInt4, double{1} * count * config.hidden);
    } else {
      sum += bytes("ffn_down") * count / config.channels;
    }
  }
  return sum + bytes("ffn_down") * widest / config.channels;
}

}  // namespace

uint64_t EstimateWeightBytes(const ModelFile& file, WeightPlan plan,
                             const CalibratedLadder* ladder) {
  double sum = 0;
  std::map<std::string, double, std::less<>> bytes;
  for (const StoredTensor& tensor : file.tensors()) {
    const WeightType type = TypeOf(plan, tensor.type, tensor.name.starts_with("blk."));
    sum += bytes[tensor.name] = BytesOf(type, double{1} * tensor.rows * tensor.cols);
  }
  // Refits are 4-bit, except beside weights that are floats.
  const bool four_bits = plan != WeightPlan::kF32 && plan != WeightPlan::kBf16;
  for (int layer = 0; ladder != nullptr && layer < file.config().layers; ++layer) {
    const auto part = [&](std::string_view name) {
      const auto found = bytes.find(fmt::format("blk.{}.{}.weight", layer, name));
      return found == bytes.end() ? 0.0 : found->second;
    };
    sum += PanelBytes(file.config(), *ladder, layer, part, four_bits);
  }
  return static_cast<uint64_t>(sum);
}

}  // namespace espalier
