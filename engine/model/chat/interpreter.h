// Walks a parsed template and collects its text.
#pragma once

#include "engine/model/chat/ast.h"
#include "engine/model/chat/value.h"

namespace espalier::jinja {

// Variables are the entries of context, a dict. Fails (failure.h) where jinja2 raises, and beyond
// the bounds of failure.h.
Text Interpret(const Body& body, const Value& context);

}  // namespace espalier::jinja
