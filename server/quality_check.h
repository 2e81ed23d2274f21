// What pruning costs on this server's own traffic: while nobody waits, a sampled request's text is
// scored at a pruned rung and at the full model, and a rung that loses far more than its price tag
// says is no longer served.
//
// Two figures of a rung, both nats per token above the full model. Of prompts, which people wrote:
// what the rung loses on them, the very thing that price tags tell. Of answers that the rung itself
// gave: how much less likely the full model finds them, an estimate of the divergence between the
// two.
//
// Plain: no thread, no clock. The engine thread drives it, between steps.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "engine/scheduling/scheduler.h"

namespace espalier {

struct QualityCheckOptions {
  double share = 0.02;       // of the engine's time that checks take at most; above 0
  double bound = 0.5;        // nats beyond the price tag from which a rung is not served
  double idle_s = 0.2;       // that the engine does nothing before a check begins
  int longest = 256;         // tokens of a text that are looked at
  int64_t enough = 4096;     // prompt tokens of a rung before it is judged
  int64_t window = 1 << 16;  // tokens after which what was counted before counts half
};

class QualityCheck {
 public:
  // Running means of a rung.
  struct Figure {
    double tokens = 0;  // counted, less what the window forgot
    double mean = 0;    // nats per token above the full model
    double standard_error = 0;
  };

  QualityCheck(const QualityCheckOptions& options, const Ladder& ladder);

  // What goes on in the engine: a request came; a step told something; a request was cancelled.
  // Texts of requests that end by themselves are looked at later, one in hand at a time.
  void Watch(const Request& request);
  void Follow(const SequenceOutput& output);
  void Forget(RequestId id);

  // When Next may have something for an engine that is idle since then (kNever: it is not known to
  // be); kNever: not as things are.
  Instant Due(Instant idle_since) const;
  // A request that scores a text, for an engine that is idle; nothing if none is due.
  std::optional<Request> Next(Instant now, Instant idle_since);
  // The id of the request that Next gave, while it runs.
  std::optional<RequestId> running() const { return running_; }
  // Takes what the engine told of it, and true; false if it is of another request.
  bool Take(const SequenceOutput& output, Instant now);
  // It was cancelled for others; the same is due again.
  void Abandon(Instant now);
  // The engine cannot take it; another text is looked at.
  void Drop();

  Figure prompts(int rung) const { return FigureOf(of_prompts_[rung]); }
  Figure answers(int rung) const { return FigureOf(of_answers_[rung]); }
  int64_t checks() const { return checks_; }  // since start
  // The hardest rung that may be served: the one before the first that is judged too bad.
  int hardest() const;

  // What rungs are taken to lose, [rungs]: their prices, each drawn to what prompts measured as
  // they grow in number.
  std::span<const double> losses() const { return std::span(losses_).first(rungs_); }

 private:
  struct Text {
    RequestId id = 0;
    std::vector<int32_t> tokens;
    int prompt_tokens = 0;  // of `tokens`
    int rung = -1;          // that the answer was given at; -1: at several, or none yet
  };
  struct Sums {
    double tokens = 0, sum = 0, squares = 0;
  };

  Figure FigureOf(const Sums& sums) const;
  void Add(double nats, Sums* sums) const;
  void Count();
  void Rest(Instant now);

  const QualityCheckOptions options_;
  const int rungs_;
  std::array<double, kMostRungs> price_ = {};
  std::array<Sums, kMostRungs> of_prompts_, of_answers_;
  std::array<double, kMostRungs> losses_ = {};

  std::optional<Text> watched_;   // of a request that runs
  std::optional<Text> text_;      // to be looked at
  int turn_ = 0;                  // the rung for texts that were served in full
  int rung_ = 0;                  // that the text in hand is scored at, before rung 0
  std::vector<float> scores_[2];  // log-probabilities of its tokens but the first: at rung_, at 0
  bool at_full_ = false;          // the second of the two
  std::optional<RequestId> running_;
  RequestId next_id_;
  Instant began_{0};
  Instant rest_until_{0};
  int64_t checks_ = 0;
};

}  // namespace espalier
