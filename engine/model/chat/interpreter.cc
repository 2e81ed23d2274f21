#include "engine/model/chat/interpreter.h"

#include <fmt/format.h>

#include <deque>
#include <unordered_map>

#include "engine/model/chat/failure.h"
#include "engine/model/chat/format.h"
#include "engine/model/chat/operators.h"
#include "engine/model/chat/parser.h"

namespace espalier::jinja {

namespace {

constexpr int64_t kMaxRange = 100'000;  // the sandbox's own limit

// Variables of the template, of one iteration, of one macro call. Reading looks outwards, setting
// stays here, as in jinja2.
struct Scope {
  std::unordered_map<std::string_view, Value> variables;  // names live in the tree
  const Scope* outer = nullptr;
};

enum class Flow { kNext, kBreak, kContinue };

class Interpreter {
 public:
  Text Run(const Body& body, const Value& context) {
    try {
      for (const auto& [name, value] : context.dict().entries) {
        globals_.variables[name.bytes()] = value;
      }
      Execute(body, template_);
      return std::move(out_);
    } catch (const Failure& failure) {
      if (quotes_template_) throw;
      throw Failure{
          absl::Status(failure.status.code(),
                       fmt::format("line {}: {}", line_, std::string(failure.status.message())))};
    }
  }

 private:
  // One level of the recursion over the tree.
  struct Level {
    explicit Level(Interpreter& interpreter) : interpreter(interpreter) {
      if (++interpreter.depth_ > kMaxEvaluationDepth) FailBound("the template nests too deep");
    }
    ~Level() { --interpreter.depth_; }
    Interpreter& interpreter;
  };

  // Statements.

  Flow Execute(const Body& body, Scope& scope) {
    const Level level(*this);
    for (const Statement& statement : body) {
      line_ = statement.line;
      budget_.Charge(1);
      const Flow flow =
          std::visit([&](const auto& node) { return Do(node, scope); }, statement.node);
      if (flow != Flow::kNext) return flow;
    }
    return Flow::kNext;
  }

  // The text that body would print.
  Text Capture(const Body& body, Scope& scope) {
    Text outer = std::exchange(out_, Text());
    Execute(body, scope);
    return std::exchange(out_, std::move(outer));
  }

  Flow Do(const Data& data, Scope&) { return Print(data.text.text()); }
  Flow Do(const Output& output, Scope& scope) {
    return Print(Str(Evaluate(output.value, scope), budget_));
  }
  Flow Print(const Text& text) {
    budget_.ChargeBytes(text.size());
    out_.Append(text);
    return Flow::kNext;
  }

  Flow Do(const Assignment& assignment, Scope& scope) {
    Assign(assignment.target, Evaluate(assignment.value, scope), scope);
    return Flow::kNext;
  }

  Flow Do(const BlockAssignment& assignment, Scope& scope) {
    Scope inner{{}, &scope};
    Assign(assignment.target, Capture(assignment.body, inner), scope);
    return Flow::kNext;
  }

  Flow Do(const If& node, Scope& scope) {
    for (const auto& [test, body] : node.branches) {
      if (Evaluate(test, scope).Truth()) return Execute(body, scope);
    }
    return Execute(node.otherwise, scope);
  }

  Flow Do(const For& node, Scope& scope) {
    auto loop = std::make_shared<Loop>();
    const Value iterable = Evaluate(node.iterable, scope);
    loop->items = Select(node, Iterate(iterable, budget_), scope);
    loop->depth = OneDeeper(iterable.Depth());
    bool completed = false;  // else follows unless an iteration got to its end: jinja2's rule
    for (; loop->index0 < loop->items->size(); ++loop->index0) {
      budget_.Charge(2);
      Scope inner{{}, &scope};
      inner.variables["loop"] = std::shared_ptr<const Loop>(loop);
      Assign(node.target, (*loop->items)[loop->index0], inner);
      const Flow flow = Execute(node.body, inner);
      if (flow == Flow::kBreak) break;
      completed |= flow == Flow::kNext;
    }
    if (completed) return Flow::kNext;
    Scope inner{{}, &scope};
    return Execute(node.otherwise, inner);
  }

