#include "engine/model/chat/jinja.h"

#include <fmt/format.h>

#include <cstdint>
#include <string>

#include "engine/model/chat/failure.h"
#include "engine/model/chat/interpreter.h"
#include "engine/model/chat/lexer.h"
#include "engine/model/chat/parser.h"
#include "engine/model/chat/text.h"

namespace espalier::jinja {

namespace {

// Messages quote templates and values, and go into one line of a log and into RPC trailers: control
// characters become spaces, bytes that are no UTF-8 U+FFFD, and what is too long is cut.
absl::Status InOneLine(const absl::Status& status) {
  constexpr size_t kMost = 512;
  const std::string message(status.message());
  std::string line;
  for (size_t begin = 0; begin < message.size();) {
    const size_t end = CodePointEnd(message, begin);
    if (line.size() + (end - begin) > kMost) {
      line += "...";
      break;
    }
    const auto byte = static_cast<uint8_t>(message[begin]);
    if (byte < 0x20 || byte == 0x7F) {
      line += ' ';
    } else if (byte >= 0x80 && end == begin + 1) {
      line += "\xEF\xBF\xBD";
    } else {
      line.append(message, begin, end - begin);
    }
    begin = end;
  }
  return {status.code(), line};
}

}  // namespace

struct Template::Tree {
  Body body;
};

Template::Template(std::unique_ptr<const Tree> tree) : tree_(std::move(tree)) {}
Template::Template(Template&&) noexcept = default;
Template& Template::operator=(Template&&) noexcept = default;
Template::~Template() = default;

absl::StatusOr<Template> Template::Compile(std::string_view source) {
  if (source.size() > kMaxSource) {
    return absl::InvalidArgumentError(fmt::format(
        "a template of {} bytes, more than the {} that are read", source.size(), kMaxSource));
  }
  try {
    return Template(std::make_unique<const Tree>(Tree{Parse(Tokenize(source))}));
  } catch (const Failure& failure) {
    return InOneLine(failure.status);
  }
}

absl::StatusOr<Text> Template::Render(const Value& context) const {
  if (!context.Is(Kind::kDict)) return absl::InvalidArgumentError("the context is no dict");
  try {
    return Interpret(tree_->body, context);
  } catch (const Failure& failure) {
    return InOneLine(failure.status);
  }
}

}  // namespace espalier::jinja
