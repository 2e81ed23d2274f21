#include <utility>

#include "engine/model/text/tokenizer.h"
#include "engine/model/text/utf8.h"

namespace espalier {
namespace {

constexpr std::string_view kReplacement = "\xEF\xBF\xBD";  // U+FFFD

// Moves what is settled from the front of `bytes` to the end of `text`: characters as they are,
// maximal subparts as U+FFFD. Returns the rest, a character cut off by the end (at most 3 bytes).
std::string_view AppendSettled(std::string_view bytes, std::string& text) {
  while (!bytes.empty()) {
    const Utf8Step step = ReadUtf8(bytes);
    if (step.kind == Utf8Step::Kind::kCutOff) break;
    const bool whole = step.kind == Utf8Step::Kind::kCharacter;
    text.append(whole ? bytes.substr(0, step.length) : kReplacement);
    bytes.remove_prefix(step.length);
  }
  return bytes;
}

}  // namespace

size_t ValidUtf8Prefix(std::string_view bytes) {
  size_t valid = 0;
  while (valid < bytes.size()) {
    const Utf8Step step = ReadUtf8(bytes.substr(valid));
    if (step.kind != Utf8Step::Kind::kCharacter) break;
    valid += step.length;
  }
  return valid;
}

std::string Tokenizer::Decode(std::span<const int32_t> tokens, bool skip_special) const {
  StreamingDetokenizer detokenizer(*this, skip_special);
  std::string text;
  for (const int32_t token : tokens) text += detokenizer.Push(token);
  return text += detokenizer.Flush();
}

StreamingDetokenizer::StreamingDetokenizer(const Tokenizer& tokenizer, bool skip_special)
    : tokenizer_(&tokenizer), skip_special_(skip_special) {}

std::string StreamingDetokenizer::Push(int32_t token) {
  std::string text;
  if (skip_special_ && tokenizer_->IsSpecial(token)) return text;
  pending_ += tokenizer_->TokenBytes(token);
  pending_ = AppendSettled(pending_, text);
  return text;
}

std::string StreamingDetokenizer::Flush() {
  std::string text;
  // A character cut off is one maximal subpart.
  if (!std::exchange(pending_, {}).empty()) text = kReplacement;
  return text;
}

}  // namespace espalier
