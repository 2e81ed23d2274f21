#include "server/prompt_encoder.h"

#include <utility>

#include "absl/status/status.h"

namespace espalier {

PromptEncoder::PromptEncoder(const Tokenizer* tokenizer, const ChatTemplate* chat_template)
    : tokenizer_(tokenizer), chat_template_(chat_template) {
  for (const VocabularyToken& token : tokenizer->vocabulary().tokens) {
    if (token.kind == TokenKind::kControl && !token.text.empty()) special_.push_back(token.text);
  }
}

absl::StatusOr<std::vector<int32_t>> PromptEncoder::EncodeText(std::string_view text,
                                                               bool parse_special) const {
  absl::StatusOr<std::vector<int32_t>> ids = tokenizer_->Encode(
      text, parse_special ? Tokenizer::Special::kParse : Tokenizer::Special::kAsText);
  const Vocabulary& vocabulary = tokenizer_->vocabulary();
  if (ids.ok() && vocabulary.add_bos && vocabulary.bos >= 0) {
    ids->insert(ids->begin(), vocabulary.bos);
  }
  return ids;
}

absl::StatusOr<std::vector<int32_t>> PromptEncoder::EncodeChat(
    const std::vector<ChatMessage>& messages) const {
  if (chat_template_ == nullptr) {
    return absl::FailedPreconditionError("the model has no chat template");
  }
  const absl::StatusOr<std::vector<ChatSegment>> segments =
      chat_template_->RenderSegments(messages, /*add_generation_prompt=*/true);
  if (!segments.ok()) return segments.status();
  return EncodeSegments(*segments);
}

absl::StatusOr<std::vector<int32_t>> PromptEncoder::EncodeSegments(
    const std::vector<ChatSegment>& segments) const {
  const std::vector<bool> cut_out = SegmentsToCutOut(segments, special_);
  std::vector<int32_t> ids;
  for (size_t i = 0; i < segments.size();) {
    std::string text;
    const bool as_text = cut_out[i];
    for (; i < segments.size() && cut_out[i] == as_text; ++i) text += segments[i].text;
    const absl::StatusOr<std::vector<int32_t>> part = tokenizer_->Encode(
        text, as_text ? Tokenizer::Special::kAsText : Tokenizer::Special::kParse);
    if (!part.ok()) return part.status();
    ids.insert(ids.end(), part->begin(), part->end());
  }
  return ids;
}

std::vector<bool> SegmentsToCutOut(const std::vector<ChatSegment>& segments,
                                   const std::vector<std::string>& special) {
  std::string text;
  std::vector<size_t> ends;  // of each segment, in text
  for (const ChatSegment& segment : segments) {
    text += segment.text;
    ends.push_back(text.size());
  }
  std::vector<bool> cut_out(segments.size(), false);
  for (const std::string& word : special) {
    size_t i = 0;
    for (size_t at = text.find(word); at != std::string::npos; at = text.find(word, at + 1)) {
      while (ends[i] <= at) ++i;
      // Every segment that this occurrence touches.
      for (size_t j = i; j < segments.size() && (j == i || ends[j - 1] < at + word.size()); ++j) {
        if (segments[j].from_caller) cut_out[j] = true;
      }
    }
  }
  return cut_out;
}

}  // namespace espalier
