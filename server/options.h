// Every setting of the server: meaning, unit, range and default, and how it is read.
#pragma once

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "engine/model/weight_plan.h"
#include "engine/pruning/probe.h"
#include "kernels/backend.h"
#include "kernels/cpu/cpu_backend.h"

namespace espalier {

enum class LogFormat : uint8_t { kText, kJson };
enum class LogLevel : uint8_t { kDebug, kInfo, kWarning, kError };

struct ServerOptions {
  // --- Model and machine.
  // A .gguf file, or a folder with config.json, *.safetensors and tokenizer.json. Required.
  std::string model;
  // Name in answers and metrics; empty: as the model's file says.
  std::string model_name;
  // How the model's matrices are kept; auto goes by their types in the file.
  WeightPlan weights = WeightPlan::kAuto;
  // How keys and values are kept; none (auto): DefaultKvType.
  std::optional<KvType> kv_type;
  // Bytes for KV pages; 0 (auto): ModelOptions::kv_bytes says what is taken.
  uint64_t kv_memory = 0;
  // Bytes for the whole process, of which KV gets what is left; 0: what the machine has, or this
  // share of that, as it is at any time, if above 0.
  uint64_t memory_budget = 0;
  double memory_share = 0;
  // Instruction set; none (auto): the best this machine runs.
  std::optional<Isa> isa;
  // Compute threads, 0 to 1024; 0 (auto): the cores this process may use.
  int threads = 0;

  // --- Pruning.
  // The ladder that calibration wrote, its channels beside it; empty: the full model only.
  std::string ladder;
  // Who chooses the rung of requests without one of their own: always the same, or the hardest
  // milder one that their bounds allow; LadderPolicy; or DqnPolicy, in its shield.
  enum class PolicyKind : uint8_t { kFixed, kLadder, kDqn };
  PolicyKind policy = PolicyKind::kFixed;
  int fixed_rung = 0;  // at most the ladder's last
  // What `espalier train --task serve` wrote; empty: PolicyPathOf(ladder).
  std::string policy_file;
  bool shadow = false;  // the full model is served, and what the policy would do is only told
  // What the policy prunes for, seconds, 0.001 to 3600: a request should not wait for longer, nor
  // take longer for a token.
  std::chrono::milliseconds ttft_target{1000};
  std::chrono::milliseconds tpot_target{100};
  // What waiting and slow steps alone may cost, told nats per token, 0 to 100; memory may cost
  // more.
  double load_loss = 0.2;
  // Where the policy's decisions go, with what it saw; empty: nowhere.
  std::string decision_log;
  // Of the engine's time, in which nobody waits, for scoring a sample of its traffic at pruned
  // rungs and at the full model, 0 to 1; 0: never.
  double quality_check = 0.02;
  // How much more than its price tag a rung may be seen to lose before it is no longer served, nats
  // per token, 0 to 100.
  double quality_bound = 0.5;
  // Rows by which each prefill step that narrows ranks heads and channels anew, by Probe Pruning;
  // none (off): they stay as calibrated. Needs a ladder without refitted weights.
  std::optional<ProbeOptions::Rows> probe;
  double probe_budget = 0.015;  // most rows probed, as a share of those narrowed, 0 to 1
  int probe_least_rows = 64;    // steps that narrow fewer prefill rows are not probed, 0 to 65536
  int probe_refresh = 64;       // decode steps after which history ranks anew; 0: never
  int probe_whole = 64;         // of so many decode steps one leaves nothing out; 0: none
  bool frozen_history = false;  // history stays as read
  // The probe's history: read at the start if the file exists, written at the end unless frozen;
  // empty: begins anew.
  std::string history_file;
  // Sums of what the model's matrices meet, of a sample of rows at rung 0, for `espalier prune
  // --moments`: read at the start if the file exists, written every minute and at the end; empty:
  // none are gathered.
  std::string moments_file;
  // The same of what the channels of its MLPs hold together, a layer at a time, for `espalier
  // calibrate --moments`: read at the start if the file exists, written every ten minutes and at
  // the end; empty: none are gathered.
  std::string channel_moments_file;

  // --- Network.
  // Address to listen at, for gRPC and metrics.
  std::string host = "127.0.0.1";
  // gRPC port, 0 to 65535; 0: a free one, told in the log and in port_file.
  int port = 50051;
  // The gRPC port is written here, and a newline, once the server listens; empty: nowhere.
  std::string port_file;
  // Prometheus port, -1 to 65535; -1: off, 0: a free one, told in the log.
  int metrics_port = 9090;
  // Largest message received, bytes, 1 KiB to 1 GiB.
  uint64_t max_message_bytes = 4 << 20;
  // A connection older than this is asked to reconnect, seconds; 0: never. For load balancers that
  // place connections, not calls.
  std::chrono::milliseconds max_connection_age{0};
  // What its streams get to finish after that, seconds; 0: without limit.
  std::chrono::milliseconds max_connection_age_grace{0};

  // Callers may change the memory budget and replace the model.
  bool admin = false;

  // --- Scheduling.
  // Rows of one step, 1 to 65536: how long a prompt's chunk may hold up the streams that run. On a
  // CPU products are as fast a row from 128 rows on.
  int max_batch_tokens = 128;
  int max_sequences = 64;       // running at once, 1 to 4096, at most max_batch_tokens
  int max_waiting = 256;        // queue bound, requests, 1 to 1000000; beyond: RESOURCE_EXHAUSTED
  double reserve_output = 0.5;  // SchedulerOptions::reserve_output, 0 to 1
  // Full KV pages are kept after their request and shared by requests that begin with the same
  // tokens; kept ones give way whenever memory is wanted.
  bool prefix_cache = true;
  // Tokens that wait for a slow reader before its stream is ended, 16 to 1048576.
  int stream_buffer_tokens = 1024;
  // What running streams get to finish after SIGTERM, seconds, 0 to 86400.
  std::chrono::milliseconds drain_timeout{30'000};
  // Without progress for so long while work waits, health is NOT_SERVING until there is some,
  // seconds, 0 to 86400; 0: never.
  std::chrono::milliseconds stall_timeout{30'000};

  // --- Logs.
  LogLevel log_level = LogLevel::kInfo;
  LogFormat log_format = LogFormat::kText;
  // Prompts appear in the request log.
  bool log_prompts = false;
};

// NotFound, with the option and the system's words, if no file could be written where `path` is:
// rather at the start than when there is something to write.
absl::Status CheckFolder(std::string_view option, const std::string& path);

// "0.1.0", as the build says.
std::string_view ServerVersion();

// Reads options, each by precedence: flag, environment (ESPALIER_MAX_WAITING for --max-waiting),
// file (--config FILE, lines `max-waiting = 128`), default. None: --help or --version was asked for
// and is printed; exit 0. InvalidArgument: one line that names the option, and the file or variable
// if it came from there; print it and exit 2. Unknown names are errors on the command line and in
// the file; other variables named ESPALIER_* are not ours to judge.
absl::StatusOr<std::optional<ServerOptions>> ParseServerOptions(int argc, const char* const* argv);

}  // namespace espalier
