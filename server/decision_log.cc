#include "server/decision_log.h"

#include <fmt/format.h>
#include <pthread.h>

#include <chrono>
#include <filesystem>
#include <string_view>
#include <system_error>
#include <utility>

namespace espalier {
namespace {

constexpr size_t kMost = 65536;  // minutes of steps, should the disk stall
constexpr std::chrono::milliseconds kEvery{100};
constexpr std::string_view kBegins = R"({"policy":)";

// Numbers as they are, so that they are read back to the same bits.
std::string Line(const Decision& decision) {
  const PressureReport& report = decision.report;
  return fmt::format(
      R"({{"time_s":{},"kv_used":{},"kv_promised":{},"queue_length":{},"oldest_wait_s":{},)"
      R"("step_s":{},"memory_age_s":{},"running":{},"waiting":{},"rung":{},"reason":"{}"}})"
      "\n",
      report.time_s, report.kv_used, report.kv_promised, report.queue_length, report.oldest_wait_s,
      report.step_s, report.memory_age_s, report.running, report.waiting, decision.rung,
      decision.reason);
}

std::string BandText(const PressureBand& band) {
  return fmt::format("[{},{}]", band.raise, band.lower);
}

}  // namespace

absl::StatusOr<std::unique_ptr<DecisionLog>> DecisionLog::Create(const std::string& path,
                                                                 const LadderPolicyOptions& options,
                                                                 std::string_view learned) {
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
  std::ofstream file(path, std::ios::binary);
  file
      << kBegins
      << fmt::format(
             R"("{}","network":"{}","version":2,"ttft_target_s":{},"tpot_target_s":{},"kv_lower":{},"load_loss":{},)"
             R"("wait":{},"step":{},"raise_dwell_s":{},"lower_dwell_s":{}}})"
             "\n",
             learned.empty() ? "ladder" : "dqn", learned, options.ttft_target_s,
             options.tpot_target_s, options.kv_lower, options.load_loss, BandText(options.wait),
             BandText(options.step), options.raise_dwell_s, options.lower_dwell_s);
  file.flush();
  if (!file) {
    return absl::UnavailableError(fmt::format("--decision-log: {}: cannot be written", path));
  }
  return std::unique_ptr<DecisionLog>(new DecisionLog(std::move(file)));
}

DecisionLog::DecisionLog(std::ofstream file) : file_(std::move(file)) {
  waiting_.reserve(kMost);
  thread_ = std::thread([this] { Run(); });
  pthread_setname_np(thread_.native_handle(), "decisions");
}

DecisionLog::~DecisionLog() {
  {
    std::lock_guard lock(mutex_);
    ended_ = true;
    ending_.notify_one();
  }
  thread_.join();
}

void DecisionLog::Add(const Decision& decision) {
  std::lock_guard lock(mutex_);
  if (waiting_.size() < kMost) {
    waiting_.push_back(decision);
  } else {
    ++dropped_;
  }
}

void DecisionLog::Run() {
  std::vector<Decision> taken;
  taken.reserve(kMost);
  for (bool ended = false; !ended;) {
    int64_t dropped = 0;
    {
      std::unique_lock lock(mutex_);
      ending_.wait_for(lock, kEvery, [this] { return ended_; });
      ended = ended_;
      taken.swap(waiting_);
      dropped = std::exchange(dropped_, 0);
    }
    for (const Decision& decision : taken) file_ << Line(decision);
    if (dropped > 0) file_ << fmt::format("{{\"dropped\":{}}}\n", dropped);
    file_.flush();
    taken.clear();
  }
}

}  // namespace espalier
