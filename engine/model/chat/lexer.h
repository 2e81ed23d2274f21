// Cuts a template into text and tags, and tags into tokens, with jinja2's white space rules
// (trim_blocks, lstrip_blocks, no trailing newline kept).
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace espalier::jinja {

enum class TokenKind {
  kData,           // text between tags; raw blocks and comments are already resolved
  kVariableBegin,  // {{
  kVariableEnd,    // }}
  kBlockBegin,     // {%
  kBlockEnd,       // %}
  kName,
  kString,  // unescaped
  kInteger,
  kFloat,
  kOperator,
  kEnd,
};

struct Token {
  TokenKind kind;
  std::string text;
  int line;
};

// Ends with a kEnd. Fails (failure.h) naming the line.
std::vector<Token> Tokenize(std::string_view source);

}  // namespace espalier::jinja
