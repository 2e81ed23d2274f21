// Fuzzes a GGUF: the container where every byte beyond its end is watched, then the model in a
// file.
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "engine/model/files/gguf.h"
#include "engine/model/files/model_file.h"
#include "tests/fuzz/fuzz_check.h"
#include "tests/support/model_writer.h"

namespace espalier {
namespace {

// Reads every key as every type; all but one are faults.
void ReadKeys(const std::string& path, const Gguf& gguf) {
  constexpr size_t kMost = 1 << 20;
  for (const auto& [key, value] : gguf.metadata) {
    GgufKeys keys(path, gguf);
    keys.Integer(key, INT64_MIN, INT64_MAX);
    keys.Positive(key, 1e30);
    keys.Bool(key, false);
    keys.String(key);
    keys.Strings(key, kMost);
    keys.Integers(key, kMost);
    RequireOneLine(keys.status());
  }
}

}  // namespace
}  // namespace espalier

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace espalier;  // NOLINT: the entry point cannot lie in it
  static const TemporaryFolder folder;
  const std::string_view bytes(reinterpret_cast<const char*>(data), size);
  const std::string path = folder.Write("model.gguf", bytes);
  if (const absl::StatusOr<Gguf> gguf = ParseGguf(path, bytes); gguf.ok()) {
    ReadKeys(path, *gguf);
    for (const StoredTensor& tensor : gguf->tensors) ReadRows(tensor);
  } else {
    RequireOneLine(gguf.status());
  }
  RequireRefusedOrUsable(ModelFile::Open(path));
  return 0;
}
