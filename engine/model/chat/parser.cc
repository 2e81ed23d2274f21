#include "engine/model/chat/parser.h"

#include <fmt/format.h>

#include <algorithm>
#include <initializer_list>
#include <set>

#include "engine/model/chat/expression_parser.h"

namespace espalier::jinja {

namespace {

constexpr std::string_view kFunctions[] = {"range", "dict", "namespace", "raise_exception",
                                           "strftime_now"};

class Parser : ExpressionParser {
 public:
  explicit Parser(std::vector<Token> tokens) : ExpressionParser(std::move(tokens)) {}

  Body Run() {
    Body body = ParseBody({});
    for (const auto& [name, line] : called_) {
      if (!IsFunction(name) && !assigned_.contains(name)) {
        FailAt(line, fmt::format("unknown function '{}'", name));
      }
    }
    return body;
  }

 private:
  // Up to a tag named by one of ends, whose name is left to the caller; or to the template's end.
  Body ParseBody(std::initializer_list<std::string_view> ends) {
    Nesting nesting(*this);
    Body body;
    while (true) {
      BeginTag();
      const Token token = Take();
      switch (token.kind) {
        case TokenKind::kEnd:
          if (ends.size() == 0) return body;
          FailAt(token.line, fmt::format("the template ends before '{}'", *(ends.end() - 1)));
        case TokenKind::kData:
          body.push_back({Data{Value::String(token.text)}, token.line});
          break;
        case TokenKind::kVariableBegin:
          body.push_back({Output{ParseTuple(true)}, token.line});
          ExpectKind(TokenKind::kVariableEnd);
          break;
        default:  // a block: nothing else can follow a tag's end
          if (std::any_of(ends.begin(), ends.end(), [&](auto end) { return SeesName(end); })) {
            return body;
          }
          body.push_back(ParseStatement());
          ExpectKind(TokenKind::kBlockEnd);
      }
    }
  }

  // A body that its opening tag's end precedes and {% end %} closes.
  Body ParseBlock(std::string_view end) {
    BeginBlock();
    Body body = ParseBody({end});
    Take();
    return body;
  }

  void BeginBlock() {
    TakeOperator(":");
    ExpectKind(TokenKind::kBlockEnd);
  }

  // A body with variables of its own, out of which no loop can be left.
  Body ParseScope(std::string_view end) {
    const int loops = std::exchange(loops_, 0);
    ++scopes_;
    Body body = ParseBlock(end);
    --scopes_;
    loops_ = loops;
    return body;
  }

  Statement ParseStatement() {
    const int line = Peek().line;
    const std::string tag = ExpectName();
    if (tag == "if") return {ParseIf(), line};
    if (tag == "for") return {ParseFor(), line};
    if (tag == "set") return ParseSet(line);
    if (tag == "macro") return {ParseMacro(line), line};
    if (tag == "generation") return {Scoped{ParseScope("endgeneration")}, line};
    if (tag == "break" || tag == "continue") {
      if (loops_ == 0) FailAt(line, fmt::format("'{}' outside of a loop", tag));
      if (tag == "break") return {Break{}, line};
      return {Continue{}, line};
    }
    FailAt(line, fmt::format("unsupported tag '{}'", tag));
  }

  If ParseIf() {
    If node;
    do {
      ExpressionPtr test = ParseTuple(false);
      BeginBlock();
      node.branches.emplace_back(std::move(test), ParseBody({"elif", "else", "endif"}));
    } while (TakeName("elif"));
    if (TakeName("else")) {
      node.otherwise = ParseBlock("endif");
    } else {
      Take();
    }
    return node;
  }

  For ParseFor() {
    For node;
    node.target = ParseTarget();
    if (!TakeName("in")) FailExpected("'in'");
    node.iterable = ParseTuple(false);
    if (TakeName("if")) node.condition = ParseExpression();
    if (SeesName("recursive")) FailHere("'recursive' loops are not supported");
    BeginBlock();
    ++scopes_;
    ++loops_;
    node.body = ParseBody({"else", "endfor"});
    --loops_;
    if (TakeName("else")) {
      node.otherwise = ParseBlock("endfor");
    } else {
      Take();
    }
    --scopes_;
    return node;
  }

  Statement ParseSet(int line) {
    Target target;
    if (SeesOperator(".", 1)) {
      target.names.push_back(ExpectName());
      Take();
      target.attribute = ExpectName();
    } else {
      target = ParseTarget();
    }
    if (TakeOperator("=")) return {Assignment{std::move(target), ParseTuple(true)}, line};
    if (SeesOperator("|")) FailHere("filters on a block 'set' are not supported");
    return {BlockAssignment{std::move(target), ParseScope("endset")}, line};
  }

  MacroDefinition ParseMacro(int line) {
    if (scopes_ > 0) FailAt(line, "a macro inside a loop, block or macro is not supported");
    auto macro = std::make_shared<Macro>();
    macro->name = ExpectAssignableName();
    ExpectOperator("(");
    while (!TakeOperator(")")) {
      if (!macro->parameters.empty()) ExpectOperator(",");
      std::string name = ExpectAssignableName();
      ExpressionPtr fallback = TakeOperator("=") ? ParseExpression() : nullptr;
      if (!fallback && !macro->parameters.empty() && macro->parameters.back().second) {
        FailHere(fmt::format("parameter '{}' without default follows one with default", name));
      }
      macro->parameters.emplace_back(std::move(name), std::move(fallback));
    }
    in_macro_ = true;
    macro->body = ParseScope("endmacro");
    in_macro_ = false;
    return {std::move(macro)};
  }

  std::string ExpectAssignableName() {
    for (const std::string_view constant : {"true", "True", "false", "False", "none", "None"}) {
      if (SeesName(constant)) FailHere(fmt::format("cannot assign to '{}'", constant));
    }
    std::string name = ExpectName();
    assigned_.insert(name);
    return name;
  }

  // Names with commas between them, maybe in brackets.
  Target ParseTarget() {
    Target target;
    const bool bracket = TakeOperator("(");
    do {
      if (!target.names.empty() && !Sees(TokenKind::kName)) break;
      if (SeesName("in") && !target.names.empty()) break;
      target.names.push_back(ExpectAssignableName());
      target.unpacks |= SeesOperator(",");
    } while (TakeOperator(","));
    if (bracket) ExpectOperator(")");
    return target;
  }

  int scopes_ = 0;  // loops, macros and blocks around the current statement
  int loops_ = 0;   // loops that a break could leave
  std::set<std::string> assigned_;
};

}  // namespace

bool IsFunction(std::string_view name) {
  return std::find(std::begin(kFunctions), std::end(kFunctions), name) != std::end(kFunctions);
}

Body Parse(std::vector<Token> tokens) { return Parser(std::move(tokens)).Run(); }

}  // namespace espalier::jinja
