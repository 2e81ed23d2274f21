// What a server saw of its MLPs' channels, for `espalier calibrate --moments`: a GGUF file of sums,
// never of text.
//
//   general.architecture              "espalier-channel-moments"
//   espalier.fingerprint              string, FingerprintOf(model): a `down` is fitted to what its
//                                     own gate and up, and all before them, give it
//   espalier.layers, .channels        int64
//   espalier.tokens.LAYER, espalier.sinks.LAYER
//                                     int64, rows in a layer's sums, and attention sinks
//   blk.LAYER.ffn_down.sums           F32 [2, channels]: the sum of each channel, and what of it
//                                     float leaves out
//   blk.LAYER.ffn_down.sinks          F32 [1, channels]: the same of sinks, as float has it
//   blk.LAYER.ffn_down.products       F32 [tiles * kTile, kTile]: ChannelMoments::Layer::products
#pragma once

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/model/files/model_file.h"
#include "engine/pruning/channel_moments.h"

namespace espalier {

// NotFound if there is no file; InvalidArgument, with file and the first key or tensor that
// differs, if it is of another model or not whole, or if there are no rows whose sums these could
// be: a value is not finite, a sum of squares negative, or another sum larger than those allow.
absl::StatusOr<ChannelMoments> ReadChannelMoments(const std::string& path, const ModelFile& model);

// Through a file beside it, so that none is ever half written; nothing of the sums is copied.
// `fingerprint` is the model's. Errors name the path.
absl::Status WriteChannelMoments(const std::string& path, const std::string& fingerprint,
                                 const ChannelMoments& moments);

}  // namespace espalier