  // The items that a loop's condition lets pass.
  std::shared_ptr<const Items> Select(const For& node, std::shared_ptr<const Items> items,
                                      const Scope& scope) {
    if (!node.condition) return items;
    auto selected = std::make_shared<Items>();
    for (const Value& item : *items) {
      budget_.Charge(2);
      Scope inner{{}, &scope};
      Assign(node.target, item, inner);
      if (Evaluate(node.condition, inner).Truth()) selected->push_back(item);
    }
    return selected;
  }

  Flow Do(const Scoped& node, Scope& scope) {
    Scope inner{{}, &scope};
    return Execute(node.body, inner);
  }

  Flow Do(const MacroDefinition& node, Scope& scope) {
    scope.variables[node.macro->name] = Callable{node.macro.get(), node.macro->name};
    return Flow::kNext;
  }

  Flow Do(const Break&, Scope&) { return Flow::kBreak; }
  Flow Do(const Continue&, Scope&) { return Flow::kContinue; }

  void Assign(const Target& target, Value value, Scope& scope) {
    if (target.attribute) {
      const Value holder = Lookup(target.names[0], scope);
      if (!holder.Is(Kind::kNamespace)) {
        Fail(fmt::format("cannot set '{}.{}': it is no namespace", target.names[0],
                         *target.attribute));
      }
      holder.ns()->attributes[*target.attribute] = std::move(value);
      return;
    }
    if (!target.unpacks) {
      scope.variables[target.names[0]] = std::move(value);
      return;
    }
    const auto items = Iterate(value, budget_);
    if (items->size() != target.names.size()) {
      Fail(
          fmt::format("cannot unpack {} values into {} names", items->size(), target.names.size()));
    }
    for (size_t i = 0; i < items->size(); ++i) scope.variables[target.names[i]] = (*items)[i];
  }

  Value Lookup(std::string_view name, const Scope& innermost) {
    for (const Scope* scope = &innermost; scope != nullptr; scope = scope->outer) {
      budget_.Charge(1);
      const auto found = scope->variables.find(name);
      if (found != scope->variables.end()) return found->second;
    }
    // Without a clock strftime_now is not defined, so that a template takes its own fixed date.
    if (IsFunction(name) && name != "strftime_now") return Callable{nullptr, "a function"};
    return Value::MakeUndefined(fmt::format("'{}' is undefined", name));
  }

  // Expressions.

  Value Evaluate(const ExpressionPtr& expression, const Scope& scope) {
    const Level level(*this);
    budget_.Charge(1);
    line_ = expression->line;
    return std::visit([&](const auto& node) { return Get(node, scope); }, expression->node);
  }

  std::optional<Value> EvaluateIfAny(const ExpressionPtr& expression, const Scope& scope) {
    if (!expression) return std::nullopt;
    return Evaluate(expression, scope);
  }

  Value Get(const Literal& literal, const Scope&) { return literal.value; }
  Value Get(const Name& name, const Scope& scope) { return Lookup(name.name, scope); }

  Value Get(const ListLiteral& list, const Scope& scope) {
    return Value::Of(list.kind, EvaluateAll(list.items, scope));
  }

  Items EvaluateAll(const std::vector<ExpressionPtr>& expressions, const Scope& scope) {
    Items values;
    values.reserve(expressions.size());
    for (const ExpressionPtr& expression : expressions) {
      values.push_back(Evaluate(expression, scope));
    }
    return values;
  }

  Value Get(const DictLiteral& dict, const Scope& scope) {
    std::vector<std::pair<Value, Value>> entries;
    for (const auto& [key, value] : dict.entries) {
      Value evaluated_key = Evaluate(key, scope);
      Insert(entries, std::move(evaluated_key), Evaluate(value, scope), budget_);
    }
    return Value::MakeDict(std::move(entries));
  }

  Value Get(const Not& node, const Scope& scope) { return !Evaluate(node.operand, scope).Truth(); }

