// The filters, tests and methods that templates may use, each one row in a table.
#pragma once

#include <array>
#include <optional>
#include <span>
#include <string_view>

#include "engine/model/chat/failure.h"
#include "engine/model/chat/value.h"

namespace espalier::jinja {

// One slot for each parameter; empty where the template gave none.
using Arguments = std::span<const std::optional<Value>>;

struct Builtin {
  static constexpr size_t kMaxParameters = 5;

  std::string_view name;
  Value (*apply)(const Value& subject, Arguments arguments, Budget& budget);
  size_t parameter_count = 0;
  size_t required = 0;
  // Names for keyword arguments; "" can only be given by position.
  std::array<std::string_view, kMaxParameters> parameters = {};
};

// nullptr: unknown, which the parser turns into an error at load.
const Builtin* FindFilter(std::string_view name);
const Builtin* FindTest(std::string_view name);
const Builtin* FindMethod(std::string_view name);

}  // namespace espalier::jinja
