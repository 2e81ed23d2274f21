#include "server/metrics.h"

#include <fmt/format.h>
#include <prometheus/counter.h>
#include <prometheus/exposer.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>
#include <prometheus/text_serializer.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <exception>
#include <sstream>
#include <string_view>
#include <utility>
#include <vector>

#include "server/steady_clock.h"

namespace espalier {
namespace {

using prometheus::Counter;
using prometheus::Gauge;
using prometheus::Histogram;
using prometheus::Labels;
using prometheus::Registry;
using Bounds = Histogram::BucketBoundaries;

// vLLM's bounds in seconds, with finer ones below, where a small model on a CPU lives. More buckets
// do not break a query written for fewer.
const Bounds kFirstToken = {.001, .005, .01, .02, .04, .06, .08, .1, .25, .5,  .75,
                            1,    2.5,  5,   7.5, 10,  20,  40,  80, 160, 640, 2560};
const Bounds kPerToken = {.001, .0025, .005, .01, .025, .05, .075, .1, .15, .2, .3,
                          .4,   .5,    .75,  1,   2.5,  5,   7.5,  10, 20,  40, 80};
const Bounds kRequest = {.005, .01, .025, .05, .1, .2, .3, .5,  .8,  1,   1.5, 2,    2.5, 5,
                         10,   15,  20,   30,  40, 50, 60, 120, 240, 480, 960, 1920, 7680};
const Bounds kIterationTokens = {1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384};
// vLLM's 1-2-5 series, which it ends at the model's length.
const Bounds kTokens = {1,   2,    5,    10,   20,    50,    100,   200,
                        500, 1000, 2000, 5000, 10000, 20000, 50000, 100000};

const Bounds kStep = {.0005, .001, .002, .005, .01, .02, .05, .1, .2, .5, 1, 2, 5};
const Bounds kRows = {0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096};
const Bounds kRatio = {0, .05, .1, .15, .2, .25, .3, .4, .5, .6, .8, 1};
const Bounds kLoss = {0, .02, .05, .1, .15, .2, .3, .4, .6, 1, 2};

// The share of PhaseTimes that each label stands for.
struct Phase {
  const char* name;
  double PhaseTimes::* seconds;
};
constexpr std::array kPhases = {
    Phase{"embed", &PhaseTimes::embed},
    Phase{"attention_projections", &PhaseTimes::attention_projections},
    Phase{"attention", &PhaseTimes::attention},
    Phase{"probe", &PhaseTimes::probe},
    Phase{"gather", &PhaseTimes::gather},
    Phase{"mlp", &PhaseTimes::mlp},
    Phase{"norm", &PhaseTimes::norm},
    Phase{"head", &PhaseTimes::head},
    Phase{"sampling", &PhaseTimes::sampling},
};

// How requests end that were queued; any other outcome is a refusal.
constexpr std::array kOutcomes = {"stop", "length", "cancelled", "deadline", "reader_stalled"};

bool Contains(const auto& names, std::string_view name) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

Gauge& AddGauge(Registry* registry, const char* name, const char* help, const Labels& labels = {}) {
  return prometheus::BuildGauge().Name(name).Help(help).Register(*registry).Add(labels);
}

Counter& AddCounter(Registry* registry, const char* name, const char* help,
                    const Labels& labels = {}) {
  return prometheus::BuildCounter().Name(name).Help(help).Register(*registry).Add(labels);
}

Histogram& AddHistogram(Registry* registry, const char* name, const char* help,
                        const Bounds& bounds, const Labels& labels = {}) {
  return prometheus::BuildHistogram().Name(name).Help(help).Register(*registry).Add(labels, bounds);
}

// Adds what a total since start has grown by.
void Advance(Counter* counter, uint64_t total) {
  counter->Increment(static_cast<double>(total) - counter->Value());
}

}  // namespace

struct Metrics::Instruments : prometheus::Collectable {
  Instruments(const BuildInfo& build, std::function<uint64_t()> foreign)
      : vllm{{"model_name", build.model_name}, {"engine", "0"}}, foreign_bytes(std::move(foreign)) {
    Build(build);
    Labels cache = vllm;
    cache["block_size"] = fmt::format("{}", build.page_tokens);
    cache["num_gpu_blocks"] =
        fmt::format("{}", build.kv_blocks);  // vLLM's word, whatever the device
    AddGauge(r, "vllm:cache_config_info", "Size of the KV cache; always 1.", cache).Set(1);
    for (size_t i = 0; i < kPhases.size(); ++i) {
      phases[i] =
          &AddCounter(r, "espalier_step_phase_seconds_total",
                      "Time of engine steps by what was computed.", {{"phase", kPhases[i].name}});
    }
    // Present from the start, so that a rate over them has no gap.
    for (const char* outcome : kOutcomes) Finished(outcome);
    for (const char* reason : {"stop", "length", "abort"}) Success(reason);
    for (const char* reason : {"queue_full", "overloaded", "no_memory", "draining", "out_of_range"})
      Refused(reason);
  }

