#include "engine/model/chat/parser.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <initializer_list>
#include <set>
#include <system_error>

#include "engine/model/chat/failure.h"

namespace espalier::jinja {

namespace {

// More than any tag of a real template; with it, no tree is deep enough to hurt its destructor.
constexpr int kMaxNodesInTag = 2000;

constexpr std::string_view kFunctions[] = {"range", "dict", "namespace", "raise_exception",
                                           "strftime_now"};

struct BinaryOperator {
  std::string_view symbol;
  Arithmetic op;
};
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

class Parser {
 public:
  explicit Parser(std::vector<Token> tokens) : tokens_(std::move(tokens)) {}

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
  // What a call gives before anyone knows which parameters it meets.
  struct CallArguments {
    std::vector<ExpressionPtr> positional;
    std::vector<std::pair<std::string, ExpressionPtr>> keywords;
  };

  // Counts the nesting of what the parser parses recursively.
  struct Nesting {
    explicit Nesting(Parser& parser) : parser(parser) {
      if (++parser.nesting_ > kMaxSyntaxDepth) {
        parser.FailHere(fmt::format("nested over {} deep", kMaxSyntaxDepth));
      }
    }
    ~Nesting() { --parser.nesting_; }
    Parser& parser;
  };

  // Tokens.

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

  template <typename Node>
  ExpressionPtr Make(int line, Node node) {
    if (++nodes_in_tag_ > kMaxNodesInTag) {
      FailAt(line, fmt::format("a tag of over {} operations", kMaxNodesInTag));
    }
    return std::make_unique<const Expression>(Expression{std::move(node), line});
  }

  // Statements.

  // Up to a tag named by one of ends, whose name is left to the caller; or to the template's end.
  Body ParseBody(std::initializer_list<std::string_view> ends) {
    Nesting nesting(*this);
    Body body;
    while (true) {
      nodes_in_tag_ = 0;
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

  // Expressions, from the loosest binding to the tightest.

  ExpressionPtr ParseTuple(bool with_conditional) {
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

  ExpressionPtr ParseExpression() {
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

  ExpressionPtr ParseOr() {
    ExpressionPtr left = ParseAnd();
    while (SeesName("or")) {
      const int line = Take().line;
      left = Make(line, Logic{false, std::move(left), ParseAnd()});
    }
    return left;
  }

  ExpressionPtr ParseAnd() {
    ExpressionPtr left = ParseNot();
    while (SeesName("and")) {
      const int line = Take().line;
      left = Make(line, Logic{true, std::move(left), ParseNot()});
    }
    return left;
  }

  ExpressionPtr ParseNot() {
    Nesting nesting(*this);
    if (!SeesName("not")) return ParseComparison();
    const int line = Take().line;
    return Make(line, Not{ParseNot()});
  }

  std::optional<Comparison> TakeComparison() {
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

  ExpressionPtr ParseComparison() {
    const int line = Peek().line;
    ExpressionPtr first = ParseSum();
    std::vector<std::pair<Comparison, ExpressionPtr>> rest;
    while (const auto comparison = TakeComparison()) rest.emplace_back(*comparison, ParseSum());
    if (rest.empty()) return first;
    return Make(line, ComparisonChain{std::move(first), std::move(rest)});
  }

  ExpressionPtr ParseBinary(std::span<const BinaryOperator> operators,
                            ExpressionPtr (Parser::*parse_operand)()) {
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

  ExpressionPtr ParseSum() { return ParseBinary(kSums, &Parser::ParseConcatenation); }

  ExpressionPtr ParseConcatenation() {
    ExpressionPtr left = ParseProduct();
    while (SeesOperator("~")) {
      const int line = Take().line;
      left = Make(line, Concatenation{std::move(left), ParseProduct()});
    }
    return left;
  }

  ExpressionPtr ParseProduct() { return ParseBinary(kProducts, &Parser::ParsePower); }
  ExpressionPtr ParsePower() { return ParseBinary(kPowers, &Parser::ParseFiltered); }

  ExpressionPtr ParseFiltered() {
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

  ExpressionPtr ParseUnary() {
    Nesting nesting(*this);
    if (!SeesOperator("-") && !SeesOperator("+")) return ParsePostfix(ParsePrimary());
    const Token sign = Take();
    return ParsePostfix(Make(sign.line, Sign{sign.text == "-", ParseUnary()}));
  }

  ExpressionPtr ParsePrimary() {
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
  Value ParseNumber(const Token& token) {
    Number number{};
    const char* end = token.text.data() + token.text.size();
    if (std::from_chars(token.text.data(), end, number).ec != std::errc()) {
      FailAt(token.line, fmt::format("the number {} is out of range", token.text));
    }
    return number;
  }

  ExpressionPtr ParseName(const Token& token) {
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

  ExpressionPtr ParseList(int line) {
    std::vector<ExpressionPtr> items;
    while (!TakeOperator("]")) {
      if (!items.empty()) ExpectOperator(",");
      if (TakeOperator("]")) break;
      items.push_back(ParseExpression());
    }
    return Make(line, ListLiteral{Kind::kList, std::move(items)});
  }

  ExpressionPtr ParseDict(int line) {
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

  ExpressionPtr ParsePostfix(ExpressionPtr value) {
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

  ExpressionPtr ParseMember(ExpressionPtr object, int line) {
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

  ExpressionPtr ParseSubscript(ExpressionPtr object, int line) {
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

  CallArguments ParseArguments() {
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

  ExpressionPtr ParseFilter(ExpressionPtr value) {
    const int line = Peek().line;
    const std::string name = ExpectName();
    const Builtin* filter = FindFilter(name);
    if (filter == nullptr) FailAt(line, fmt::format("unknown filter '{}'", name));
    CallArguments arguments = SeesOperator("(") ? ParseArguments() : CallArguments();
    CheckNamedBuiltin(name, arguments, line);
    return MakeCall(*filter, "filter", std::move(value), std::move(arguments), line);
  }

  // Filters that take the name of another filter or test: if it is written out, it must be known.
  static void CheckNamedBuiltin(std::string_view filter, const CallArguments& arguments, int line) {
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

  ExpressionPtr ParseTest(ExpressionPtr value) {
    const int line = Take().line;
    const bool negated = TakeName("not");
    const std::string name = ExpectName();
    const Builtin* test = FindTest(name);
    if (test == nullptr) FailAt(line, fmt::format("unknown test '{}'", name));
    ExpressionPtr result = MakeCall(*test, "test", std::move(value), ParseTestArguments(), line);
    return negated ? Make(line, Not{std::move(result)}) : std::move(result);
  }

  // In brackets, or a single one without.
  CallArguments ParseTestArguments() {
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

  ExpressionPtr MakeCall(const Builtin& builtin, std::string_view what, ExpressionPtr subject,
                         CallArguments given, int line) {
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

  const std::vector<Token> tokens_;
  size_t position_ = 0;
  int nesting_ = 0;
  int nodes_in_tag_ = 0;
  int scopes_ = 0;  // loops, macros and blocks around the current statement
  int loops_ = 0;   // loops that a break could leave
  bool in_macro_ = false;
  std::set<std::string> assigned_;
  std::vector<std::pair<std::string, int>> called_;
};

}  // namespace

bool IsFunction(std::string_view name) {
  return std::find(std::begin(kFunctions), std::end(kFunctions), name) != std::end(kFunctions);
}

Body Parse(std::vector<Token> tokens) { return Parser(std::move(tokens)).Run(); }

}  // namespace espalier::jinja
