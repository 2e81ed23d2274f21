// Fuzzes text to tokens and back. The input's first byte picks the pre-tokenizer and whether
// special tokens are parsed; the rest is the text, and then, two bytes each, tokens of a stream.
#include <cstddef>
#include <cstdint>
#include <memory>
#include <numeric>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "engine/model/files/model_file.h"
#include "engine/model/text/characters.h"
#include "engine/model/text/tokenizer.h"
#include "tests/fuzz/fuzz_check.h"

namespace espalier {
namespace {

std::string Nfc(std::string_view text) {
  std::string storage;
  return std::string(ToNfc(text, &storage));
}

void CheckText(const Tokenizer& tokenizer, PreTokenizer kind, Tokenizer::Special special,
               std::string_view text) {
  const auto ids = tokenizer.Encode(text, special);
  Require(ids.ok() == (ValidUtf8Prefix(text) == text.size()), "UTF-8 and only that is encoded");
  if (!ids.ok()) return RequireOneLine(ids.status());
  const std::string decoded = tokenizer.Decode(*ids, /*skip_special=*/false);
  if (kind == PreTokenizer::kQwen2) {
    Require(Nfc(decoded) == Nfc(text), "text comes back in NFC");
  } else {
    Require(decoded == text, "text comes back");
  }
  const std::vector<int> pieces = tokenizer.PieceLengths(text);
  Require(std::accumulate(pieces.begin(), pieces.end(), size_t{0}) ==
              (kind == PreTokenizer::kQwen2 ? Nfc(text).size() : text.size()),
          "pieces leave no gaps");
}

void CheckStream(const Tokenizer& tokenizer, std::string_view bytes) {
  std::vector<int32_t> ids;
  for (size_t i = 0; i + 1 < bytes.size(); i += 2) {
    const int id = static_cast<uint8_t>(bytes[i]) << 8 | static_cast<uint8_t>(bytes[i + 1]);
    ids.push_back(id % (tokenizer.size() + 2) - 1);  // one below and one above are no tokens
  }
  for (const bool skip_special : {false, true}) {
    StreamingDetokenizer stream(tokenizer, skip_special);
    std::string text;
    for (const int32_t id : ids) {
      const std::string piece = stream.Push(id);
      Require(ValidUtf8Prefix(piece) == piece.size(), "no character is split");
      text += piece;
    }
    text += stream.Flush();
    Require(text == tokenizer.Decode(ids, skip_special), "the stream says what Decode says");
  }
}

}  // namespace
}  // namespace espalier

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace espalier;  // NOLINT: the entry point cannot lie in it
  constexpr PreTokenizer kKinds[] = {PreTokenizer::kGpt2, PreTokenizer::kSmolLm,
                                     PreTokenizer::kQwen2};
  static const std::vector<std::unique_ptr<const Tokenizer>> kTokenizers = [&] {
    const auto file = ModelFile::Open(ESPALIER_TINY_MODEL);  // every byte is a token of it
    Require(file.ok(), "the tiny model opens");
    std::vector<std::unique_ptr<const Tokenizer>> tokenizers;
    for (const PreTokenizer kind : kKinds) {
      Vocabulary vocabulary = (*file)->vocabulary();
      vocabulary.pre_tokenizer = kind;
      tokenizers.push_back(*Tokenizer::Create(std::move(vocabulary)));
    }
    return tokenizers;
  }();
  if (size == 0) return -1;  // into no corpus
  const int pick = data[0] % 3;
  const auto special = data[0] & 0x80 ? Tokenizer::Special::kParse : Tokenizer::Special::kAsText;
  const std::string_view text(reinterpret_cast<const char*>(data) + 1, size - 1);
  CheckText(*kTokenizers[pick], kKinds[pick], special, text);
  CheckStream(*kTokenizers[pick], text);
  return 0;
}
