// A Jinja template: compiled once, rendered over any dict of values, const and shared by threads.
#pragma once

#include <memory>
#include <string_view>

#include "absl/status/statusor.h"
#include "engine/model/chat/value.h"

namespace espalier::jinja {

// Behaves as jinja2 does with trim_blocks, lstrip_blocks, loopcontrols and the sandbox, which is
// how transformers sets it up; README.md lists what is known. Errors are one line of at most 515
// bytes of UTF-8, whatever they quote.
class Template {
 public:
  // InvalidArgument, "line N: ...", for what is malformed or unknown.
  static absl::StatusOr<Template> Compile(std::string_view source);
  Template(Template&&) noexcept;
  Template& operator=(Template&&) noexcept;
  ~Template();

  // InvalidArgument where jinja2 raises ("line N: ...") and for raise_exception (its own message);
  // ResourceExhausted beyond the bounds of failure.h. context is a dict of the variables by name.
  absl::StatusOr<Text> Render(const Value& context) const;

 private:
  struct Tree;
  explicit Template(std::unique_ptr<const Tree> tree);
  std::unique_ptr<const Tree> tree_;
};

}  // namespace espalier::jinja