  std::vector<prometheus::MetricFamily> Collect() const override {
    // Reading it costs as much as all else in a scrape, so not more than once a second.
    const int64_t now = SteadyNow().count();
    const int64_t last = foreign_read.load(std::memory_order_relaxed);
    if (foreign_bytes && (last == 0 || now - last > 1'000'000'000)) {
      foreign_read.store(now, std::memory_order_relaxed);
      foreign.Set(static_cast<double>(foreign_bytes()));
    }
    return registry.Collect();
  }

  void Build(const BuildInfo& build) {
    auto& family = prometheus::BuildGauge()
                       .Name("espalier_build_info")
                       .Help("What is served by which build; always 1.")
                       .Register(registry);
    if (build_info != nullptr) family.Remove(build_info);
    build_info = &family.Add({{"version", build.version},
                              {"model_name", build.model_name},
                              {"weights", build.weights},
                              {"kv_type", build.kv_type},
                              {"device", build.device}});
    build_info->Set(1);
  }
  Gauge& Memory(const char* part) {
    return AddGauge(r, "espalier_memory_bytes", "The ledger: where memory is.", {{"part", part}});
  }
  Gauge& DeviceMemory(const char* part) {
    return AddGauge(r, "espalier_device_memory_bytes",
                    "Memory of the first NVIDIA device, whoever holds it.", {{"part", part}});
  }
  Counter& Finished(std::string_view outcome) {
    return AddCounter(r, "espalier_requests_finished_total",
                      "Requests that were queued, by how they ended.",
                      {{"outcome", std::string(outcome)}});
  }
  Counter& Refused(std::string_view reason) {
    return AddCounter(r, "espalier_requests_refused_total",
                      "Requests turned away before any work, by reason.",
                      {{"reason", std::string(reason)}});
  }
  Counter& Stage(const char* stage) {
    return AddCounter(r, "espalier_rows_by_stage_total",
                      "Rows by how what they keep was chosen: all of it, by a probe of their step, "
                      "or before their step.",
                      {{"stage", stage}});
  }
  Counter& Success(std::string_view reason) {
    Labels labels = vllm;
    labels["finished_reason"] = std::string(reason);
    return AddCounter(r, "vllm:request_success_total", "Requests that ended, by reason.", labels);
  }
  Histogram& Rows(const char* kind) {
    return AddHistogram(r, "espalier_batch_rows", "Rows of a step by kind.", kRows,
                        {{"kind", kind}});
  }
  prometheus::Family<Gauge>& MeasuredLosses() {
    return prometheus::BuildGauge()
        .Name("espalier_measured_loss_nats")
        .Help(
            "What a rung is seen to lose on this server's traffic, nats per token above the full "
            "model: of prompts, and of answers that it gave.")
        .Register(registry);
  }
  Gauge& MeasuredLoss(int rung, const char* of) {
    return MeasuredLosses().Add({{"rung", fmt::format("{}", rung)}, {"of", of}});
  }
  Counter& TokensByRung(int rung) {
    return AddCounter(r, "espalier_tokens_by_rung_total",
                      "Output tokens of finished requests by the rung they were drawn at.",
                      {{"rung", fmt::format("{}", rung)}});
  }

  Registry registry;
  Registry* const r = &registry;
  const Labels vllm;
  const std::function<uint64_t()> foreign_bytes;
  mutable std::atomic<int64_t> foreign_read{0};  // when; steady nanoseconds
  Gauge* build_info = nullptr;

  // Engine thread.
  Gauge& running = AddGauge(r, "vllm:num_requests_running", "Requests that hold KV memory.", vllm);
  Gauge& waiting = AddGauge(r, "vllm:num_requests_waiting", "Requests that hold none yet.", vllm);
  Gauge& kv_usage =
      AddGauge(r, "vllm:kv_cache_usage_perc",
               "KV pages in use / all pages, from 0 to 1; reusable ones are free.", vllm);
  Counter& preemptions = AddCounter(r, "vllm:num_preemptions_total",
                                    "Requests that lost their KV memory to others.", vllm);
  Counter& prefix_queries =
      AddCounter(r, "vllm:prefix_cache_queries_total",
                 "Prompt tokens looked up in the prefix cache, once per request.", vllm);
  Counter& prefix_hits = AddCounter(r, "vllm:prefix_cache_hits_total",
                                    "Of these, tokens found there, which were not computed.", vllm);
  Counter& prefix_evicted =
      AddCounter(r, "espalier_prefix_cache_evicted_pages_total",
                 "KV pages that left the prefix cache because others wanted the memory.");
  Gauge& kv_pages =
      AddGauge(r, "espalier_kv_pages", "KV pages there may be now, by memory budget and machine.");
  Gauge& prefix_pages = AddGauge(r, "espalier_prefix_cache_pages",
                                 "KV pages that no request uses, kept for those to come.");
  Counter& generated =
      AddCounter(r, "vllm:generation_tokens_total", "Tokens drawn for requests.", vllm);
  Histogram& inter_token =
      AddHistogram(r, "vllm:inter_token_latency_seconds",
                   "From a request's token to its next, preemptions included.", kPerToken, vllm);
  Histogram& iteration_tokens =
      AddHistogram(r, "vllm:iteration_tokens_total", "Rows of a step.", kIterationTokens, vllm);
  Histogram& step = AddHistogram(r, "espalier_step_seconds", "Wall time of an engine step.", kStep);
  Histogram& decode_rows = Rows("decode");
  Histogram& prefill_rows = Rows("prefill");
  std::array<Counter*, kPhases.size()> phases;
  Counter& recomputed = AddCounter(r, "espalier_recomputed_tokens_total",
                                   "Tokens computed again after a preemption.");
  Counter& full_rows = Stage("full");
  Counter& probed_rows = Stage("probed");
  Counter& history_rows = Stage("history");
  Counter& probe_rows =
      AddCounter(r, "espalier_probe_rows_total", "Rows that layers were probed with.");
  Counter& rankings = AddCounter(r, "espalier_rankings_total",
                                 "Rankings of a layer's heads or channels renewed while serving.");
  Gauge& wanted_rung = AddGauge(
      r, "espalier_policy_rung",
      "The rung that the policy would now serve a request without bounds at; 0: the full model.");
  Gauge& hardest_rung =
      AddGauge(r, "espalier_hardest_rung",
               "The hardest rung that may be served: harder ones were seen to lose too much.");
  Counter& checks = AddCounter(r, "espalier_quality_checks_total",
                               "Texts scored at a pruned rung and in full, while nobody waited.");
  Counter& rung_moves =
      AddCounter(r, "espalier_rung_moves_total", "Moves of running requests to another rung.");
  Gauge& ranking_age = AddGauge(r, "espalier_ranking_age_steps",
                                "Steps that pruned since a ranking was last renewed.");
  Gauge& queue = AddGauge(r, "espalier_queue_requests", "Requests admitted, but not running.");
  Gauge& queue_bound = AddGauge(r, "espalier_queue_limit", "Requests that may wait.");
  Gauge& oldest =
      AddGauge(r, "espalier_queue_oldest_seconds",
               "The longest that a waiting request has waited, since it came or was preempted.");
  Gauge& stalled = AddGauge(r, "espalier_engine_stalled",
                            "1 while work waits and the engine makes no progress, else 0.");
  Counter& stalls =
      AddCounter(r, "espalier_engine_stalls_total", "Times the engine stopped making progress.");
  std::atomic<uint64_t> checks_before{0};  // of models before this one
  Gauge& gathered = AddGauge(r, "espalier_moments_tokens",
                             "Rows in the sums that --moments-file keeps for espalier prune.");
  Gauge& gathered_channels =
      AddGauge(r, "espalier_channel_moments_tokens",
               "Rows in the sums that --channel-moments-file keeps for espalier calibrate, of the "
               "layer that was seen least.");
  Counter& reloads = AddCounter(r, "espalier_reloads_total", "Times the model was replaced.");
  Gauge& weights = Memory("weights");
  Gauge& weights_released = Memory("weights_released");
  Gauge& grpc = Memory("grpc");
  Gauge& weight_return = AddGauge(
      r, "espalier_weights_return_seconds",
      "What steps waited for the last return of weights to memory, all its pieces together.");
  Counter& weight_returns =
      AddCounter(r, "espalier_weights_returns_total", "Times that weights came back to memory.");
  Counter& weight_releases = AddCounter(r, "espalier_weights_releases_total",
                                        "Times that weights of rungs not in use left memory.");
  Gauge& kv_used = Memory("kv_used");
  Gauge& kv_reusable = Memory("kv_reusable");
  Gauge& kv_free = Memory("kv_free");
  Gauge& workspace = Memory("workspace");
  Gauge& foreign = Memory("foreign");
  // As the convention has it, and as other exporters do.
  Gauge& resident = AddGauge(r, "process_resident_memory_bytes", "Resident memory of the process.");
  Gauge& memory_budget = AddGauge(r, "espalier_memory_budget_bytes",
                                  "What the process may hold; 0: what the machine has left.");
  Gauge& kv_allowed = AddGauge(
      r, "espalier_kv_allowed_bytes",
      "What KV may hold beside the rest of the process; 0: new requests are refused, unless "
      "weights can leave for them.");

  // Once per request.
  Histogram& first_token = AddHistogram(
      r, "vllm:time_to_first_token_seconds",
      "Arrival of the call to first token; tokenising and queueing included.", kFirstToken, vllm);
  Histogram& per_token = AddHistogram(r, "vllm:request_time_per_output_token_seconds",
                                      "Mean time per token after the first.", kPerToken, vllm);
  Histogram& total = AddHistogram(r, "vllm:e2e_request_latency_seconds",
                                  "Arrival to end of the call.", kRequest, vllm);
  Histogram& queue_time = AddHistogram(r, "vllm:request_queue_time_seconds",
                                       "Arrival to first scheduled.", kRequest, vllm);
  Histogram& prefill_time = AddHistogram(r, "vllm:request_prefill_time_seconds",
                                         "First scheduled to first token.", kRequest, vllm);
  Histogram& decode_time = AddHistogram(r, "vllm:request_decode_time_seconds",
                                        "First token to last token.", kRequest, vllm);
  Histogram& inference_time = AddHistogram(r, "vllm:request_inference_time_seconds",
                                           "First scheduled to last token.", kRequest, vllm);
  Histogram& max_tokens =
      AddHistogram(r, "vllm:request_params_max_tokens", "max_tokens of a request.", kTokens, vllm);
  Histogram& prompt_tokens =
      AddHistogram(r, "vllm:request_prompt_tokens", "Prompt tokens of a request.", kTokens, vllm);
  Histogram& output_tokens = AddHistogram(r, "vllm:request_generation_tokens",
                                          "Output tokens of a request.", kTokens, vllm);
  Counter& cached_total =
      AddCounter(r, "vllm:prompt_tokens_cached_total",
                 "Prompt tokens of them that were found in the prefix cache.", vllm);
  Counter& prompt_total = AddCounter(r, "vllm:prompt_tokens_total",
                                     "Prompt tokens of requests that got to a first token.", vllm);
  Histogram& prune_ratio =
      AddHistogram(r, "espalier_prune_ratio",
                   "Share of heads and channels left out, mean over a request.", kRatio);
  Histogram& estimated_loss = AddHistogram(
      r, "espalier_estimated_loss_nats",
      "Expected loss of a request's rung above the full model, nats per token.", kLoss);

  // Holds the others weakly. Metrics ends it first, so that no scrape outlives what it reads.
  std::unique_ptr<prometheus::Exposer> exposer;
};

Metrics::Metrics(const BuildInfo& build, std::function<uint64_t()> foreign_bytes)
    : instruments_(std::make_shared<Instruments>(build, std::move(foreign_bytes))) {}

Metrics::~Metrics() { instruments_->exposer.reset(); }

absl::StatusOr<int> Metrics::Serve(const std::string& host, int port) {
  const bool ipv6 = host.find(':') != std::string::npos;
  const std::string address =
      fmt::format("{}{}{}:{}", ipv6 ? "[" : "", host, ipv6 ? "]" : "", port);
  // The library tells by exceptions, and of a port in use only that it could not start.
  try {
    auto exposer = std::make_unique<prometheus::Exposer>(address, /*num_threads=*/1);
    exposer->RegisterCollectable(instruments_);
    const std::vector<int> ports = exposer->GetListeningPorts();
    if (ports.empty()) return absl::UnavailableError("metrics: listens nowhere at " + address);
    instruments_->exposer = std::move(exposer);
    return ports.front();
  } catch (const std::exception& error) {
    return absl::UnavailableError(fmt::format(
        "metrics: cannot listen at {} ({}); is the port in use?", address, error.what()));
  }
}

void Metrics::OnStep(const StepReport& report, const LoadSnapshot& load, const StepTimes& times) {
  Instruments& m = *instruments_;
  m.running.Set(load.stats.running);
  m.waiting.Set(load.waiting());
  m.queue.Set(load.waiting());
  m.queue_bound.Set(load.max_waiting);
  m.oldest.Set(times.oldest_wait);
  m.kv_usage.Set(load.kv_utilization());
  m.weights.Set(static_cast<double>(load.ledger.weights));
  m.weights_released.Set(static_cast<double>(load.ledger.weights_released));
  m.grpc.Set(static_cast<double>(load.ledger.grpc));
  m.weight_return.Set(load.weights.return_s);
  Advance(&m.weight_returns, load.weights.returns);
  Advance(&m.weight_releases, load.weights.releases);
  m.kv_used.Set(static_cast<double>(load.ledger.kv_used));
  m.kv_reusable.Set(static_cast<double>(load.ledger.kv_reusable));
  m.kv_free.Set(static_cast<double>(load.ledger.kv_free));
  m.workspace.Set(static_cast<double>(load.ledger.workspace));
  Advance(&m.preemptions, load.stats.preemptions);
  Advance(&m.recomputed, load.stats.recomputed_tokens);
  Advance(&m.prefix_queries, load.stats.prefix_queries);
  Advance(&m.prefix_hits, load.stats.prefix_hits);
  Advance(&m.prefix_evicted, load.stats.prefix_evicted_pages);
  m.kv_pages.Set(load.stats.pages_total);
  m.prefix_pages.Set(load.stats.pages_cached);
  m.wanted_rung.Set(load.stats.wanted_rung);
  Advance(&m.rung_moves, load.stats.rung_moves);
  Advance(&m.full_rows, load.stats.stages.full);
  Advance(&m.probed_rows, load.stats.stages.probed);
  Advance(&m.history_rows, load.stats.stages.history);

  const int rows = report.decode_rows + report.prefill_rows;
  if (rows == 0) return;
  m.step.Observe(times.step);
  for (const double gap : times.token_gaps) m.inter_token.Observe(gap);
  m.iteration_tokens.Observe(rows);
  m.decode_rows.Observe(report.decode_rows);
  m.prefill_rows.Observe(report.prefill_rows);
  for (size_t i = 0; i < kPhases.size(); ++i) {
    m.phases[i]->Increment(report.phases.*kPhases[i].seconds);
  }
  m.probe_rows.Increment(static_cast<double>(report.probe.rows));
  m.rankings.Increment(static_cast<double>(report.probe.rankings));
  m.ranking_age.Set(static_cast<double>(report.probe.age));
  size_t drawn = 0;
  for (const SequenceOutput& output : report.outputs) drawn += output.tokens.size();
  m.generated.Increment(static_cast<double>(drawn));
}

void Metrics::OnCheck(const QualityCheck& quality, int rungs) {
  Instruments& m = *instruments_;
  Advance(&m.checks, m.checks_before + static_cast<uint64_t>(quality.checks()));
  m.hardest_rung.Set(quality.hardest());
  for (int rung = 1; rung < rungs; ++rung) {
    if (const QualityCheck::Figure figure = quality.prompts(rung); figure.tokens > 0) {
      m.MeasuredLoss(rung, "prompts").Set(figure.mean);
    }
    if (const QualityCheck::Figure figure = quality.answers(rung); figure.tokens > 0) {
      m.MeasuredLoss(rung, "answers").Set(figure.mean);
    }
  }
}

void Metrics::OnReload(const BuildInfo& build, int rungs, int rungs_before) {
  Instruments& m = *instruments_;
  m.Build(build);
  m.reloads.Increment();
  m.checks_before = static_cast<uint64_t>(m.checks.Value());
  m.hardest_rung.Set(rungs - 1);
  for (int rung = 1; rung < rungs_before; ++rung) {
    for (const char* of : {"prompts", "answers"}) {
      m.MeasuredLosses().Remove(&m.MeasuredLoss(rung, of));
    }
  }
}

void Metrics::OnGathered(std::optional<int64_t> inputs, std::optional<int64_t> channels) {
  if (inputs.has_value()) instruments_->gathered.Set(static_cast<double>(*inputs));
  if (channels.has_value()) instruments_->gathered_channels.Set(static_cast<double>(*channels));
}

void Metrics::OnFinished(const RequestSummary& summary) {
  Instruments& m = *instruments_;
  const bool queued = summary.queue_s >= 0 || Contains(kOutcomes, summary.outcome);
  if (!queued) {
    m.Refused(summary.outcome).Increment();
    return;
  }
  const bool succeeded = summary.outcome == "stop" || summary.outcome == "length";
  m.Finished(summary.outcome).Increment();
  m.Success(succeeded ? summary.outcome : "abort").Increment();
  m.total.Observe(summary.total_s);
  m.prompt_tokens.Observe(summary.prompt_tokens);
  if (summary.queue_s >= 0) m.queue_time.Observe(summary.queue_s);
  if (succeeded || summary.first_token_s >= 0) {
    m.prompt_total.Increment(summary.prompt_tokens);
    m.cached_total.Increment(summary.cached_tokens);
  }
  if (summary.first_token_s < 0) return;
  m.first_token.Observe(summary.first_token_s);
  m.prefill_time.Observe(summary.first_token_s - summary.queue_s);
  m.decode_time.Observe(summary.last_token_s - summary.first_token_s);
  m.inference_time.Observe(summary.last_token_s - summary.queue_s);
  m.max_tokens.Observe(summary.max_tokens);
  m.output_tokens.Observe(summary.output_tokens);
  m.prune_ratio.Observe(summary.mean_prune_ratio);
  m.estimated_loss.Observe(summary.estimated_loss);
  for (int rung = 0; rung < kMostRungs; ++rung) {
    if (summary.rung_tokens[rung] > 0) m.TokensByRung(rung).Increment(summary.rung_tokens[rung]);
  }
  if (summary.output_tokens > 1) m.per_token.Observe(summary.per_token_s());
}

void Metrics::OnMemory(uint64_t resident, uint64_t budget, uint64_t kv_allowed) {
  instruments_->resident.Set(static_cast<double>(resident));
  instruments_->memory_budget.Set(static_cast<double>(budget));
  instruments_->kv_allowed.Set(static_cast<double>(kv_allowed));
}

void Metrics::OnLadder(int rungs) { instruments_->hardest_rung.Set(rungs - 1); }

void Metrics::OnDeviceMemory(uint64_t total, uint64_t free) {
  instruments_->DeviceMemory("total").Set(static_cast<double>(total));
  instruments_->DeviceMemory("free").Set(static_cast<double>(free));
}

void Metrics::OnStall(bool stuck) {
  instruments_->stalled.Set(stuck ? 1 : 0);
  if (stuck) instruments_->stalls.Increment();
}

std::string Metrics::Text() const {
  std::ostringstream out;
  prometheus::TextSerializer().Serialize(out, instruments_->Collect());
  return out.str();
}

}  // namespace espalier
