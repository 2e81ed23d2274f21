// A scheduler and its puppet, whose steps are told as text: `7[0,4)` are rows of a prefill chunk of
// request 7, `7@5` its decode row at position 5.
#pragma once

#include <fmt/format.h>

#include <optional>
#include <string>
#include <vector>

#include "engine/scheduling/scheduler.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/support/puppet_executor.h"

namespace espalier {

inline constexpr int kLayers = 2;
inline constexpr SiteWidths kWidths{.layers = kLayers, .heads = 2, .channels = 8};

struct Asked {
  int prompt = 1;
  int max_tokens = 4;
  int priority = 0;
  Instant deadline = kNever;
  int first = 100;  // token; each is one more than the one before
};

class SchedulerTest : public testing::Test {
 protected:
  // 8 tokens a step, and a pool of `pages` pages of 4 tokens in each of the two layers. Without
  // prefix_cache_ all is computed, though the prompts begin alike.
  void Make(int pages, SchedulerOptions options = {.max_batch_tokens = 8}) {
    options.prefix_cache = prefix_cache_;
    const KvGeometry geometry{
        .layers = kLayers, .pages = kLayers * pages, .page_tokens = 4, .context = 64};
    scheduler_.emplace(options, geometry, ladder_, policy_);
    puppet_.emplace(geometry, ladder_);
  }

  // A rung of fewer channels for decode rows.
  void AddNarrowRung() {
    Rung narrow = ladder_.rung(ladder_.size() - 1);
    narrow.decode.Keep(0, SiteKind::kChannels, 4);
    ASSERT_TRUE(ladder_.Append(narrow));
  }

  // A rung at four bits, and prefixes are shared.
  void AddPackedRung() {
    Rung packed = ladder_.rung(ladder_.size() - 1);
    packed.int4_kv = true;
    ASSERT_TRUE(ladder_.Append(packed));
    prefix_cache_ = true;
  }

  static Request MakeRequest(RequestId id, const Asked& asked) {
    Request request{.id = id, .priority = asked.priority, .deadline = asked.deadline};
    for (int i = 0; i < asked.prompt; ++i) request.prompt.push_back(asked.first + i);
    request.stop.max_tokens = asked.max_tokens;
    return request;
  }

  void Submit(RequestId id, const Asked& asked) {
    ASSERT_EQ(scheduler_->Submit(MakeRequest(id, asked)), absl::OkStatus());
  }

  // One step at `now`; what was told is in outputs_.
  std::string Step(Instant now = Instant{0}) {
    outputs_.clear();
    const Batch& batch = scheduler_->Schedule(now, &outputs_);
    std::string text;
    for (const BatchSpan& span : batch.spans) {
      if (!text.empty()) text += ' ';
      text += span.decode ? fmt::format("{}@{}", span.id, span.start)
                          : fmt::format("{}[{},{})", span.id, span.start, span.start + span.rows);
    }
    puppet_->PackPages(scheduler_->packings());
    if (!batch.empty()) {
      EXPECT_EQ(puppet_->Execute(batch, &result_), absl::OkStatus());
      scheduler_->Commit(result_, &outputs_);
    }
    scheduler_->CheckInvariants();
    return text;
  }

  // "id:reason" of what ended in the last step.
  std::vector<std::string> Ended() const {
    std::vector<std::string> ended;
    for (const SequenceOutput& output : outputs_) {
      if (output.finish == FinishReason::kNone) continue;
      ended.push_back(fmt::format("{}:{}", output.id, FinishReasonName(output.finish)));
    }
    return ended;
  }

  std::vector<int32_t> RunToEnd(RequestId id) {
    std::vector<int32_t> tokens;
    while (!scheduler_->idle()) {
      Step();
      for (const SequenceOutput& output : outputs_) {
        if (output.id != id) continue;
        for (const TokenResult& token : output.tokens) tokens.push_back(token.token);
      }
    }
    return tokens;
  }

  // Pages in use and pages kept for reuse, of one layer.
  std::string Pages() const {
    const SchedulerStats stats = scheduler_->stats();
    return fmt::format("{} + {}", stats.pages_used / kLayers, stats.pages_cached / kLayers);
  }

  bool prefix_cache_ = false;
  Ladder ladder_ = Ladder::DenseOnly(kWidths);
  FixedPolicy dense_{0};
  Policy* policy_ = &dense_;
  std::optional<Scheduler> scheduler_;
  std::optional<PuppetExecutor> puppet_;
  StepResult result_;
  std::vector<SequenceOutput> outputs_;
};

// Wants what it is told.
class Told final : public Policy {
 public:
  void Observe(const PressureReport& report, const Ladder&) override { seen = report; }
  int ChooseRung(const RequestTraits& traits) const override {
    return HardestIn(traits.allowed, rung);
  }
  std::string_view name() const override { return "told"; }
  std::string_view reason() const override { return why; }

  double refuses_behind_s() const override { return behind_s; }
  int hardest_served() const override { return hardest; }
  void Chose(uint64_t request, const RequestTraits& traits, int at) override {
    chosen.push_back(
        fmt::format("{} at {} of {:b}, priority {}", request, at, traits.allowed, traits.priority));
  }

  int rung = 0;
  int hardest = kMostRungs - 1;
  std::string_view why = "told so";
  double behind_s = 1e9;
  std::vector<std::string> chosen;
  PressureReport seen;
};

}  // namespace espalier
