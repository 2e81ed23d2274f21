// A model's own chat template, compiled at load and rendered per request. Const, shared by threads.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace espalier {

struct ChatMessage {
  std::string role;
  std::string content;
};

// A stretch of a rendered prompt. Text that came out of a message's content, or of a role that is
// not one of the usual ones, must not become special tokens, whatever it says; text of the template
// may. A usual role (system, developer, user, assistant, tool, function) counts as the template's,
// which may build "<|user|>" from it.
struct ChatSegment {
  std::string text;
  bool from_caller = false;
};

class ChatTemplate {
 public:
  // InvalidArgument, naming line and construct, for anything that the interpreter does not know:
  // an error at load, never a wrong prompt.
  static absl::StatusOr<std::unique_ptr<const ChatTemplate>> Compile(std::string_view source,
                                                                     std::string_view bos_token,
                                                                     std::string_view eos_token);
  ~ChatTemplate();

  // The prompt as HF transformers' apply_chat_template renders it (trim_blocks, lstrip_blocks).
  // InvalidArgument with the template's own message for raise_exception, or for an undefined value
  // that the template uses. Bounded in time and output size: ResourceExhausted beyond.
  absl::StatusOr<std::string> Render(const std::vector<ChatMessage>& messages,
                                     bool add_generation_prompt) const;

  // The same text, cut where template text and the callers' text meet.
  absl::StatusOr<std::vector<ChatSegment>> RenderSegments(const std::vector<ChatMessage>& messages,
                                                          bool add_generation_prompt) const;

 private:
  struct Impl;
  explicit ChatTemplate(std::unique_ptr<const Impl> impl);
  std::unique_ptr<const Impl> impl_;
};

}  // namespace espalier
