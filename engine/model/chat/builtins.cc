#include "engine/model/chat/builtins.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>

#include "engine/model/chat/format.h"
#include "engine/model/chat/operators.h"
#include "engine/model/chat/strings.h"

namespace espalier::jinja {

namespace {

const Builtin* FindIn(std::span<const Builtin> table, std::string_view name) {
  const auto found = std::find_if(table.begin(), table.end(),
                                  [&](const Builtin& builtin) { return builtin.name == name; });
  return found == table.end() ? nullptr : &*found;
}

bool GivenTrue(const std::optional<Value>& argument) { return argument && argument->Truth(); }

// Tests.

template <Kind... kinds>
Value IsOneOf(const Value& v, Arguments, Budget&) {
  return (v.Is(kinds) || ...);
}

template <Comparison op>
Value Compares(const Value& v, Arguments a, Budget& budget) {
  return Compare(op, v, *a[0], budget);
}

Value IsDefined(const Value& v, Arguments, Budget&) { return !v.IsUndefined(); }
Value IsTrue(const Value& v, Arguments, Budget&) { return v.Is(Kind::kBool) && v.boolean(); }
Value IsFalse(const Value& v, Arguments, Budget&) { return v.Is(Kind::kBool) && !v.boolean(); }

Value IsIterable(const Value& v, Arguments, Budget&) {
  return v.IsUndefined() || v.IsString() || v.IsSequence() || v.Is(Kind::kDict) ||
         v.Is(Kind::kLoop);
}

Value IsSequence(const Value& v, Arguments, Budget&) {
  return v.IsUndefined() || v.IsString() || v.Is(Kind::kDict) || v.Is(Kind::kList) ||
         v.Is(Kind::kTuple) || v.Is(Kind::kRange);
}

Value HasRemainder(const Value& v, const Value& divisor, int64_t remainder, Budget& budget) {
  return Equal(Apply(Arithmetic::kModulo, v, divisor, budget), remainder, budget);
}
Value IsOdd(const Value& v, Arguments, Budget& b) { return HasRemainder(v, int64_t{2}, 1, b); }
Value IsEven(const Value& v, Arguments, Budget& b) { return HasRemainder(v, int64_t{2}, 0, b); }
Value IsDivisible(const Value& v, Arguments a, Budget& b) { return HasRemainder(v, *a[0], 0, b); }

// The order of the rows means nothing.
constexpr Builtin kTests[] = {
    {"defined", IsDefined},
    {"undefined", IsOneOf<Kind::kUndefined>},
    {"none", IsOneOf<Kind::kNone>},
    {"boolean", IsOneOf<Kind::kBool>},
    {"true", IsTrue},
    {"false", IsFalse},
    {"integer", IsOneOf<Kind::kInt>},
    {"float", IsOneOf<Kind::kFloat>},
    {"number", IsOneOf<Kind::kBool, Kind::kInt, Kind::kFloat>},
    {"string", IsOneOf<Kind::kString>},
    {"mapping", IsOneOf<Kind::kDict>},
    {"iterable", IsIterable},
    {"sequence", IsSequence},
    {"odd", IsOdd},
    {"even", IsEven},
    {"divisibleby", IsDivisible, 1, 1, {"num"}},
    {"==", Compares<Comparison::kEqual>, 1, 1},
    {"eq", Compares<Comparison::kEqual>, 1, 1},
    {"equalto", Compares<Comparison::kEqual>, 1, 1},
    {"!=", Compares<Comparison::kNotEqual>, 1, 1},
    {"ne", Compares<Comparison::kNotEqual>, 1, 1},
    {"<", Compares<Comparison::kLess>, 1, 1},
    {"lt", Compares<Comparison::kLess>, 1, 1},
    {"lessthan", Compares<Comparison::kLess>, 1, 1},
    {"<=", Compares<Comparison::kLessEqual>, 1, 1},
    {"le", Compares<Comparison::kLessEqual>, 1, 1},
    {">", Compares<Comparison::kGreater>, 1, 1},
    {"gt", Compares<Comparison::kGreater>, 1, 1},
    {"greaterthan", Compares<Comparison::kGreater>, 1, 1},
    {">=", Compares<Comparison::kGreaterEqual>, 1, 1},
    {"ge", Compares<Comparison::kGreaterEqual>, 1, 1},
    {"in", Compares<Comparison::kIn>, 1, 1, {"seq"}},
};

// Filters on any value.

Value Default(const Value& v, Arguments a, Budget&) {
  const bool missing = v.IsUndefined() || (GivenTrue(a[1]) && !v.Truth());
  return missing ? a[0].value_or(Value::String("")) : v;
}

Value Count(const Value& v, Arguments, Budget& budget) {
  return static_cast<int64_t>(Length(v, budget));
}

Value ToText(const Value& v, Arguments, Budget& budget) { return Str(v, budget); }

// A number as int() and float() of Python read a string: white space around it is ignored. Nothing
// if it is none; fails for the rarer spellings that Python knows.
template <typename Number>
std::optional<Number> Read(std::string_view s) {
  const Span span = Strip(s, nullptr, true, true);
  s = s.substr(span.begin, span.end - span.begin);
  if (!IsAscii(s) || s.find('_') != std::string_view::npos) {
    Fail("a number with underscores or non-ASCII characters is not supported");
  }
  if (s.starts_with('+') && !s.starts_with("+-")) s.remove_prefix(1);
  Number number{};
  const auto [end, error] = std::from_chars(s.data(), s.data() + s.size(), number);
  if (error == std::errc::result_out_of_range) Fail("a number leaves the range of 64 bits");
  if (error != std::errc() || end != s.data() + s.size()) return std::nullopt;
  return number;
}

int64_t Truncate(double number) {
  if (!(std::abs(number) < 9.2e18)) Fail("a number leaves the range of 64 bits");
  return static_cast<int64_t>(number);
}

Value ToInteger(const Value& v, Arguments a, Budget&) {
  if (v.IsUndefined()) Fail(v.reason());
  if (v.IsInteger()) return v.integer();
  const Value fallback = a[0].value_or(int64_t{0});
  if (v.IsString()) {
    if (const auto integer = Read<int64_t>(v.bytes())) return *integer;
  }
  const auto number = v.Is(Kind::kFloat) ? v.number()
                      : v.IsString()     ? Read<double>(v.bytes())
                                         : std::nullopt;
  if (!number || std::isnan(*number)) return fallback;
  return Truncate(*number);
}

Value ToFloat(const Value& v, Arguments a, Budget&) {
  if (v.IsUndefined()) Fail(v.reason());
  if (v.IsNumber()) return v.number();
  const auto number = v.IsString() ? Read<double>(v.bytes()) : std::nullopt;
  return number ? Value(*number) : a[0].value_or(0.0);
}

Value ToJsonText(const Value& v, Arguments a, Budget& budget) {
  JsonStyle style;
  style.ensure_ascii = GivenTrue(a[0]);
  if (a[1] && !a[1]->Is(Kind::kNone)) {
    if (!a[1]->IsInteger() || a[1]->integer() > 100) Fail("tojson: indent is no number up to 100");
    style.indent = std::max<int64_t>(a[1]->integer(), 0);
    style.item_separator = Text(",");
  }
  if (a[2] && !a[2]->Is(Kind::kNone)) {
    const auto separators = Iterate(*a[2], budget);
    if (separators->size() != 2 || !separators->front().IsString() ||
        !separators->back().IsString()) {
      Fail("tojson: separators are not two strings");
    }
    style.item_separator = separators->front().text();
    style.key_separator = separators->back().text();
  }
  style.sort_keys = GivenTrue(a[3]);
  return ToJson(v, style, budget);
}

// Filters on sequences.

Value ToList(const Value& v, Arguments, Budget& budget) {
  const auto items = Iterate(v, budget);
  budget.ChargeItems(items->size());
  return Value::List(*items);
}

Value First(const Value& v, Arguments, Budget& budget) {
  const auto items = Iterate(v, budget);
  return items->empty() ? Value::MakeUndefined("there is no first item") : items->front();
}

Value Last(const Value& v, Arguments, Budget& budget) {
  if (v.Is(Kind::kGenerator)) Fail("a generator object has no last item");
  const auto items = Iterate(v, budget);
  return items->empty() ? Value::MakeUndefined("there is no last item") : items->back();
}

Value Reverse(const Value& v, Arguments, Budget& budget) {
  if (v.IsString()) return Slice(v, std::nullopt, std::nullopt, int64_t{-1}, budget);
  const auto items = Iterate(v, budget);
  budget.ChargeItems(items->size());
  return Value::Of(Kind::kGenerator, Items(items->rbegin(), items->rend()));
}

Items PairsOf(const Dict& dict, Budget& budget) {
  budget.ChargeItems(2 * dict.entries.size());
  Items pairs;
  for (const auto& [key, value] : dict.entries) {
    pairs.push_back(Value::Of(Kind::kTuple, {key, value}));
  }
  return pairs;
}

Value ItemPairs(const Value& v, Arguments, Budget& budget) {
  if (v.IsUndefined()) return Value::Of(Kind::kGenerator, {});
  if (!v.Is(Kind::kDict)) Fail(fmt::format("{} has no items", v.Noun()));
  return Value::Of(Kind::kGenerator, PairsOf(v.dict(), budget));
}

// What path leads to: items of items, as in "function.name" or "0.role". Whatever is undefined on
// the way is replaced by the fallback, if there is one.
Value Follow(Value object, const Value& path, const std::optional<Value>& fallback,
             Budget& budget) {
  const auto step = [&](const Value& key) {
    object = GetItem(object, key, budget);
    if (object.IsUndefined() && fallback && !fallback->Is(Kind::kNone)) object = *fallback;
  };
  if (!path.IsString()) {
    step(path);
    return object;
  }
  std::string_view rest = path.bytes();
  while (true) {
    const size_t dot = rest.find('.');
    const std::string_view part = rest.substr(0, dot);
    const bool is_index = !part.empty() && part.size() < 10 &&
                          part.find_first_not_of("0123456789") == std::string_view::npos;
    step(is_index ? Value(*Read<int64_t>(part)) : Value::String(part));
    if (dot == std::string_view::npos) return object;
    rest.remove_prefix(dot + 1);
  }
}

Value Join(const Value& v, Arguments a, Budget& budget) {
  const auto items = Iterate(v, budget);
  const Text separator = a[0] ? Str(*a[0], budget) : Text();
  const bool by_attribute = a[1] && !a[1]->Is(Kind::kNone);
  Text joined;
  for (size_t i = 0; i < items->size(); ++i) {
    const Value& item = (*items)[i];
    budget.Charge(1);
    if (i > 0) joined.Append(separator);
    joined.Append(Str(by_attribute ? Follow(item, *a[1], std::nullopt, budget) : item, budget));
  }
  budget.ChargeBytes(joined.size());
  return joined;
}

// Calls a filter or test that a template names in a string.
Value ApplyNamed(const Builtin* (*find)(std::string_view), const std::optional<Value>& name,
                 const Value& subject, Arguments given, Budget& budget) {
  const Builtin* builtin = name && name->IsString() ? find(name->bytes()) : nullptr;
  if (builtin == nullptr) Fail("unknown filter or test in map, select or reject");
  std::array<std::optional<Value>, Builtin::kMaxParameters> slots;
  const auto count = std::find(given.begin(), given.end(), std::nullopt) - given.begin();
  if (count > static_cast<ptrdiff_t>(builtin->parameter_count) ||
      count < static_cast<ptrdiff_t>(builtin->required)) {
    Fail(fmt::format("'{}' has a wrong number of arguments", builtin->name));
  }
  std::copy_n(given.begin(), count, slots.begin());
  return builtin->apply(subject, std::span(slots).first(builtin->parameter_count), budget);
}

// map, select and their like take anything false for an empty list.
std::shared_ptr<const Items> IterateIfTrue(const Value& v, Budget& budget) {
  return v.Truth() ? Iterate(v, budget) : std::make_shared<const Items>();
}

Value Map(const Value& v, Arguments a, Budget& budget) {
  const std::optional<Value>& attribute = a[3];
  const auto items = IterateIfTrue(v, budget);
  Items mapped;
  for (const Value& item : *items) {
    budget.ChargeItems(1);
    if (a[0] || !attribute) {
      mapped.push_back(ApplyNamed(FindFilter, a[0], item, a.subspan(1, 2), budget));
    } else {
      mapped.push_back(Follow(item, *attribute, a[4], budget));
    }
  }
  return Value::Of(Kind::kGenerator, std::move(mapped));
}

// The items whose test, or truth, is as wanted. With by_attribute the first argument is a path.
template <bool by_attribute, bool wanted>
Value Select(const Value& v, Arguments a, Budget& budget) {
  const Arguments test = by_attribute ? a.subspan(1) : a;
  const auto items = IterateIfTrue(v, budget);
  Items selected;
  for (const Value& item : *items) {
    budget.ChargeItems(1);
    const Value subject = by_attribute ? Follow(item, *a[0], std::nullopt, budget) : item;
    const Value result =
        test[0] ? ApplyNamed(FindTest, test[0], subject, test.subspan(1), budget) : subject;
    if (result.Truth() == wanted) selected.push_back(item);
  }
  return Value::Of(Kind::kGenerator, std::move(selected));
}

// Filters on strings work on what a value prints; methods of the same name on strings alone.

Value Trim(const Value& v, Arguments a, Budget& budget) {
  return strings::Strip(Str(v, budget), a[0], strings::Side::kBoth);
}
Value Upper(const Value& v, Arguments, Budget& budget) { return strings::Upper(Str(v, budget)); }
Value Lower(const Value& v, Arguments, Budget& budget) { return strings::Lower(Str(v, budget)); }
Value Title(const Value& v, Arguments, Budget& budget) {
  return strings::TitleWords(Str(v, budget));
}
Value Capitalize(const Value& v, Arguments, Budget& budget) {
  return strings::Capitalize(Str(v, budget));
}
Value Replace(const Value& v, Arguments a, Budget& budget) {
  return strings::Replace(Str(v, budget), Str(*a[0], budget), Str(*a[1], budget), a[2], budget);
}
Value Indent(const Value& v, Arguments a, Budget& budget) {
  if (!v.IsString()) Fail(fmt::format("{} cannot be indented", v.Noun()));
  return strings::Indent(v.text(), a[0], GivenTrue(a[1]), GivenTrue(a[2]), budget);
}

constexpr Builtin kFilters[] = {
    {"capitalize", Capitalize},
    {"count", Count},
    {"d", Default, 2, 0, {"default_value", "boolean"}},
    {"default", Default, 2, 0, {"default_value", "boolean"}},
    {"first", First},
    {"float", ToFloat, 1, 0, {"default"}},
    {"indent", Indent, 3, 0, {"width", "first", "blank"}},
    {"int", ToInteger, 1, 0, {"default"}},
    {"items", ItemPairs},
    {"join", Join, 2, 0, {"d", "attribute"}},
    {"last", Last},
    {"length", Count},
    {"list", ToList},
    {"lower", Lower},
    {"map", Map, 5, 0, {"", "", "", "attribute", "default"}},
    {"reject", Select<false, false>, 2, 0},
    {"rejectattr", Select<true, false>, 3, 1},
    {"replace", Replace, 3, 2, {"old", "new", "count"}},
    {"reverse", Reverse},
    {"select", Select<false, true>, 2, 0},
    {"selectattr", Select<true, true>, 3, 1},
    {"string", ToText},
    {"title", Title},
    {"tojson", ToJsonText, 4, 0, {"ensure_ascii", "indent", "separators", "sort_keys"}},
    {"trim", Trim, 1, 0, {"chars"}},
    {"upper", Upper},
};

// Methods.

const Text& Receiver(const Value& v, std::string_view method) {
  if (v.IsUndefined()) Fail(v.reason());
  if (!v.IsString()) Fail(fmt::format("'{}' has no method '{}'", v.Noun(), method));
  return v.text();
}

const Dict& DictReceiver(const Value& v, std::string_view method) {
  if (v.IsUndefined()) Fail(v.reason());
  if (!v.Is(Kind::kDict)) Fail(fmt::format("'{}' has no method '{}'", v.Noun(), method));
  return v.dict();
}

template <strings::Side side>
Value CallStrip(const Value& v, Arguments a, Budget&) {
  return strings::Strip(Receiver(v, "strip"), a[0], side);
}
template <bool from_right>
Value CallSplit(const Value& v, Arguments a, Budget& budget) {
  return Value::List(strings::Split(Receiver(v, "split"), a[0], a[1], from_right, budget));
}
template <strings::Side side>
Value CallHasAffix(const Value& v, Arguments a, Budget& budget) {
  return strings::HasAffix(Receiver(v, "startswith"), *a[0], side, budget);
}
template <strings::Side side>
Value CallRemoveAffix(const Value& v, Arguments a, Budget&) {
  return strings::RemoveAffix(Receiver(v, "removeprefix"), *a[0], side);
}
Value CallUpper(const Value& v, Arguments, Budget&) { return strings::Upper(Receiver(v, "upper")); }
Value CallLower(const Value& v, Arguments, Budget&) { return strings::Lower(Receiver(v, "lower")); }
Value CallTitle(const Value& v, Arguments, Budget&) {
  return strings::TitleLetters(Receiver(v, "title"));
}
Value CallCapitalize(const Value& v, Arguments, Budget&) {
  return strings::Capitalize(Receiver(v, "capitalize"));
}
Value CallReplace(const Value& v, Arguments a, Budget& budget) {
  const Text& text = Receiver(v, "replace");
  return strings::Replace(text, Receiver(*a[0], "replace"), Receiver(*a[1], "replace"), a[2],
                          budget);
}
Value CallJoin(const Value& v, Arguments a, Budget& budget) {
  const Text& separator = Receiver(v, "join");
  const auto items = Iterate(*a[0], budget);
  for (const Value& item : *items) {
    if (!item.IsString()) Fail(fmt::format("join() of a {}", item.Noun()));
  }
  const std::optional<Value> arguments[] = {Value(separator), std::nullopt};
  return Join(Value::List(*items), arguments, budget);
}

Value CallItems(const Value& v, Arguments, Budget& budget) {
  return Value::Of(Kind::kView, PairsOf(DictReceiver(v, "items"), budget));
}
Value CallKeys(const Value& v, Arguments, Budget& budget) {
  DictReceiver(v, "keys");
  return Value::Of(Kind::kView, *Iterate(v, budget));
}
Value CallValues(const Value& v, Arguments, Budget& budget) {
  const Dict& dict = DictReceiver(v, "values");
  budget.ChargeItems(dict.entries.size());
  Items values;
  for (const auto& [key, value] : dict.entries) values.push_back(value);
  return Value::Of(Kind::kView, std::move(values));
}
Value CallGet(const Value& v, Arguments a, Budget& budget) {
  const Value* found = Find(DictReceiver(v, "get"), *a[0], budget);
  return found != nullptr ? *found : a[1].value_or(Value::None{});
}

Value CallCycle(const Value& v, Arguments a, Budget&) {
  if (!v.Is(Kind::kLoop)) Fail(fmt::format("'{}' has no method 'cycle'", v.Noun()));
  const auto count = std::find(a.begin(), a.end(), std::nullopt) - a.begin();
  return *a[v.loop().index0 % static_cast<size_t>(count)];
}

using strings::Side;

constexpr Builtin kMethods[] = {
    {"capitalize", CallCapitalize},
    {"cycle", CallCycle, 5, 1},
    {"endswith", CallHasAffix<Side::kRight>, 1, 1},
    {"get", CallGet, 2, 1},
    {"items", CallItems},
    {"join", CallJoin, 1, 1},
    {"keys", CallKeys},
    {"lower", CallLower},
    {"lstrip", CallStrip<Side::kLeft>, 1, 0},
    {"removeprefix", CallRemoveAffix<Side::kLeft>, 1, 1},
    {"removesuffix", CallRemoveAffix<Side::kRight>, 1, 1},
    {"replace", CallReplace, 3, 2},
    {"rsplit", CallSplit<true>, 2, 0, {"sep", "maxsplit"}},
    {"rstrip", CallStrip<Side::kRight>, 1, 0},
    {"split", CallSplit<false>, 2, 0, {"sep", "maxsplit"}},
    {"startswith", CallHasAffix<Side::kLeft>, 1, 1},
    {"strip", CallStrip<Side::kBoth>, 1, 0},
    {"title", CallTitle},
    {"upper", CallUpper},
    {"values", CallValues},
};

}  // namespace

const Builtin* FindFilter(std::string_view name) { return FindIn(kFilters, name); }
const Builtin* FindTest(std::string_view name) { return FindIn(kTests, name); }
const Builtin* FindMethod(std::string_view name) { return FindIn(kMethods, name); }

}  // namespace espalier::jinja
