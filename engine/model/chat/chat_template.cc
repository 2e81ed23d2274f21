#include "engine/model/chat/chat_template.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "engine/model/chat/failure.h"
#include "engine/model/chat/jinja.h"

namespace espalier {

namespace {

using jinja::Text;
using jinja::Value;

// Roles are words of the protocol: a template may build "<|user|>" from one. Any other role is as
// suspect as the content.
constexpr std::string_view kKnownRoles[] = {"system",    "developer", "user",
                                            "assistant", "tool",      "function"};

Value RoleValue(const std::string& role) {
  const bool known =
      std::find(std::begin(kKnownRoles), std::end(kKnownRoles), role) != std::end(kKnownRoles);
  return Text(role, !known);
}

Value MessageValue(const ChatMessage& message) {
  return Value::MakeDict({{Value::String("role"), RoleValue(message.role)},
                          {Value::String("content"), Text(message.content, true)}});
}

absl::Status CheckSize(const std::vector<ChatMessage>& messages) {
  size_t bytes = 0;
  for (const ChatMessage& message : messages) {
    for (const std::string* part : {&message.role, &message.content}) {
      if (part->size() > jinja::kMaxText - bytes) {
        return absl::ResourceExhaustedError(
            fmt::format("chat messages of over {} bytes", jinja::kMaxText));
      }
      bytes += part->size();
    }
  }
  return absl::OkStatus();
}

}  // namespace

struct ChatTemplate::Impl {
  jinja::Template compiled;
  std::string bos_token;
  std::string eos_token;

  absl::StatusOr<Text> Render(const std::vector<ChatMessage>& messages,
                              bool add_generation_prompt) const {
    if (absl::Status status = CheckSize(messages); !status.ok()) return status;
    jinja::Items values;
    for (const ChatMessage& message : messages) values.push_back(MessageValue(message));
    return compiled.Render(
        Value::MakeDict({{Value::String("messages"), Value::List(std::move(values))},
                         {Value::String("add_generation_prompt"), add_generation_prompt},
                         {Value::String("bos_token"), Value::String(bos_token)},
                         {Value::String("eos_token"), Value::String(eos_token)}}));
  }
};

ChatTemplate::ChatTemplate(std::unique_ptr<const Impl> impl) : impl_(std::move(impl)) {}
ChatTemplate::~ChatTemplate() = default;

absl::StatusOr<std::unique_ptr<const ChatTemplate>> ChatTemplate::Compile(
    std::string_view source, std::string_view bos_token, std::string_view eos_token) {
  constexpr size_t kMaxToken = 1024;  // bytes; keeps Render within kMaxText
  if (std::max(bos_token.size(), eos_token.size()) > kMaxToken) {
    return absl::InvalidArgumentError(fmt::format("bos or eos token of over {} bytes", kMaxToken));
  }
  absl::StatusOr<jinja::Template> compiled = jinja::Template::Compile(source);
  if (!compiled.ok()) {
    return absl::InvalidArgumentError(
        fmt::format("chat template: {}", std::string(compiled.status().message())));
  }
  return std::unique_ptr<const ChatTemplate>(new ChatTemplate(std::make_unique<const Impl>(
      Impl{*std::move(compiled), std::string(bos_token), std::string(eos_token)})));
}

absl::StatusOr<std::string> ChatTemplate::Render(const std::vector<ChatMessage>& messages,
                                                 bool add_generation_prompt) const {
  absl::StatusOr<Text> text = impl_->Render(messages, add_generation_prompt);
  if (!text.ok()) return text.status();
  return std::string(text->bytes());
}

absl::StatusOr<std::vector<ChatSegment>> ChatTemplate::RenderSegments(
    const std::vector<ChatMessage>& messages, bool add_generation_prompt) const {
  absl::StatusOr<Text> text = impl_->Render(messages, add_generation_prompt);
  if (!text.ok()) return text.status();
  std::vector<ChatSegment> segments;
  for (const Text::Run& run : text->Runs()) {
    segments.push_back(
        {std::string(text->bytes().substr(run.begin, run.end - run.begin)), run.from_caller});
  }
  return segments;
}

}  // namespace espalier
