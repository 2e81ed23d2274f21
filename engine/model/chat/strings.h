// The methods of Python's str. Each byte of a result keeps the origin of the byte it was made from.
#pragma once

#include <optional>

#include "engine/model/chat/failure.h"
#include "engine/model/chat/text.h"
#include "engine/model/chat/value.h"

namespace espalier::jinja::strings {

enum class Side { kLeft, kRight, kBoth };

// chars, old, separator and so on absent or none: Python's defaults. Fail on what is no string.
Text Strip(const Text& text, const std::optional<Value>& chars, Side side);
Items Split(const Text& text, const std::optional<Value>& separator,
            const std::optional<Value>& max_splits, bool from_right, Budget& budget);
Text Replace(const Text& text, const Text& old_part, const Text& new_part,
             const std::optional<Value>& max_count, Budget& budget);
bool HasAffix(const Text& text, const Value& affix_or_tuple, Side side, Budget& budget);
Text RemoveAffix(const Text& text, const Value& affix, Side side);
// jinja2's indent filter; width is a number of spaces or a string.
Text Indent(const Text& text, const std::optional<Value>& width, bool first, bool blank,
            Budget& budget);

Text Upper(const Text& text);
Text Lower(const Text& text);
// Of ASCII alone: they fail on anything else.
Text Capitalize(const Text& text);
Text TitleLetters(const Text& text);  // str.title: every letter after a non-letter
Text TitleWords(const Text& text);    // jinja2's filter: the first after one of " -({[<"

}  // namespace espalier::jinja::strings
