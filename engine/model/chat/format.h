// Values as text: str(), repr() and json.dumps() of Python, byte for byte.
#pragma once

#include "engine/model/chat/failure.h"
#include "engine/model/chat/value.h"

namespace espalier::jinja {

// What {{ value }} prints. Fails for what Python would print with an address in memory.
Text Str(const Value& value, Budget& budget);

struct JsonStyle {
  int64_t indent = -1;  // spaces a level; negative: all in one line
  Text item_separator{", "};
  Text key_separator{": "};
  bool ensure_ascii = false;
  bool sort_keys = false;
};
Text ToJson(const Value& value, const JsonStyle& style, Budget& budget);

}  // namespace espalier::jinja
