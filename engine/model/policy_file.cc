#include "engine/model/policy_file.h"

#include <fmt/format.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <optional>
#include <utility>

namespace espalier {

absl::StatusOr<PolicyFile> OpenPolicy(const std::string& path, int rungs) {
  constexpr std::streamsize kMost = 100'000;  // and one more tells that it is longer
  std::ifstream file(path, std::ios::binary);
  std::string bytes(kMost + 1, '\0');
  file.read(bytes.data(), kMost + 1);
  bytes.resize(static_cast<size_t>(file.gcount()));
  if (!file.is_open() || bytes.empty()) {
    return absl::NotFoundError(fmt::format("{}: cannot be read", path));
  }
  TrainedFor trained;
  std::string error;
  std::optional<QNetwork> network = QNetwork::Parse(bytes, &trained, &error);
  if (!network) return absl::InvalidArgumentError(fmt::format("{}: {}", path, error));
  const QShape& shape = network->shape();
  if (!DqnPolicy::Fits(shape, rungs)) {
    return absl::InvalidArgumentError(fmt::format(
        "{}: a network of {} inputs, {} units and {} actions, where {}, at most {} and {}, one for "
        "each rung of the ladder, are needed",
        path, shape.inputs, shape.hidden, shape.actions, kLevelInputs, DqnPolicy::kMostHidden,
        rungs));
  }
  return PolicyFile{.network = *std::move(network),
                    .trained = std::move(trained),
                    .version = QNetwork::Version(bytes)};
}

LevelPolicyOptions LevelOptionsOf(const TrainedFor& trained, const LadderPolicyOptions& rule) {
  return {.ttft_target_s = rule.ttft_target_s,
          .tpot_target_s = rule.tpot_target_s,
          .load_loss = std::min(rule.load_loss, trained.load_loss)};
}

std::string PolicyPathOf(const std::string& ladder) {
  return std::filesystem::path(ladder).replace_extension(".dqn").string();
}

}  // namespace espalier
