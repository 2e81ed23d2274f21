#include "server/decision_log.h"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <filesystem>
#include <iterator>
#include <span>
#include <string_view>
#include <system_error>
#include <utility>

namespace espalier {
namespace {

// Bytes for the file: minutes of steps, should the disk stall.
constexpr size_t kMost = 16 << 20;
// Bytes of each half of the last lines; a report takes some 400.
constexpr size_t kRecent = 512 << 10;
// Bytes of the longest line, and more.
constexpr size_t kLine = 8192;

// How lines begin.
constexpr std::string_view kLosses = R"({"losses":)", kCap = R"({"cap":)";
constexpr std::chrono::milliseconds kEvery{100};
constexpr std::string_view kBegins = R"({"policy":)";

std::string BandText(const PressureBand& band) {
  return fmt::format("[{},{}]", band.raise, band.lower);
}

}  // namespace

absl::StatusOr<std::unique_ptr<DecisionLog>> DecisionLog::Create(const std::string& path,
                                                                 const LadderPolicyOptions& options,
                                                                 std::string_view learned) {
  std::unique_ptr<DecisionLog> log(new DecisionLog(
      std::string(kBegins) +
      fmt::format(
          R"("{}","network":"{}","version":3,"ttft_target_s":{},"tpot_target_s":{},"kv_lower":{},)"
          R"("load_loss":{},"wait":{},"step":{},"raise_dwell_s":{},"lower_dwell_s":{}}})"
          "\n",
          learned.empty() ? "ladder" : "dqn", learned, options.ttft_target_s, options.tpot_target_s,
          options.kv_lower, options.load_loss, BandText(options.wait), BandText(options.step),
          options.raise_dwell_s, options.lower_dwell_s)));
  if (path.empty()) return log;
  // A pipe or a terminal has nothing to lose, and to read from it could wait for ever.
  if (std::error_code none; std::filesystem::is_regular_file(path, none)) {
    std::string there(kBegins.size(), '\0');
    std::ifstream before(path, std::ios::binary);
    before.read(there.data(), static_cast<std::streamsize>(there.size()));
    if (before.gcount() > 0 && there != kBegins) {
      return absl::AlreadyExistsError(
          fmt::format("--decision-log: {}: is no decision log and would be written over", path));
    }
  }
  // The log that tells why a server ended is not to be lost with its restart.
  if (std::error_code none; std::filesystem::file_size(path, none) > 0 && !none) {
    std::filesystem::rename(path, path + ".old", none);
  }
  log->file_.open(path, std::ios::binary);
  log->file_ << log->first_line_;
  log->file_.flush();
  if (!log->file_) {
    return absl::UnavailableError(fmt::format("--decision-log: {}: cannot be written", path));
  }
  for (std::string* lines : {&log->waiting_, &log->writing_}) lines->reserve(kMost + kLine);
  log->thread_ = std::thread([log = log.get()] { log->Run(); });
  pthread_setname_np(log->thread_.native_handle(), "decisions");
  return log;
}

DecisionLog::DecisionLog(std::string first_line) : first_line_(std::move(first_line)) {
  for (std::string* lines : {&older_, &newer_}) lines->reserve(kRecent + kLine);
  for (std::string* line : {&losses_line_, &cap_line_}) line->reserve(kLine);
}

void DecisionLog::Close() {
  if (!thread_.joinable()) return;
  {
    std::lock_guard lock(mutex_);
    ended_ = true;
    ending_.notify_one();
  }
  thread_.join();
}

std::string DecisionLog::Recent(size_t most) const {
  std::string lines, losses, cap;
  lines.reserve(2 * (kRecent + kLine));  // not while the engine's thread may wait
  int64_t all = 0;
  {
    std::lock_guard lock(mutex_);
    lines.append(older_).append(newer_);
    losses = losses_line_;
    cap = cap_line_;
    all = lines_;
  }
  size_t begin = lines.size();
  int64_t told = 0;
  for (; begin > 0 && most > 0; --most, ++told) {
    begin = lines.rfind('\n', begin - 2) + 1;  // 0 where there is none before
  }
  lines.erase(0, begin);
  const auto unless_told = [&](const std::string& line, std::string_view kind) {
    return lines.find(kind) == lines.npos ? line : "";
  };
  const std::string missing = all > told ? fmt::format("{{\"dropped\":{}}}\n", all - told) : "";
  return first_line_ + missing + unless_told(losses, kLosses) + unless_told(cap, kCap) + lines;
}

template <typename Write>
void DecisionLog::Add(const Write& write) {
  std::lock_guard lock(mutex_);
  const size_t begin = newer_.size();
  write(std::back_inserter(newer_));
  ++lines_;
  const std::string_view line = std::string_view(newer_).substr(begin);
  if (line.starts_with(kLosses)) losses_line_ = line;
  if (line.starts_with(kCap)) cap_line_ = line;
  if (thread_.joinable() && waiting_.size() < kMost) {
    waiting_ += line;
  } else if (thread_.joinable()) {
    ++dropped_;
  }
  if (newer_.size() < kRecent) return;
  older_.swap(newer_);
  newer_.clear();
}

// Numbers as they are, here and below, so that they are read back to the same bits.
void DecisionLog::AddLosses(const Ladder& ladder) {
  bool news = losses_told_ != ladder.size();
  losses_told_ = ladder.size();
  for (int rung = 0; rung < losses_told_; ++rung) {
    const double loss = ladder.rung(rung).price.quality_loss_nats;
    news = std::exchange(losses_[rung], loss) != loss || news;
  }
  if (!news) return;
  Add([&](auto out) {
    const std::span<const double> losses = std::span(losses_).first(losses_told_);
    fmt::format_to(out, "{}[{}]}}\n", kLosses, fmt::join(losses, ","));
  });
}

void DecisionLog::AddReport(const PressureReport& report, const Ladder& ladder,
                            const Policy& policy) {
  AddLosses(ladder);
  Add([&](auto out) {
    fmt::format_to(
        out,
        R"({{"time_s":{},"kv_used":{},"kv_promised":{},"queue_length":{},"oldest_wait_s":{},)"
        R"("step_s":{},"memory_age_s":{},"free_memory":{},"foreign_memory":{},"first_token_s":{},)"
        R"("arrivals_per_s":{},"running":{},"waiting":{},"rung":{},"hardest":{},"reason":"{}")",
        report.time_s, report.kv_used, report.kv_promised, report.queue_length,
        report.oldest_wait_s, report.step_s, report.memory_age_s, report.free_memory,
        report.foreign_memory, report.first_token_s, report.arrivals_per_s, report.running,
        report.waiting, policy.wanted(), policy.hardest_open(), policy.reason());
    if (std::isfinite(policy.refuses_behind_s())) {
      fmt::format_to(out, R"(,"refuses_behind_s":{})", policy.refuses_behind_s());
    }
    if (!std::ranges::equal(policy.scores(), std::span(scores_).first(policy.scores().size()))) {
      std::ranges::copy(policy.scores(), scores_.begin());
      fmt::format_to(out, R"(,"scores":[{}])", fmt::join(policy.scores(), ","));
    }
    fmt::format_to(out, "}}\n");
  });
}

void DecisionLog::AddChoice(uint64_t request, const RequestTraits& traits, int wanted, int rung) {
  Add([&](auto out) {
    fmt::format_to(out,
                   R"({{"request":{},"allowed":{},"priority":{},"wanted":{},"rung":{}}})"
                   "\n",
                   request, traits.allowed, traits.priority, wanted, rung);
  });
}

void DecisionLog::AddCap(int hardest) {
  Add([&](auto out) { fmt::format_to(out, "{}{}}}\n", kCap, hardest); });
}

void DecisionLog::Run() {
  for (bool ended = false; !ended;) {
    int64_t dropped = 0;
    {
      std::unique_lock lock(mutex_);
      ending_.wait_for(lock, kEvery, [this] { return ended_; });
      ended = ended_;
      writing_.swap(waiting_);
      dropped = std::exchange(dropped_, 0);
    }
    file_ << writing_;
    if (dropped > 0) file_ << fmt::format("{{\"dropped\":{}}}\n", dropped);
    file_.flush();
    writing_.clear();
  }
}

}  // namespace espalier
