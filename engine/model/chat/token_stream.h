// Reading tokens one after the other, with errors that name the line. The base of both parsers.
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "engine/model/chat/failure.h"
#include "engine/model/chat/lexer.h"

namespace espalier::jinja {

class TokenStream {
 protected:
  explicit TokenStream(std::vector<Token> tokens) : tokens_(std::move(tokens)) {}

  // Counts the nesting of what the parser parses recursively.
  struct Nesting {
    explicit Nesting(TokenStream& stream) : stream(stream) {
      if (++stream.nesting_ > kMaxSyntaxDepth) {
        stream.FailHere(fmt::format("nested over {} deep", kMaxSyntaxDepth));
      }
    }
    ~Nesting() { --stream.nesting_; }
    TokenStream& stream;
  };

  [[noreturn]] static void FailAt(int line, std::string_view what) {
    Fail(fmt::format("line {}: {}", line, what));
  }
  [[noreturn]] void FailHere(std::string_view what) const { FailAt(Peek().line, what); }
  [[noreturn]] void FailExpected(std::string_view what) const {
    FailHere(fmt::format("expected {}, got {}", what, Describe(Peek())));
  }

  static std::string Describe(const Token& token) {
    switch (token.kind) {
      case TokenKind::kData:
        return "text";
      case TokenKind::kVariableBegin:
        return "'{{'";
      case TokenKind::kVariableEnd:
        return "'}}'";
      case TokenKind::kBlockBegin:
        return "'{%'";
      case TokenKind::kBlockEnd:
        return "'%}'";
      case TokenKind::kString:
        return "a string";
      case TokenKind::kEnd:
        return "the end of the template";
      default:
        return fmt::format("'{}'", token.text);
    }
  }

  const Token& Peek(size_t ahead = 0) const {
    return tokens_[std::min(position_ + ahead, tokens_.size() - 1)];
  }
  Token Take() { return tokens_[position_ + 1 < tokens_.size() ? position_++ : position_]; }
  bool Sees(TokenKind kind) const { return Peek().kind == kind; }
  bool SeesOperator(std::string_view symbol, size_t ahead = 0) const {
    return Peek(ahead).kind == TokenKind::kOperator && Peek(ahead).text == symbol;
  }
  bool SeesName(std::string_view name, size_t ahead = 0) const {
    return Peek(ahead).kind == TokenKind::kName && Peek(ahead).text == name;
  }
  bool TakeOperator(std::string_view symbol) { return SeesOperator(symbol) && (Take(), true); }
  bool TakeName(std::string_view name) { return SeesName(name) && (Take(), true); }
  void ExpectOperator(std::string_view symbol) {
    if (!TakeOperator(symbol)) FailExpected(fmt::format("'{}'", symbol));
  }
  void ExpectKind(TokenKind kind) {
    if (!Sees(kind)) FailExpected(Describe({kind, "", 0}));
    Take();
  }
  std::string ExpectName() {
    if (!Sees(TokenKind::kName)) FailExpected("a name");
    return Take().text;
  }

 private:
  const std::vector<Token> tokens_;
  size_t position_ = 0;
  int nesting_ = 0;
};

}  // namespace espalier::jinja
