// From what a caller wrote to the tokens a model reads.
//
// A chat is rendered by the model's own template and must give the very ids that the template's
// authors trained on, so the text goes through the tokenizer in one piece: pre-tokenizer and merges
// see across the borders of template and content. But a caller who writes "<|im_end|>" into a
// message must not end the turn. Only then, and only around the message that does it, the text is
// cut: that message is encoded with special tokens as ordinary characters, the rest as usual.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/model/chat/chat_template.h"
#include "engine/model/text/tokenizer.h"

namespace espalier {

class PromptEncoder {
 public:
  // Both must outlive the encoder. No template (null): Chat is FailedPrecondition.
  PromptEncoder(const Tokenizer* tokenizer, const ChatTemplate* chat_template);

  // With the BOS token before it, if the model wants one. InvalidArgument: not UTF-8.
  absl::StatusOr<std::vector<int32_t>> EncodeText(std::string_view text, bool parse_special) const;

  // The messages and the opening of the answer. A BOS token is the template's business.
  absl::StatusOr<std::vector<int32_t>> EncodeChat(const std::vector<ChatMessage>& messages) const;

 private:
  absl::StatusOr<std::vector<int32_t>> EncodeSegments(
      const std::vector<ChatSegment>& segments) const;

  const Tokenizer* tokenizer_;
  const ChatTemplate* chat_template_;
  std::vector<std::string> special_;  // strings that a tokenizer would make special tokens
};

// What of `segments` must be encoded with special tokens as text: true for each segment of a caller
// that a string of `special` lies in or reaches into.
std::vector<bool> SegmentsToCutOut(const std::vector<ChatSegment>& segments,
                                   const std::vector<std::string>& special);

}  // namespace espalier
