// Fuzzes tokenizer.json: read as a vocabulary, made a tokenizer, used.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "engine/model/files/hf_tokenizer.h"
#include "engine/model/files/json_keys.h"
#include "engine/model/text/tokenizer.h"
#include "tests/fuzz/fuzz_check.h"
#include "tests/support/model_writer.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace espalier;  // NOLINT: the entry point cannot lie in it
  static const TemporaryFolder folder;
  static const Json kConfig = Json::object();
  constexpr int kTokens = 300;
  folder.Write("tokenizer.json", std::string_view(reinterpret_cast<const char*>(data), size));
  const absl::StatusOr<Vocabulary> vocabulary = ReadHfVocabulary(folder.path(), kConfig, kTokens);
  if (!vocabulary.ok()) {
    RequireOneLine(vocabulary.status());
    return 0;
  }
  const auto tokenizer = Tokenizer::Create(*vocabulary);
  if (!tokenizer.ok()) {
    RequireOneLine(tokenizer.status());
    return 0;
  }
  const auto ids =
      (*tokenizer)->Encode("the th 12 <|im_end|>\n\xC3\xA9", Tokenizer::Special::kParse);
  Require(ids.ok(), "every tokenizer encodes UTF-8");
  Require(std::ranges::all_of(*ids, [](int32_t id) { return id >= 0 && id < kTokens; }),
          "ids are tokens");
  (*tokenizer)->Decode(*ids, /*skip_special=*/false);
  return 0;
}
