#include "server/options.h"

#include <arpa/inet.h>
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include <CLI/CLI.hpp>

#include "policy/ladder_file.h"

namespace espalier {
namespace {

using std::chrono::milliseconds;

// How one kind of value is read and shown. What --help says of a range is what is checked.
struct Value {
  std::string placeholder;  // in --help
  std::string expected;     // "a whole number from 1 to 4096"
  std::function<bool(std::string_view text, ServerOptions* options)> read;
  std::function<std::string(const ServerOptions& options)> show;
  const char* alone = nullptr;  // what the flag means without a value, if it may be without
};

struct Setting {
  std::string group;
  std::string name;     // "max-waiting"
  std::string meaning;  // with the unit, if it has one
  Value value;
};

template <typename T>
std::optional<T> ReadNumber(std::string_view text) {
  T number{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return number;
}

// A number and a unit's factor: "512MiB", "1.5s". Splits at the first letter.
template <typename T>
std::optional<std::pair<T, int64_t>> ReadQuantity(
    std::string_view text, std::initializer_list<std::pair<std::string_view, int64_t>> units) {
  const size_t split = std::min(text.find_first_not_of("0123456789.+-"), text.size());
  const std::optional<T> number = ReadNumber<T>(text.substr(0, split));
  for (const auto& [unit, factor] : units) {
    if (number && text.substr(split) == unit) return std::pair(*number, factor);
  }
  return std::nullopt;
}

Value Text(std::string ServerOptions::* field, std::string placeholder, std::string expected) {
  return {std::move(placeholder), std::move(expected),
          [field](std::string_view text, ServerOptions* options) {
            options->*field = text;
            return true;
          },
          [field](const ServerOptions& options) { return options.*field; }};
}

Value Whole(int ServerOptions::* field, int low, int high) {
  return {"N", fmt::format("a whole number from {} to {}", low, high),
          [=](std::string_view text, ServerOptions* options) {
            const std::optional<int> number = ReadNumber<int>(text);
            if (!number || *number < low || *number > high) return false;
            options->*field = *number;
            return true;
          },
          [field](const ServerOptions& options) { return fmt::format("{}", options.*field); }};
}

Value Share(double ServerOptions::* field) {
  return {"SHARE", "a number from 0 to 1",
          [field](std::string_view text, ServerOptions* options) {
            const std::optional<double> number = ReadNumber<double>(text);
            if (!number || !(*number >= 0 && *number <= 1)) return false;
            options->*field = *number;
            return true;
          },
          [field](const ServerOptions& options) { return fmt::format("{}", options.*field); }};
}

Value Nats(double ServerOptions::* field) {
  return {"NATS", "a number from 0 to 100",
          [field](std::string_view text, ServerOptions* options) {
            const std::optional<double> number = ReadNumber<double>(text);
            if (!number || !(*number >= 0 && *number <= 100)) return false;
            options->*field = *number;
            return true;
          },
          [field](const ServerOptions& options) { return fmt::format("{}", options.*field); }};
}

Value Bytes(uint64_t ServerOptions::* field, uint64_t low, uint64_t high, std::string range,
            bool zero_is_auto) {
  return {
      "BYTES",
      fmt::format("{}a whole number, of bytes or with KiB, MiB, GiB, TiB, or kB, MB, GB, TB of a "
                  "thousand; {}",
                  zero_is_auto ? "auto, or " : "", range),
      [=](std::string_view text, ServerOptions* options) {
        if (zero_is_auto && (text == "auto" || text == "0")) return options->*field = 0, true;
        const auto quantity = ReadQuantity<uint64_t>(text, {{"", 1},
                                                            {"B", 1},
                                                            {"KiB", 1ll << 10},
                                                            {"MiB", 1ll << 20},
                                                            {"GiB", 1ll << 30},
                                                            {"TiB", 1ll << 40},
                                                            {"Ki", 1ll << 10},
                                                            {"Mi", 1ll << 20},
                                                            {"Gi", 1ll << 30},
                                                            {"kB", 1'000},
                                                            {"KB", 1'000},
                                                            {"MB", 1'000'000},
                                                            {"GB", 1'000'000'000},
                                                            {"TB", 1'000'000'000'000}});
        // Divided, not multiplied: a product could wrap around into the range.
        if (!quantity || quantity->first > high / quantity->second) return false;
        const uint64_t bytes = quantity->first * quantity->second;
        if (bytes < low) return false;
        options->*field = bytes;
        return true;
      },
      [=](const ServerOptions& options) -> std::string {
        const uint64_t bytes = options.*field;
        if (zero_is_auto && bytes == 0) return "auto";
        if (bytes % (1 << 20) == 0) return fmt::format("{}MiB", bytes >> 20);
        return fmt::format("{}", bytes);
      }};
}

Value Budget() {
  Value bytes = Bytes(&ServerOptions::memory_budget, 1 << 20, 1ull << 50, "1MiB to 1024TiB", true);
  return {"BYTES|SHARE",
          bytes.expected + "; or 1% to 100% of what the machine, or the container, has",
          [read = bytes.read](std::string_view text, ServerOptions* options) {
            if (!text.ends_with('%')) return options->memory_share = 0, read(text, options);
            const auto number = ReadNumber<double>(text.substr(0, text.size() - 1));
            if (!number || !(*number >= 1 && *number <= 100)) return false;
            options->memory_budget = 0;
            options->memory_share = *number / 100;
            return true;
          },
          [show = bytes.show](const ServerOptions& options) {
            return options.memory_share > 0 ? fmt::format("{:g}%", 100 * options.memory_share)
                                            : show(options);
          }};
}

Value Seconds(milliseconds ServerOptions::* field) {
  return {"SECONDS", "seconds from 0 to 86400, with an optional ms, s, m or h",
          [=](std::string_view text, ServerOptions* options) {
            const auto quantity = ReadQuantity<double>(
                text, {{"", 1000}, {"s", 1000}, {"ms", 1}, {"m", 60'000}, {"h", 3'600'000}});
            if (!quantity) return false;
            const double ms = quantity->first * quantity->second;
            if (!(ms >= 0 && ms <= 86'400'000)) return false;
            options->*field = milliseconds(std::llround(ms));
            return true;
          },
          [field](const ServerOptions& options) {
            return fmt::format("{}", (options.*field).count() / 1000.0);
          }};
}

template <typename T>
Value Choice(T ServerOptions::* field, const std::vector<std::pair<std::string, T>>& choices) {
  std::string names;
  for (const auto& [name, value] : choices) names += (names.empty() ? "" : "|") + name;
  return {names, "one of " + names,
          [=](std::string_view text, ServerOptions* options) {
            for (const auto& [name, value] : choices) {
              if (text == name) return options->*field = value, true;
            }
            return false;
          },
          [=](const ServerOptions& options) -> std::string {
            for (const auto& [name, value] : choices) {
              if (options.*field == value) return name;
            }
            return "";
          }};
}

std::vector<std::pair<std::string, WeightPlan>> WeightPlans() {
  std::vector<std::pair<std::string, WeightPlan>> plans;
  for (const std::string_view name : kWeightPlanNames) {
    plans.emplace_back(name, static_cast<WeightPlan>(plans.size()));
  }
  return plans;
}

std::vector<std::pair<std::string, std::optional<ProbeOptions::Rows>>> ProbeChoices() {
  std::vector<std::pair<std::string, std::optional<ProbeOptions::Rows>>> choices;
  for (const std::string_view name : kProbeNames) {
    const size_t i = choices.size();
    choices.emplace_back(
        name, i == 0 ? std::nullopt : std::optional(static_cast<ProbeOptions::Rows>(i - 1)));
  }
  return choices;
}

Value WhichPolicy() {
  using Kind = ServerOptions::PolicyKind;
  static constexpr std::string_view kFixed = "fixed:";
  return {"NAME", "off, fixed:RUNG with a rung from 0 to 63, ladder or dqn",
          [](std::string_view text, ServerOptions* options) {
            options->fixed_rung = 0;
            options->policy = text == "ladder" ? Kind::kLadder
                              : text == "dqn"  ? Kind::kDqn
                                               : Kind::kFixed;
            if (options->policy != Kind::kFixed || text == "off") return true;
            if (!text.starts_with(kFixed)) return false;
            const std::optional<int> rung = ReadNumber<int>(text.substr(kFixed.size()));
            if (!rung || *rung < 0 || *rung >= kMostRungs) return false;
            options->fixed_rung = *rung;
            return true;
          },
          [](const ServerOptions& options) -> std::string {
            if (options.policy == Kind::kLadder) return "ladder";
            if (options.policy == Kind::kDqn) return "dqn";
            return options.fixed_rung == 0 ? "off"
                                           : fmt::format("{}{}", kFixed, options.fixed_rung);
          }};
}

Value Flag(bool ServerOptions::* field) {
  Value value = Choice<bool>(field, {{"false", false}, {"true", true}});
  value.alone = "true";
  return value;
}

// An address, or a name by RFC 1123. A name is looked up only when the server listens.
bool IsHost(std::string_view text) {
  const std::string host(text.substr(0, text.find('%')));  // behind it, an IPv6 address's zone
  in6_addr address;
  if (inet_pton(AF_INET6, host.c_str(), &address) == 1) return true;
  if (inet_pton(AF_INET, std::string(text).c_str(), &address) == 1) return true;
  if (text.empty() || text.size() > 253) return false;
  // All of digits and dots, it is an address that went wrong.
  if (text.find_first_not_of("0123456789.") == std::string_view::npos) return false;
  const auto letter = [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_';
  };
  char before = '.';
  size_t label = 0;
  for (const char c : text) {
    label = c == '.' ? 0 : label + 1;
    if (label > 63) return false;
    const bool border = before == '.' || before == '-';
    if (!(letter(c) || (c == '-' && before != '.') || (c == '.' && !border))) return false;
    before = c;
  }
  return before != '-';
}

Value Host(std::string ServerOptions::* field) {
  Value value = Text(field, "ADDRESS", "an IP address or host name");
  value.read = [field](std::string_view text, ServerOptions* options) {
    options->*field = text;
    return IsHost(text);
  };
  return value;
}

// Every setting, in the order of --help.
const std::vector<Setting>& Settings() {
  using O = ServerOptions;
  constexpr const char *kModel = "Model and machine", *kNetwork = "Network", *kPruning = "Pruning",
                       *kScheduling = "Scheduling", *kLogs = "Logs";
  static const std::vector<Setting> settings = {
      {kModel, "model", "The model to serve. Required",
       Text(&O::model, "PATH", "a .gguf file or a Hugging Face folder")},
      {kModel, "model-name", "Name in answers and metrics; empty: as the file says",
       Text(&O::model_name, "NAME", "any text")},
      {kModel, "weights",
       "Type of the weights in memory; auto: int4 where the file has Q4_0 or Q4_1, else int8; "
       "int4: the layers, embedding and LM head int8; bf16: all, which is exact for a bf16 file, "
       "at half of f32's memory; f32 is the reference",
       Choice<WeightPlan>(&O::weights, WeightPlans())},
      {kModel, "kv-type",
       "Type of keys and values; auto: f32 with f32 weights, f16 with --weights int8 or bf16\n"
       "and where keys have a bias, else int8",
       Choice<std::optional<KvType>>(
           &O::kv_type,
           {{"auto", {}}, {"int8", KvType::kInt8}, {"f16", KvType::kF16}, {"f32", KvType::kF32}})},
      {kModel, "kv-memory",
       "Memory for keys and values; auto: 32 sequences of 1,024 tokens,\n"
       "or one of the whole context if that is more; at most half of what is free",
       Bytes(&O::kv_memory, 1 << 16, 1ull << 50, "64KiB to 1024TiB", true)},
      {kModel, "memory-budget",
       "Memory for the whole process, of which keys and values get what is left;\n"
       "auto: what the machine, or the container, has. Followed while serving",
       Budget()},
      {kModel, "isa", "Instruction set of the kernels; auto: the best this machine runs",
       Choice<std::optional<Isa>>(&O::isa, {{"auto", {}},
                                            {"portable", Isa::kPortable},
                                            {"avx2", Isa::kAvx2},
                                            {"avxvnni", Isa::kAvxVnni},
                                            {"avx512", Isa::kAvx512Vnni},
                                            {"amx", Isa::kAmx}})},
      {kModel, "threads", "Compute threads; 0: the cores this process may use",
       Whole(&O::threads, 0, 1024)},

      {kPruning, "ladder", "The rungs that `espalier calibrate` wrote, and PATH.gguf beside it",
       Text(&O::ladder, "PATH", "a .ladder file; empty: the full model only")},
      {kPruning, "policy",
       "Who chooses a request's rung, or the hardest milder one that its bounds\n"
       "allow; off: the full model; fixed:RUNG: always this one; ladder: harder\n"
       "while memory is short or the targets below are missed, milder again when\n"
       "they are met for a while; dqn: as learned in simulations",
       WhichPolicy()},
      {kPruning, "policy-file",
       "The dqn policy's network, of `espalier train --task serve`; empty: beside\n"
       "the ladder, with .dqn in place of .ladder",
       Text(&O::policy_file, "PATH", "a path; empty: beside the ladder")},
      {kPruning, "policy-mode",
       "shadow: the full model is served, and what the policy would do is told in\n"
       "logs and metrics alone",
       Choice<bool>(&O::shadow, {{"on", false}, {"shadow", true}})},
      {kPruning, "ttft-target", "How long a request should wait at most", Seconds(&O::ttft_target)},
      {kPruning, "tpot-target", "How long a token should take at most, when decoding",
       Seconds(&O::tpot_target)},
      {kPruning, "load-loss",
       "What waiting and slow steps alone may cost, as told, per token: beyond it\n"
       "newcomers are refused; memory may cost more",
       Nats(&O::load_loss)},
      {kPruning, "decision-log",
       "Where the policy's decisions go, a line a step with what it saw and one\n"
       "for each request's rung, for `espalier replay`; the file of the run before\n"
       "is kept as PATH.old. Not with --policy off or fixed, which decide nothing",
       Text(&O::decision_log, "PATH", "a path; empty: none")},
      {kPruning, "quality-check",
       "Share of time, while nobody waits, in which texts just served are scored\n"
       "at pruned rungs and in full, to see what pruning loses here; 0: none",
       Share(&O::quality_check)},
      {kPruning, "quality-bound",
       "Nats per token beyond its price tag from which a rung is served no more",
       Nats(&O::quality_bound)},
      {kPruning, "probe",
       "Rank heads and channels anew in each prefill step that prunes, by a probe\n"
       "of its rows, fused with history (Probe Pruning); prompts: by what the\n"
       "prompts last read held, for decode; off: as calibrated, which loses less.\n"
       "Needs a ladder of `espalier calibrate --compensate none`",
       Choice<std::optional<ProbeOptions::Rows>>(&O::probe, ProbeChoices())},
      {kPruning, "probe-budget",
       "Most rows that are probed, as a share of those pruned; one at least",
       Share(&O::probe_budget)},
      {kPruning, "probe-least-rows", "Steps that prune fewer prefill rows are not probed",
       Whole(&O::probe_least_rows, 0, 65536)},
      {kPruning, "probe-refresh", "Decode steps after which history ranks anew; 0: never",
       Whole(&O::probe_refresh, 0, 1'000'000)},
      {kPruning, "probe-whole",
       "Of so many decode steps one leaves nothing out, so that history sees all;\n"
       "0: none",
       Whole(&O::probe_whole, 0, 1'000'000)},
      {kPruning, "history", "What a probe learns: ema: from traffic; frozen: nothing",
       Choice<bool>(&O::frozen_history, {{"ema", false}, {"frozen", true}})},
      {kPruning, "history-file",
       "Where a probe's history is read from at the start, if it is there, and\n"
       "written to at the end, unless frozen; energies, never text",
       Text(&O::history_file, "PATH", "a path; empty: none")},
      {kPruning, "moments-file",
       "Gather what the model's matrices meet, of a sample of rows served in full,\n"
       "for `espalier prune --moments`: read from here at the start, if it is there,\n"
       "and written every minute and at the end; sums of columns, never text",
       Text(&O::moments_file, "PATH", "a path; empty: none")},
      {kPruning, "channel-moments-file",
       "Gather how channels go together, a layer at a time, of rows served in full,\n"
       "for `espalier calibrate --moments`: read from here at the start, if it is\n"
       "there, and written every ten minutes and at the end; sums of products, never\n"
       "text. They take 2 * layers * channels * (channels + 64) bytes of memory, 147 MB\n"
       "of 30 x 1536",
       Text(&O::channel_moments_file, "PATH", "a path; empty: none")},

      {kNetwork, "host", "Where to listen, for gRPC and metrics", Host(&O::host)},
      {kNetwork, "port", "gRPC port; 0: a free one", Whole(&O::port, 0, 65535)},
      {kNetwork, "port-file", "File that the gRPC port is written to once the server listens",
       Text(&O::port_file, "PATH", "a path; empty: none")},
      {kNetwork, "metrics-port", "Prometheus port; -1: off, 0: a free one",
       Whole(&O::metrics_port, -1, 65535)},
      {kNetwork, "max-message-bytes", "Largest message received",
       Bytes(&O::max_message_bytes, 1 << 10, 1 << 30, "1KiB to 1GiB", false)},
      {kNetwork, "admin",
       "Let callers change the memory budget and replace the model (SetMemoryBudget,\nReloadModel)",
       Flag(&O::admin)},
      {kNetwork, "max-connection-age",
       "Age at which a connection is asked to reconnect, for balancers\n"
       "that place connections rather than calls; 0: never",
       Seconds(&O::max_connection_age)},
      {kNetwork, "max-connection-age-grace",
       "What its streams get to finish after that; 0: without limit",
       Seconds(&O::max_connection_age_grace)},

      {kScheduling, "max-batch-tokens", "Rows of one step: decode rows first, then prefill",
       Whole(&O::max_batch_tokens, 1, 65536)},
      {kScheduling, "max-sequences", "Sequences that run at once, at most max-batch-tokens",
       Whole(&O::max_sequences, 1, 4096)},
      {kScheduling, "max-waiting", "Requests that wait; what is beyond gets RESOURCE_EXHAUSTED",
       Whole(&O::max_waiting, 1, 1'000'000)},
      {kScheduling, "reserve-output",
       "Share of a newcomer's max_tokens that must fit beside the running;\n"
       "0 admits on the prompt alone and preempts more, 1 never preempts",
       Share(&O::reserve_output)},
      {kScheduling, "prefix-cache",
       "Keep full KV pages for requests that begin with the same tokens;\n"
       "they give way when memory is wanted",
       Flag(&O::prefix_cache)},
      {kScheduling, "stream-buffer-tokens",
       "Tokens that wait for a slow reader before its stream is ended",
       Whole(&O::stream_buffer_tokens, 16, 1 << 20)},
      {kScheduling, "drain-timeout", "What running streams get to finish after SIGTERM",
       Seconds(&O::drain_timeout)},
      {kScheduling, "stall-timeout",
       "Time without progress, while work waits, after which health is\n"
       "NOT_SERVING until there is some; 0: never",
       Seconds(&O::stall_timeout)},

      {kLogs, "log-level", "Least level that is logged",
       Choice<LogLevel>(&O::log_level, {{"debug", LogLevel::kDebug},
                                        {"info", LogLevel::kInfo},
                                        {"warning", LogLevel::kWarning},
                                        {"error", LogLevel::kError}})},
      {kLogs, "log-format", "Lines of text, or one JSON object a line",
       Choice<LogFormat>(&O::log_format, {{"text", LogFormat::kText}, {"json", LogFormat::kJson}})},
      {kLogs, "log-prompts", "Write prompts to the request log", Flag(&O::log_prompts)},
  };
  return settings;
}

// A value as given, and where: "--port", "ESPALIER_PORT", "server.conf:3: port".
struct Given {
  std::string text;
  std::string origin;
};
using GivenByName = std::map<std::string, Given, std::less<>>;

std::string EnvironmentName(std::string_view name) {
  std::string variable = "ESPALIER_";
  for (const char c : name) variable += c == '-' ? '_' : static_cast<char>(std::toupper(c));
  return variable;
}

void AddEnvironment(GivenByName* given) {
  for (const Setting& setting : Settings()) {
    const std::string variable = EnvironmentName(setting.name);
    const char* text = std::getenv(variable.c_str());
    // In a cluster with a service named "espalier", Kubernetes sets ESPALIER_PORT to its address.
    if (!text || (setting.name == "port" && std::string_view(text).starts_with("tcp://"))) continue;
    given->try_emplace(setting.name, Given{text, variable});
  }
}

std::string_view Trim(std::string_view text) {
  constexpr std::string_view kSpace = " \t\r";
  const size_t first = text.find_first_not_of(kSpace);
  if (first == std::string_view::npos) return {};
  return text.substr(first, text.find_last_not_of(kSpace) - first + 1);
}

absl::Status AddFile(const std::string& path, GivenByName* given) {
  std::ifstream file(path);
  if (!file) return absl::InvalidArgumentError(fmt::format("--config: cannot read {}", path));
  GivenByName in_file;
  std::string line;
  for (int number = 1; std::getline(file, line); ++number) {
    const std::string_view entry = Trim(line);
    if (entry.empty() || entry.front() == '#') continue;
    const size_t equals = entry.find('=');
    if (equals == std::string_view::npos) {
      return absl::InvalidArgumentError(
          fmt::format("{}:{}: expected `key = value`, got \"{}\"", path, number, entry));
    }
    std::string name(Trim(entry.substr(0, equals)));
    std::replace(name.begin(), name.end(), '_', '-');
    const bool known = std::any_of(Settings().begin(), Settings().end(),
                                   [&](const Setting& setting) { return setting.name == name; });
    if (!known) {
      return absl::InvalidArgumentError(
          fmt::format("{}:{}: unknown option {}", path, number, name));
    }
    const auto origin = fmt::format("{}:{}: {}", path, number, name);
    const Given value{std::string(Trim(entry.substr(equals + 1))), origin};
    if (!in_file.emplace(name, value).second) {
      return absl::InvalidArgumentError(origin + ": given twice");
    }
  }
  if (file.bad() || !file.eof()) {
    return absl::InvalidArgumentError(fmt::format("--config: cannot read {}", path));
  }
  given->merge(in_file);
  return absl::OkStatus();
}

// What a user sees of CLI11's complaint: one line.
absl::Status AsStatus(const CLI::ParseError& error) {
  std::string text = error.what();
  std::replace(text.begin(), text.end(), '\n', ' ');
  return absl::InvalidArgumentError(text);
}

absl::StatusOr<ServerOptions> ReadOptions(const GivenByName& given) {
  ServerOptions options;
  for (const Setting& setting : Settings()) {
    const auto it = given.find(setting.name);
    if (it == given.end() || setting.value.read(it->second.text, &options)) continue;
    return absl::InvalidArgumentError(fmt::format("{}: expected {}, got \"{}\"", it->second.origin,
                                                  setting.value.expected, it->second.text));
  }
  if (options.model.empty()) {
    return absl::InvalidArgumentError(
        "--model: expected a .gguf file or a Hugging Face folder, got nothing");
  }
  using Kind = ServerOptions::PolicyKind;
  const bool fixed = options.policy == Kind::kFixed;
  if (options.ladder.empty() && fixed && options.fixed_rung != 0) {
    return absl::InvalidArgumentError(
        fmt::format("--policy: rung {} needs a ladder: --ladder", options.fixed_rung));
  }
  if (options.ladder.empty() && !fixed) {
    return absl::InvalidArgumentError(
        fmt::format("--policy: {} needs a ladder: --ladder",
                    options.policy == Kind::kLadder ? "ladder" : "dqn"));
  }
  if (!options.policy_file.empty() && options.policy != Kind::kDqn) {
    return absl::InvalidArgumentError("--policy-file: only --policy dqn reads it");
  }
  if (!options.decision_log.empty() && fixed) {
    return absl::InvalidArgumentError("--decision-log: a fixed policy decides nothing");
  }
  for (const auto& [name, target] :
       {std::pair("--ttft-target", options.ttft_target), {"--tpot-target", options.tpot_target}}) {
    if (target.count() < 1) {
      return absl::InvalidArgumentError(
          fmt::format("{}: expected a millisecond or more, got {} ms", name, target.count()));
    }
  }
  if (options.probe.has_value() && options.ladder.empty()) {
    return absl::InvalidArgumentError("--probe: needs a ladder: --ladder");
  }
  if (!options.probe.has_value() && !options.history_file.empty()) {
    return absl::InvalidArgumentError("--history-file: only a --probe has a history");
  }
  if (options.max_sequences > options.max_batch_tokens) {
    return absl::InvalidArgumentError(
        fmt::format("--max-sequences: expected at most max-batch-tokens = {}, got {}",
                    options.max_batch_tokens, options.max_sequences));
  }
  return options;
}

}  // namespace

std::string_view ServerVersion() { return ESPALIER_VERSION; }

absl::StatusOr<std::optional<ServerOptions>> ParseServerOptions(int argc, const char* const* argv) {
  CLI::App app("Serves a large language model over gRPC.", "espalier-server");
  app.get_formatter()->column_width(34);
  app.set_version_flag("--version", fmt::format("espalier-server {}", ServerVersion()),
                       "Print the version and exit");
  app.footer(
      "Each option is also read from the environment (ESPALIER_MAX_WAITING for --max-waiting) and\n"
      "from the file of --config. Flags win over the environment, it wins over the file.");
  std::string config;
  app.add_option("--config", config, "File of options: lines `key = value`, # starts a comment")
      ->type_name("PATH")
      ->envname("ESPALIER_CONFIG");

  const ServerOptions defaults;
  std::map<std::string, std::string> flags;
  for (const Setting& setting : Settings()) {
    const std::string shown = setting.value.show(defaults);
    const std::string help = fmt::format("{}\n[{}; default: {}]", setting.meaning,
                                         setting.value.expected, shown.empty() ? "none" : shown);
    const std::string flag = "--" + setting.name;
    CLI::Option* option = app.add_option(flag, flags[setting.name], help);
    if (setting.value.alone != nullptr) option->expected(0, 1);
    option->type_name(setting.value.placeholder)->group(setting.group);
  }

  GivenByName given;
  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& help_or_version) {
    app.exit(help_or_version);
    return std::optional<ServerOptions>();
  } catch (const CLI::ParseError& error) {
    return AsStatus(error);
  }
  for (const Setting& setting : Settings()) {
    const std::string flag = "--" + setting.name;
    if (app.count(flag) == 0) continue;
    const bool alone = setting.value.alone != nullptr && flags[setting.name].empty();
    given[setting.name] = {alone ? setting.value.alone : flags[setting.name], flag};
  }
  AddEnvironment(&given);
  if (!config.empty()) {
    const absl::Status status = AddFile(config, &given);
    if (!status.ok()) return status;
  }
  absl::StatusOr<ServerOptions> options = ReadOptions(given);
  if (!options.ok()) return options.status();
  return std::optional<ServerOptions>(*std::move(options));
}

absl::Status CheckFolder(std::string_view option, const std::string& path) {
  const std::string folder = std::filesystem::absolute(path).parent_path().string();
  if (access(folder.c_str(), W_OK) == 0) return absl::OkStatus();
  return absl::NotFoundError(
      fmt::format("{}: {}: {}", option, folder, std::generic_category().message(errno)));
}

}  // namespace espalier
