// `espalier calibrate`: what of a model's layers may leave, what then makes up for it, and what
// each rung of the ladder costs and loses, measured here.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <memory>
#include <numeric>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <CLI/CLI.hpp>

#include "engine/model/channel_moments_file.h"
#include "engine/model/pruning_file.h"
#include "engine/model/text/tokenizer.h"
#include "engine/pruning/channel_moments.h"
#include "engine/pruning/importance.h"
#include "policy/blocks/block_orders.h"
#include "policy/ladder_file.h"
#include "tools/bench_run.h"
#include "tools/command.h"
#include "tools/corpus.h"
#include "tools/forced_run.h"
#include "tools/interrupt.h"
#include "tools/ladder_plan.h"
#include "tools/layer_fit.h"
#include "tools/local_model.h"
#include "tools/machine.h"
#include "tools/moment_fit.h"
#include "tools/progress.h"
#include "tools/self_text.h"
#include "tools/statistics.h"
#include "tools/value_checks.h"

namespace espalier {
namespace {

constexpr int kStepRows = 512;
constexpr int kTurns = 9;           // of timings
constexpr size_t kDropWindows = 8;  // that the order of attention blocks is found on
constexpr size_t kKeyWindows = 64;  // that mean keys are of

struct Options {
  LocalModelOptions model;
  std::vector<std::string> texts;
  int64_t tokens = 160'000;
  int window = 512;
  uint64_t seed = 1;
  std::vector<std::string> rungs = {"0.1", "0.2", "0.3", "0.4", "0.4+3", "0.5+3", "0.6+3", "0.6+6"};
  std::vector<double> widths = {0.2, 0.4, 0.6};
  int dense_layers = kDenseLayers;
  std::optional<int> last_dense_layers;  // none: kLastDenseLayers or 0
  std::optional<double> slope;           // none: kSlope or 0
  std::string rank = "elimination";
  std::string compensate = "refit";
  std::string moments;  // what channels are ranked and refitted by; empty: text
  std::string blocks;   // removal orders; empty: attention alone, by what is missed least
  int64_t resident_tokens = 8192;
  std::string reprice;  // a ladder to time again, in place of all else
  std::string out;
};

absl::Status Cancelled() { return absl::CancelledError("interrupted; no ladder was written"); }

// Texts to calibrate with and others, of the same kinds, to measure losses on.
struct Corpus {
  std::vector<std::vector<int32_t>> windows;  // kinds in turns
  std::vector<std::pair<std::string, std::vector<std::vector<int32_t>>>> held_out;  // by kind
};

// Windows of a kind that are kept to measure on.
int64_t HeldOut(int64_t windows) { return std::clamp<int64_t>(windows / 8, 1, 6); }

// What --text calls the text that the model makes up.
constexpr std::string_view kSelf = "self";
constexpr int kSelfBatch = 32;

bool WantsSelf(const Options& options) {
  return std::ranges::find(options.texts, kSelf) != options.texts.end();
}

absl::StatusOr<std::vector<TextKind>> MakeUp(const Options& options, const Tokenizer& tokenizer,
                                             int64_t count, ModelExecutor* executor) {
  Progress bar("making up text");
  absl::StatusOr<std::vector<std::vector<int32_t>>> texts =
      MakeUpTexts(executor, tokenizer, static_cast<int>(count), options.window, kSelfBatch,
                  options.seed, [&](int64_t done, int64_t total) {
                    bar.Update(done, total);
                    return !Interrupt::raised();
                  });
  if (!texts.ok()) return texts.status();
  return std::vector<TextKind>{{std::string(kSelf), *std::move(texts)}};
}

absl::StatusOr<Corpus> ReadCorpus(const Options& options, const Tokenizer& tokenizer,
                                  ModelExecutor* executor) {
  const auto kinds = static_cast<int64_t>(options.texts.size());
  const int64_t most = std::max<int64_t>(2, options.tokens / options.window / kinds + 1);
  const int64_t with_held_out = most + HeldOut(most);
  std::vector<std::string> paths;
  std::ranges::copy_if(options.texts, std::back_inserter(paths),
                       [](const std::string& path) { return path != kSelf; });
  absl::StatusOr<std::vector<TextKind>> read =
      ReadKinds(paths, tokenizer, options.window, static_cast<int>(with_held_out));
  if (!read.ok()) return read.status();
  if (WantsSelf(options)) {
    absl::StatusOr<std::vector<TextKind>> made =
        MakeUp(options, tokenizer, with_held_out, executor);
    if (!made.ok()) return made.status();
    read->push_back(std::move(made->front()));
  }
  Corpus corpus;
  size_t longest = 0;
  for (TextKind& kind : *read) {
    if (kind.windows.size() < 2) {
      return absl::InvalidArgumentError(
          fmt::format("{}: less than two windows of {} tokens: one to calibrate with, one to "
                      "measure on",
                      kind.name, options.window));
    }
    const int64_t held = HeldOut(static_cast<int64_t>(kind.windows.size()));
    corpus.held_out.emplace_back(kind.name,
                                 std::vector(kind.windows.end() - held, kind.windows.end()));
    kind.windows.resize(kind.windows.size() - held);
    longest = std::max(longest, kind.windows.size());
  }
  for (size_t i = 0; i < longest; ++i) {
    for (TextKind& kind : *read) {
      if (i < kind.windows.size()) corpus.windows.push_back(std::move(kind.windows[i]));
    }
  }
  return corpus;
}

// Nats per token of windows that lie in the KV pool together.
absl::StatusOr<double> Loss(std::span<const std::vector<int32_t>> windows, int rung,
                            ModelExecutor* executor) {
  std::vector<ForcedText> texts;
  for (const std::vector<int32_t>& window : windows) {
    texts.push_back({.tokens = window, .prompt = static_cast<int>(window.size()), .rung = rung});
  }
  const absl::StatusOr<ForcedResult> result = RunForced(executor, kStepRows, texts);
  if (!result.ok()) return result.status();
  return std::accumulate(result->nll.begin(), result->nll.end(), 0.0) /
         std::accumulate(result->terms.begin(), result->terms.end(), 0);
}

// Attention blocks by what the model loses without each alone, least first.
absl::StatusOr<std::vector<int>> DropOrder(const Corpus& corpus, ModelExecutor* executor) {
  const SiteWidths widths = executor->config().sites();
  const auto windows =
      std::span(corpus.windows).first(std::min<size_t>(corpus.windows.size(), kDropWindows));
  std::vector<std::pair<double, int>> losses;
  Progress bar("attention blocks");
  for (int layer = 0; layer < widths.layers; ++layer) {
    KeepProfile keep = KeepProfile::Dense(widths);
    keep.Keep(layer, SiteKind::kHeads, 0);
    Ladder ladder = Ladder::DenseOnly(widths);
    ladder.Append({.prefill = keep, .decode = keep});
    absl::Status status = executor->SetLadder(ladder, StaticSelector(widths));
    if (!status.ok()) return status;
    const absl::StatusOr<double> loss = Loss(windows, 1, executor);
    if (!loss.ok()) return loss.status();
    if (Interrupt::raised()) return Cancelled();
    losses.emplace_back(*loss, layer);
    bar.Update(layer + 1, widths.layers);
  }
  std::ranges::sort(losses);
  std::vector<int> order;
  for (const auto& [loss, layer] : losses) order.push_back(AttentionBlock(layer));
  return order;
}

// As trained for about so many tokens.
absl::StatusOr<std::vector<int>> TrainedOrder(const Options& options, int layers) {
  std::ifstream file(options.blocks, std::ios::binary);
  const std::string text((std::istreambuf_iterator<char>(file)), {});
  if (!file)
    return absl::NotFoundError(fmt::format("--blocks: {}: cannot be read", options.blocks));
  BlockOrders orders;
  std::string error;
  if (!ParseBlockOrders(text, &orders, &error)) {
    return absl::InvalidArgumentError(fmt::format("--blocks: {}: {}", options.blocks, error));
  }
  if (orders.layers != layers) {
    return absl::InvalidArgumentError(fmt::format("--blocks: {}: of a model of {} layers, not {}",
                                                  options.blocks, orders.layers, layers));
  }
  return orders.For(options.resident_tokens).blocks;
}

// What rotated keys of each layer are on the mean.
absl::Status FindKeyMeans(const Corpus& corpus, ModelExecutor* executor, PruningData* data) {
  const ModelConfig& config = executor->config();
  const size_t width = size_t{1} * config.kv_heads * config.head_dim;
  std::vector<std::vector<double>> sums(config.layers, std::vector<double>(width));
  std::vector<int64_t> rows(config.layers);
  executor->set_key_observer([&](int layer, ConstMatrix keys) {
    rows[layer] += keys.rows;
    for (int row = 0; row < keys.rows; ++row) {
      for (size_t i = 0; i < width; ++i) sums[layer][i] += keys.row(row)[i];
    }
  });
  Progress bar("mean keys");
  absl::Status status;
  const size_t count = std::min(kKeyWindows, corpus.windows.size());
  for (size_t i = 0; i < count && status.ok(); ++i) {
    status = Loss(std::span(corpus.windows).subspan(i, 1), 0, executor).status();
    if (Interrupt::raised()) status = Cancelled();
    bar.Update(static_cast<int64_t>(i) + 1, static_cast<int64_t>(count));
  }
  executor->set_key_observer({});
  for (int layer = 0; layer < config.layers; ++layer) {
    for (const double sum : sums[layer]) {
      data->layers[layer].key_mean.push_back(static_cast<float>(sum / rows[layer]));
    }
  }
  return status;
}

// Nats per token of each kind.
absl::StatusOr<std::vector<double>> Losses(const Corpus& corpus, int rung,
                                           ModelExecutor* executor) {
  std::vector<double> losses;
  for (const auto& [kind, windows] : corpus.held_out) {
    const absl::StatusOr<double> loss = Loss(windows, rung, executor);
    if (!loss.ok()) return loss.status();
    losses.push_back(*loss);
  }
  return losses;
}

// Microseconds a row, of all rungs.
struct Prices {
  std::vector<double> prefill_us, decode_us;  // [rungs]
};

// Of each rung, from times [rungs][turns]. Rungs are compared within a turn: from one to the next a
// shared machine's speed moves by a fifth, more than what tells neighbours apart.
std::vector<double> CompareInTurns(std::span<const std::vector<double>> times) {
  std::vector<double> means;
  for (int turn = 0; turn < kTurns; ++turn) {
    double sum = 0;
    for (const std::vector<double>& of_rung : times) sum += of_rung[turn];
    means.push_back(sum / static_cast<double>(times.size()));
  }
  const double mean = Median(means);
  std::vector<double> prices;
  for (const std::vector<double>& of_rung : times) {
    std::vector<double> shares;
    for (int turn = 0; turn < kTurns; ++turn) shares.push_back(of_rung[turn] / means[turn]);
    prices.push_back(Median(shares) * mean);
  }
  return prices;
}

absl::StatusOr<Prices> Time(ModelExecutor* executor, int rungs) {
  const BenchEngine engine{.executor = executor,
                           .geometry = executor->kv_geometry(),
                           .ladder = &executor->ladder(),
                           .vocabulary = executor->config().vocabulary,
                           .step_rows = kStepRows};
  std::vector<std::vector<double>> prefill(rungs), decode(rungs);
  Progress bar("timing rungs");
  for (int turn = 0; turn < kTurns; ++turn) {
    for (int rung = 0; rung < rungs; ++rung) {
      const BenchShape shape{.batch = 8, .prompt = 128, .generate = 32, .rungs = {rung}};
      const absl::StatusOr<BenchResult> result =
          RunBench(engine, shape, turn + 1, [](int64_t, int64_t) {});
      if (!result.ok()) return result.status();
      if (Interrupt::raised()) return Cancelled();
      prefill[rung].push_back(1e6 / result->prefill.tokens_per_s());
      decode[rung].push_back(1e6 / result->decode.tokens_per_s());
      bar.Update(turn * rungs + rung + 1, int64_t{kTurns} * rungs);
    }
  }
  return Prices{.prefill_us = CompareInTurns(prefill), .decode_us = CompareInTurns(decode)};
}

Compensation CompensationOf(const Options& options) {
  return static_cast<Compensation>(std::ranges::find(kCompensationNames, options.compensate) -
                                   std::begin(kCompensationNames));
}

// The plans, mildest first.
std::vector<RungPlan> PlansOf(const Options& options) {
  std::vector<RungPlan> plans(options.rungs.size());
  for (size_t i = 0; i < plans.size(); ++i) {
    ReadRung(options.rungs[i], &plans[i]);
  }
  std::ranges::sort(plans);
  return plans;
}

absl::Status WriteText(const std::string& path, const std::string& text) {
  std::ofstream file(path);
  file << text;
  file.close();
  return file ? absl::OkStatus()
              : absl::UnavailableError(fmt::format("{}: cannot be written", path));
}

// That both files can be written, before minutes are spent on what goes into them.
absl::Status CheckWritable(const std::string& out) {
  const std::string probe = ChannelsPathOf(out) + ".new";
  const bool opened = std::ofstream(probe, std::ios::binary).is_open();
  std::remove(probe.c_str());
  return opened ? absl::OkStatus()
                : absl::UnavailableError(fmt::format("--out: {}: cannot be written", out));
}

double Tenths(double us) { return std::round(10 * us) / 10; }

// A ladder's times anew, as of this machine; losses are the model's and stay.
absl::Status Reprice(const Options& options) {
  const Interrupt interrupt([] {});
  absl::StatusOr<LocalModel> model =
      LoadLocalModel(options.model, int64_t{8} * PagedTokens(options.window + 1), kStepRows);
  if (!model.ok()) return model.status();
  absl::StatusOr<CalibratedLadder> made = OpenLadder(options.reprice, *model->file);
  if (!made.ok()) return made.status();
  ModelExecutor* executor = model->executor.get();
  absl::Status status = executor->SetLadder(made->ladder, *made->channels);
  if (!status.ok()) return status;
  const absl::StatusOr<Prices> prices = Time(executor, made->ladder.size());
  if (!prices.ok()) return prices.status();
  Ladder ladder = made->ladder;
  for (int rung = 0; rung < made->ladder.size(); ++rung) {
    Rung priced = made->ladder.rung(rung);
    priced.price.prefill_us_per_token = Tenths(prices->prefill_us[rung]);
    priced.price.decode_us_per_row = Tenths(prices->decode_us[rung]);
    if (rung == 0) {
      ladder = Ladder::DenseOnly(executor->config().sites(), priced.price);
    } else {
      ladder.Append(std::move(priced));
    }
  }
  constexpr std::string_view kTimed = "times: ";
  std::string comment;
  std::ifstream before(options.reprice);
  for (std::string line; std::getline(before, line);) {
    if (!line.starts_with("# ") || line.substr(2).starts_with(kTimed)) continue;
    comment += line.substr(2) + "\n";
  }
  comment += fmt::format("{}{}, {} threads, batch 8\n", kTimed, MachineName(), model->threads);
  const std::string text = FormatLadder(ladder, comment);
  status = WriteText(options.reprice, text);
  if (!status.ok()) return status;
  fmt::print("{}", text);
  return absl::OkStatus();
}

// Rankings and refits, of the corpus or of a server's moments, if those are not null.
absl::StatusOr<PruningData> FindChannels(const Options& options, const Ladder& planned,
                                         const Corpus& corpus, const ChannelMoments* moments,
                                         const std::string& checkpoint, const LocalModel& model) {
  const ModelConfig& config = model.file->config();
  const Compensation compensation = CompensationOf(options);
  Progress bar("rankings and refits");
  const auto progress = [&](int64_t done, int64_t total) {
    bar.Update(done, total);
    return !Interrupt::raised();
  };
  if (moments != nullptr) {
    return FitToMoments({.rank = options.rank,
                         .compensation = compensation,
                         .channel_group = model.executor->channel_group()},
                        planned, *model.file, *moments, model.backend.get(), progress);
  }
  absl::StatusOr<PruningData> data = FitLayers(
      {.rank = options.rank,
       .compensation = compensation,
       .step_rows = kStepRows,
       .checkpoint = checkpoint,
       .resumed =
           [&](int layers) {
             fmt::print(stderr, "{}: goes on after {} of {} layers\n", checkpoint, layers,
                        config.layers);
           }},
      planned, *model.file, corpus.windows, model.executor.get(), model.backend.get(), progress);
  if (absl::IsCancelled(data.status())) {
    fmt::print(stderr, "{}; the same command goes on from {}\n",
               std::string(data.status().message()), checkpoint);
  }
  return data;
}

absl::Status Run(const Options& options) {
  const Interrupt interrupt([] {});
  const std::string out = options.out.empty() ? LadderPathOf(options.model.model) : options.out;
  for (const std::string& written : {out, ChannelsPathOf(out)}) {
    std::error_code error;
    if (std::filesystem::equivalent(written, options.model.model, error)) {
      return absl::InvalidArgumentError(fmt::format("--out: {} is the model", written));
    }
    if (std::filesystem::equivalent(written, options.moments, error)) {
      return absl::InvalidArgumentError(fmt::format("--out: {} is the --moments", written));
    }
  }
  if (absl::Status status = CheckWritable(out); !status.ok()) return status;
  absl::StatusOr<LocalModel> model = LoadLocalModel(
      options.model, int64_t{WantsSelf(options) ? kSelfBatch : 8} * PagedTokens(options.window + 1),
      kStepRows);
  if (!model.ok()) return model.status();
  const ModelFile& file = *model->file;
  const ModelConfig& config = file.config();
  if (options.dense_layers >= config.layers) {
    return absl::InvalidArgumentError(fmt::format("--dense-layers: {} of {} layers leave none",
                                                  options.dense_layers, config.layers));
  }
  if (options.dense_layers + options.last_dense_layers.value_or(0) >= config.layers) {
    return absl::InvalidArgumentError(
        fmt::format("--last-dense-layers: {} of {} layers, beside the first {}, leave none",
                    *options.last_dense_layers, config.layers, options.dense_layers));
  }
  if (config.channels % kQuantGroup != 0) {
    return absl::UnimplementedError(fmt::format("{} channels: only multiples of {} can be narrowed",
                                                config.channels, kQuantGroup));
  }
  auto tokenizer = Tokenizer::Create(file.vocabulary());
  if (!tokenizer.ok()) return tokenizer.status();
  std::optional<ChannelMoments> moments;
  if (!options.moments.empty()) {
    absl::StatusOr<ChannelMoments> read = ReadChannelMoments(options.moments, file);
    if (!read.ok()) return read.status();
    moments = *std::move(read);
  }
  const std::vector<RungPlan> plans = PlansOf(options);
  absl::StatusOr<std::vector<int>> drop_order;
  if (!options.blocks.empty()) {
    drop_order = TrainedOrder(options, config.layers);
    if (!drop_order.ok()) return drop_order.status();
  } else {
    // Any order, before minutes are spent on finding it; the last layer's attention stays.
    drop_order.emplace();
    for (int layer = 0; layer + 1 < config.layers; ++layer) {
      drop_order->push_back(AttentionBlock(layer));
    }
  }
  // Not so by a server's moments, which fit each layer to its own loss. A bias makes up for little,
  // and FLAP, which it is there for, leaves out alike.
  const bool made_up_for =
      CompensationOf(options) == Compensation::kRefit && options.moments.empty();
  const LayerWidths widths{
      .dense_layers = options.dense_layers,
      .left_out = options.widths,
      .last_dense_layers = options.last_dense_layers.value_or(made_up_for ? kLastDenseLayers : 0),
      .slope = options.slope.value_or(made_up_for ? kSlope : 0),
  };
  absl::StatusOr<Ladder> plan = PlanLadder(widths, config, plans, *drop_order);
  if (!plan.ok()) return plan.status();
  if (moments.has_value()) {
    if (const absl::Status says = CheckMoments(*moments, *plan); !says.ok()) {
      return absl::InvalidArgumentError(
          fmt::format("--moments: {}: {}", options.moments, std::string(says.message())));
    }
  }
  ModelExecutor* executor = model->executor.get();
  const bool int4_kv = plan->rung(plan->size() - 1).int4_kv;
  if (int4_kv && model->kv != KvType::kInt8) {
    return absl::InvalidArgumentError(fmt::format(
        "--rungs: {} is of K and V in int8, not {} (--kv)", kInt4Rung, KvTypeName(model->kv)));
  }
  const absl::StatusOr<Corpus> corpus = ReadCorpus(options, **tokenizer, executor);
  if (!corpus.ok()) return corpus.status();
  if (plans.back().blocks > 0 && options.blocks.empty()) {
    drop_order = DropOrder(*corpus, executor);
    if (!drop_order.ok()) return drop_order.status();
    plan = PlanLadder(widths, config, plans, *drop_order);
    if (!plan.ok()) return plan.status();
  }
  const Ladder planned = *std::move(plan);

  const std::string checkpoint = ChannelsPathOf(out) + ".part";
  absl::StatusOr<PruningData> data = FindChannels(
      options, planned, *corpus, moments.has_value() ? &*moments : nullptr, checkpoint, *model);
  if (!data.ok()) return data.status();
  absl::Status status;
  if (int4_kv) status = FindKeyMeans(*corpus, executor, &*data);
  if (!status.ok()) return status;
  status = WritePruningFile(ChannelsPathOf(out), file, *data);
  if (!status.ok()) return status;
  const absl::StatusOr<std::unique_ptr<PruningFile>> channels =
      PruningFile::Open(ChannelsPathOf(out), file);
  if (!channels.ok()) return channels.status();
  status = executor->SetLadder(planned, **channels);
  if (!status.ok()) return status;

  const absl::StatusOr<Prices> prices = Time(executor, planned.size());
  if (!prices.ok()) return prices.status();
  const KvPoolShape page = {
      .type = model->kv, .pages = 1, .kv_heads = config.kv_heads, .head_dim = config.head_dim};
  std::vector<Rung> rungs;
  std::vector<std::string> kinds;  // [rungs]
  std::vector<double> dense;
  Progress bar("losses");
  for (int rung = 0; rung < planned.size(); ++rung) {
    const absl::StatusOr<std::vector<double>> losses = Losses(*corpus, rung, executor);
    if (!losses.ok()) return losses.status();
    bar.Update(rung + 1, planned.size());
    if (rung == 0) dense = *losses;
    Rung& priced = rungs.emplace_back(planned.rung(rung));
    std::string& by_kind = kinds.emplace_back();
    double loss = 0;
    for (size_t kind = 0; kind < losses->size(); ++kind) {
      const double above = (*losses)[kind] - dense[kind];
      loss += above / static_cast<double>(losses->size());
      by_kind += fmt::format(" {} {:.3f}", corpus->held_out[kind].first, above);
    }
    int kv_layers = 0;
    for (int layer = 0; layer < config.layers; ++layer) kv_layers += priced.HoldsKv(layer) ? 1 : 0;
    priced.price = {.prefill_us_per_token = Tenths(prices->prefill_us[rung]),
                    .decode_us_per_row = Tenths(prices->decode_us[rung]),
                    .kv_bytes_per_token = static_cast<double>(page.page_bytes()) * kv_layers /
                                          (priced.int4_kv ? kInt4PageTokens : kPageTokens),
                    .quality_loss_nats = std::max(0.0, std::round(1e4 * loss) / 1e4)};
  }
  Ladder ladder = Ladder::DenseOnly(config.sites(), rungs[0].price);
  std::string lines;
  for (size_t rung = 1; rung < rungs.size(); ++rung) {
    const auto better = std::ranges::find_if(
        rungs, [&](const Rung& other) { return Dominated(rungs[rung].price, other.price); });
    if (better != rungs.end()) {
      lines +=
          fmt::format("left out: prune ratio {:.3f}; one of {:.3f} is as fast and loses no more\n",
                      rungs[rung].decode.prune_ratio(), better->decode.prune_ratio());
      continue;
    }
    lines += fmt::format("loss of rung {} by kind:{}\n", ladder.size(), kinds[rung]);
    ladder.Append(rungs[rung]);
  }
  // The command, but for where the model lies.
  std::string told = fmt::format(
      "espalier calibrate --model {} --text {} --tokens {} --rungs {} --widths {} --dense-layers "
      "{} --last-dense-layers {} --slope {} --rank {} --compensate {}",
      std::filesystem::path(LadderPathOf(options.model.model)).stem().string(),
      fmt::join(options.texts, " "), options.tokens, fmt::join(options.rungs, ","),
      fmt::join(options.widths, ","), widths.dense_layers, widths.last_dense_layers, widths.slope,
      options.rank, options.compensate);
  if (!options.blocks.empty()) {
    told += fmt::format(" --blocks {} --resident-tokens {}",
                        std::filesystem::path(options.blocks).filename().string(),
                        options.resident_tokens);
  }
  if (moments.has_value()) {
    told +=
        fmt::format(" --moments {}", std::filesystem::path(options.moments).filename().string());
  }
  told += fmt::format(
      "\n{}: {} tokens, measured on {}, {} threads, batch 8, weights {}, kv {}\n", config.name,
      moments.has_value() ? static_cast<uint64_t>(moments->tokens())
                          : corpus->windows.size() * options.window,
      MachineName(), model->threads, executor->weight_types(), KvTypeName(model->kv));
  const std::string text = FormatLadder(ladder, told + lines);
  status = WriteText(out, text);
  if (!status.ok()) return status;
  std::remove(checkpoint.c_str());
  fmt::print("{}\n{}: {} rungs, with {}\n", text, out, ladder.size(), ChannelsPathOf(out));
  return absl::OkStatus();
}

}  // namespace

void AddCalibrate(CLI::App& root, Action* action) {
  auto options = std::make_shared<Options>();
  CLI::App* sub = root.add_subcommand(
      "calibrate", "Measure which channels a model can spare and what that costs; write a ladder");
  sub->add_option("--text", options->texts,
                  "Text like the traffic to come: files or folders, each of which is a kind of "
                  "text, and kinds count alike; self: what the model makes up. Where they differ "
                  "from traffic, pruned rungs lose more than is told")
      ->type_name("PATH");
  sub->add_option("--reprice", options->reprice,
                  "Time the rungs of this ladder again and write it anew, with its losses: for a "
                  "ladder of another machine")
      ->type_name("PATH");
  sub->add_option("--tokens", options->tokens,
                  "Tokens to calibrate with, of all kinds; with --moments, to measure with")
      ->type_name("TOKENS")
      ->check(CLI::Range(1000, 100'000'000))
      ->capture_default_str();
  sub->add_option("--seed", options->seed, "Of the text that the model makes up")
      ->type_name("NUMBER")
      ->check(Unsigned64())
      ->capture_default_str();
  sub->add_option(
         "--rungs", options->rungs,
         "A rung for each: the share of the MLPs' channels to leave out, and of query heads, how "
         "many blocks to drop (of attention those that are missed least, or as --blocks says), and "
         "whether K and V are kept in four bits")
      ->type_name("RATIO[hHEADS][+BLOCKS][/int4]")
      ->delimiter(',')
      ->check(IsRung())
      ->default_str(fmt::format("{}", fmt::join(options->rungs, ",")));
  sub->add_option("--widths", options->widths,
                  "Shares of all MLP channels that have weights fitted for them, 10 MB or so of a "
                  "model of 135M; a rung of a ratio between two has the harder one's in some "
                  "layers")
      ->type_name("RATIO")
      ->delimiter(',')
      ->check(Within(0.01, 0.95))
      ->default_str(fmt::format("{}", fmt::join(options->widths, ",")));
  sub->add_option("--dense-layers", options->dense_layers, "First layers to leave whole")
      ->type_name("LAYERS")
      ->check(CLI::Range(0, 1023))
      ->capture_default_str();
  sub->add_option("--last-dense-layers", options->last_dense_layers,
                  "Last layers whose MLPs to leave whole; the others leave out as many channels "
                  "more, but none more than 85 %")
      ->type_name("LAYERS")
      ->check(CLI::Range(0, 1023))
      ->default_str(
          fmt::format("{} with --compensate refit and no --moments, else 0", kLastDenseLayers));
  sub->add_option("--slope", options->slope,
                  "How much more than the mean the first narrowed MLP leaves out, and the last "
                  "less, as many channels in all: later ones, fitted to what is missing, make up "
                  "for earlier ones")
      ->type_name("SHARE")
      ->check(Within(0, 0.95))
      ->default_str(fmt::format("{} with --compensate refit and no --moments, else 0", kSlope));
  std::vector<std::string> ranks = {"elimination"};
  ranks.insert(ranks.end(), std::begin(kImportanceNames), std::end(kImportanceNames));
  sub->add_option("--rank", options->rank,
                  "What says which channels stay; elimination: what the others can least make up "
                  "for; else a published measure, to compare with")
      ->type_name("NAME")
      ->check(CLI::IsMember(ranks))
      ->capture_default_str();
  sub->add_option("--compensate", options->compensate,
                  "What makes up for channels that leave; refit: those that stay, their weights "
                  "fitted by least squares; mean: a bias for each rung; none: nothing, so that the "
                  "server's --probe may choose other channels")
      ->type_name("NAME")
      ->check(CLI::IsMember(
          std::vector<std::string>(std::begin(kCompensationNames), std::end(kCompensationNames))))
      ->capture_default_str();
  sub->add_option("--moments", options->moments,
                  "Rank and refit by what a server gathered of its own traffic "
                  "(--channel-moments-file), in place of --text, on which losses are then "
                  "measured, and the order of attention blocks; not of heads")
      ->type_name("PATH");
  sub->add_option("--blocks", options->blocks,
                  "Which blocks to drop first, attention or MLP: removal orders of `espalier train "
                  "--task rap`")
      ->type_name("PATH");
  sub->add_option("--resident-tokens", options->resident_tokens,
                  "Of --blocks, the order for about so many tokens, of all sequences")
      ->type_name("TOKENS")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 40))
      ->capture_default_str();
  sub->add_option("--out", options->out,
                  "The ladder to write; the rankings and refitted weights lie beside it, as "
                  "PATH.gguf, and until it is done what is found so far, as PATH.gguf.part, from "
                  "which the same command goes on. Default: beside the model, as MODEL.ladder")
      ->type_name("PATH");
  AddLocalModelOptions(*sub, &options->model);
  sub->get_option("--model")->required();
  sub->get_option("--moments")->excludes(sub->get_option("--reprice"));
  sub->final_callback([=] {
    if (sub->count("--moments") > 0 && options->moments.empty()) {
      throw CLI::ValidationError("--moments", "expected a path, got none");
    }
    std::ranges::sort(options->widths);
    if (options->texts.empty() && options->reprice.empty()) throw CLI::RequiredError("--text");
    *action = [options] { return options->reprice.empty() ? Run(*options) : Reprice(*options); };
  });
}

}  // namespace espalier
