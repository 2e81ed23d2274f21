#include "engine/model/chat/jinja.h"

#include <fmt/format.h>

#include "engine/model/chat/failure.h"
#include "engine/model/chat/interpreter.h"
#include "engine/model/chat/lexer.h"
#include "engine/model/chat/parser.h"

namespace espalier::jinja {

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
    return failure.status;
  }
}

absl::StatusOr<Text> Template::Render(const Value& context) const {
  if (!context.Is(Kind::kDict)) return absl::InvalidArgumentError("the context is no dict");
  try {
    return Interpret(tree_->body, context);
  } catch (const Failure& failure) {
    return failure.status;
  }
}

}  // namespace espalier::jinja
