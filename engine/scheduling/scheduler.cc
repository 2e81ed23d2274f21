#include "engine/scheduling/scheduler.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>

#include "engine/scheduling/invariant.h"

namespace espalier {
namespace {

bool Contains(const std::vector<int32_t>& tokens, int32_t token) {
  return std::find(tokens.begin(), tokens.end(), token) != tokens.end();
}

// `rung`, or the nearest in the set, a milder one if there is any; -1 if the set is empty.
int NearestIn(RungSet set, int rung) {
  const int milder = HardestIn(set, rung);
  return milder >= 0 || set == 0 ? milder : std::countr_zero(set);
}

// At most so many nodes fit into the pool: each takes a page in every layer that keeps K and V.
int MostNodes(const SchedulerOptions& options, const KvGeometry& geometry, const Ladder& ladder) {
  if (!options.prefix_cache) return 0;
  int fewest = geometry.layers;
  for (int rung = 0; rung < ladder.size(); ++rung) {
    int kept = 0;
    for (int layer = 0; layer < geometry.layers; ++layer) {
      kept += ladder.rung(rung).HoldsKv(layer) ? 1 : 0;
    }
    if (kept > 0) fewest = std::min(fewest, kept);
  }
  return geometry.pages / fewest;
}

}  // namespace

Scheduler::Scheduler(const SchedulerOptions& options, const KvGeometry& geometry,
                     const Ladder& ladder, Policy* policy)
    : options_(options),
      geometry_(geometry),
      ladder_(ladder),
      policy_(policy),
      served_(~RungSet{0} >> (kMostRungs - std::clamp(ladder.size(), 1, kMostRungs))),
      pool_(geometry.pages, geometry.layers),
      cache_(MostNodes(options, geometry, ladder), geometry.layers, 2 * geometry.page_tokens,
             &pool_) {
  Invariant(
      options.max_batch_tokens >= 1 && options.max_sequences >= 1 && options.max_waiting >= 0 &&
          options.reserve_output >= 0 && options.reserve_output <= 1,
      "scheduler options: {} batch tokens, {} sequences, {} waiting, reserve {}",
      options.max_batch_tokens, options.max_sequences, options.max_waiting, options.reserve_output);
  Invariant(geometry.page_tokens >= 1 && geometry.context >= 1,
            "KV geometry: pages of {} tokens, context of {}", geometry.page_tokens,
            geometry.context);
  Invariant(ladder.size() >= 1, "a ladder without rungs");
  for (int rung = 0; rung < ladder.size(); ++rung) {
    Invariant(ladder.rung(rung).prefill.widths().layers == geometry.layers,
              "rung {} has {} layers, the KV pool {}", rung,
              ladder.rung(rung).prefill.widths().layers, geometry.layers);
    std::vector<int>& layers = kv_layers_.emplace_back();
    for (int layer = 0; layer < geometry.layers; ++layer) {
      if (ladder.rung(rung).HoldsKv(layer)) layers.push_back(layer);
    }
    const bool same = rung > 0 && layers.size() == kv_layers_[rung - 1].size() &&  // nested
                      page_tokens(rung) == page_tokens(rung - 1);
    mildest_.push_back(same ? mildest_.back() : rung);
  }
  most_pages_.reserve(ladder.size());
  batch_.tokens.reserve(options.max_batch_tokens);
  batch_.spans.reserve(options.max_sequences);
  batch_.logits.reserve(options.max_batch_tokens);
  scheduled_.reserve(options.max_sequences);
  hits_.reserve(cache_.capacity());
  running_.reserve(options.max_sequences);
  first_tokens_.reserve(options.max_sequences);
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
  const size_t total = request.prompt.size() + static_cast<size_t>(max_tokens);
  if (total > static_cast<size_t>(max_sequence_tokens())) {
    return absl::OutOfRangeError(fmt::format(
        "prompt + max_tokens: {} + {} tokens can never fit, the longest sequence is {} tokens",
        request.prompt.size(), max_tokens, max_sequence_tokens()));
  }
  if (waiting_.size() >= static_cast<size_t>(options_.max_waiting)) {
    return absl::ResourceExhaustedError(fmt::format(
        "queue: {} requests wait already, the bound is {}", waiting_.size(), options_.max_waiting));
  }

  RungSet allowed = AllowedRungs(request.bounds, ladder_);
  if (request.bounds.rung.has_value()) {
    allowed = RungSet{1} << HardestIn(allowed, *request.bounds.rung);
  }
  if (FittingRungs(request, allowed) == 0) {
    int nearest = std::countr_zero(allowed);  // the rung at which least is missing
    const auto missing = [&](int rung) { return PagesAt(request, rung) - MostPages(rung); };
    for (int rung = nearest + 1; rung < ladder_.size(); ++rung) {
      if ((allowed >> rung & 1) != 0 && missing(rung) < missing(nearest)) nearest = rung;
    }
    return absl::ResourceExhaustedError(fmt::format(
        "memory: {} + {} tokens take {} KV pages at rung {}, and there may be {} at present of {}",
        request.prompt.size(), max_tokens, PagesAt(request, nearest), nearest, MostPages(nearest),
        geometry_.pages));
  }

  if (idle()) {
    first_tokens_.clear();
    first_token_s_ = 0;
    last_step_ = kNever;
    step_s_ = 0;  // and not the first one, which prefills: that alone is no reason to prune
  }
  auto sequence = std::make_unique<Sequence>();
  sequence->allowed = allowed;
  sequence->arrival_order = arrivals_++;
  sequence->waits_since = request.arrival;
  sequence->page_tables.resize(geometry_.layers);
  sequence->tokens.reserve(total);
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
  if (last_step_ != kNever) {
    constexpr double kNew = 0.1;
    const double step = std::chrono::duration<double>(now - last_step_).count();
    step_s_ = (1 - kNew) * step_s_ + kNew * step;
  }
  last_step_ = now;
  NoteTraffic(now);
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

void Scheduler::NoteTraffic(Instant now) {
  constexpr double kMeanSeconds = 2, kNew = 0.2;
  const double since_s =
      arrivals_at_ == kNever ? 0 : std::chrono::duration<double>(now - arrivals_at_).count();
  // As if they had come evenly since the last step, which may be long ago.
  const double share = -std::expm1(-std::max(1e-6, since_s) / kMeanSeconds);
  arrivals_per_s_ *= 1 - share;
  arrivals_per_s_ += std::exchange(arrived_, 0) * share / std::max(1e-6, since_s);
  arrivals_at_ = now;
  for (const Instant arrival : first_tokens_) {
    const double took_s = std::chrono::duration<double>(now - arrival).count();
    first_token_s_ = (1 - kNew) * first_token_s_ + kNew * took_s;
  }
  first_tokens_.clear();
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
  int64_t unpromised = pool_.available();
  for (const Sequence* sequence : running_) {
    unpromised -= PagesPromised(*sequence) - PagesHeld(*sequence);
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
  const int rung = ChooseRung(*head);
  if (rung < 0) return false;
  head->rung = rung;
  FindPrefix(*head);
  int64_t needed = PagesPromised(*head);
  for (const int32_t node : hits_) {
    if (cache_.users(node) > 0) needed -= static_cast<int64_t>(kv_layers_[head->rung].size());
  }
  if (needed > *unpromised && !running_.empty()) return false;
  // It was accepted for what there would be without weights that it does not need.
  const int64_t most = PagesAt(head->request, head->rung);
  if (most > pool_.total()) pool_.SetLimit(static_cast<int>(most));

  *unpromised -= needed;
  if (newcomer) {
    head->first_scheduled = now;
    const int longest =
        TableLength(int64_t{head->prompt_tokens()} + head->request.stop.max_tokens, 0);
    for (std::vector<int32_t>& table : head->page_tables) table.reserve(longest);
    if (options_.prefix_cache) head->nodes.reserve(longest);
  }
  AdoptPrefix(head);
  if (newcomer) {
    head->cached_tokens = head->computed;
    if (options_.prefix_cache && !head->request.prompt_logprobs) {
      prefix_queries_ += static_cast<uint64_t>(head->prompt_tokens());
      prefix_hits_ += static_cast<uint64_t>(head->cached_tokens);
    }
  } else {
    recomputed_tokens_ += static_cast<uint64_t>(std::max(0, head->lost - head->computed));
  }
  TakePages(head, TableLength(head->size(), head->rung));
  NoteChoice(head, rung);
  head->state = Sequence::State::kRunning;
  waiting_.erase(waiting_.begin());
  running_.insert(running_.begin() + static_cast<ptrdiff_t>(place), head);
  return true;
}

RequestTraits Scheduler::TraitsOf(const Sequence& sequence) const {
  return {.allowed = sequence.allowed, .priority = sequence.request.priority};
}

void Scheduler::NoteChoice(Sequence* sequence, int rung) {
  const bool admitted = sequence->state == Sequence::State::kWaiting;
  if (admitted || rung > sequence->rung) {
    // Others are pruned, and it is not: it has no reason to tell.
    const bool unpruned = rung == 0 && policy_->wanted() > 0;
    sequence->reason = unpruned                       ? "none"
                       : rung > WishedRung(*sequence) ? "memory"  // it fits at none milder
                                                      : policy_->reason();
  }
  if (sequence->request.bounds.rung.has_value()) return;
  policy_->Chose(sequence->request.id, TraitsOf(*sequence), rung);
}

int Scheduler::WishedRung(const Sequence& sequence) const {
  const Request& request = sequence.request;
  if (request.bounds.rung.has_value()) return std::countr_zero(sequence.allowed);  // the only one
  const int rung = policy_->ChooseRung(TraitsOf(sequence));
  Invariant(rung >= 0 && rung < ladder_.size() && (sequence.allowed >> rung & 1) != 0,
            "policy {} chose rung {} of {} for request {}, against its bounds", policy_->name(),
            rung, ladder_.size(), request.id);
  return rung;
}

int Scheduler::WishedOf(const Sequence& sequence, RungSet rungs) const {
  const int rung = WishedRung(sequence);
  const RungSet harder = rungs >> rung;
  return harder != 0 ? rung + std::countr_zero(harder) : HardestIn(rungs, rung);
}

RungSet Scheduler::FittingRungs(const Request& request, RungSet allowed) const {
  RungSet fitting = 0;
  for (int rung = 0; rung < ladder_.size(); ++rung) {
    if (PagesAt(request, rung) <= MostPages(rung)) fitting |= RungSet{1} << rung;
  }
  return fitting & allowed;
}

RungSet Scheduler::FittingRungs(const Sequence& sequence) const {
  const RungSet fitting = FittingRungs(sequence.request, sequence.allowed);
  return fitting != 0 ? fitting : sequence.allowed;
}

int64_t Scheduler::MostPages(int rung) const {
  if (most_pages_.empty()) return pool_.total();
  const bool served = (served_ >> rung & 1) != 0;
  return std::max(most_pages_[rung], served ? pool_.total() : 0);
}

int64_t Scheduler::LeastPages(const Sequence& sequence) const {
  if (sequence.state == Sequence::State::kRunning) return PagesAt(sequence.request, sequence.rung);
  int64_t least = std::numeric_limits<int64_t>::max();
  for (int rung = 0; rung < ladder_.size(); ++rung) {
    if ((sequence.allowed >> rung & 1) != 0) {
      least = std::min(least, PagesAt(sequence.request, rung));
    }
  }
  return least;
}

RungSet Scheduler::Reachable(const Sequence& sequence) const {
  const RungSet fitting = FittingRungs(sequence);
  const bool fits = (fitting >> sequence.rung & 1) != 0;
  return (fits ? fitting : sequence.allowed) & (~RungSet{0} << mildest_[sequence.rung]);
}

int Scheduler::ChooseRung(const Sequence& sequence) const {
  const RungSet rungs = FittingRungs(sequence);
  return NearestIn(rungs & served_, WishedOf(sequence, rungs));
}

int Scheduler::MoveOf(const Sequence& sequence) const {
  const RungSet rungs = Reachable(sequence);
  return NearestIn(rungs & served_, WishedOf(sequence, rungs));
}

void Scheduler::MoveRunning() {
  for (Sequence* sequence : running_) {
    const int rung = MoveOf(*sequence);
    Invariant(rung >= 0, "request {} runs, and may have no rung that is served",
              sequence->request.id);
    if (rung != sequence->rung) MoveTo(sequence, rung);
  }
}

bool Scheduler::ServeRungs(RungSet rungs) {
  Invariant(batch_.empty(), "rungs changed while a batch is out");
  packings_.clear();
  const RungSet before = std::exchange(served_, rungs);
  int64_t copies = 0;
  const auto stays = [rungs](const Sequence& sequence) {
    return (rungs >> sequence.rung & 1) != 0;
  };
  for (const Sequence* sequence : running_) {
    if (stays(*sequence)) continue;
    const int rung = MoveOf(*sequence);
    if (rung >= 0 && page_tokens(rung) != page_tokens(sequence->rung)) {
      copies += PagesToPack(*sequence, rung);
    }
    if (rung < 0 || copies > pool_.available()) {
      served_ = before;
      return false;
    }
  }
  for (Sequence* sequence : running_) {
    if (!stays(*sequence)) MoveTo(sequence, MoveOf(*sequence));
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
  RungUse use{.pages_used = pool_.used(), .pages_needed = pool_.used()};
  for (const Sequence* sequence : running_) {
    use.running |= RungSet{1} << sequence->rung;
    use.wished |= RungSet{1} << WishedOf(*sequence, Reachable(*sequence));
  }
  if (!waiting_.empty()) {
    use.head = FittingRungs(*waiting_.front());
    const int rung = WishedOf(*waiting_.front(), use.head);
    use.wished |= RungSet{1} << rung;
    use.pages_of_head = PagesPromised(*waiting_.front(), rung);
  }
  for (const Sequence* sequence : waiting_) {
    use.pages_needed += PagesPromised(*sequence, WishedOf(*sequence, FittingRungs(*sequence)));
  }
  return use;
}

void Scheduler::MoveTo(Sequence* sequence, int rung) {
  const bool packs = page_tokens(rung) != page_tokens(sequence->rung);
  if (packs && pool_.available() < PagesToPack(*sequence, rung)) return;
  NoteChoice(sequence, rung);
  for (const int layer : kv_layers_[sequence->rung]) {
    if (ladder_.rung(rung).HoldsKv(layer)) continue;
    std::vector<int32_t>& table = sequence->page_tables[layer];
    pool_.Return(layer, std::span(table).subspan(sequence->nodes.size()));
    table.clear();
  }
  if (packs) Pack(sequence, rung);
  sequence->rung = rung;
  sequence->moved = true;
  ++rung_moves_;
}

int64_t Scheduler::PagesToPack(const Sequence& sequence, int rung) const {
  const int shared = static_cast<int>(sequence.nodes.size());
  const int copies = shared == sequence.table_length ? (shared + 1) / 2 : shared / 2;
  return int64_t{copies} * static_cast<int64_t>(kv_layers_[rung].size());
}

void Scheduler::Pack(Sequence* sequence, int rung) {
  const int shared = static_cast<int>(sequence->nodes.size());
  const int before = sequence->table_length, after = (before + 1) / 2;
  const int computed = TableLength(sequence->computed, sequence->rung);  // pages with any in them
  for (const int layer : kv_layers_[rung]) {
    std::vector<int32_t>& table = sequence->page_tables[layer];
    for (int i = 0; i < after; ++i) {
      const int32_t first = table[2 * i], second = 2 * i + 1 < before ? table[2 * i + 1] : -1;
      const bool own_first = 2 * i >= shared, own_second = second >= 0 && 2 * i + 1 >= shared;
      const int32_t to = own_first ? first : own_second ? second : TakePage(layer);
      if (2 * i < computed) {
        packings_.push_back({.layer = layer,
                             .first = first,
                             .second = 2 * i + 1 < computed ? second : -1,
                             .to = to});
      }
      if (own_first && own_second) pool_.Return(layer, std::span(&second, 1));
      table[i] = to;
    }
    table.resize(after);
  }
  for (std::vector<int32_t>& nodes = sequence->nodes; !nodes.empty(); nodes.pop_back()) {
    cache_.Release(nodes.back());
  }
  sequence->table_length = after;
}

std::vector<std::pair<int32_t, int32_t>> Scheduler::LimitPages(int pages, Instant now) {
  Invariant(batch_.empty(), "pages limited while a batch is out");
  packings_.clear();
  int64_t least = 0;
  for (const Queue* queue : {&running_, &waiting_}) {
    for (const Sequence* sequence : *queue) least = std::max(least, LeastPages(*sequence));
  }
  pages = static_cast<int>(std::clamp<int64_t>(pages, least, geometry_.pages));
  std::vector<std::pair<int32_t, int32_t>> moves;
  if (pages < pool_.total()) {
    while (pool_.used() + pool_.cached() > pages && cache_.Evict()) {
    }
    for (int rung = 1; rung < ladder_.size() && pool_.used() > pages; ++rung) {
      PressureReport report = Pressure(now);
      const double grown = static_cast<double>(pool_.total()) / std::max(pages, 1);
      report.kv_used *= grown;
      report.kv_promised *= grown;
      policy_->Observe(report, ladder_);
      MoveRunning();
    }
    while (pool_.used() + pool_.cached() > pages) {
      if (!cache_.Evict()) Preempt(running_.back(), now);
    }
    moves = pool_.Empty(pages);
  }
  pool_.SetLimit(pages);
  if (moves.empty()) return moves;
  std::vector<int32_t> page_of(geometry_.pages);
  std::iota(page_of.begin(), page_of.end(), 0);
  for (const auto& [from, to] : moves) page_of[from] = to;
  for (Sequence* sequence : running_) {
    for (std::vector<int32_t>& table : sequence->page_tables) {
      for (int32_t& page : table) page = page_of[page];
    }
  }
  cache_.Move(page_of);
  return moves;
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
          .reason = HeldByWeights(sequence) ? "weights" : sequence.reason,
          .stages = sequence.stages};
}

bool Scheduler::HeldByWeights(const Sequence& sequence) const {
  return std::popcount(served_) < ladder_.size() && sequence.state == Sequence::State::kRunning &&
         sequence.rung !=
             WishedOf(sequence, sequence.allowed & (~RungSet{0} << mildest_[sequence.rung]));
}

bool Scheduler::Grow(Sequence* sequence, Instant now) {
  const int length = TableLength(sequence->size(), sequence->rung);
  const int64_t missing = static_cast<int64_t>(length - sequence->table_length) *
                          static_cast<int64_t>(kv_layers_[sequence->rung].size());
  while (pool_.available() < missing) {
    Sequence* victim = running_.back();
    Invariant(victim != running_.front(), "{} pages cannot hold the {} tokens of request {} alone",
              pool_.total(), sequence->size(), sequence->request.id);
    Preempt(victim, now);
    if (victim == sequence) return false;
  }
  TakePages(sequence, length);
  return true;
}

void Scheduler::Preempt(Sequence* sequence, Instant now) {
  ++preemptions_;
  ++sequence->preemptions;
  sequence->waits_since = now;
  sequence->lost = sequence->computed;
  ReturnPages(sequence);
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
    SharePages(sequence);
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
  if ((span.decode ? rung.decode : rung.prefill).dense()) return {.full = span.rows};
  if (!span.decode && probe.ahead) return {.probed = span.rows};
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
  if (sequence->output_tokens() == 1) first_tokens_.push_back(sequence->request.arrival);
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

void Scheduler::FindPrefix(const Sequence& sequence) {
  hits_.clear();
  if (!options_.prefix_cache || kv_layers_[sequence.rung].empty()) return;
  int reusable = sequence.size() - 1;
  if (sequence.request.prompt_logprobs && sequence.scored + 1 < sequence.prompt_tokens()) {
    reusable = sequence.scored;
  }
  int32_t node = PrefixCache::kNone;
  for (int page = 0; (page + 1) * page_tokens(sequence.rung) <= reusable; ++page) {
    node = cache_.Find(sequence.rung, node, PageTokens(sequence, page));
    if (node == PrefixCache::kNone) return;
    hits_.push_back(node);
  }
}

void Scheduler::AdoptPrefix(Sequence* sequence) {
  for (const int32_t node : hits_) {
    cache_.Use(node);
    sequence->nodes.push_back(node);
    for (const int layer : kv_layers_[sequence->rung]) {
      sequence->page_tables[layer].push_back(cache_.pages(node)[layer]);
    }
  }
  sequence->node_rung = sequence->rung;
  sequence->moved = false;
  sequence->table_length = static_cast<int>(hits_.size());
  sequence->computed = sequence->table_length * page_tokens(sequence->rung);
}

void Scheduler::SharePages(Sequence* sequence) {
  const int rung = sequence->rung;
  if (!options_.prefix_cache || kv_layers_[rung].empty() || sequence->moved) return;
  // Where decode rows are narrowed otherwise, their K and V are not what a prefill would find.
  const bool alike = ladder_.rung(rung).prefill == ladder_.rung(rung).decode;
  const int shared = alike ? sequence->computed : std::min(sequence->computed, sequence->prefilled);
  std::vector<int32_t>& nodes = sequence->nodes;
  for (int page = static_cast<int>(nodes.size()); (page + 1) * page_tokens(rung) <= shared;
       ++page) {
    const int32_t parent = nodes.empty() ? PrefixCache::kNone : nodes.back();
    const std::span<const int32_t> tokens = PageTokens(*sequence, page);
    int32_t node = cache_.Find(rung, parent, tokens);
    if (node == PrefixCache::kNone) {
      node = cache_.Insert(rung, parent, tokens, sequence->page_tables, page);
    } else {
      cache_.Use(node);
      for (const int layer : kv_layers_[rung]) {
        int32_t& own = sequence->page_tables[layer][page];
        pool_.Return(layer, std::span(&own, 1));
        own = cache_.pages(node)[layer];
      }
    }
    nodes.push_back(node);
  }
}

void Scheduler::TakePages(Sequence* sequence, int table_length) {
  for (; sequence->table_length < table_length; ++sequence->table_length) {
    for (const int layer : kv_layers_[sequence->rung]) {
      sequence->page_tables[layer].push_back(TakePage(layer));
    }
  }
}

int32_t Scheduler::TakePage(int layer) {
  int32_t page = pool_.Take(layer);
  if (page < 0 && cache_.Evict()) page = pool_.Take(layer);
  Invariant(page >= 0, "no page left for layer {}", layer);
  return page;
}

void Scheduler::ReturnPages(Sequence* sequence) {
  std::vector<int32_t>& nodes = sequence->nodes;
  for (const int layer : kv_layers_[sequence->rung]) {
    pool_.Return(layer, std::span(sequence->page_tables[layer]).subspan(nodes.size()));
    sequence->page_tables[layer].clear();
  }
  for (; !nodes.empty(); nodes.pop_back()) cache_.Release(nodes.back());
  sequence->table_length = 0;
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
  ReturnPages(sequence);
  Remove(sequence, sequence->state == Sequence::State::kRunning ? &running_ : &waiting_);
  sequences_.erase(id);
}

int Scheduler::TableLength(int64_t tokens, int rung) const {
  return static_cast<int>((tokens + page_tokens(rung) - 1) / page_tokens(rung));
}

std::span<const int32_t> Scheduler::PageTokens(const Sequence& sequence, int page) const {
  return std::span(sequence.tokens)
      .subspan(static_cast<size_t>(page) * page_tokens(sequence.rung), page_tokens(sequence.rung));
}

int64_t Scheduler::PagesHeld(const Sequence& sequence) const {
  return static_cast<int64_t>(sequence.table_length) *
         static_cast<int64_t>(kv_layers_[sequence.rung].size());
}

int64_t Scheduler::PagesAt(const Request& request, int rung) const {
  const int64_t tokens = static_cast<int64_t>(request.prompt.size()) + request.stop.max_tokens;
  return TableLength(tokens, rung) * static_cast<int64_t>(kv_layers_[rung].size());
}

int64_t Scheduler::PagesPromised(const Sequence& sequence, int rung) const {
  const int to_come = sequence.request.stop.max_tokens - sequence.output_tokens();
  const auto reserved = static_cast<int64_t>(std::ceil(options_.reserve_output * to_come));
  return static_cast<int64_t>(TableLength(sequence.size() + reserved, rung)) *
         static_cast<int64_t>(kv_layers_[rung].size());
}

int64_t Scheduler::PagesAtMost(size_t prompt, int max_tokens) const {
  return static_cast<int64_t>(TableLength(static_cast<int64_t>(prompt) + max_tokens, 0)) *
         geometry_.layers;
}

int64_t Scheduler::PagesAtMost() const {
  int64_t pages = 0;
  for (const Queue* queue : {&running_, &waiting_}) {
    for (const Sequence* sequence : *queue) {
      pages += PagesAtMost(sequence->request.prompt.size(), sequence->request.stop.max_tokens);
    }
  }
  return pages;
}

int Scheduler::max_sequence_tokens() const {
  const int64_t pool_tokens = int64_t{geometry_.pages / geometry_.layers} * geometry_.page_tokens;
  return static_cast<int>(std::min<int64_t>(geometry_.context, pool_tokens));
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
      .kv_used = share(pool_.used(), pool_.total()),
      .kv_promised = share(promised, pool_.total()),
      .queue_length = share(static_cast<int64_t>(waiting_.size()), options_.max_waiting),
      .oldest_wait_s = std::chrono::duration<double>(now - oldest).count(),
      .step_s = step_s_,
      .memory_age_s = memory_.at == kNever
                          ? 0
                          : std::chrono::duration<double>(now - std::min(now, memory_.at)).count(),
      .free_memory = memory_.free,
      .foreign_memory = memory_.foreign,
      .first_token_s = first_token_s_,
      .arrivals_per_s = arrivals_per_s_,
      .running = static_cast<int>(running_.size()),
      .waiting = static_cast<int>(waiting_.size())};
}

SchedulerStats Scheduler::stats() const {
  return {.running = static_cast<int>(running_.size()),
          .waiting = static_cast<int>(waiting_.size()),
          .pages_total = pool_.total(),
          .pages_free = pool_.free(),
          .pages_used = pool_.used(),
          .pages_cached = pool_.cached(),
          .preemptions = preemptions_,
          .recomputed_tokens = recomputed_tokens_,
          .wanted_rung = policy_->wanted(),
          .reason = policy_->reason(),
          .refused_priority = waiting_.empty() ? std::nullopt : refused_priority_,
          .rung_moves = rung_moves_,
          .prefix_queries = prefix_queries_,
          .prefix_hits = prefix_hits_,
          .prefix_evicted_pages = cache_.evicted_pages(),
          .stages = stages_};
}

void Scheduler::CheckInvariants() const {
  pool_.CheckInvariants();
  Invariant(running_.size() + waiting_.size() == sequences_.size(),
            "{} running + {} waiting sequences, {} live", running_.size(), waiting_.size(),
            sequences_.size());
  Invariant(running_.size() <= static_cast<size_t>(options_.max_sequences),
            "{} sequences run, {} may", running_.size(), options_.max_sequences);
  std::vector<bool> seen(geometry_.pages, false);
  std::vector<int> held(geometry_.layers, 0);
  std::vector<int> users(cache_.capacity(), 0);
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
      Invariant(
          sequence.computed <= sequence.size() &&
              sequence.computed <= int64_t{sequence.table_length} * page_tokens(sequence.rung),
          "request {}: {} computed of {} tokens in {} pages", id, sequence.computed,
          sequence.size(), sequence.table_length);
      const int shared = static_cast<int>(sequence.nodes.size());
      Invariant(shared * page_tokens(sequence.rung) <= sequence.computed,
                "request {} shares {} pages, {} tokens are computed", id, shared,
                sequence.computed);
      for (int page = 0; page < shared; ++page) {
        const int32_t node = sequence.nodes[page];
        const int32_t parent = page == 0 ? PrefixCache::kNone : sequence.nodes[page - 1];
        Invariant(cache_.Find(sequence.node_rung, parent, PageTokens(sequence, page)) == node,
                  "request {}: page {} is not that of its tokens", id, page);
        ++users[node];
      }
      for (int layer = 0; layer < geometry_.layers; ++layer) {
        const std::vector<int32_t>& table = sequence.page_tables[layer];
        const int expected = ladder_.rung(sequence.rung).HoldsKv(layer) ? sequence.table_length : 0;
        Invariant(static_cast<int>(table.size()) == expected,
                  "request {} holds {} pages of layer {}, expected {}", id, table.size(), layer,
                  expected);
        if (expected == 0) continue;
        held[layer] += expected - shared;
        for (int i = 0; i < expected; ++i) {
          const int32_t page = table[i];
          if (i < shared) {
            Invariant(page == cache_.pages(sequence.nodes[i])[layer],
                      "request {}: page {} of layer {} is not that of its node", id, page, layer);
            continue;
          }
          Invariant(pool_.layer_of(page) == layer && !pool_.cached(page) && !seen[page],
                    "request {}: page {} of layer {} is not its own", id, page, layer);
          seen[page] = true;
        }
      }
    }
  }
  cache_.CheckInvariants(users, &seen, &held);
  for (int32_t page = 0; page < geometry_.pages; ++page) {
    Invariant(seen[page] == (pool_.layer_of(page) >= 0), "page {} is out, but nobody has it", page);
  }
  for (int layer = 0; layer < geometry_.layers; ++layer) {
    Invariant(held[layer] == pool_.used_by(layer), "layer {}: sequences hold {} pages, the pool {}",
              layer, held[layer], pool_.used_by(layer));
  }
}

}  // namespace espalier
