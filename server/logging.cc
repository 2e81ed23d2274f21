#include "server/logging.h"

#include <fmt/format.h>
#include <spdlog/sinks/stdout_color_sinks.h>
#include <spdlog/spdlog.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <iterator>
#include <memory>
#include <span>
#include <vector>

namespace espalier {
namespace {

std::atomic<LogFormat> format_in_use = LogFormat::kText;

// %+ would print local time; a fleet is read in UTC. The message arrives with its fields.
constexpr const char* kTextPattern = "%Y-%m-%dT%H:%M:%S.%eZ %^%-5l%$ %v";
constexpr const char* kJsonPattern = R"({"time":"%Y-%m-%dT%H:%M:%S.%eZ","level":"%l",%v})";

spdlog::logger& Logger() {
  static const std::shared_ptr<spdlog::logger> logger = [] {
    auto made = spdlog::stderr_color_mt("espalier");
    made->set_pattern(kTextPattern, spdlog::pattern_time_type::utc);
    made->flush_on(spdlog::level::trace);
    return made;
  }();
  return *logger;
}

spdlog::level::level_enum SpdlogLevel(LogLevel level) {
  switch (level) {
    case LogLevel::kDebug:
      return spdlog::level::debug;
    case LogLevel::kInfo:
      return spdlog::level::info;
    case LogLevel::kWarning:
      return spdlog::level::warn;
    case LogLevel::kError:
      return spdlog::level::err;
  }
  return spdlog::level::err;
}

// Bytes of the well-formed UTF-8 character at the front of `text`; 0 if there is none.
size_t CharacterBytes(std::string_view text) {
  const auto byte = [&](size_t i) { return static_cast<uint8_t>(text[i]); };
  const uint8_t lead = byte(0);
  if (lead < 0x80) return 1;
  const size_t bytes = lead >= 0xF0 ? 4 : lead >= 0xE0 ? 3 : 2;
  if (lead < 0xC2 || lead > 0xF4 || text.size() < bytes) return 0;
  for (size_t i = 1; i < bytes; ++i) {
    if ((byte(i) & 0xC0) != 0x80) return 0;
  }
  // Overlong forms, surrogates, beyond U+10FFFF.
  if (lead == 0xE0 && byte(1) < 0xA0) return 0;
  if (lead == 0xED && byte(1) > 0x9F) return 0;
  if (lead == 0xF0 && byte(1) < 0x90) return 0;
  if (lead == 0xF4 && byte(1) > 0x8F) return 0;
  return bytes;
}

void AppendQuoted(std::string_view text, std::string* out) {
  *out += '"';
  while (!text.empty()) {
    const size_t bytes = CharacterBytes(text);
    const uint8_t lead = static_cast<uint8_t>(text.front());
    if (bytes == 0) {
      *out += "\\ufffd";
    } else if (lead == '"' || lead == '\\') {
      *out += '\\';
      *out += text.front();
    } else if (lead == '\n') {
      *out += "\\n";
    } else if (lead < 0x20 || lead == 0x7F) {
      fmt::format_to(std::back_inserter(*out), "\\u{:04x}", lead);
    } else {
      *out += text.substr(0, bytes);
    }
    text.remove_prefix(std::max<size_t>(bytes, 1));
  }
  *out += '"';
}

// A word that needs no quotes in a text line.
bool IsPlain(std::string_view text) {
  return !text.empty() && std::all_of(text.begin(), text.end(), [](char c) {
    return c > ' ' && c < 0x7F && c != '"' && c != '=' && c != '\\';
  });
}

void AppendValue(const LogField& field, LogFormat format, std::string* out) {
  if (const auto* text = std::get_if<std::string_view>(&field.value)) {
    if (format == LogFormat::kText && IsPlain(*text)) {
      *out += *text;
    } else {
      AppendQuoted(*text, out);
    }
  } else if (const auto* flag = std::get_if<bool>(&field.value)) {
    *out += *flag ? "true" : "false";
  } else if (const auto* number = std::get_if<double>(&field.value)) {
    // JSON has no word for what is not finite.
    if (std::isfinite(*number)) {
      fmt::format_to(std::back_inserter(*out), "{:.6g}", *number);
    } else {
      *out += "null";
    }
  } else {
    fmt::format_to(std::back_inserter(*out), "{}", std::get<int64_t>(field.value));
  }
}

}  // namespace

void StartLogging(LogLevel level, LogFormat format) {
  format_in_use = format;
  Logger().set_level(SpdlogLevel(level));
  Logger().set_pattern(format == LogFormat::kJson ? kJsonPattern : kTextPattern,
                       spdlog::pattern_time_type::utc);
}

std::string FormatLogLine(LogFormat format, std::string_view message,
                          std::span<const LogField> fields) {
  std::string line;
  if (format == LogFormat::kJson) {
    line += "\"message\":";
    AppendQuoted(message, &line);
  } else {
    for (const char c : message) line += static_cast<uint8_t>(c) < ' ' ? ' ' : c;
  }
  for (const LogField& field : fields) {
    if (format == LogFormat::kJson) {
      line += ',';
      AppendQuoted(field.name, &line);
      line += ':';
    } else {
      line += ' ';
      line += field.name;
      line += '=';
    }
    AppendValue(field, format, &line);
  }
  return line;
}

void Log(LogLevel level, std::string_view message, std::span<const LogField> fields) {
  const spdlog::level::level_enum spdlog_level = SpdlogLevel(level);
  if (!Logger().should_log(spdlog_level)) return;
  Logger().log(spdlog_level, "{}", FormatLogLine(format_in_use, message, fields));
}

void LogRequest(const RequestSummary& summary) {
  std::vector<LogField> fields = {{"id", summary.id},
                                  {"request_id", summary.request_id},
                                  {"method", summary.method},
                                  {"peer", summary.peer},
                                  {"outcome", summary.outcome}};
  const auto add = [&fields](const LogField& field) { fields.push_back(field); };
  if (!summary.error.empty()) add({"error", summary.error});
  add({"prompt_tokens", summary.prompt_tokens});
  add({"cached_tokens", summary.cached_tokens});
  add({"output_tokens", summary.output_tokens});
  if (summary.preemptions > 0) add({"preemptions", summary.preemptions});
  // What did not happen has no time.
  if (summary.queue_s >= 0) add({"queue_s", summary.queue_s});
  if (summary.first_token_s >= 0) add({"first_token_s", summary.first_token_s});
  if (summary.output_tokens > 1) add({"per_token_s", summary.per_token_s()});
  add({"total_s", summary.total_s});
  if (summary.output_tokens > 0) {
    add({"rung", summary.rung});
    add({"prune_ratio", summary.mean_prune_ratio});
  }
  if (!summary.prompt.empty()) add({"prompt", summary.prompt});
  Log(LogLevel::kInfo, "request", fields);
}

}  // namespace espalier
