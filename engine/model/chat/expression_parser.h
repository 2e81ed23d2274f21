// Reads expressions: everything between {{ and }}, and what tags are made of.
#pragma once

#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "engine/model/chat/ast.h"
#include "engine/model/chat/token_stream.h"

namespace espalier::jinja {

// More than any tag of a real template; with it, no tree is deep enough to hurt its destructor.
inline constexpr int kMaxNodesInTag = 2000;

struct BinaryOperator {
  std::string_view symbol;
  Arithmetic op;
};

class ExpressionParser : protected TokenStream {
 protected:
  explicit ExpressionParser(std::vector<Token> tokens) : TokenStream(std::move(tokens)) {}

  // Expressions separated by commas make a tuple; with_conditional allows "a if b else c".
  ExpressionPtr ParseTuple(bool with_conditional);
  ExpressionPtr ParseExpression();

  void BeginTag() { nodes_in_tag_ = 0; }
  bool in_macro_ = false;
  std::vector<std::pair<std::string, int>> called_;  // functions by name, with their line

 private:
  // What a call gives before anyone knows which parameters it meets.
  struct CallArguments {
    std::vector<ExpressionPtr> positional;
    std::vector<std::pair<std::string, ExpressionPtr>> keywords;
  };

  template <typename Node>
  ExpressionPtr Make(int line, Node node) {
    if (++nodes_in_tag_ > kMaxNodesInTag) {
      FailAt(line, fmt::format("a tag of over {} operations", kMaxNodesInTag));
    }
    return std::make_unique<const Expression>(Expression{std::move(node), line});
  }

  // From the loosest binding to the tightest.
  ExpressionPtr ParseOr();
  ExpressionPtr ParseAnd();
  ExpressionPtr ParseNot();
  std::optional<Comparison> TakeComparison();
  ExpressionPtr ParseComparison();
  ExpressionPtr ParseBinary(std::span<const BinaryOperator> operators,
                            ExpressionPtr (ExpressionParser::*parse_operand)());
  ExpressionPtr ParseSum();
  ExpressionPtr ParseConcatenation();
  ExpressionPtr ParseProduct();
  ExpressionPtr ParsePower();
  ExpressionPtr ParseFiltered();
  ExpressionPtr ParseUnary();
  ExpressionPtr ParsePrimary();
  template <typename Number>
  Value ParseNumber(const Token& token);
  ExpressionPtr ParseName(const Token& token);
  ExpressionPtr ParseList(int line);
  ExpressionPtr ParseDict(int line);
  ExpressionPtr ParsePostfix(ExpressionPtr value);
  ExpressionPtr ParseMember(ExpressionPtr object, int line);
  ExpressionPtr ParseSubscript(ExpressionPtr object, int line);
  CallArguments ParseArguments();
  ExpressionPtr ParseFilter(ExpressionPtr value);
  // Filters that take the name of another filter or test: if it is written out, it must be known.
  static void CheckNamedBuiltin(std::string_view filter, const CallArguments& arguments, int line);
  ExpressionPtr ParseTest(ExpressionPtr value);
  // In brackets, or a single one without.
  CallArguments ParseTestArguments();
  ExpressionPtr MakeCall(const Builtin& builtin, std::string_view what, ExpressionPtr subject,
                         CallArguments given, int line);

  int nodes_in_tag_ = 0;
};

}  // namespace espalier::jinja
