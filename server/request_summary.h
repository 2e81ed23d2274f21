// What is told about a request when it ends: one log line, one set of histogram observations.
#pragma once

#include <array>
#include <string>
#include <string_view>

#include "engine/scheduling/batch.h"
#include "engine/scheduling/request.h"

namespace espalier {

// Made on a gRPC or writer thread, never on the engine thread. Refused requests have a summary too:
// `outcome` is then the status code's name and the counts are zero.
struct RequestSummary {
  RequestId id = 0;         // of this server's run
  std::string request_id;   // the caller's, or made by the server
  std::string_view method;  // "Generate" or "Score"
  std::string peer;         // as gRPC names it, e.g. "ipv4:127.0.0.1:4242"
  // "stop", "length", or why it failed: "cancelled", "deadline", "reader_stalled", "queue_full",
  // "draining", "invalid_argument", "out_of_range", "unavailable", "internal" ...
  std::string_view outcome;
  std::string error;  // one line; empty if it went well
  int prompt_tokens = 0;
  int cached_tokens = 0;  // of prompt_tokens, found in the prefix cache
  int output_tokens = 0;
  int max_tokens = 0;  // as asked for, or the default
  int preemptions = 0;
  int rung = 0;                                      // the last one it was served at
  std::array<int32_t, kMostRungs> rung_tokens = {};  // drawn at each
  StageRows stages;                                  // rows computed, as in the proto
  std::string rung_by;          // who chose it, and why: "request", or the policy's name and reason
  double mean_prune_ratio = 0;  // of decode rows; as the next, mean over tokens
  double estimated_loss = 0;    // nats per token above the full model

  // Seconds since arrival (tokenising included); negative: it never came to that.
  double queue_s = -1;        // first scheduled
  double first_token_s = -1;  // first token
  double last_token_s = -1;   // last token
  double total_s = 0;         // end of the call

  std::string prompt;  // only with --log-prompts

  // Mean time per token after the first, seconds; 0 for fewer than two tokens.
  double per_token_s() const {
    return output_tokens > 1 && first_token_s >= 0
               ? (last_token_s - first_token_s) / (output_tokens - 1)
               : 0;
  }
};

}  // namespace espalier
