#include "engine/model/chat/operators.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <compare>

#include "engine/model/chat/format.h"

namespace espalier::jinja {

namespace {

constexpr std::string_view kSymbols[] = {"+", "-", "*", "/", "//", "%", "**"};

[[noreturn]] void FailOperands(std::string_view symbol, const Value& left, const Value& right) {
  for (const Value* operand : {&left, &right}) {
    if (operand->IsUndefined()) Fail(operand->reason());
  }
  Fail(fmt::format("unsupported operands for {}: {} and {}", symbol, left.Noun(), right.Noun()));
}

[[noreturn]] void FailOverflow() { Fail("an integer leaves the range of 64 bits"); }

int64_t FloorDivide(int64_t a, int64_t b) {
  if (a == INT64_MIN && b == -1) FailOverflow();
  return a / b - (a % b != 0 && (a < 0) != (b < 0));
}

double FloorModulo(double a, double b) {
  const double remainder = std::fmod(a, b);
  if (remainder == 0) return std::copysign(0.0, b);
  return (remainder < 0) != (b < 0) ? remainder + b : remainder;
}

// As CPython: from the exact remainder, so that the quotient cannot round to the wrong side.
double FloorDivide(double a, double b) {
  const double quotient = (a - FloorModulo(a, b)) / b;
  if (quotient == 0) return std::copysign(0.0, a / b);
  const double floor = std::floor(quotient);
  return quotient - floor > 0.5 ? floor + 1 : floor;
}

int64_t IntegerPower(int64_t base, int64_t exponent) {
  int64_t result = 1;
  while (exponent > 0) {
    if (exponent & 1 && __builtin_mul_overflow(result, base, &result)) FailOverflow();
    exponent >>= 1;
    if (exponent > 0 && __builtin_mul_overflow(base, base, &base)) FailOverflow();
  }
  return result;
}

Value ApplyIntegers(Arithmetic op, int64_t a, int64_t b) {
  int64_t result = 0;
  switch (op) {
    case Arithmetic::kAdd:
      if (__builtin_add_overflow(a, b, &result)) FailOverflow();
      return result;
    case Arithmetic::kSubtract:
      if (__builtin_sub_overflow(a, b, &result)) FailOverflow();
      return result;
    case Arithmetic::kMultiply:
      if (__builtin_mul_overflow(a, b, &result)) FailOverflow();
      return result;
    case Arithmetic::kDivide:
      return static_cast<double>(a) / static_cast<double>(b);
    case Arithmetic::kFloorDivide:
      return FloorDivide(a, b);
    case Arithmetic::kModulo:
      return b == -1 ? int64_t{0} : a - b * FloorDivide(a, b);
    case Arithmetic::kPower:
      if (b < 0) return std::pow(static_cast<double>(a), static_cast<double>(b));
      return IntegerPower(a, b);
  }
  return result;
}

Value ApplyFloats(Arithmetic op, double a, double b) {
  switch (op) {
    case Arithmetic::kAdd:
      return a + b;
    case Arithmetic::kSubtract:
      return a - b;
    case Arithmetic::kMultiply:
      return a * b;
    case Arithmetic::kDivide:
      return a / b;
    case Arithmetic::kFloorDivide:
      return FloorDivide(a, b);
    case Arithmetic::kModulo:
      return FloorModulo(a, b);
    case Arithmetic::kPower:
      break;
  }
  const double power = std::pow(a, b);
  if (!std::isfinite(power) && std::isfinite(a) && std::isfinite(b)) {
    Fail("the result of ** is no finite real number");
  }
  return power;
}

Value ApplyNumbers(Arithmetic op, const Value& left, const Value& right) {
  const bool divides =
      op == Arithmetic::kDivide || op == Arithmetic::kFloorDivide || op == Arithmetic::kModulo;
  const bool inverts = op == Arithmetic::kPower && left.number() == 0 && right.number() < 0;
  if ((divides && right.number() == 0) || inverts) Fail("division by zero");
  if (left.IsInteger() && right.IsInteger()) {
    return ApplyIntegers(op, left.integer(), right.integer());
  }
  return ApplyFloats(op, left.number(), right.number());
}

bool IsListOrTuple(const Value& v) { return v.Is(Kind::kList) || v.Is(Kind::kTuple); }

Value Repeat(const Value& what, int64_t times, Budget& budget) {
  const size_t count = static_cast<size_t>(std::max<int64_t>(times, 0));
  if (what.IsString()) {
    const size_t size = what.text().size();
    if (size > 0 && count > kMaxText / size) FailBound("the text grows beyond 16 MiB");
    budget.Charge(size > 0 ? count : 0);
    Text result;
    for (size_t i = 0; size > 0 && i < count; ++i) result.Append(what.text());
    budget.ChargeBytes(result.size());
    return result;
  }
  const Items& items = what.items();
  if (!items.empty() && count > kMaxSteps / items.size()) FailBound("the list grows too long");
  budget.ChargeItems(items.size() * count);
  Items result;
  for (size_t i = 0; !items.empty() && i < count; ++i) {
    result.insert(result.end(), items.begin(), items.end());
  }
  return Value::Of(what.kind(), std::move(result));
}

std::partial_ordering OrderNumbers(const Value& left, const Value& right) {
  if (left.IsInteger() && right.IsInteger()) return left.integer() <=> right.integer();
  // long double holds every int64 exactly on x86-64, so mixed comparisons are Python's exact ones.
  const auto exact = [](const Value& v) {
    return v.IsInteger() ? static_cast<long double>(v.integer())
                         : static_cast<long double>(v.number());
  };
  return exact(left) <=> exact(right);
}

std::partial_ordering Order(const Value& left, const Value& right, std::string_view symbol,
                            Budget& budget) {
  budget.Charge(1);
  if (left.IsNumber() && right.IsNumber()) return OrderNumbers(left, right);
  if (left.IsString() && right.IsString()) {
    budget.ChargeBytes(std::min(left.text().size(), right.text().size()));
    return left.bytes().compare(right.bytes()) <=> 0;
  }
  if (!IsListOrTuple(left) || left.kind() != right.kind()) FailOperands(symbol, left, right);
  const size_t common = std::min(left.items().size(), right.items().size());
  for (size_t i = 0; i < common; ++i) {
    if (!Equal(left.items()[i], right.items()[i], budget)) {
      return Order(left.items()[i], right.items()[i], symbol, budget);
    }
  }
  return left.items().size() <=> right.items().size();
}

bool Contains(const Value& container, const Value& item, Budget& budget) {
  if (container.IsString()) {
    if (!item.IsString()) FailOperands("in", item, container);
    budget.ChargeBytes(container.text().size() + item.text().size());
    return container.bytes().find(item.bytes()) != std::string_view::npos;
  }
  if (container.Is(Kind::kDict)) {
    if (item.Is(Kind::kList) || item.Is(Kind::kDict)) FailOperands("in", item, container);
    return Find(container.dict(), item, budget) != nullptr;
  }
  const auto items = Iterate(container, budget);
  return std::any_of(items->begin(), items->end(),
                     [&](const Value& v) { return Equal(v, item, budget); });
}

}  // namespace

Value Apply(Arithmetic op, const Value& left, const Value& right, Budget& budget) {
  if (left.IsNumber() && right.IsNumber()) return ApplyNumbers(op, left, right);
  if (op == Arithmetic::kAdd && left.IsString() && right.IsString()) {
    Text result = left.text();
    result.Append(right.text());
    budget.ChargeBytes(result.size());
    return result;
  }
  if (op == Arithmetic::kAdd && IsListOrTuple(left) && left.kind() == right.kind()) {
    budget.ChargeItems(left.items().size() + right.items().size());
    Items items = left.items();
    items.insert(items.end(), right.items().begin(), right.items().end());
    return Value::Of(left.kind(), std::move(items));
  }
  const auto repeatable = [](const Value& v) { return v.IsString() || IsListOrTuple(v); };
  if (op == Arithmetic::kMultiply) {
    if (repeatable(left) && right.IsInteger()) return Repeat(left, right.integer(), budget);
    if (left.IsInteger() && repeatable(right)) return Repeat(right, left.integer(), budget);
  }
  if (op == Arithmetic::kModulo && left.IsString()) Fail("'%' on strings is not supported");
  FailOperands(kSymbols[static_cast<int>(op)], left, right);
}

Value Negate(const Value& operand) {
  if (operand.Is(Kind::kFloat)) return -operand.number();
  if (operand.IsInteger()) {
    return ApplyIntegers(Arithmetic::kSubtract, 0, operand.integer());
  }
  if (operand.IsUndefined()) Fail(operand.reason());
  Fail(fmt::format("bad operand for unary -: {}", operand.Noun()));
}

bool Compare(Comparison op, const Value& left, const Value& right, Budget& budget) {
  switch (op) {
    case Comparison::kEqual:
      return Equal(left, right, budget);
    case Comparison::kNotEqual:
      return !Equal(left, right, budget);
    case Comparison::kLess:
      return Order(left, right, "<", budget) < 0;
    case Comparison::kLessEqual:
      return Order(left, right, "<=", budget) <= 0;
    case Comparison::kGreater:
      return Order(left, right, ">", budget) > 0;
    case Comparison::kGreaterEqual:
      return Order(left, right, ">=", budget) >= 0;
    case Comparison::kIn:
      return Contains(right, left, budget);
    case Comparison::kNotIn:
      return !Contains(right, left, budget);
  }
  return false;
}

bool Equal(const Value& left, const Value& right, Budget& budget) {
  budget.Charge(1);
  if (left.IsNumber() && right.IsNumber()) return OrderNumbers(left, right) == 0;
  if (left.kind() != right.kind()) return false;
  switch (left.kind()) {
    case Kind::kString:
      budget.ChargeBytes(left.text().size());
      return left.bytes() == right.bytes();
    case Kind::kList:
    case Kind::kTuple:
    case Kind::kRange:
      return std::equal(left.items().begin(), left.items().end(), right.items().begin(),
                        right.items().end(),
                        [&](const Value& a, const Value& b) { return Equal(a, b, budget); });
    case Kind::kDict: {
      const Dict& other = right.dict();
      if (left.dict().entries.size() != other.entries.size()) return false;
      for (const auto& [key, value] : left.dict().entries) {
        const Value* match = Find(other, key, budget);
        if (match == nullptr || !Equal(value, *match, budget)) return false;
      }
      return true;
    }
    case Kind::kView:
    case Kind::kGenerator:
      return &left.sequence() == &right.sequence();
    case Kind::kNamespace:
      return left.ns() == right.ns();
    case Kind::kLoop:
      return &left.loop() == &right.loop();
    case Kind::kCallable:
      return left.callable().macro == right.callable().macro &&
             left.callable().name == right.callable().name;
    default:  // undefined, none
      return true;
  }
}

const Value* Find(const Dict& dict, const Value& key, Budget& budget) {
  for (const auto& [candidate, value] : dict.entries) {
    if (Equal(candidate, key, budget)) return &value;
  }
  return nullptr;
}

void Insert(std::vector<std::pair<Value, Value>>& entries, Value key, Value value, Budget& budget) {
  if (key.Depth() > 0 && !key.Is(Kind::kTuple)) {
    Fail(fmt::format("a {} cannot be a key", key.Noun()));
  }
  for (auto& [candidate, old_value] : entries) {
    if (Equal(candidate, key, budget)) {
      old_value = std::move(value);
      return;
    }
  }
  entries.emplace_back(std::move(key), std::move(value));
}

size_t Length(const Value& value, Budget& budget) {
  switch (value.kind()) {
    case Kind::kUndefined:
      return 0;
    case Kind::kString:
      budget.ChargeBytes(value.text().size());
      return CodePointCount(value.bytes());
    case Kind::kList:
    case Kind::kTuple:
    case Kind::kRange:
    case Kind::kView:
      return value.items().size();
    case Kind::kDict:
      return value.dict().entries.size();
    case Kind::kLoop:
      return value.loop().items->size();
    default:
      Fail(fmt::format("{} has no length", value.Noun()));
  }
}

std::shared_ptr<const Items> Iterate(const Value& value, Budget& budget) {
  auto items = std::make_shared<Items>();
  switch (value.kind()) {
    case Kind::kUndefined:
      return items;
    case Kind::kString: {
      budget.ChargeItems(CodePointCount(value.bytes()));
      const std::vector<size_t> begins = CodePointBegins(value.bytes());
      for (const size_t begin : begins) {
        items->push_back(value.text().Substr(begin, CodePointEnd(value.bytes(), begin)));
      }
      return items;
    }
    case Kind::kGenerator:
      if (std::exchange(value.sequence().exhausted, true)) return items;
      return value.shared_items();
    case Kind::kList:
    case Kind::kTuple:
    case Kind::kRange:
    case Kind::kView:
      return value.shared_items();
    case Kind::kDict:
      budget.ChargeItems(value.dict().entries.size());
      for (const auto& [key, entry] : value.dict().entries) items->push_back(key);
      return items;
    default:
      Fail(fmt::format("{} is not iterable", value.Noun()));
  }
}

namespace {

// Methods that Python's objects have and the sandbox lets a template see. Unless called they are
// just something defined and true that hides an item of the same name.
constexpr std::string_view kDictMethods = " copy fromkeys get items keys values ";
constexpr std::string_view kDictMutators = " clear pop popitem setdefault update ";
constexpr std::string_view kListMethods = " copy count index ";
constexpr std::string_view kStringMethods =
    " capitalize casefold center count encode endswith expandtabs find format format_map index "
    "isalnum isalpha isascii isdecimal isdigit isidentifier islower isnumeric isprintable isspace "
    "istitle isupper join ljust lower lstrip maketrans partition removeprefix removesuffix replace "
    "rfind rindex rjust rpartition rsplit rstrip split splitlines startswith strip swapcase title "
    "translate upper zfill ";

bool Lists(std::string_view names, std::string_view name) {
  constexpr size_t kLongest = 12;  // of all names listed
  return name.size() <= kLongest && names.find(fmt::format(" {} ", name)) != std::string_view::npos;
}

Value LoopAttribute(const Loop& loop, std::string_view name) {
  const int64_t index0 = static_cast<int64_t>(loop.index0);
  const int64_t length = static_cast<int64_t>(loop.items->size());
  if (name == "index") return index0 + 1;
  if (name == "index0") return index0;
  if (name == "revindex") return length - index0;
  if (name == "revindex0") return length - index0 - 1;
  if (name == "first") return index0 == 0;
  if (name == "last") return index0 + 1 == length;
  if (name == "length") return length;
  if (name == "depth") return int64_t{1};
  if (name == "depth0") return int64_t{0};
  if (name == "previtem") {
    if (index0 == 0) return Value::MakeUndefined("there is no previous item");
    return (*loop.items)[loop.index0 - 1];
  }
  if (name == "nextitem") {
    if (index0 + 1 == length) return Value::MakeUndefined("there is no next item");
    return (*loop.items)[loop.index0 + 1];
  }
  if (name == "cycle" || name == "changed") return Callable{nullptr, "loop.cycle"};
  return Value::MakeUndefined(fmt::format("'loop' has no attribute '{}'", name.substr(0, 100)));
}

// An attribute in Python's sense; null if the object has none of that name.
std::optional<Value> PythonAttribute(const Value& object, std::string_view name) {
  switch (object.kind()) {
    case Kind::kNamespace: {
      const auto found = object.ns()->attributes.find(name);
      if (found != object.ns()->attributes.end()) return found->second;
      return std::nullopt;
    }
    case Kind::kLoop:
      return LoopAttribute(object.loop(), name);
    case Kind::kDict:
      if (Lists(kDictMutators, name)) {
        return Value::MakeUndefined(fmt::format("'{}' would change a dict", name));
      }
      if (Lists(kDictMethods, name)) return Callable{nullptr, "a method of a dict"};
      return std::nullopt;
    case Kind::kList:
      if (Lists(kListMethods, name)) return Callable{nullptr, "a method of a list"};
      return std::nullopt;
    case Kind::kString:
      if (Lists(kStringMethods, name)) return Callable{nullptr, "a method of a string"};
      return std::nullopt;
    default:
      return std::nullopt;
  }
}

bool IsIndexable(const Value& v) { return IsListOrTuple(v) || v.Is(Kind::kRange); }

// Null if the object has no item of that key.
std::optional<Value> Item(const Value& object, const Value& key, Budget& budget) {
  if (object.Is(Kind::kDict)) {
    const Value* found = Find(object.dict(), key, budget);
    return found == nullptr ? std::nullopt : std::optional(*found);
  }
  if (!key.IsInteger() || !(IsIndexable(object) || object.IsString())) return std::nullopt;
  const int64_t length = static_cast<int64_t>(Length(object, budget));
  int64_t index = key.integer();
  if (index < 0) index += length;
  if (index < 0 || index >= length) return std::nullopt;
  if (IsIndexable(object)) return object.items()[index];
  size_t begin = 0;
  while (index-- > 0) begin = CodePointEnd(object.bytes(), begin);
  return object.text().Substr(begin, CodePointEnd(object.bytes(), begin));
}

}  // namespace

Value GetAttribute(const Value& object, std::string_view name, Budget& budget) {
  if (object.IsUndefined()) Fail(object.reason());
  if (auto attribute = PythonAttribute(object, name)) return *std::move(attribute);
  if (object.Is(Kind::kDict)) {
    if (auto item = Item(object, Value::String(name), budget)) return *std::move(item);
  }
  return Value::MakeUndefined(fmt::format("'{}' has no attribute '{}'", object.Noun(), name));
}

Value GetItem(const Value& object, const Value& key, Budget& budget) {
  if (object.IsUndefined()) Fail(object.reason());
  if (auto item = Item(object, key, budget)) return *std::move(item);
  if (key.IsString()) {
    if (auto attribute = PythonAttribute(object, key.bytes())) return *std::move(attribute);
    return Value::MakeUndefined(
        fmt::format("'{}' has no attribute '{}'", object.Noun(), key.bytes().substr(0, 100)));
  }
  const std::string name = key.IsInteger() ? std::to_string(key.integer()) : "of that key";
  return Value::MakeUndefined(fmt::format("{} has no element {}", object.Noun(), name));
}

Value Slice(const Value& object, const std::optional<Value>& start,
            const std::optional<Value>& stop, const std::optional<Value>& step, Budget& budget) {
  if (object.IsUndefined()) Fail(object.reason());
  if (!IsIndexable(object) && !object.IsString()) {
    Fail(fmt::format("{} cannot be sliced", object.Noun()));
  }
  const auto bound = [](const std::optional<Value>& v) -> std::optional<int64_t> {
    if (!v || v->Is(Kind::kNone)) return std::nullopt;
    if (!v->IsInteger()) Fail(fmt::format("a slice's bound is a {}", v->Noun()));
    return v->integer();
  };
  const int64_t by = bound(step).value_or(1);
  if (by == 0) Fail("a slice's step is zero");

  const bool is_string = object.IsString();
  budget.Charge(is_string ? object.text().size() / 8 : object.items().size());
  const std::vector<size_t> begins =
      is_string ? CodePointBegins(object.bytes()) : std::vector<size_t>();
  const int64_t length = static_cast<int64_t>(is_string ? begins.size() : object.items().size());
  const int64_t lowest = by > 0 ? 0 : -1;
  const int64_t highest = by > 0 ? length : length - 1;
  const auto clamp = [&](std::optional<int64_t> i, int64_t absent) {
    if (!i) return absent;
    return std::clamp(*i < 0 ? *i + length : *i, lowest, highest);
  };
  const int64_t first = clamp(bound(start), by > 0 ? lowest : highest);
  const int64_t last = clamp(bound(stop), by > 0 ? highest : lowest);

  Text text;
  Items items;
  for (int64_t i = first; by > 0 ? i < last : i > last;) {
    if (is_string) {
      const size_t run_end = by == 1 ? last : i + 1;  // a plain slice is one stretch of bytes
      text.Append(object.text(), begins[i],
                  run_end < begins.size() ? begins[run_end] : object.text().size());
      if (by == 1) break;
    } else {
      items.push_back(object.items()[i]);
    }
    if (__builtin_add_overflow(i, by, &i)) break;
  }
  if (is_string) return text;
  return Value::Of(object.kind(), std::move(items));
}

}  // namespace espalier::jinja
