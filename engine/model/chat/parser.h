// Reads tokens into the tree that the interpreter walks, and refuses what it would not understand.
#pragma once

#include <vector>

#include "engine/model/chat/ast.h"
#include "engine/model/chat/lexer.h"

namespace espalier::jinja {

// The functions a template may call without defining them.
bool IsFunction(std::string_view name);

// Fails (failure.h), naming line and construct, for every tag, filter, test, function or method
// that is unknown, and for nesting beyond kMaxSyntaxDepth: a parsed tree can be walked recursively.
Body Parse(std::vector<Token> tokens);

}  // namespace espalier::jinja
