// The parsed form of a template. Const once parsed, shared by threads.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "engine/model/chat/builtins.h"
#include "engine/model/chat/operators.h"
#include "engine/model/chat/value.h"

namespace espalier::jinja {

struct Expression;
using ExpressionPtr = std::unique_ptr<const Expression>;

struct Literal {
  Value value;
};
struct Name {
  std::string name;
};
struct ListLiteral {
  Kind kind;  // kList or kTuple
  std::vector<ExpressionPtr> items;
};
struct DictLiteral {
  std::vector<std::pair<ExpressionPtr, ExpressionPtr>> entries;
};
struct Not {
  ExpressionPtr operand;
};
struct Sign {
  bool negative;
  ExpressionPtr operand;
};
struct Binary {
  Arithmetic op;
  ExpressionPtr left, right;
};
struct Concatenation {  // left ~ right
  ExpressionPtr left, right;
};
struct Logic {
  bool is_and;
  ExpressionPtr left, right;
};
struct ComparisonChain {  // first < second <= third
  ExpressionPtr first;
  std::vector<std::pair<Comparison, ExpressionPtr>> rest;
};
struct Conditional {  // then if test else otherwise
  ExpressionPtr test, then;
  ExpressionPtr otherwise;  // may be null: undefined
};
struct Attribute {
  ExpressionPtr object;
  std::string name;
};
struct Subscript {
  ExpressionPtr object, key;
};
struct SliceOf {
  ExpressionPtr object;
  ExpressionPtr start, stop, step;  // each may be null
};
struct BuiltinCall {  // value|filter(...), value is test ..., value.method(...)
  const Builtin* builtin;
  ExpressionPtr subject;
  std::vector<ExpressionPtr> arguments;  // one for each parameter; null where absent
};
struct FunctionCall {  // name(...): a macro, or one of the functions
  std::string name;
  std::vector<ExpressionPtr> positional;
  std::vector<std::pair<std::string, ExpressionPtr>> keywords;
};

struct Expression {
  std::variant<Literal, Name, ListLiteral, DictLiteral, Not, Sign, Binary, Concatenation, Logic,
               ComparisonChain, Conditional, Attribute, Subscript, SliceOf, BuiltinCall,
               FunctionCall>
      node;
  int line;
};

struct Statement;
using Body = std::vector<Statement>;

struct Target {
  std::vector<std::string> names;
  bool unpacks = false;                  // names are a tuple's
  std::optional<std::string> attribute;  // of the namespace names[0]
};

struct Data {
  Value text;
};
struct Output {
  ExpressionPtr value;
};
struct Assignment {
  Target target;
  ExpressionPtr value;
};
struct BlockAssignment {
  Target target;
  Body body;
};
struct If {
  std::vector<std::pair<ExpressionPtr, Body>> branches;
  Body otherwise;
};
struct For {
  Target target;
  ExpressionPtr iterable;
  ExpressionPtr condition;  // may be null
  Body body, otherwise;
};
struct Scoped {  // {% generation %}: text that training scores; here only a scope
  Body body;
};
struct MacroDefinition {
  std::shared_ptr<const Macro> macro;
};
struct Break {};
struct Continue {};

struct Statement {
  std::variant<Data, Output, Assignment, BlockAssignment, If, For, Scoped, MacroDefinition, Break,
               Continue>
      node;
  int line;
};

struct Macro {
  std::string name;
  std::vector<std::pair<std::string, ExpressionPtr>> parameters;  // with default, or null
  Body body;
};

}  // namespace espalier::jinja
