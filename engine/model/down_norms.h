// `down` and `o` as a model's file has them, and the norms that published measures of channels
// need.
#pragma once

#include <vector>

#include "absl/status/statusor.h"
#include "engine/model/files/model_file.h"
#include "policy/keep_profile.h"

namespace espalier {

// Of a layer, [hidden, channels]. InvalidArgument, with file and tensor, if it is not there.
absl::StatusOr<std::vector<float>> ReadDown(const ModelFile& file, int layer);

// The same of `o`, [hidden, heads * head_dim].
absl::StatusOr<std::vector<float>> ReadO(const ModelFile& file, int layer);

// DownNorms by kPpsp of every layer's `down`, [layers][channels], or, of heads, of its `o`,
// [layers][heads * head_dim]: what a Probe ranks by.
absl::StatusOr<std::vector<std::vector<float>>> PpspNorms(const ModelFile& file, SiteKind kind);

}  // namespace espalier
