#include "server/moments_keeper.h"

#include <fmt/format.h>

#include <filesystem>
#include <utility>

#include "engine/machine_memory.h"
#include "engine/model/channel_moments_file.h"
#include "engine/model/moments_file.h"
#include "engine/model/own_file.h"
#include "server/logging.h"

namespace espalier {
namespace {

// Of so many steps with rows enough at rung 0 the inputs of one are summed; and the channels.
constexpr int kGatherEvery = 16;
constexpr int kGatherChannelsEvery = 8;

// How often sums are written: a megabyte or so, and a hundred and more.
constexpr std::chrono::minutes kInputsInterval{1};
constexpr std::chrono::minutes kChannelsInterval{10};

}  // namespace

absl::StatusOr<std::unique_ptr<MomentsKeeper>> MomentsKeeper::Open(const ServerOptions& options,
                                                                   const ModelFile& model) {
  auto keeper = std::make_unique<MomentsKeeper>();
  const ModelConfig& config = model.config();
  const auto place = [](const std::string& path) {
    return std::filesystem::absolute(path).lexically_normal();
  };
  if (!options.moments_file.empty() && !options.channel_moments_file.empty() &&
      place(options.moments_file) == place(options.channel_moments_file)) {
    return absl::InvalidArgumentError(
        fmt::format("--channel-moments-file: {} is the --moments-file", options.moments_file));
  }
  if (const std::string& path = options.moments_file; !path.empty()) {
    absl::Status status = keeper->Keep<InputMoments>(
        "moments", "--moments-file", path, kInputsInterval, model, LineageOf, ReadMoments,
        [&] { return InputMoments(config); }, &InputMoments::tokens, &keeper->inputs_);
    if (!status.ok()) return status;
    Kept& kept = keeper->kept_.back();
    kept.attach = [sums = keeper->inputs_.get()](ModelExecutor* executor) {
      executor->set_input_moments(sums, kGatherEvery);
    };
    kept.write = [sums = keeper->inputs_.get(), &kept, config] {
      return WriteMoments(kept.file, kept.model, config, *sums);
    };
  }
  if (const std::string& path = options.channel_moments_file; !path.empty()) {
    absl::Status status = keeper->Keep<ChannelMoments>(
        "channel moments", "--channel-moments-file", path, kChannelsInterval, model, FingerprintOf,
        ReadChannelMoments,
        [&]() -> absl::StatusOr<ChannelMoments> {
          const uint64_t bytes = ChannelMoments::Bytes(config.layers, config.channels);
          if (const uint64_t available = ReadMachineMemory().available; bytes > available) {
            return absl::ResourceExhaustedError(
                fmt::format("--channel-moments-file: sums of {} layers of {} channels take {} MiB, "
                            "{} are available",
                            config.layers, config.channels, bytes >> 20, available >> 20));
          }
          return ChannelMoments(config.layers, config.channels);
        },
        &ChannelMoments::additions, &keeper->channels_);
    if (!status.ok()) return status;
    Kept& kept = keeper->kept_.back();
    kept.attach = [sums = keeper->channels_.get()](ModelExecutor* executor) {
      executor->set_channel_moments(sums, kGatherChannelsEvery);
    };
    kept.write = [sums = keeper->channels_.get(), &kept] {
      return WriteChannelMoments(kept.file, kept.model, *sums);
    };
  }
  using Kind = ServerOptions::PolicyKind;
  if (!keeper->kept_.empty() && options.policy == Kind::kFixed && options.fixed_rung > 0) {
    Log(LogLevel::kWarning,
        "moments are of rows served in full: with this --policy, of callers alone that ask for it",
        {{"policy", fmt::format("fixed:{}", options.fixed_rung)}});
  }
  return keeper;
}

template <typename Moments>
absl::Status MomentsKeeper::Keep(
    std::string_view name, std::string_view option, const std::string& path,
    std::chrono::milliseconds interval, const ModelFile& model, KnownBy known_by,
    absl::StatusOr<Moments> (*read)(const std::string&, const ModelFile&),
    const std::function<absl::StatusOr<Moments>()>& empty, int64_t (Moments::*added)() const,
    std::unique_ptr<Moments>* sums) {
  absl::StatusOr<Moments> found = read(path, model);
  const bool begins = absl::IsNotFound(found.status());
  if (begins) found = empty();
  if (!found.ok()) return found.status();
  if (absl::Status status = CheckFolder(option, path); !status.ok()) return status;
  *sums = std::make_unique<Moments>(*std::move(found));
  Kept& kept = kept_.emplace_back();
  kept.name = name;
  kept.file = path;
  kept.known_by = known_by;
  kept.model = known_by(model);
  kept.interval = interval;
  kept.set_frozen = [sums = sums->get()](bool frozen) { sums->set_frozen(frozen); };
  kept.added = [sums = sums->get(), added] { return (sums->*added)(); };
  kept.written = begins ? -1 : kept.added();
  Log(LogLevel::kInfo, fmt::format("{} are gathered", name),
      {{"file", path}, {"tokens", (*sums)->tokens()}});
  return absl::OkStatus();
}

void MomentsKeeper::Attach(const ModelFile& model, ModelExecutor* executor) const {
  for (const Kept& kept : kept_) {
    if (kept.known_by(model) == kept.model) kept.attach(executor);
  }
}

void MomentsKeeper::Tell(const ModelFile& model) {
  for (Kept& kept : kept_) {
    const bool served = kept.known_by(model) == kept.model;
    if (std::exchange(kept.served, served) == served) continue;
    Log(LogLevel::kInfo,
        served ? fmt::format("{} are gathered again", kept.name)
               : fmt::format("{} are gathered no more: another model is served", kept.name));
  }
}

void MomentsKeeper::Tend(Instant now, EngineThread* engine) {
  for (Kept& kept : kept_) {
    if (kept.due == Instant{}) kept.due = now + kept.interval;
    if (kept.writing.valid()) {
      if (kept.writing.wait_for(std::chrono::seconds(0)) != std::future_status::ready) continue;
      Took(kept.writing.get(), &kept);
    } else if (kept.frozen.exchange(false, std::memory_order_acquire)) {
      kept.in_hand = kept.added();
      if (kept.in_hand > kept.written) {
        kept.writing = std::async(std::launch::async, kept.write);
        continue;
      }
    } else {
      if (now < kept.due || kept.asked) continue;
      kept.due = now + kept.interval;
      kept.asked = true;
      engine->SoonBetweenSteps([&kept] {
        kept.set_frozen(true);
        kept.frozen.store(true, std::memory_order_release);
      });
      continue;
    }
    kept.asked = false;
    engine->SoonBetweenSteps([&kept] { kept.set_frozen(false); });
  }
}

void MomentsKeeper::Close() {
  for (Kept& kept : kept_) {
    if (kept.writing.valid()) Took(kept.writing.get(), &kept);
    kept.in_hand = kept.added();
    if (kept.in_hand > kept.written) Took(kept.write(), &kept);
  }
}

void MomentsKeeper::Took(const absl::Status& status, Kept* kept) {
  if (status.ok()) {
    kept->written = kept->in_hand;
    return;
  }
  Log(LogLevel::kError, fmt::format("{} are not written", kept->name),
      {{"error", std::string(status.message())}});
}

std::optional<int64_t> MomentsKeeper::input_tokens() const {
  return inputs_ == nullptr ? std::nullopt : std::optional(inputs_->tokens());
}

std::optional<int64_t> MomentsKeeper::channel_tokens() const {
  return channels_ == nullptr ? std::nullopt : std::optional(channels_->tokens());
}

}  // namespace espalier
