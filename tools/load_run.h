// A load generator: many streamed calls at once, closed loop or Poisson arrivals, and what they
// saw.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "tools/generation.h"
#include "tools/remote.h"

namespace espalier {

struct LoadShape {
  int requests = 32;        // at most
  int concurrency = 8;      // closed loop: calls in flight
  double rate = 0;          // open loop: arrivals per second; 0: closed loop
  double duration = 0;      // seconds in which calls begin; 0: until all requests are made
  int prompt_tokens = 128;  // random ids
  int max_tokens = 128;     // drawn by each, end tokens ignored
  int rung = -1;            // of the ladder; -1: as the server's policy says
  int priority = 0;         // of each; higher is served first
  double ttft_target = 0;   // seconds a call may wait for its first token; 0: any time
  double tpot_target = 0;   // seconds a token after it may take, mean of a call; 0: any time
  // After the last call began, those that run are cancelled once none can come within the targets.
  bool give_up = false;
  int vocabulary = 0;
  uint64_t seed = 1;  // of arrivals and prompts
};

// How calls ended other than OK.
struct Refusals {
  int calls = 0;
  int with_retry_info = 0;
  std::string example;  // one message
};

struct LoadReport {
  int started = 0;
  int finished = 0;  // with OK
  int good = 0;      // of them within both targets
  // Calls that were still given tokens, or ended well, after their deadline.
  int past_deadline = 0;
  int64_t tokens = 0;  // of all calls
  // Of calls that finished. A server that has seen the seed finds its prompts in the prefix cache:
  // times are then those of repeated prompts.
  int64_t prompt_tokens = 0;
  int64_t cached_tokens = 0;
  std::map<int, int64_t> rung_tokens;        // as the server told
  double told_loss = 0;                      // nats, summed over those tokens
  double seconds = 0;                        // first call to last end
  std::vector<double> first_token;           // seconds, one per call that got any
  std::vector<double> per_token;             // seconds, one per call that got two or more
  std::vector<double> end;                   // seconds, one per call that finished
  std::map<std::string, Refusals> refusals;  // by code

  double loss_per_token() const {
    int64_t tokens = 0;
    for (const auto& [rung, drawn] : rung_tokens) tokens += drawn;
    return tokens > 0 ? told_loss / static_cast<double>(tokens) : 0;
  }
};

// When open-loop calls begin, seconds from the start, ascending: exponential gaps with mean 1 /
// rate from `seed`, `requests` at most, all before `duration` unless that is 0.
std::vector<double> PoissonArrivals(double rate, double duration, int requests, uint64_t seed);

// The same calls for `espalier simulate`, a line each; of an open loop.
std::string TrafficOf(const LoadShape& shape);

// Whether a call of `shape`, begun `age` seconds ago, may yet be good: its first token came after
// `first_token` seconds, or, at -1, has not come. Late messages have half a second to arrive.
bool MayBeGood(const LoadShape& shape, double age, double first_token);

// Calls progress(done, total) now and then, in calls.
// Ctrl-C cancels all calls; what came so far is reported.
LoadReport RunLoad(v1::EspalierService::Stub* stub, const RemoteOptions& remote,
                   const LoadShape& shape,
                   const std::function<void(int64_t done, int64_t total)>& progress);

}  // namespace espalier
