#include "engine/sim/simulation.h"

#include <algorithm>
#include <chrono>
#include <optional>
#include <utility>

#include "engine/sim/sim_executor.h"

namespace espalier {
namespace {

Instant Seconds(double seconds) {
  return std::chrono::duration_cast<Instant>(std::chrono::duration<double>(seconds));
}

double InSeconds(Instant span) { return std::chrono::duration<double>(span).count(); }

class Simulation {
 public:
  Simulation(const Traffic& traffic, const SimOptions& options, const Ladder& ladder,
             const CostModel& costs, Policy* policy, const SimObserver& observer)
      : traffic_(traffic),
        options_(options),
        ladder_(ladder),
        executor_(&costs),
        observer_(observer),
        engine_(options.scheduler, options.geometry, ladder, &executor_, policy),
        first_token_(traffic.calls.size(), kNever) {
    report_.calls.resize(traffic.calls.size());
    report_.rung_tokens.resize(ladder.size());
  }

  SimReport Run() {
    while (next_call_ < traffic_.calls.size() || !engine_.idle()) {
      TakeWhatIsDue();
      if (engine_.idle()) {
        refused_.reset();  // as the server's engine thread
        if (next_call_ < traffic_.calls.size()) {
          now_ = std::max(now_, traffic_.calls[next_call_].arrival);
        }
        continue;
      }
      Step();
    }
    report_.seconds = InSeconds(now_);
    return std::move(report_);
  }

 private:
  void TakeWhatIsDue() {
    for (; next_shock_ < traffic_.shocks.size() && traffic_.shocks[next_shock_].at <= now_;
         ++next_shock_) {
      const double pages = options_.geometry.pages * traffic_.shocks[next_shock_].share;
      engine_.LimitPages(static_cast<int>(pages), now_);
    }
    for (; next_call_ < traffic_.calls.size() && traffic_.calls[next_call_].arrival <= now_;
         ++next_call_) {
      Submit(next_call_);
    }
  }

  void Submit(size_t index) {
    const SimCall& call = traffic_.calls[index];
    engine_.CountArrivals(1);
    Request request;
    request.id = index + 1;
    request.prompt.resize(call.prompt);
    request.stop.max_tokens = call.output;
    request.priority = call.priority;
    request.arrival = call.arrival;
    // As the server's inbox: a policy that refuses does so while somebody waits.
    const bool full = refused_.has_value() && call.priority <= *refused_ && waiting_ > 0;
    if (full || !engine_.Submit(std::move(request)).ok()) {
      report_.calls[index].refused = true;
      if (observer_) observer_(report_.calls[index]);
      return;
    }
    ++waiting_;
  }

  void Step() {
    // Only a lost device fails, and there is none.
    const StepReport& step = **engine_.Step(now_);
    const bool worked = step.decode_rows + step.prefill_rows > 0;
    now_ += worked ? Seconds(executor_.seconds() + options_.step_overhead_s) : kStepRetry;
    ++report_.steps;
    waiting_ = step.stats.waiting;
    refused_ = step.stats.refused_priority;
    for (const SequenceOutput& output : step.outputs) Take(output);
    report_.preemptions = step.stats.preemptions;
    report_.rung_moves = step.stats.rung_moves;
  }

  void Take(const SequenceOutput& output) {
    const size_t index = output.id - 1;
    SimOutcome& outcome = report_.calls[index];
    if (!output.tokens.empty()) {
      if (first_token_[index] == kNever) {
        first_token_[index] = now_;
        outcome.first_token_s = InSeconds(now_ - traffic_.calls[index].arrival);
      }
      const auto tokens = static_cast<int>(output.tokens.size());
      outcome.tokens += tokens;
      outcome.loss += tokens * ladder_.rung(output.rung).price.quality_loss_nats;
      report_.rung_tokens[output.rung] += tokens;
    }
    if (output.finish == FinishReason::kNone) return;
    outcome.loss /= std::max(1, outcome.tokens);
    outcome.per_token_s =
        outcome.tokens > 1 ? InSeconds(now_ - first_token_[index]) / (outcome.tokens - 1) : 0;
    if (observer_) observer_(outcome);
  }

  const Traffic& traffic_;
  const SimOptions& options_;
  const Ladder& ladder_;
  SimExecutor executor_;
  const SimObserver& observer_;
  Engine engine_;
  std::vector<Instant> first_token_;  // [calls]
  Instant now_{0};
  size_t next_call_ = 0, next_shock_ = 0;
  int waiting_ = 0;
  std::optional<int> refused_;
  SimReport report_;
};

}  // namespace

int SimReport::refused() const {
  return static_cast<int>(std::ranges::count(calls, true, &SimOutcome::refused));
}

int SimReport::good(const SimOptions& options) const {
  return static_cast<int>(
      std::ranges::count_if(calls, [&](const SimOutcome& call) { return call.Good(options); }));
}

double SimReport::loss_per_token() const {
  double loss = 0, tokens = 0;
  for (const SimOutcome& call : calls) {
    loss += call.loss * call.tokens;
    tokens += call.tokens;
  }
  return tokens > 0 ? loss / tokens : 0;
}

SimReport Simulate(const Traffic& traffic, const SimOptions& options, const Ladder& ladder,
                   const CostModel& costs, Policy* policy, const SimObserver& observer) {
  return Simulation(traffic, options, ladder, costs, policy, observer).Run();
}

}  // namespace espalier
