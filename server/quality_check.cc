#include "server/quality_check.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <utility>

namespace espalier {
namespace {

// Shorter texts say little for two passes.
constexpr size_t kShortest = 16;

// Prompt tokens that a price tag, measured on as many or more, weighs as much as.
constexpr double kPriceTokens = 4096;

constexpr double kLeastLoss = 1e-3;  // nats per token

}  // namespace

QualityCheck::QualityCheck(const QualityCheckOptions& options, const Ladder& ladder)
    : options_(options), rungs_(ladder.size()), next_id_(std::numeric_limits<RequestId>::max()) {
  for (int rung = 0; rung < rungs_; ++rung) {
    price_[rung] = losses_[rung] = ladder.rung(rung).price.quality_loss_nats;
  }
}

void QualityCheck::Watch(const Request& request) {
  if (watched_.has_value() || text_.has_value() || rungs_ == 1) return;
  const size_t count = std::min<size_t>(request.prompt.size(), options_.longest);
  watched_ = Text{
      .id = request.id,
      .tokens = {request.prompt.begin(), request.prompt.begin() + static_cast<ptrdiff_t>(count)},
      .prompt_tokens = static_cast<int>(count)};
}

void QualityCheck::Follow(const SequenceOutput& output) {
  if (!watched_.has_value() || output.id != watched_->id) return;
  Text& text = *watched_;
  for (const TokenResult& token : output.tokens) {
    if (text.tokens.size() == static_cast<size_t>(options_.longest)) break;
    if (text.prompt_tokens == static_cast<int>(text.tokens.size())) text.rung = output.rung;
    if (text.rung != output.rung) text.rung = -1;
    text.tokens.push_back(token.token);
  }
  if (output.finish == FinishReason::kNone) return;
  const bool whole = output.finish == FinishReason::kStop || output.finish == FinishReason::kLength;
  if (whole && text.tokens.size() >= kShortest) text_ = std::move(text);
  watched_.reset();
}

void QualityCheck::Forget(RequestId id) {
  if (watched_.has_value() && watched_->id == id) watched_.reset();
}

Instant QualityCheck::Due(Instant idle_since) const {
  if (!text_.has_value() || running_.has_value() || idle_since == kNever) return kNever;
  const auto idle =
      std::chrono::duration_cast<Instant>(std::chrono::duration<double>(options_.idle_s));
  return std::max(rest_until_, idle_since + idle);
}

std::optional<Request> QualityCheck::Next(Instant now, Instant idle_since) {
  if (const Instant due = Due(idle_since); due == kNever || now < due) return std::nullopt;
  if (!at_full_) {
    rung_ = text_->rung > 0 ? text_->rung : turn_ + 1;
    if (text_->rung <= 0) turn_ = (turn_ + 1) % (rungs_ - 1);
  }
  scores_[at_full_ ? 1 : 0].clear();
  running_ = next_id_--;
  began_ = now;
  Request request{.id = *running_,
                  .prompt = text_->tokens,
                  .stop = {.max_tokens = 0},
                  .priority = std::numeric_limits<int>::min(),
                  .arrival = now,
                  .prompt_logprobs = true};
  request.sampling.top_logprobs = 0;
  request.bounds.rung = at_full_ ? 0 : rung_;
  return request;
}

bool QualityCheck::Take(const SequenceOutput& output, Instant now) {
  if (!running_.has_value() || output.id != *running_) return false;
  for (const TokenResult& score : output.prompt_scores) {
    scores_[at_full_ ? 1 : 0].push_back(score.logprob);
  }
  if (output.finish == FinishReason::kNone) return true;
  Rest(now);
  if (!at_full_) {
    at_full_ = true;
    return true;
  }
  Count();
  text_.reset();
  at_full_ = false;
  return true;
}

void QualityCheck::Abandon(Instant now) { Rest(now); }

void QualityCheck::Drop() {
  running_.reset();
  text_.reset();
  at_full_ = false;
}

// Checks take their share of time and no more: so long is waited for each of them.
void QualityCheck::Rest(Instant now) {
  running_.reset();
  const double took = std::chrono::duration<double>(now - began_).count();
  rest_until_ = now + std::chrono::duration_cast<Instant>(
                          std::chrono::duration<double>(took * (1 / options_.share - 1)));
}

void QualityCheck::Add(double nats, Sums* sums) const {
  if (sums->tokens >= static_cast<double>(options_.window)) {
    for (double Sums::* const part : {&Sums::tokens, &Sums::sum, &Sums::squares}) {
      sums->*part /= 2;
    }
  }
  ++sums->tokens;
  sums->sum += nats;
  sums->squares += nats * nats;
}

void QualityCheck::Count() {
  const size_t count = std::min(scores_[0].size(), scores_[1].size());
  for (size_t i = 0; i < count; ++i) {
    const double above = double{scores_[1][i]} - scores_[0][i];
    if (!std::isfinite(above)) continue;
    if (static_cast<int>(i) + 1 < text_->prompt_tokens) {
      Add(above, &of_prompts_[rung_]);
    } else if (text_->rung == rung_) {
      Add(-above, &of_answers_[rung_]);
    }
  }
  ++checks_;
  const Sums& sums = of_prompts_[rung_];
  const double loss = (sums.sum + kPriceTokens * price_[rung_]) / (sums.tokens + kPriceTokens);
  // Nothing lost is the full model's alone, or what calibration found.
  losses_[rung_] = std::max(loss, std::min(price_[rung_], kLeastLoss));
}

QualityCheck::Figure QualityCheck::FigureOf(const Sums& sums) const {
  if (sums.tokens < 2) return {.tokens = sums.tokens};
  const double mean = sums.sum / sums.tokens;
  const double variance = std::max(0.0, sums.squares / sums.tokens - mean * mean);
  return {.tokens = sums.tokens,
          .mean = mean,
          .standard_error = std::sqrt(variance / (sums.tokens - 1))};
}

int QualityCheck::hardest() const {
  for (int rung = 1; rung < rungs_; ++rung) {
    const Figure figure = prompts(rung);
    if (figure.tokens >= static_cast<double>(options_.enough) &&
        figure.mean - 2 * figure.standard_error > price_[rung] + options_.bound) {
      return rung - 1;
    }
  }
  return rungs_ - 1;
}

}  // namespace espalier
