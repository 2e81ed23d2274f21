#include "engine/scheduling/scheduler.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "engine/scheduling/invariant.h"

namespace espalier {
namespace {

bool Contains(const std::vector<int32_t>& tokens, int32_t token) {
  return std::find(tokens.begin(), tokens.end(), token) != tokens.end();
}

const SchedulerOptions& Checked(const SchedulerOptions& options) {
  Invariant(
      options.max_batch_tokens >= 1 && options.max_sequences >= 1 && options.max_waiting >= 0 &&
          options.reserve_output >= 0 && options.reserve_output <= 1,
      "scheduler options: {} batch tokens, {} sequences, {} waiting, reserve {}",
      options.max_batch_tokens, options.max_sequences, options.max_waiting, options.reserve_output);
  return options;
}

}  // namespace

Scheduler::Scheduler(const SchedulerOptions& options, const KvGeometry& geometry,
                     const Ladder& ladder, Policy* policy)
    : options_(Checked(options)),
      ladder_(ladder),
      policy_(policy),
      pages_(geometry, ladder_, options.prefix_cache),
      rungs_(ladder_, pages_, *policy),
      traffic_(options.max_sequences) {
  batch_.tokens.reserve(options.max_batch_tokens);
  batch_.spans.reserve(options.max_sequences);
  batch_.logits.reserve(options.max_batch_tokens);
  scheduled_.reserve(options.max_sequences);
  running_.reserve(options.max_sequences);
  waiting_.reserve(static_cast<size_t>(options.max_waiting) + options.max_sequences);
}

absl::Status Scheduler::Submit(Request request) {
  if (request.prompt.empty()) {
    return absl::InvalidArgumentError("prompt: expected at least one token, got none");
  }
  const int max_tokens = request.stop.max_tokens;
  if (max_tokens < 0 || (max_tokens == 0 && !request.prompt_logprobs)) {
    return absl::InvalidArgumentError(fmt::format(
        "max_tokens: expected at least 1 (0 only to score the prompt), got {}", max_tokens));
  }
  if (sequences_.contains(request.id)) {
    return absl::InvalidArgumentError(fmt::format("id: request {} is live already", request.id));
  }
  if (request.tokens() > max_sequence_tokens()) {
    return absl::OutOfRangeError(fmt::format(
        "prompt + max_tokens: {} + {} tokens can never fit, the longest sequence is {} tokens",
        request.prompt.size(), max_tokens, max_sequence_tokens()));
  }
  if (waiting_.size() >= static_cast<size_t>(options_.max_waiting)) {
    return absl::ResourceExhaustedError(fmt::format(
        "queue: {} requests wait already, the bound is {}", waiting_.size(), options_.max_waiting));
  }

  const RungSet allowed = rungs_.Allowed(request.bounds);
  if (absl::Status fits = rungs_.CheckFits(request, allowed); !fits.ok()) return fits;

  if (idle()) traffic_.Rest();
  auto sequence = std::make_unique<Sequence>();
  sequence->allowed = allowed;
  sequence->arrival_order = arrivals_++;
  sequence->waits_since = request.arrival;
  sequence->page_tables.resize(pages_.geometry().layers);
  sequence->tokens.reserve(static_cast<size_t>(request.tokens()));
  sequence->tokens = request.prompt;
  next_deadline_ = std::min(next_deadline_, request.deadline);
  sequence->request = std::move(request);
  Insert(sequence.get(), &waiting_);
  sequences_.emplace(sequence->request.id, std::move(sequence));
  return absl::OkStatus();
}

bool Scheduler::Cancel(RequestId id) {
  Invariant(batch_.empty(), "request {} cancelled while a batch is out", id);
  const auto found = sequences_.find(id);
  if (found == sequences_.end()) return false;
  End(found->second.get());
  return true;
}

const Batch& Scheduler::Schedule(Instant now, std::vector<SequenceOutput>* expired) {
  Invariant(batch_.empty(), "Schedule while a batch is out");
  packings_.clear();
  Expire(now, expired);
  if (idle()) return batch_;
  traffic_.Step(now);
  policy_->Observe(Pressure(now), ladder_);
  MoveRunning();
  AddDecodes(now);
  AddPrefills(now);
  refused_priority_ = RefusedPriority(now);
  return batch_;
}

void Scheduler::Expire(Instant now, std::vector<SequenceOutput>* expired) {
  if (now < next_deadline_) return;
  next_deadline_ = kNever;
  for (Queue* queue : {&running_, &waiting_}) {
    for (size_t i = 0; i < queue->size();) {
      Sequence* sequence = (*queue)[i];
      if (now < sequence->request.deadline) {
        next_deadline_ = std::min(next_deadline_, sequence->request.deadline);
        ++i;
      } else {
        expired->push_back(Describe(*sequence, FinishReason::kDeadline));
        End(sequence);
      }
    }
  }
}

std::optional<int> Scheduler::RefusedPriority(Instant now) const {
  const double behind_s = policy_->refuses_behind_s();
  for (const Sequence* sequence : waiting_) {
    if (std::chrono::duration<double>(now - sequence->waits_since).count() >= behind_s) {
      return sequence->request.priority;
    }
  }
  return std::nullopt;
}

void Scheduler::AddDecodes(Instant now) {
  for (size_t i = 0; i < running_.size(); ++i) {
    if (running_[i]->decoding() && Grow(running_[i], now)) {
      AddSpan(running_[i], /*decode=*/true, /*admitted=*/false);
    }
  }
}

void Scheduler::AddPrefills(Instant now) {
  int64_t unpromised = int64_t{rungs_.limit()} - pool().used();
  for (const Sequence* sequence : running_) {
    unpromised -= PagesPromised(*sequence) - pages_.PagesHeld(*sequence);
  }
  bool admitting = true;
  for (size_t i = 0; batch_.rows() < options_.max_batch_tokens; ++i) {
    const bool head_is_next = !waiting_.empty() && (i == running_.size() ||
                                                    ServedBefore(*waiting_.front(), *running_[i]));
    const bool admitted = head_is_next && admitting && AdmitHead(i, now, &unpromised);
    if (head_is_next) admitting = admitted;
    if (i == running_.size()) return;
    // A preempted sequence that finds all but its last token computed is decoding already.
    if (admitted || !running_[i]->decoding()) AddSpan(running_[i], /*decode=*/false, admitted);
  }
}

bool Scheduler::AdmitHead(size_t place, Instant now, int64_t* unpromised) {
  if (running_.size() >= static_cast<size_t>(options_.max_sequences)) return false;
  Sequence* head = waiting_.front();
  const bool newcomer = head->first_scheduled == kNever;
  const int rung = rungs_.Choose(*head);
  if (rung < 0) return false;
  const int64_t needed = PagesPromised(*head, rung) - pages_.FindPrefix(*head, rung);
  if (needed > *unpromised && !running_.empty()) return false;
  // It was accepted when there were more, or for what there would be without weights that it does
  // not need.
  const int64_t most = pages_.Pages(head->request, rung);
  if (most > pool().total()) pages_.SetLimit(static_cast<int>(most), running_);

  *unpromised -= needed;
  if (newcomer) {
    head->first_scheduled = now;
    pages_.Reserve(head);
  }
  pages_.AdoptPrefix(head, rung);
  if (newcomer) {
    head->cached_tokens = head->computed;
    if (options_.prefix_cache && !head->request.prompt_logprobs) {
      prefix_queries_ += static_cast<uint64_t>(head->prompt_tokens());
      prefix_hits_ += static_cast<uint64_t>(head->cached_tokens);
    }
  } else {
    recomputed_tokens_ += static_cast<uint64_t>(std::max(0, head->lost - head->computed));
  }
  pages_.Grow(head, pages_.TableLength(head->size(), rung));
  NoteChoice(head, rung);
  head->state = Sequence::State::kRunning;
  waiting_.erase(waiting_.begin());
  running_.insert(running_.begin() + static_cast<ptrdiff_t>(place), head);
  return true;
}

void Scheduler::NoteChoice(Sequence* sequence, int rung) {
  const bool admitted = sequence->state == Sequence::State::kWaiting;
  if (admitted || rung > sequence->rung) {
    if (rungs_.HeldByMemory(*sequence)) {
      sequence->reason = "memory";
    } else if (rung == 0 && policy_->wanted() > 0) {
      sequence->reason = "none";  // others are pruned, and it is not: it has no reason to tell
    } else if (admitted || rung <= rungs_.PolicyRung(*sequence)) {
      sequence->reason = policy_->reason();
    }
  }
  if (sequence->request.bounds.rung.has_value()) return;
  policy_->Chose(sequence->request.id, TraitsOf(*sequence), rung);
}

void Scheduler::MoveRunning() {
  for (Sequence* sequence : running_) {
    const int rung = rungs_.Choose(*sequence);
    Invariant(rung >= 0, "request {} runs, and may have no rung that is served",
              sequence->request.id);
    if (rung != sequence->rung) MoveTo(sequence, rung);
  }
}

bool Scheduler::ServeRungs(RungSet rungs) {
  Invariant(batch_.empty(), "rungs changed while a batch is out");
  packings_.clear();
  const RungSet before = rungs_.in_memory();
  rungs_.set_in_memory(rungs);
  int64_t copies = 0;
  const auto stays = [rungs](const Sequence& sequence) { return Has(rungs, sequence.rung); };
  for (const Sequence* sequence : running_) {
    if (stays(*sequence)) continue;
    const int rung = rungs_.Choose(*sequence);
    if (rung >= 0) copies += pages_.PagesToMove(*sequence, rung);
    if (rung < 0 || copies > pool().available()) {
      rungs_.set_in_memory(before);
      return false;
    }
  }
  for (Sequence* sequence : running_) {
    if (!stays(*sequence)) MoveTo(sequence, rungs_.Choose(*sequence));
  }
  return true;
}

void Scheduler::SetLosses(std::span<const double> losses) {
  Invariant(idle() && losses.size() == static_cast<size_t>(ladder_.size()),
            "{} losses of {} rungs, with {} requests live", losses.size(), ladder_.size(),
            sequences_.size());
  for (int rung = 0; rung < ladder_.size(); ++rung) ladder_.SetQualityLoss(rung, losses[rung]);
}

RungUse Scheduler::rung_use() const {
  RungUse use{.pages_used = pool().used(), .pages_needed = pool().used()};
  for (const Sequence* sequence : running_) {
    use.running |= RungSet{1} << sequence->rung;
    use.wished |= RungSet{1} << rungs_.Wished(*sequence);
  }
  if (!waiting_.empty()) {
    use.head = rungs_.Open(*waiting_.front());
    const int rung = rungs_.Wished(*waiting_.front());
    use.wished |= RungSet{1} << rung;
    use.pages_of_head = PagesPromised(*waiting_.front(), rung);
  }
  for (const Sequence* sequence : waiting_) {
    use.pages_needed += PagesPromised(*sequence, rungs_.Wished(*sequence));
  }
  return use;
}

void Scheduler::MoveTo(Sequence* sequence, int rung) {
  if (!pages_.CanMove(*sequence, rung)) return;
  NoteChoice(sequence, rung);
  pages_.Move(sequence, rung, &packings_);
  ++rung_moves_;
}

std::vector<std::pair<int32_t, int32_t>> Scheduler::LimitPages(int pages, Instant now) {
  Invariant(batch_.empty(), "pages limited while a batch is out");
  packings_.clear();
  pages = std::clamp(pages, 0, pages_.geometry().pages);
  const bool fewer = pages < rungs_.limit();
  rungs_.set_limit(pages);
  const auto is_held = [this] { return pool().used() + pool().cached(); };
  // Whoever runs can end, alone at last.
  const auto needed = [this] {
    int64_t alone = rungs_.limit();
    for (const Sequence* sequence : running_) alone = std::max(alone, pages_.PagesAlone(*sequence));
    return static_cast<int>(alone);
  };
  if (rungs_.limit() < pool().total()) {
    while (is_held() > rungs_.limit() && pages_.Evict()) {
    }
    MoveRunning();  // who does not fit any more
    for (int rung = 1; fewer && rung < ladder_.size() && pool().used() > rungs_.limit(); ++rung) {
      PressureReport report = Pressure(now);
      const double to_limit = static_cast<double>(pool().total()) / std::max(rungs_.limit(), 1);
      report.kv_used *= to_limit;
      report.kv_promised *= to_limit;
      policy_->Observe(report, ladder_);
      MoveRunning();
    }
    while (is_held() > needed()) {
      if (!pages_.Evict()) Preempt(running_.back(), now);
    }
  }
  return pages_.SetLimit(needed(), running_);
}

SequenceOutput Scheduler::Describe(const Sequence& sequence, FinishReason finish) const {
  return {.id = sequence.request.id,
          .finish = finish,
          .prompt_tokens = sequence.prompt_tokens(),
          .cached_tokens = sequence.cached_tokens,
          .output_tokens = sequence.output_tokens(),
          .preemptions = sequence.preemptions,
          .first_scheduled = sequence.first_scheduled,
          .rung = sequence.rung,
          .rung_loss = ladder_.rung(sequence.rung).price.quality_loss_nats,
          .reason = rungs_.HeldByWeights(sequence) ? "weights" : sequence.reason,
          .stages = sequence.stages};
}

bool Scheduler::Grow(Sequence* sequence, Instant now) {
  const int length = pages_.TableLength(sequence->size(), sequence->rung);
  const int64_t missing =
      pages_.Pages(sequence->size(), sequence->rung) - pages_.PagesHeld(*sequence);
  while (pool().available() < missing) {
    Sequence* victim = running_.back();
    Invariant(victim != running_.front(), "{} pages cannot hold the {} tokens of request {} alone",
              pool().total(), sequence->size(), sequence->request.id);
    Preempt(victim, now);
    if (victim == sequence) return false;
  }
  pages_.Grow(sequence, length);
  return true;
}

void Scheduler::Preempt(Sequence* sequence, Instant now) {
  ++preemptions_;
  ++sequence->preemptions;
  sequence->waits_since = now;
  sequence->lost = sequence->computed;
  pages_.Return(sequence);
  sequence->computed = 0;
  Remove(sequence, &running_);
  sequence->state = Sequence::State::kWaiting;
  Insert(sequence, &waiting_);
}

void Scheduler::AddSpan(Sequence* sequence, bool decode, bool admitted) {
  const Request& request = sequence->request;
  const int start = sequence->computed;
  const int rows = std::min(sequence->size() - start, options_.max_batch_tokens - batch_.rows());
  Invariant(rows > 0, "request {} got no row of {}", request.id, options_.max_batch_tokens);
  const int first_row = batch_.rows();
  const auto first_token = sequence->tokens.begin() + start;

  LogitRow logits{.span = static_cast<int>(batch_.spans.size()),
                  .sampling = &request.sampling,
                  .tokens = sequence->tokens,
                  .prompt_tokens = sequence->prompt_tokens()};
  if (request.prompt_logprobs) {
    logits.use = LogitRow::Use::kScore;
    const int end = std::min(start + rows, sequence->prompt_tokens() - 1);
    for (int position = std::max(start, sequence->scored); position < end; ++position) {
      logits.row = first_row + position - start;
      logits.target = request.prompt[position + 1];
      batch_.logits.push_back(logits);
    }
  }
  if (start + rows == sequence->size() && request.stop.max_tokens > 0) {
    logits.use = LogitRow::Use::kSample;
    logits.row = first_row + rows - 1;
    logits.target = -1;
    if (sequence->output_tokens() < request.stop.min_tokens) {
      logits.banned = request.stop.stop_tokens;
    }
    batch_.logits.push_back(logits);
  }

  batch_.spans.push_back({.id = request.id,
                          .first_row = first_row,
                          .rows = rows,
                          .start = start,
                          .decode = decode,
                          .admitted = admitted,
                          .rung = sequence->rung,
                          .page_tables = sequence->page_tables});
  batch_.tokens.insert(batch_.tokens.end(), first_token, first_token + rows);
  if (!decode) sequence->prefilled = start + rows;
  (decode ? batch_.decode_rows : batch_.prefill_rows) += rows;
  scheduled_.push_back(sequence);
}

void Scheduler::Commit(const StepResult& result, std::vector<SequenceOutput>* outputs) {
  Invariant(result.tokens.size() == batch_.logits.size(), "{} results for {} logit rows",
            result.tokens.size(), batch_.logits.size());
  size_t next = 0;
  for (size_t i = 0; i < scheduled_.size(); ++i) {
    Sequence* sequence = scheduled_[i];
    sequence->computed += batch_.spans[i].rows;
    const StageRows stages = Stages(batch_.spans[i], result.probe);
    sequence->stages += stages;
    stages_ += stages;
    pages_.Share(sequence);
    SequenceOutput output;
    for (; next < batch_.logits.size() && batch_.logits[next].span == static_cast<int>(i); ++next) {
      if (batch_.logits[next].use == LogitRow::Use::kScore) {
        output.prompt_scores.push_back(result.tokens[next]);
        ++sequence->scored;
      } else {
        output.finish = Append(result.tokens[next], sequence, &output);
      }
    }
    if (sequence->request.stop.max_tokens == 0 && sequence->computed == sequence->size()) {
      output.finish = FinishReason::kLength;
    }
    if (output.finish == FinishReason::kNone && output.tokens.empty() &&
        output.prompt_scores.empty()) {
      continue;  // a prefill chunk in the middle has nothing to tell
    }
    SequenceOutput& told = outputs->emplace_back(Describe(*sequence, output.finish));
    told.tokens = std::move(output.tokens);
    told.prompt_scores = std::move(output.prompt_scores);
    if (told.finish != FinishReason::kNone) End(sequence);
  }
  Discard();
}

StageRows Scheduler::Stages(const BatchSpan& span, const ProbeUse& probe) const {
  const Rung& rung = ladder_.rung(span.rung);
  const KeepProfile& keep = span.decode ? rung.decode : rung.prefill;
  if (keep.dense() || (span.decode && probe.whole && !keep.drops())) return {.full = span.rows};
  if (!span.decode && probe.ahead && keep.narrows()) return {.probed = span.rows};
  return {.history = span.rows};
}

FinishReason Scheduler::Append(const TokenResult& drawn, Sequence* sequence,
                               SequenceOutput* output) {
  const StopParams& stop = sequence->request.stop;
  // Below min_tokens stop tokens are banned, so one is drawn only where nothing else could be: all
  // tokens banned, or logits that are no numbers. That ends the sequence, not the server.
  if (Contains(stop.stop_tokens, drawn.token)) return FinishReason::kStop;
  sequence->tokens.push_back(drawn.token);
  if (!spare_tokens_.empty()) {
    output->tokens.swap(spare_tokens_.back());
    spare_tokens_.pop_back();
  }
  output->tokens.push_back(drawn);
  if (sequence->output_tokens() == 1) traffic_.CountFirstToken(sequence->request.arrival);
  return sequence->output_tokens() == stop.max_tokens ? FinishReason::kLength : FinishReason::kNone;
}

void Scheduler::Recycle(std::vector<SequenceOutput>* outputs) {
  for (SequenceOutput& output : *outputs) {
    if (output.tokens.capacity() == 0) continue;
    output.tokens.clear();
    spare_tokens_.push_back(std::move(output.tokens));
  }
  outputs->clear();
}

void Scheduler::Discard() {
  batch_.Clear();
  scheduled_.clear();
}

void Scheduler::Insert(Sequence* sequence, Queue* queue) {
  const auto before = [](const Sequence* a, const Sequence* b) { return ServedBefore(*a, *b); };
  queue->insert(std::upper_bound(queue->begin(), queue->end(), sequence, before), sequence);
}

void Scheduler::Remove(Sequence* sequence, Queue* queue) {
  queue->erase(std::find(queue->begin(), queue->end(), sequence));
}

void Scheduler::End(Sequence* sequence) {
  const RequestId id = sequence->request.id;
  pages_.Return(sequence);
  Remove(sequence, sequence->state == Sequence::State::kRunning ? &running_ : &waiting_);
  sequences_.erase(id);
}

int64_t Scheduler::PagesPromised(const Sequence& sequence, int rung) const {
  const int to_come = sequence.request.stop.max_tokens - sequence.output_tokens();
  const auto reserved = static_cast<int64_t>(std::ceil(options_.reserve_output * to_come));
  return pages_.Pages(sequence.size() + reserved, rung);
}

int64_t Scheduler::PagesAtMost() const {
  int64_t pages = 0;
  for (const Queue* queue : {&running_, &waiting_}) {
    for (const Sequence* sequence : *queue) {
      pages += PagesAtMost(sequence->request);
    }
  }
  return pages;
}

int Scheduler::max_sequence_tokens() const {
  const KvGeometry& geometry = pages_.geometry();
  const int64_t pool_tokens = int64_t{geometry.pages / geometry.layers} * geometry.page_tokens;
  return static_cast<int>(std::min<int64_t>(geometry.context, pool_tokens));
}

PressureReport Scheduler::Pressure(Instant now) const {
  const auto share = [](int64_t part, int64_t whole) {
    return whole == 0 ? 0.0 : static_cast<double>(part) / static_cast<double>(whole);
  };
  int64_t promised = 0;
  Instant oldest = now;
  for (const Sequence* sequence : waiting_) {
    promised += PagesPromised(*sequence);
    oldest = std::min(oldest, sequence->waits_since);
  }
  return {
      .time_s = std::chrono::duration<double>(now).count(),
      .kv_used = share(pool().used(), pool().total()),
      .kv_promised = share(promised, pool().total()),
      .queue_length = share(static_cast<int64_t>(waiting_.size()), options_.max_waiting),
      .oldest_wait_s = std::chrono::duration<double>(now - oldest).count(),
      .step_s = traffic_.step_s(),
      .memory_age_s = memory_.at == kNever
                          ? 0
                          : std::chrono::duration<double>(now - std::min(now, memory_.at)).count(),
      .free_memory = memory_.free,
      .foreign_memory = memory_.foreign,
      .first_token_s = traffic_.first_token_s(),
      .arrivals_per_s = traffic_.arrivals_per_s(),
      .running = static_cast<int>(running_.size()),
      .waiting = static_cast<int>(waiting_.size())};
}

SchedulerStats Scheduler::stats() const {
  return {.running = static_cast<int>(running_.size()),
          .waiting = static_cast<int>(waiting_.size()),
          .pages_total = pool().total(),
          .pages_free = pool().free(),
          .pages_used = pool().used(),
          .pages_cached = pool().cached(),
          .preemptions = preemptions_,
          .recomputed_tokens = recomputed_tokens_,
          .wanted_rung = policy_->wanted(),
          .reason = policy_->reason(),
          .refused_priority = waiting_.empty() ? std::nullopt : refused_priority_,
          .rung_moves = rung_moves_,
          .prefix_queries = prefix_queries_,
          .prefix_hits = prefix_hits_,
          .prefix_evicted_pages = pages_.evicted(),
          .stages = stages_};
}

void Scheduler::CheckInvariants() const {
  Invariant(running_.size() + waiting_.size() == sequences_.size(),
            "{} running + {} waiting sequences, {} live", running_.size(), waiting_.size(),
            sequences_.size());
  Invariant(running_.size() <= static_cast<size_t>(options_.max_sequences),
            "{} sequences run, {} may", running_.size(), options_.max_sequences);
  for (const Queue* queue : {&running_, &waiting_}) {
    const bool running = queue == &running_;
    for (size_t i = 0; i < queue->size(); ++i) {
      const Sequence& sequence = *(*queue)[i];
      const RequestId id = sequence.request.id;
      Invariant(i == 0 || ServedBefore(*(*queue)[i - 1], sequence), "request {} is out of order",
                id);
      Invariant((sequence.state == Sequence::State::kRunning) == running,
                "request {} is in a queue of another state", id);
      Invariant(running || (sequence.table_length == 0 && sequence.computed == 0),
                "request {} waits with {} tokens in pages", id, sequence.computed);
    }
  }
  pages_.CheckInvariants(running_);
}

}  // namespace espalier