  Value Get(const Sign& node, const Scope& scope) {
    const Value operand = Evaluate(node.operand, scope);
    if (node.negative) return Negate(operand);
    return Apply(Arithmetic::kAdd, int64_t{0}, operand, budget_);
  }

  Value Get(const Binary& node, const Scope& scope) {
    const Value left = Evaluate(node.left, scope);
    return Apply(node.op, left, Evaluate(node.right, scope), budget_);
  }

  Value Get(const Concatenation& node, const Scope& scope) {
    Text text = Str(Evaluate(node.left, scope), budget_);
    text.Append(Str(Evaluate(node.right, scope), budget_));
    budget_.ChargeBytes(text.size());
    return text;
  }

  Value Get(const Logic& node, const Scope& scope) {
    Value left = Evaluate(node.left, scope);
    return left.Truth() == node.is_and ? Evaluate(node.right, scope) : left;
  }

  Value Get(const ComparisonChain& chain, const Scope& scope) {
    Value left = Evaluate(chain.first, scope);
    for (const auto& [op, operand] : chain.rest) {
      Value right = Evaluate(operand, scope);
      if (!Compare(op, left, right, budget_)) return false;
      left = std::move(right);
    }
    return true;
  }

  Value Get(const Conditional& node, const Scope& scope) {
    if (Evaluate(node.test, scope).Truth()) return Evaluate(node.then, scope);
    if (node.otherwise) return Evaluate(node.otherwise, scope);
    return Value::MakeUndefined("an 'if' without 'else' was false");
  }

  Value Get(const Attribute& node, const Scope& scope) {
    return GetAttribute(Evaluate(node.object, scope), node.name, budget_);
  }

  Value Get(const Subscript& node, const Scope& scope) {
    const Value object = Evaluate(node.object, scope);
    return GetItem(object, Evaluate(node.key, scope), budget_);
  }

  Value Get(const SliceOf& node, const Scope& scope) {
    const Value object = Evaluate(node.object, scope);
    const auto start = EvaluateIfAny(node.start, scope);
    const auto stop = EvaluateIfAny(node.stop, scope);
    return Slice(object, start, stop, EvaluateIfAny(node.step, scope), budget_);
  }

  Value Get(const BuiltinCall& node, const Scope& scope) {
    const Value subject = Evaluate(node.subject, scope);
    ChargeReading(subject);
    std::vector<std::optional<Value>> arguments;
    for (const ExpressionPtr& argument : node.arguments) {
      arguments.push_back(EvaluateIfAny(argument, scope));
      if (arguments.back()) ChargeReading(*arguments.back());
    }
    return node.builtin->apply(subject, arguments, budget_);
  }

  // Builtins read, and often copy, all of a string.
  void ChargeReading(const Value& value) {
    if (value.IsString()) budget_.ChargeBytes(value.text().size());
  }

  // Functions and macros.

  using Keywords = std::vector<std::pair<std::string_view, Value>>;

  Value Get(const FunctionCall& call, const Scope& scope) {
    const Value callee = Lookup(call.name, scope);
    Items positional = EvaluateAll(call.positional, scope);
    Keywords keywords;
    for (const auto& [name, value] : call.keywords) {
      keywords.emplace_back(name, Evaluate(value, scope));
    }
    const Macro* macro = callee.Is(Kind::kCallable) ? callee.callable().macro : nullptr;
    if (macro != nullptr) return CallMacro(*macro, std::move(positional), std::move(keywords));
    if (call.name == "strftime_now") Fail("strftime_now needs a clock, which is not given here");
    if (callee.IsUndefined()) Fail(callee.reason());
    if (!callee.Is(Kind::kCallable) || !IsFunction(call.name)) {
      Fail(fmt::format("'{}' cannot be called", call.name));
    }
    return CallFunction(call.name, positional, keywords);
  }

