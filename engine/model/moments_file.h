// What a server saw of its matrices' inputs, for `espalier prune --moments`: a GGUF file of sums,
// never of text.
//
//   general.architecture              "espalier-moments"
//   espalier.fingerprint              string, LineageOf(model): what a pruned model was fed prunes
//                                     the one it was made from anew
//   espalier.layers, .hidden, .attention, .channels
//                                     int64: layers, and columns of their inputs
//   espalier.tokens                   int64, rows in the sums
//   blk.LAYER.INPUT.moments           F32 [4, columns], INPUT one of kMatrixInputNames: the sum of
//                                     each column, what of it that float leaves out; the same of
//                                     its squares
#pragma once

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/model/files/model_file.h"
#include "engine/pruning/weights/input_moments.h"

namespace espalier {

// NotFound if there is no file; InvalidArgument, with file and the first key or tensor that
// differs, if it is of another model or not whole, if a value is not finite or a sum of squares is
// negative.
absl::StatusOr<InputMoments> ReadMoments(const std::string& path, const ModelFile& model);

// Through a file beside it, so that none is ever half written. `lineage` and `config` are the
// model's. Errors name the path.
absl::Status WriteMoments(const std::string& path, const std::string& lineage,
                          const ModelConfig& config, const InputMoments& moments);

}  // namespace espalier
