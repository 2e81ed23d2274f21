// Python's operators over Values: arithmetic, comparison, membership, indexing, iteration.
#pragma once

#include <memory>
#include <optional>
#include <string_view>

#include "engine/model/chat/failure.h"
#include "engine/model/chat/value.h"

namespace espalier::jinja {

enum class Arithmetic { kAdd, kSubtract, kMultiply, kDivide, kFloorDivide, kModulo, kPower };
enum class Comparison {
  kEqual,
  kNotEqual,
  kLess,
  kLessEqual,
  kGreater,
  kGreaterEqual,
  kIn,
  kNotIn
};

// All fail where Python raises, and where an int leaves 64 bits.
Value Apply(Arithmetic op, const Value& left, const Value& right, Budget& budget);
Value Negate(const Value& operand);
bool Compare(Comparison op, const Value& left, const Value& right, Budget& budget);
bool Equal(const Value& left, const Value& right, Budget& budget);

// nullptr: no such key.
const Value* Find(const Dict& dict, const Value& key, Budget& budget);
// For building: the later value wins and stays at the first one's place.
void Insert(std::vector<std::pair<Value, Value>>& entries, Value key, Value value, Budget& budget);

size_t Length(const Value& value, Budget& budget);
// What a for loop walks: items, keys, code points. Nothing for undefined; ends a generator.
std::shared_ptr<const Items> Iterate(const Value& value, Budget& budget);

// object.name prefers Python's attributes, object[key] the items; both fall back to the other.
// Undefined if there is neither.
Value GetAttribute(const Value& object, std::string_view name, Budget& budget);
Value GetItem(const Value& object, const Value& key, Budget& budget);
// object[start:stop:step]; absent or none bounds are Python's defaults.
Value Slice(const Value& object, const std::optional<Value>& start,
            const std::optional<Value>& stop, const std::optional<Value>& step, Budget& budget);

}  // namespace espalier::jinja
