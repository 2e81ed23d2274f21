// What is gathered of a model's inputs while it serves, for `espalier prune` and `espalier
// calibrate`: sums that all generations of it add to, and their files.
//
// Only the engine thread adds to sums. To be written they are frozen there, between two steps, then
// written on a thread of their own, however long that takes, and thawed; steps in between gather
// nothing, and nothing is copied. The sums are made when the server loads: what they take is
// resident before memory is looked at, and so in what the budget leaves for KV.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <future>
#include <list>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/model/files/model_file.h"
#include "engine/model/model_executor.h"
#include "engine/pruning/channel_moments.h"
#include "engine/pruning/weights/input_moments.h"
#include "server/engine_thread.h"
#include "server/options.h"

namespace espalier {

class MomentsKeeper {
 public:
  // Reads the files that --moments-file and --channel-moments-file name, if they are there. Errors
  // name the file, and what of it is of another model, or the option.
  static absl::StatusOr<std::unique_ptr<MomentsKeeper>> Open(const ServerOptions& options,
                                                             const ModelFile& model);

  // Has `executor`, which serves `model`, add to the sums that are of such a model: of its lineage
  // (inputs), or of its very weights (channels). Before its first step.
  void Attach(const ModelFile& model, ModelExecutor* executor) const;
  // Says in the log which sums nobody adds to any more, or again, as `model` alone is served now.
  void Tell(const ModelFile& model);

  // Writes what is due, for the most part later. Whoever supervises; does not wait.
  void Tend(Instant now, EngineThread* engine);
  // Writes what is not written yet. After the engine's last step.
  void Close();

  // Rows in the sums; none: they are not asked for. Engine thread.
  std::optional<int64_t> input_tokens() const;
  std::optional<int64_t> channel_tokens() const;

 private:
  using KnownBy = std::string (*)(const ModelFile&);

  // One kind of sums, and its file.
  struct Kept {
    std::string_view name;  // in the log
    std::string file;
    std::string model;  // by what it is known: lineage or fingerprint
    KnownBy known_by = nullptr;
    std::chrono::milliseconds interval{0};
    std::function<int64_t()> added;  // more than before: there is something to write
    std::function<void(bool)> set_frozen;
    std::function<void(ModelExecutor*)> attach;
    std::function<absl::Status()> write;
    bool served = true;  // somebody adds to them
    // Whoever supervises.
    Instant due{};
    bool asked = false;  // that they be frozen, until they are thawed
    std::atomic<bool> frozen{false};
    std::future<absl::Status> writing;
    int64_t written = -1;  // of `added`; -1: there is no file
    int64_t in_hand = 0;   // the same, of what is being written
  };

  // All of a kind but `attach` and `write`; `sums` become what its file has, or `empty()` if it is
  // not there, and `added` grows with them.
  template <typename Moments>
  absl::Status Keep(std::string_view name, std::string_view option, const std::string& path,
                    std::chrono::milliseconds interval, const ModelFile& model, KnownBy known_by,
                    absl::StatusOr<Moments> (*read)(const std::string&, const ModelFile&),
                    const std::function<absl::StatusOr<Moments>()>& empty,
                    int64_t (Moments::*added)() const, std::unique_ptr<Moments>* sums);
  // What came of writing it.
  static void Took(const absl::Status& status, Kept* kept);

  std::unique_ptr<InputMoments> inputs_;
  std::unique_ptr<ChannelMoments> channels_;
  std::list<Kept> kept_;  // which do not move
};

}  // namespace espalier
