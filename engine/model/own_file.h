// What files of ours about a model share: a GGUF file that is mapped, parsed and of that model, and
// tensors of floats in it.
#pragma once

#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/model/files/gguf.h"
#include "engine/model/files/mapped_file.h"
#include "engine/model/files/model_file.h"

namespace espalier {

// Of a model's tensors: names, types, shapes and the ends of their data. Refits of another model
// would be noise; this tells them apart in a millisecond.
std::string FingerprintOf(const ModelFile& model);
// The same of what pruning of weights leaves as it is, all but the matrices of layers: that of a
// pruned model is that of the one it was pruned from.
std::string LineageOf(const ModelFile& model);

inline constexpr std::string_view kFingerprintKey = "espalier.fingerprint";

struct OwnFile {
  // NotFound if there is no file; InvalidArgument, with file and key, if it is of another
  // architecture or model. `dimensions`: keys, and what of the model they have to say; a
  // fingerprint says that models differ, these how.
  static absl::StatusOr<OwnFile> Open(const std::string& path, std::string_view architecture,
                                      std::span<const std::pair<std::string_view, int>> dimensions,
                                      const ModelFile& model, std::string_view fingerprint);

  // The values of a tensor to `to`; InvalidArgument, with file and tensor, if it is not F32 [rows,
  // cols]. ReadSums: nor if they are not finite.
  absl::Status Read(const std::string& name, int rows, int cols, float* to) const;
  absl::Status ReadSums(const std::string& name, int rows, int cols, float* to) const;

  std::string path;
  MappedFile file;
  Gguf gguf;  // of `file`
};

// InvalidArgument, with file and tensor, if it is of another type or shape.
absl::Status CheckShape(const std::string& path, const StoredTensor& tensor, BlockType type,
                        int rows, int cols);

// Doubles as two rows of floats: the nearest, and what those leave out. Appended to `rows`.
void AppendInTwo(std::span<const double> values, std::vector<float>* rows);

}  // namespace espalier