  Value CallMacro(const Macro& macro, Items positional, Keywords keywords) {
    if (positional.size() > macro.parameters.size()) {
      Fail(fmt::format("macro '{}' takes at most {} arguments", macro.name,
                       macro.parameters.size()));
    }
    // Macros are defined outside of all loops, so they see the template's variables and their own.
    Scope scope{{}, &template_};
    for (size_t i = 0; i < macro.parameters.size(); ++i) {
      const auto& [name, fallback] = macro.parameters[i];
      const auto keyword = std::find_if(keywords.begin(), keywords.end(),
                                        [&](const auto& k) { return k.first == name; });
      if (i < positional.size()) {
        scope.variables[name] = std::move(positional[i]);
      } else if (keyword != keywords.end()) {
        scope.variables[name] = std::move(keyword->second);
        keywords.erase(keyword);
      } else if (fallback) {
        scope.variables[name] = Evaluate(fallback, scope);
      } else {
        scope.variables[name] =
            Value::MakeUndefined(fmt::format("parameter '{}' was not provided", name));
      }
    }
    if (!keywords.empty()) {
      Fail(fmt::format("macro '{}' takes no keyword argument '{}'", macro.name,
                       keywords.front().first));
    }
    return Capture(macro.body, scope);
  }

  Value CallFunction(std::string_view name, const Items& positional, const Keywords& keywords) {
    if (name == "dict") return Value::MakeDict(CollectEntries(name, positional, keywords));
    if (name == "namespace") return MakeNamespace(CollectEntries(name, positional, keywords));
    if (!keywords.empty()) Fail(fmt::format("{}() takes no keyword arguments", name));
    if (name == "range") return MakeRange(positional);
    if (positional.size() != 1) Fail("raise_exception() takes one argument");
    quotes_template_ = true;
    Fail(std::string(Str(positional[0], budget_).bytes()));
  }

  // The entries of dict(d, key=value, ...).
  std::vector<std::pair<Value, Value>> CollectEntries(std::string_view name,
                                                      const Items& positional,
                                                      const Keywords& keywords) {
    std::vector<std::pair<Value, Value>> entries;
    if (positional.size() > 1 || (!positional.empty() && !positional[0].Is(Kind::kDict))) {
      Fail(fmt::format("{}() takes one dict and keyword arguments", name));
    }
    if (!positional.empty()) {
      budget_.ChargeItems(positional[0].dict().entries.size());
      entries = positional[0].dict().entries;
    }
    for (const auto& [key, value] : keywords) {
      Insert(entries, Value::String(key), value, budget_);
    }
    return entries;
  }

  Value MakeNamespace(const std::vector<std::pair<Value, Value>>& entries) {
    budget_.Charge(4);
    Namespace& made = namespaces_.emplace_back();
    for (const auto& [key, value] : entries) {
      if (key.IsString()) made.attributes[std::string(key.bytes())] = value;
    }
    return &made;
  }

  Value MakeRange(const Items& bounds) {
    if (bounds.empty() || bounds.size() > 3) Fail("range() takes one to three arguments");
    for (const Value& bound : bounds) {
      if (bound.IsUndefined()) Fail(bound.reason());
      if (!bound.IsInteger()) Fail(fmt::format("range() of a {}", bound.Noun()));
    }
    const int64_t start = bounds.size() > 1 ? bounds[0].integer() : 0;
    const int64_t stop = bounds[bounds.size() > 1 ? 1 : 0].integer();
    const int64_t step = bounds.size() > 2 ? bounds[2].integer() : 1;
    if (step == 0) Fail("range() with step 0");
    Items items;
    for (int64_t i = start; step > 0 ? i < stop : i > stop;) {
      if (static_cast<int64_t>(items.size()) == kMaxRange) {
        Fail(fmt::format("a range of over {} numbers", kMaxRange));
      }
      items.push_back(i);
      if (__builtin_add_overflow(i, step, &i)) break;
    }
    budget_.Charge(items.size());
    return Value::Of(Kind::kRange, std::move(items));
  }

  Budget budget_;
  std::deque<Namespace> namespaces_;
  Scope globals_;
  Scope template_{{}, &globals_};
  Text out_;
  int depth_ = 0;
  int line_ = 0;
  bool quotes_template_ = false;  // the failure's message is raise_exception's
};

}  // namespace

Text Interpret(const Body& body, const Value& context) { return Interpreter().Run(body, context); }

}  // namespace espalier::jinja
