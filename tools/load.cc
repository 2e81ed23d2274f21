// `espalier load`: a server under load, as its callers see it.
#include <fmt/format.h>

#include <fstream>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include "policy/ladder_file.h"
#include "tools/command.h"
#include "tools/load_run.h"
#include "tools/progress.h"
#include "tools/remote.h"
#include "tools/statistics.h"
#include "tools/value_checks.h"

namespace espalier {
namespace {

struct Options {
  RemoteOptions remote;
  LoadShape shape;
  std::string traffic_out;
  bool json = false;
};

void PrintTable(const LoadShape& shape, const LoadReport& report) {
  fmt::print(
      "{} calls, {} finished, {} past their deadline, {} tokens in {:.2f} s: {:.1f} tokens/s\n",
      report.started, report.finished, report.past_deadline, report.tokens, report.seconds,
      static_cast<double>(report.tokens) / report.seconds);
  if (shape.ttft_target > 0 || shape.tpot_target > 0) {
    fmt::print("{} within both targets: {:.2f} calls/s\n", report.good,
               report.good / report.seconds);
  }
  if (report.cached_tokens > 0) {
    fmt::print(
        "{} of {} prompt tokens were found in the prefix cache: another --seed has new ones\n",
        report.cached_tokens, report.prompt_tokens);
  }
  if (report.rung_tokens.size() > 1 || report.told_loss > 0) {
    std::string rungs;
    for (const auto& [rung, tokens] : report.rung_tokens) {
      rungs += fmt::format("{}rung {} for {} tokens", rungs.empty() ? "" : ", ", rung, tokens);
    }
    fmt::print("served: {}; told loss {:.3g} nats/token\n", rungs, report.loss_per_token());
  }
  fmt::print("{:>8} {:>10} {:>10} {:>10} {:>7}\n", "ms", "p50", "p90", "p99", "count");
  const auto line = [](const char* name, const std::vector<double>& seconds) {
    fmt::print("{:>8} {:>10.1f} {:>10.1f} {:>10.1f} {:>7}\n", name, 1e3 * Percentile(seconds, 50),
               1e3 * Percentile(seconds, 90), 1e3 * Percentile(seconds, 99), seconds.size());
  };
  line("TTFT", report.first_token);
  line("TPOT", report.per_token);
  line("e2e", report.end);
  for (const auto& [code, refusals] : report.refusals) {
    fmt::print("{}: {} calls, {} with RetryInfo ({})\n", code, refusals.calls,
               refusals.with_retry_info, refusals.example);
  }
}

void PrintJson(const LoadReport& report) {
  nlohmann::ordered_json json = {
      {"calls", report.started},
      {"finished", report.finished},
      {"past_deadline", report.past_deadline},
      {"tokens", report.tokens},
      {"prompt_tokens", report.prompt_tokens},
      {"cached_tokens", report.cached_tokens},
      {"good", report.good},
      {"told_loss", report.loss_per_token()},
      {"seconds", report.seconds},
      {"tokens_per_s", static_cast<double>(report.tokens) / report.seconds}};
  const auto add = [&](const std::string& name, const std::vector<double>& seconds) {
    for (const int p : {50, 90, 99})
      json[fmt::format("{}_p{}_s", name, p)] = Percentile(seconds, p);
    json[name + "_count"] = seconds.size();
  };
  add("ttft", report.first_token);
  add("tpot", report.per_token);
  add("e2e", report.end);
  json["rung_tokens"] = nlohmann::ordered_json::object();
  for (const auto& [rung, tokens] : report.rung_tokens) {
    json["rung_tokens"][fmt::format("{}", rung)] = tokens;
  }
  json["refusals"] = nlohmann::ordered_json::object();
  for (const auto& [code, refusals] : report.refusals) {
    json["refusals"][code] = {{"calls", refusals.calls},
                              {"with_retry_info", refusals.with_retry_info},
                              {"example", refusals.example}};
  }
  fmt::print("{}\n", json.dump(-1, ' ', true, nlohmann::ordered_json::error_handler_t::replace));
}

absl::Status Run(Options options) {
  v1::GetModelResponse model;
  const absl::Status asked = UnaryCall(options.remote, &v1::EspalierService::Stub::GetModel,
                                       v1::GetModelRequest(), &model);
  if (!asked.ok()) return asked;
  if (model.vocabulary_size() < 1) {
    return absl::InternalError("the server tells no vocabulary size");
  }
  options.shape.vocabulary = model.vocabulary_size();

  if (!options.traffic_out.empty()) {
    std::ofstream file(options.traffic_out);
    file << TrafficOf(options.shape);
    file.close();
    if (!file) {
      return absl::UnavailableError(fmt::format("{}: cannot be written", options.traffic_out));
    }
  }
  const auto stub = v1::EspalierService::NewStub(Connect(options.remote));
  LoadReport report;
  {
    Progress bar("calls");
    report = RunLoad(stub.get(), options.remote, options.shape,
                     [&](int64_t done, int64_t total) { bar.Update(done, total); });
  }
  if (options.json) {
    PrintJson(report);
  } else {
    PrintTable(options.shape, report);
  }
  if (report.finished > 0 || report.started == 0) return absl::OkStatus();
  const auto& [code, refusals] = *report.refusals.begin();
  return absl::UnavailableError(fmt::format("no call finished; {}: {}", code, refusals.example));
}

}  // namespace

void AddLoad(CLI::App& root, Action* action) {
  auto options = std::make_shared<Options>();
  LoadShape& shape = options->shape;
  constexpr int kMaxInt = std::numeric_limits<int>::max();
  CLI::App* sub = root.add_subcommand("load", "Put a server under load and tell what callers see");
  const auto count = [&](const char* name, int& value, const char* unit, const char* description) {
    return sub->add_option(name, value, description)
        ->type_name(unit)
        ->check(CLI::Range(1, kMaxInt, "INT in [at least 1]"))
        ->capture_default_str();
  };
  CLI::Option* requests = count("--requests", shape.requests, "COUNT", "Calls to make");
  CLI::Option* concurrency =
      count("--concurrency", shape.concurrency, "COUNT", "Closed loop: calls in flight");
  sub->add_option("--rate", shape.rate,
                  "Open loop: calls begin at random, this many per second on average, however many "
                  "are in flight; 0: closed loop")
      ->type_name("PER_SECOND")
      ->check(Within(0, 1e5))
      ->capture_default_str()
      ->excludes(concurrency);
  sub->add_option("--duration", shape.duration,
                  "Begin no call after this time, seconds; with it --requests is without limit "
                  "unless given; 0: no limit")
      ->type_name("SECONDS")
      ->check(Within(0, 1e6))
      ->capture_default_str();
  count("--prompt-tokens", shape.prompt_tokens, "TOKENS", "Length of each prompt, random ids");
  count("--max-tokens", shape.max_tokens, "TOKENS",
        "Tokens drawn by each call, greedy; end tokens do not end it");
  sub->add_option("--rung", shape.rung,
                  "Rung of the ladder that calls ask for; -1: as the server's policy says")
      ->type_name("RUNG")
      ->check(CLI::Range(-1, kMostRungs - 1))
      ->capture_default_str();
  sub->add_option("--priority", shape.priority, "Of each call; higher is served first")
      ->type_name("NUMBER")
      ->check(CLI::Range(-100, 100))
      ->capture_default_str();
  const auto target = [&](const char* name, double& value, const char* description) {
    sub->add_option(name, value, description)
        ->type_name("SECONDS")
        ->check(Within(0, 1e6))
        ->capture_default_str();
  };
  target("--ttft-target", shape.ttft_target,
         "A call is good if its first token comes within this; 0: whenever");
  target("--tpot-target", shape.tpot_target,
         "And if each token after it takes no longer, on average; 0: however long");
  sub->add_flag("--give-up", shape.give_up,
                "After the last call began, end once none that runs can still be good");
  sub->add_option("--traffic-out", options->traffic_out,
                  "Also write the calls as traffic for `espalier simulate`; with --rate")
      ->type_name("PATH")
      ->needs("--rate");
  sub->add_option("--seed", shape.seed, "Seed of prompts and arrivals; new prompts need a new one")
      ->type_name("NUMBER")
      ->check(Unsigned64())
      ->capture_default_str();
  sub->add_flag("--json", options->json, "Print one JSON object; times in seconds");
  AddRemoteOptions(*sub, &options->remote);
  sub->final_callback([=] {
    if (options->shape.duration > 0 && requests->count() == 0) options->shape.requests = kMaxInt;
    *action = [options] { return Run(*options); };
  });
}

}  // namespace espalier
