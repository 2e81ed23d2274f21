// Fuzzes the JSON files of a Hugging Face folder. The input's first letter says which one the rest
// is: c(onfig), g(eneration_config), t(okenizer_config) or the i(ndex) of the shards; the others
// are those of a small model.
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string_view>

#include "engine/model/files/model_file.h"
#include "tests/fuzz/fuzz_check.h"
#include "tests/support/model_writer.h"

namespace espalier {
namespace {

std::string_view FileOf(char letter) {
  switch (letter) {
    case 'c':
      return "config.json";
    case 'g':
      return "generation_config.json";
    case 't':
      return "tokenizer_config.json";
    case 'i':
      return "model.safetensors.index.json";
    default:
      return {};
  }
}

}  // namespace
}  // namespace espalier

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace espalier;  // NOLINT: the entry point cannot lie in it
  static const TemporaryFolder folder;
  static const HfParts kParts = [] {
    HfParts parts = TinyHf();
    parts.WriteTo(folder);
    return parts;
  }();
  const std::string_view input(reinterpret_cast<const char*>(data), size);
  const std::string_view name = input.empty() ? "" : FileOf(input[0]);
  if (name.empty()) return -1;  // into no corpus
  folder.Write(name, input.substr(1));
  RequireRefusedOrUsable(ModelFile::Open(folder.path()));
  std::filesystem::remove(folder.Path(name));
  if (name == "config.json") folder.Write(name, kParts.config.dump());
  if (name == "generation_config.json") folder.Write(name, kParts.generation_config.dump());
  if (name == "tokenizer_config.json") folder.Write(name, kParts.tokenizer_config.dump());
  return 0;
}
