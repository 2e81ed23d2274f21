#include "engine/model/chat/value.h"

#include <fmt/format.h>

#include <algorithm>

#include "engine/model/chat/failure.h"

namespace espalier::jinja {

int OneDeeper(int depth) {
  if (depth >= kMaxValueDepth) FailBound(fmt::format("a value nested over {} deep", depth));
  return depth + 1;
}

static int DepthAbove(const Items& items) {
  int deepest = 0;
  for (const Value& item : items) deepest = std::max(deepest, item.Depth());
  return OneDeeper(deepest);
}

Value Value::MakeUndefined(std::string reason) {
  Value value;
  value.data_ = Undefined{std::make_shared<const std::string>(std::move(reason))};
  return value;
}

Value Value::Of(Kind sequence_kind, Items items) {
  const int depth = DepthAbove(items);
  Value value;
  value.data_ = std::make_shared<Sequence>(Sequence{sequence_kind, std::move(items), depth});
  return value;
}

Value Value::MakeDict(std::vector<std::pair<Value, Value>> entries) {
  int deepest = 0;
  for (const auto& [key, entry] : entries) {
    deepest = std::max({deepest, key.Depth(), entry.Depth()});
  }
  Value value;
  value.data_ = std::make_shared<const Dict>(Dict{std::move(entries), OneDeeper(deepest)});
  return value;
}

Kind Value::kind() const {
  constexpr Kind kByIndex[] = {Kind::kUndefined, Kind::kNone,   Kind::kBool,    Kind::kInt,
                               Kind::kFloat,     Kind::kString, Kind::kList,    Kind::kDict,
                               Kind::kNamespace, Kind::kLoop,   Kind::kCallable};
  return IsSequence() ? sequence().kind : kByIndex[data_.index()];
}

const std::string& Value::reason() const {
  static const std::string kUnknown = "a value is undefined";
  const auto& reason = std::get<Undefined>(data_).reason;
  return reason ? *reason : kUnknown;
}

int64_t Value::integer() const { return Is(Kind::kBool) ? boolean() : std::get<int64_t>(data_); }

double Value::number() const {
  return Is(Kind::kFloat) ? std::get<double>(data_) : static_cast<double>(integer());
}

std::shared_ptr<const Items> Value::shared_items() const {
  const auto& shared = std::get<std::shared_ptr<Sequence>>(data_);
  return std::shared_ptr<const Items>(shared, &shared->items);
}

bool Value::Truth() const {
  switch (kind()) {
    case Kind::kUndefined:
    case Kind::kNone:
      return false;
    case Kind::kBool:
    case Kind::kInt:
    case Kind::kFloat:
      return number() != 0;
    case Kind::kString:
      return !text().empty();
    case Kind::kList:
    case Kind::kTuple:
    case Kind::kRange:
    case Kind::kView:
      return !items().empty();
    case Kind::kDict:
      return !dict().entries.empty();
    case Kind::kGenerator:
    case Kind::kNamespace:
    case Kind::kLoop:
    case Kind::kCallable:
      return true;
  }
  return false;
}

int Value::Depth() const {
  if (IsSequence()) return sequence().depth;
  if (Is(Kind::kDict)) return dict().depth;
  if (Is(Kind::kLoop)) return loop().depth;
  return 0;
}

std::string_view Value::Noun() const {
  switch (kind()) {
    case Kind::kUndefined:
      return "undefined value";
    case Kind::kNone:
      return "None";
    case Kind::kBool:
      return "bool object";
    case Kind::kInt:
      return "int object";
    case Kind::kFloat:
      return "float object";
    case Kind::kString:
      return "str object";
    case Kind::kList:
      return "list object";
    case Kind::kTuple:
      return "tuple object";
    case Kind::kRange:
      return "range object";
    case Kind::kView:
      return "view of a dict";
    case Kind::kGenerator:
      return "generator object";
    case Kind::kDict:
      return "dict object";
    case Kind::kNamespace:
      return "namespace object";
    case Kind::kLoop:
      return "loop object";
    case Kind::kCallable:
      return "function";
  }
  return "value";
}

}  // namespace espalier::jinja
