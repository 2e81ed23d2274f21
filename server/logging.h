// Log lines of the server, as text or JSON. The only file pair that knows spdlog.
//
// Lines go to standard error. Nothing here is called from the engine's hot path: once per request,
// once per change of state.
#pragma once

#include <concepts>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <string>
#include <string_view>
#include <variant>

#include "server/options.h"
#include "server/request_summary.h"

namespace espalier {

// One named value of a line: `name=value` in text, a JSON member otherwise.
struct LogField {
  template <std::integral T>
  LogField(std::string_view name, T value) : name(name), value(static_cast<int64_t>(value)) {}
  LogField(std::string_view name, bool value) : name(name), value(value) {}
  LogField(std::string_view name, double value) : name(name), value(value) {}
  LogField(std::string_view name, std::string_view value) : name(name), value(value) {}
  LogField(std::string_view name, const char* value) : name(name), value(std::string_view(value)) {}
  LogField(std::string_view name, const std::string& value)
      : name(name), value(std::string_view(value)) {}

  std::string_view name;  // lower_snake_case
  std::variant<int64_t, bool, double, std::string_view> value;
};

// Sets level and format for the process. Before it: text, at info.
void StartLogging(LogLevel level, LogFormat format);

// Writes one line: time (UTC), level, message, fields. Thread-safe.
void Log(LogLevel level, std::string_view message, std::span<const LogField> fields);
inline void Log(LogLevel level, std::string_view message,
                std::initializer_list<LogField> fields = {}) {
  Log(level, message, std::span(fields.begin(), fields.size()));
}

// The part of a line behind time and level. Control characters, quotes and ill-formed UTF-8 are
// escaped, so that a line stays one line and valid JSON whatever a caller sends.
std::string FormatLogLine(LogFormat format, std::string_view message,
                          std::span<const LogField> fields);

// The info line of a call that ended: ids, counts, times; its prompt only if the summary has one.
void LogRequest(const RequestSummary& summary);

}  // namespace espalier
