#include "engine/model/chat/expression_parser.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <system_error>

#include "engine/model/chat/failure.h"

namespace espalier::jinja {

namespace {

constexpr BinaryOperator kSums[] = {{"+", Arithmetic::kAdd}, {"-", Arithmetic::kSubtract}};
constexpr BinaryOperator kProducts[] = {{"*", Arithmetic::kMultiply},
                                        {"/", Arithmetic::kDivide},
                                        {"//", Arithmetic::kFloorDivide},
                                        {"%", Arithmetic::kModulo}};
constexpr BinaryOperator kPowers[] = {{"**", Arithmetic::kPower}};
constexpr std::pair<std::string_view, Comparison> kComparisons[] = {
    {"==", Comparison::kEqual},  {"!=", Comparison::kNotEqual},
    {"<", Comparison::kLess},    {"<=", Comparison::kLessEqual},
    {">", Comparison::kGreater}, {">=", Comparison::kGreaterEqual}};

}  // namespace

ExpressionPtr ExpressionParser::ParseTuple(bool with_conditional) {
  const int line = Peek().line;
  std::vector<ExpressionPtr> items;
  bool is_tuple = false;
  const auto ends = [&] {
    return Sees(TokenKind::kVariableEnd) || Sees(TokenKind::kBlockEnd) || SeesOperator(")");
  };
  do {
    if (ends()) break;
    items.push_back(with_conditional ? ParseExpression() : ParseOr());
    is_tuple |= SeesOperator(",");
  } while (TakeOperator(","));
  if (items.empty()) FailExpected("an expression");
  if (!is_tuple) return std::move(items[0]);
  return Make(line, ListLiteral{Kind::kTuple, std::move(items)});
}

ExpressionPtr ExpressionParser::ParseExpression() {
  Nesting nesting(*this);
  ExpressionPtr value = ParseOr();
  while (SeesName("if")) {
    const int line = Take().line;
    ExpressionPtr test = ParseOr();
    ExpressionPtr otherwise = TakeName("else") ? ParseExpression() : nullptr;
    value = Make(line, Conditional{std::move(test), std::move(value), std::move(otherwise)});
  }
  return value;
}

ExpressionPtr ExpressionParser::ParseOr() {
  ExpressionPtr left = ParseAnd();
  while (SeesName("or")) {
    const int line = Take().line;
    left = Make(line, Logic{false, std::move(left), ParseAnd()});
  }
  return left;
}

ExpressionPtr ExpressionParser::ParseAnd() {
  ExpressionPtr left = ParseNot();
  while (SeesName("and")) {
    const int line = Take().line;
    left = Make(line, Logic{true, std::move(left), ParseNot()});
  }
  return left;
}

ExpressionPtr ExpressionParser::ParseNot() {
  if (!SeesName("not")) return ParseComparison();
  Nesting nesting(*this);
  const int line = Take().line;
  return Make(line, Not{ParseNot()});
}

std::optional<Comparison> ExpressionParser::TakeComparison() {
  for (const auto& [symbol, comparison] : kComparisons) {
    if (TakeOperator(symbol)) return comparison;
  }
  if (TakeName("in")) return Comparison::kIn;
  if (SeesName("not") && SeesName("in", 1)) {
    Take();
    Take();
    return Comparison::kNotIn;
  }
  return std::nullopt;
}

ExpressionPtr ExpressionParser::ParseComparison() {
  const int line = Peek().line;
  ExpressionPtr first = ParseSum();
  std::vector<std::pair<Comparison, ExpressionPtr>> rest;
  while (const auto comparison = TakeComparison()) rest.emplace_back(*comparison, ParseSum());
  if (rest.empty()) return first;
  return Make(line, ComparisonChain{std::move(first), std::move(rest)});
}

ExpressionPtr ExpressionParser::ParseBinary(std::span<const BinaryOperator> operators,
                                            ExpressionPtr (ExpressionParser::*parse_operand)()) {
  ExpressionPtr left = (this->*parse_operand)();
  while (true) {
    const auto found = std::find_if(operators.begin(), operators.end(),
                                    [&](const auto& o) { return SeesOperator(o.symbol); });
    if (found == operators.end()) return left;
    const int line = Take().line;
    const auto* literal = std::get_if<Literal>(&left->node);
    if (found->op == Arithmetic::kModulo && literal != nullptr && literal->value.IsString()) {
      FailAt(line, "'%' on strings is not supported");
    }
    left = Make(line, Binary{found->op, std::move(left), (this->*parse_operand)()});
  }
}

ExpressionPtr ExpressionParser::ParseSum() {
  return ParseBinary(kSums, &ExpressionParser::ParseConcatenation);
}

ExpressionPtr ExpressionParser::ParseConcatenation() {
  ExpressionPtr left = ParseProduct();
  while (SeesOperator("~")) {
    const int line = Take().line;
    left = Make(line, Concatenation{std::move(left), ParseProduct()});
  }
  return left;
}

ExpressionPtr ExpressionParser::ParseProduct() {
  return ParseBinary(kProducts, &ExpressionParser::ParsePower);
}

ExpressionPtr ExpressionParser::ParsePower() {
  return ParseBinary(kPowers, &ExpressionParser::ParseFiltered);
}

ExpressionPtr ExpressionParser::ParseFiltered() {
  ExpressionPtr value = ParseUnary();
  while (true) {
    if (SeesOperator("|")) {
      Take();
      value = ParseFilter(std::move(value));
    } else if (SeesName("is")) {
      value = ParseTest(std::move(value));
    } else if (SeesOperator("(")) {
      FailHere("a call of what is neither a name nor a method is not supported");
    } else {
      return value;
    }
  }
}

ExpressionPtr ExpressionParser::ParseUnary() {
  if (!SeesOperator("-") && !SeesOperator("+")) return ParsePostfix(ParsePrimary());
  Nesting nesting(*this);
  const Token sign = Take();
  return ParsePostfix(Make(sign.line, Sign{sign.text == "-", ParseUnary()}));
}

ExpressionPtr ExpressionParser::ParsePrimary() {
  const Token token = Take();
  const int line = token.line;
  switch (token.kind) {
    case TokenKind::kName:
      return ParseName(token);
    case TokenKind::kString: {
      std::string text = token.text;
      while (Sees(TokenKind::kString)) text += Take().text;
      return Make(line, Literal{Value::String(text)});
    }
    case TokenKind::kInteger:
      return Make(line, Literal{ParseNumber<int64_t>(token)});
    case TokenKind::kFloat:
      return Make(line, Literal{ParseNumber<double>(token)});
    default:
      break;
  }
  if (token.kind == TokenKind::kOperator && token.text == "(") {
    if (TakeOperator(")")) return Make(line, ListLiteral{Kind::kTuple, {}});
    ExpressionPtr inner = ParseTuple(true);
    ExpectOperator(")");
    return inner;
  }
  if (token.kind == TokenKind::kOperator && token.text == "[") return ParseList(line);
  if (token.kind == TokenKind::kOperator && token.text == "{") return ParseDict(line);
  FailAt(line, fmt::format("expected an expression, got {}", Describe(token)));
}

template <typename Number>
Value ExpressionParser::ParseNumber(const Token& token) {
  Number number{};
  const char* end = token.text.data() + token.text.size();
  if (std::from_chars(token.text.data(), end, number).ec != std::errc()) {
    FailAt(token.line, fmt::format("the number {} is out of range", token.text));
  }
  return number;
}

ExpressionPtr ExpressionParser::ParseName(const Token& token) {
  const std::string& name = token.text;
  if (name == "true" || name == "True") return Make(token.line, Literal{true});
  if (name == "false" || name == "False") return Make(token.line, Literal{false});
  if (name == "none" || name == "None") return Make(token.line, Literal{Value::None{}});
  if (in_macro_ && (name == "caller" || name == "varargs" || name == "kwargs")) {
    FailAt(token.line, fmt::format("'{}' in a macro is not supported", name));
  }
  if (!SeesOperator("(")) return Make(token.line, Name{name});
  CallArguments arguments = ParseArguments();
  called_.emplace_back(name, token.line);
  return Make(token.line,
              FunctionCall{name, std::move(arguments.positional), std::move(arguments.keywords)});
}

ExpressionPtr ExpressionParser::ParseList(int line) {
  std::vector<ExpressionPtr> items;
  while (!TakeOperator("]")) {
    if (!items.empty()) ExpectOperator(",");
    if (TakeOperator("]")) break;
    items.push_back(ParseExpression());
  }
  return Make(line, ListLiteral{Kind::kList, std::move(items)});
}

ExpressionPtr ExpressionParser::ParseDict(int line) {
  DictLiteral dict;
  while (!TakeOperator("}")) {
    if (!dict.entries.empty()) ExpectOperator(",");
    if (TakeOperator("}")) break;
    ExpressionPtr key = ParseExpression();
    ExpectOperator(":");
    dict.entries.emplace_back(std::move(key), ParseExpression());
  }
  return Make(line, std::move(dict));
}

ExpressionPtr ExpressionParser::ParsePostfix(ExpressionPtr value) {
  while (true) {
    const int line = Peek().line;
    if (TakeOperator(".")) {
      value = ParseMember(std::move(value), line);
    } else if (TakeOperator("[")) {
      value = ParseSubscript(std::move(value), line);
    } else if (SeesOperator("(")) {
      FailHere("a call of what is neither a name nor a method is not supported");
    } else {
      return value;
    }
  }
}

ExpressionPtr ExpressionParser::ParseMember(ExpressionPtr object, int line) {
  if (Sees(TokenKind::kInteger)) {
    ExpressionPtr index = Make(line, Literal{ParseNumber<int64_t>(Take())});
    return Make(line, Subscript{std::move(object), std::move(index)});
  }
  std::string name = ExpectName();
  if (!SeesOperator("(")) return Make(line, Attribute{std::move(object), std::move(name)});
  const Builtin* method = FindMethod(name);
  if (method == nullptr) FailAt(line, fmt::format("unknown method '{}'", name));
  return MakeCall(*method, "method", std::move(object), ParseArguments(), line);
}

ExpressionPtr ExpressionParser::ParseSubscript(ExpressionPtr object, int line) {
  ExpressionPtr start = SeesOperator(":") ? nullptr : ParseExpression();
  if (TakeOperator("]")) return Make(line, Subscript{std::move(object), std::move(start)});
  if (SeesOperator(",")) FailHere("a subscript of several values is not supported");
  std::array<ExpressionPtr, 2> stop_and_step;
  for (ExpressionPtr& bound : stop_and_step) {
    if (!TakeOperator(":")) break;
    if (!SeesOperator(":") && !SeesOperator("]")) bound = ParseExpression();
  }
  ExpectOperator("]");
  return Make(line, SliceOf{std::move(object), std::move(start), std::move(stop_and_step[0]),
                            std::move(stop_and_step[1])});
}

ExpressionParser::CallArguments ExpressionParser::ParseArguments() {
  ExpectOperator("(");
  CallArguments arguments;
  bool first = true;
  while (!TakeOperator(")")) {
    if (!std::exchange(first, false)) ExpectOperator(",");
    if (TakeOperator(")")) break;
    if (SeesOperator("*") || SeesOperator("**")) FailHere("'*' arguments are not supported");
    if (Sees(TokenKind::kName) && SeesOperator("=", 1)) {
      std::string name = ExpectName();
      Take();
      arguments.keywords.emplace_back(std::move(name), ParseExpression());
    } else if (arguments.keywords.empty()) {
      arguments.positional.push_back(ParseExpression());
    } else {
      FailHere("a positional argument follows a keyword argument");
    }
  }
  return arguments;
}

ExpressionPtr ExpressionParser::ParseFilter(ExpressionPtr value) {
  const int line = Peek().line;
  const std::string name = ExpectName();
  const Builtin* filter = FindFilter(name);
  if (filter == nullptr) FailAt(line, fmt::format("unknown filter '{}'", name));
  CallArguments arguments = SeesOperator("(") ? ParseArguments() : CallArguments();
  CheckNamedBuiltin(name, arguments, line);
  return MakeCall(*filter, "filter", std::move(value), std::move(arguments), line);
}

void ExpressionParser::CheckNamedBuiltin(std::string_view filter, const CallArguments& arguments,
                                         int line) {
  const bool by_attribute = filter == "selectattr" || filter == "rejectattr";
  const bool takes_test = by_attribute || filter == "select" || filter == "reject";
  const size_t position = by_attribute ? 1 : 0;
  if ((!takes_test && filter != "map") || arguments.positional.size() <= position) return;
  const auto* literal = std::get_if<Literal>(&arguments.positional[position]->node);
  if (literal == nullptr || !literal->value.IsString()) return;
  const std::string_view name = literal->value.bytes();
  if ((takes_test ? FindTest(name) : FindFilter(name)) == nullptr) {
    FailAt(line, fmt::format("unknown {} '{}'", takes_test ? "test" : "filter", name));
  }
}

ExpressionPtr ExpressionParser::ParseTest(ExpressionPtr value) {
  const int line = Take().line;
  const bool negated = TakeName("not");
  const std::string name = ExpectName();
  const Builtin* test = FindTest(name);
  if (test == nullptr) FailAt(line, fmt::format("unknown test '{}'", name));
  ExpressionPtr result = MakeCall(*test, "test", std::move(value), ParseTestArguments(), line);
  return negated ? Make(line, Not{std::move(result)}) : std::move(result);
}

ExpressionParser::CallArguments ExpressionParser::ParseTestArguments() {
  if (SeesOperator("(")) return ParseArguments();
  CallArguments arguments;
  const bool is_operand = Sees(TokenKind::kName) || Sees(TokenKind::kString) ||
                          Sees(TokenKind::kInteger) || Sees(TokenKind::kFloat) ||
                          SeesOperator("[") || SeesOperator("{");
  if (!is_operand || SeesName("else") || SeesName("or") || SeesName("and")) return arguments;
  if (SeesName("is")) FailHere("tests cannot be chained with 'is'");
  arguments.positional.push_back(ParsePostfix(ParsePrimary()));
  return arguments;
}

ExpressionPtr ExpressionParser::MakeCall(const Builtin& builtin, std::string_view what,
                                         ExpressionPtr subject, CallArguments given, int line) {
  const auto fail = [&](std::string_view problem) {
    FailAt(line, fmt::format("{} '{}' {}", what, builtin.name, problem));
  };
  if (given.positional.size() > builtin.parameter_count) fail("has too many arguments");
  std::vector<ExpressionPtr> slots = std::move(given.positional);
  slots.resize(builtin.parameter_count);
  for (auto& [name, value] : given.keywords) {
    const auto begin = builtin.parameters.begin();
    const auto slot = std::find(begin, begin + builtin.parameter_count, name) - begin;
    if (slot == static_cast<ptrdiff_t>(builtin.parameter_count)) {
      fail(fmt::format("has no argument '{}'", name));
    }
    if (slots[slot]) fail(fmt::format("has argument '{}' twice", name));
    slots[slot] = std::move(value);
  }
  for (size_t i = 0; i < builtin.required; ++i) {
    if (!slots[i]) fail("has too few arguments");
  }
  return Make(line, BuiltinCall{&builtin, std::move(subject), std::move(slots)});
}

}  // namespace espalier::jinja
