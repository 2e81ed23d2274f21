// An executor on strings, for server tests: predictable tokens, at a pace the test chooses.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

#include "engine/engine.h"

namespace espalier {

// Token i of the output for a prompt that starts with `first`: depends on nothing else, so it tells
// whether streams got mixed up, reordered or cut.
inline int32_t PacedToken(int32_t first, int index) { return 'a' + (first * 7 + index) % 26; }

class PacedExecutor final : public Executor {
 public:
  absl::Status Execute(const Batch& batch, StepResult* result) override {
    {
      std::unique_lock lock(mutex_);
      in_step_ = true;
      moved_.notify_all();
      moved_.wait(lock, [this] { return !held_; });
      in_step_ = false;
      if (!failure_.ok()) return failure_;
    }
    if (const auto pause = step_time_.load(); pause.count() > 0) std::this_thread::sleep_for(pause);
    rows_ += batch.rows();
    for (const LogitRow& row : batch.logits) {
      TokenResult token{.logprob = -0.5f};
      if (row.use == LogitRow::Use::kScore) {
        token.token = row.target;
      } else {
        const int index = static_cast<int>(row.tokens.size()) - row.prompt_tokens;
        token.token = PacedToken(row.tokens[0], index);
      }
      const int top = row.sampling != nullptr ? row.sampling->top_logprobs : -1;
      for (int i = 0; i < top; ++i) token.top.emplace_back('a' + i, -1.0f - static_cast<float>(i));
      result->tokens.push_back(std::move(token));
    }
    return absl::OkStatus();
  }

  // Weights that rung 0 does not need are worth so many pages.
  int ReleasablePages(RungSet served) const override {
    return (served & ~RungSet{1}) == 0 ? panel_pages_.load() : 0;
  }
  absl::StatusOr<WeightsFit> FitWeights(RungSet /*served*/, bool /*at_once*/) override {
    std::lock_guard lock(mutex_);
    if (!failure_.ok()) return failure_;
    return WeightsFit{};
  }
  void set_panel_pages(int pages) { panel_pages_ = pages; }

  // Steps wait from now on, until Go.
  void Hold() {
    std::lock_guard lock(mutex_);
    held_ = true;
  }
  // Waits until a step does.
  void WaitForHeldStep() {
    std::unique_lock lock(mutex_);
    moved_.wait(lock, [this] { return held_ && in_step_; });
  }
  void Go() {
    std::lock_guard lock(mutex_);
    held_ = false;
    moved_.notify_all();
  }
  // Every further step fails, and every move of weights.
  void Break(absl::Status failure) {
    std::lock_guard lock(mutex_);
    failure_ = std::move(failure);
  }
  void set_step_time(std::chrono::microseconds time) { step_time_ = time; }
  int64_t rows() const { return rows_; }

 private:
  std::mutex mutex_;
  std::condition_variable moved_;
  bool held_ = false;
  bool in_step_ = false;  // at its beginning
  absl::Status failure_;
  std::atomic<std::chrono::microseconds> step_time_{std::chrono::microseconds(0)};
  std::atomic<int64_t> rows_{0};
  std::atomic<int> panel_pages_{0};
};

// A small engine on one.
struct PacedEngine {
  static constexpr SiteWidths kSites = {.layers = 2, .heads = 2, .channels = 8};

  // Three rungs that leave out 0, 0.2 and 0.4 and lose 0, 0.1 and 0.5 nats per token.
  static Ladder Rungs() {
    Ladder ladder = Ladder::DenseOnly(kSites);
    for (const int left : {2, 4}) {
      KeepProfile keep = KeepProfile::Dense(kSites);
      for (int layer = 0; layer < kSites.layers; ++layer) {
        keep.Keep(layer, SiteKind::kChannels, kSites.channels - left);
      }
      ladder.Append(
          {.prefill = keep, .decode = keep, .price = {.quality_loss_nats = left == 2 ? 0.1 : 0.5}});
    }
    return ladder;
  }

  // Rung 0 is served, unless `other` chooses.
  explicit PacedEngine(SchedulerOptions options = {.max_waiting = 1 << 20},
                       KvGeometry geometry = {.layers = 2, .pages = 4096, .context = 4096},
                       Policy* other = nullptr)
      : engine(options, geometry, Rungs(), &executor, other == nullptr ? &policy : other) {}

  PacedExecutor executor;
  FixedPolicy policy{0};
  Engine engine;
};

}  // namespace espalier
