// JSON as template values, so that tests can render over any context.
#pragma once

#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include "engine/model/chat/value.h"

namespace espalier::jinja {

// Strings, keys included, count as the caller's if from_caller. Integers must fit 64 bits.
inline Value FromJson(const nlohmann::ordered_json& json, bool from_caller) {
  if (json.is_null()) return Value::None{};
  if (json.is_boolean()) return json.get<bool>();
  if (json.is_number_float()) return json.get<double>();
  if (json.is_number()) return json.get<int64_t>();
  if (json.is_string()) return Text(json.get_ref<const std::string&>(), from_caller);
  if (json.is_array()) {
    Items items;
    for (const auto& item : json) items.push_back(FromJson(item, from_caller));
    return Value::List(std::move(items));
  }
  std::vector<std::pair<Value, Value>> entries;
  for (const auto& [key, value] : json.items()) {
    entries.emplace_back(Text(key, from_caller), FromJson(value, from_caller));
  }
  return Value::MakeDict(std::move(entries));
}

}  // namespace espalier::jinja
