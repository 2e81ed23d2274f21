#include "engine/model/chat/format.h"

#include <fmt/format.h>
#include <unicode/uchar.h>

#include <algorithm>
#include <cmath>
#include <string>

namespace espalier::jinja {

namespace {

std::string FloatRepr(double value) {
  std::string repr = fmt::format("{}", value);
  if (std::isfinite(value) && repr.find_first_of(".e") == std::string::npos) repr += ".0";
  return repr;
}

void AppendEscaped(const Text& text, std::string_view (*escape)(char32_t, std::string&),
                   Text& out) {
  std::string buffer;
  for (const Text::Run& run : text.Runs()) {
    std::string escaped;
    for (size_t i = run.begin; i < run.end;) {
      const size_t end = CodePointEnd(text.bytes(), i);
      const std::string_view replacement = escape(CodePointAt(text.bytes(), i), buffer);
      escaped += replacement.empty() ? text.bytes().substr(i, end - i) : replacement;
      i = end;
    }
    out.Append(escaped, run.from_caller);
  }
}

// As str.isprintable.
bool IsPrintable(char32_t c) {
  constexpr uint32_t kHidden = U_GC_C_MASK | U_GC_Z_MASK;
  return c == ' ' || (U_GET_GC_MASK(static_cast<UChar32>(c)) & kHidden) == 0;
}

// Empty: stands for itself.
std::string_view ReprEscape(char32_t c, std::string& buffer) {
  if (c == '\\') return "\\\\";
  if (c == '\n') return "\\n";
  if (c == '\r') return "\\r";
  if (c == '\t') return "\\t";
  if (IsPrintable(c)) return "";
  const uint32_t value = static_cast<uint32_t>(c);
  buffer = c < 0x100     ? fmt::format("\\x{:02x}", value)
           : c < 0x10000 ? fmt::format("\\u{:04x}", value)
                         : fmt::format("\\U{:08x}", value);
  return buffer;
}

std::string_view ReprEscapeInSingleQuotes(char32_t c, std::string& buffer) {
  return c == '\'' ? "\\'" : ReprEscape(c, buffer);
}

std::string_view JsonEscape(char32_t c, std::string& buffer) {
  switch (c) {
    case '"':
      return "\\\"";
    case '\\':
      return "\\\\";
    case '\b':
      return "\\b";
    case '\f':
      return "\\f";
    case '\n':
      return "\\n";
    case '\r':
      return "\\r";
    case '\t':
      return "\\t";
    default:
      if (c >= ' ') return "";
      buffer = fmt::format("\\u{:04x}", static_cast<uint32_t>(c));
      return buffer;
  }
}

std::string_view JsonEscapeToAscii(char32_t c, std::string& buffer) {
  if (c < 0x7F) return JsonEscape(c, buffer);
  if (c == 0x7F) return "";
  const uint32_t value = static_cast<uint32_t>(c);
  if (c < 0x10000) {
    buffer = fmt::format("\\u{:04x}", value);
  } else {
    const uint32_t offset = value - 0x10000;
    buffer = fmt::format("\\u{:04x}\\u{:04x}", 0xD800 + (offset >> 10), 0xDC00 + (offset & 0x3FF));
  }
  return buffer;
}

void AppendRepr(const Value& value, Text& out, Budget& budget);

void AppendStringRepr(const Text& text, Text& out, Budget& budget) {
  budget.ChargeBytes(text.size() * 4);
  const bool single = text.bytes().find('\'') != std::string_view::npos;
  const bool twice = text.bytes().find('"') != std::string_view::npos;
  const std::string_view quote = single && !twice ? "\"" : "'";
  out.Append(quote);
  AppendEscaped(text, quote == "'" ? ReprEscapeInSingleQuotes : ReprEscape, out);
  out.Append(quote);
}

void AppendSequenceRepr(const Value& value, Text& out, Budget& budget) {
  const bool tuple = value.Is(Kind::kTuple);
  out.Append(tuple ? "(" : "[");
  std::string_view separator = "";
  for (const Value& item : value.items()) {
    out.Append(separator);
    AppendRepr(item, out, budget);
    separator = ", ";
  }
  if (tuple && value.items().size() == 1) out.Append(",");
  out.Append(tuple ? ")" : "]");
}

void AppendDictRepr(const Dict& dict, Text& out, Budget& budget) {
  out.Append("{");
  std::string_view separator = "";
  for (const auto& [key, value] : dict.entries) {
    out.Append(separator);
    AppendRepr(key, out, budget);
    out.Append(": ");
    AppendRepr(value, out, budget);
    separator = ", ";
  }
  out.Append("}");
}

void AppendRepr(const Value& value, Text& out, Budget& budget) {
  budget.Charge(1);
  switch (value.kind()) {
    case Kind::kUndefined:
      return out.Append("Undefined");
    case Kind::kNone:
      return out.Append("None");
    case Kind::kBool:
      return out.Append(value.boolean() ? "True" : "False");
    case Kind::kInt:
      return out.Append(std::to_string(value.integer()));
    case Kind::kFloat:
      return out.Append(FloatRepr(value.number()));
    case Kind::kString:
      return AppendStringRepr(value.text(), out, budget);
    case Kind::kList:
    case Kind::kTuple:
      return AppendSequenceRepr(value, out, budget);
    case Kind::kDict:
      return AppendDictRepr(value.dict(), out, budget);
    default:
      Fail(fmt::format("a {} has no text form here", value.Noun()));
  }
}

class JsonWriter {
 public:
  JsonWriter(const JsonStyle& style, Budget& budget) : style_(style), budget_(budget) {}

  void Write(const Value& value) {
    budget_.Charge(1);
    switch (value.kind()) {
      case Kind::kNone:
        return out_.Append("null");
      case Kind::kBool:
        return out_.Append(value.boolean() ? "true" : "false");
      case Kind::kInt:
        return out_.Append(std::to_string(value.integer()));
      case Kind::kFloat:
        return out_.Append(Number(value.number()));
      case Kind::kString:
        return WriteString(value.text());
      case Kind::kList:
      case Kind::kTuple:
        return WriteList(value.items());
      case Kind::kDict:
        return WriteDict(value.dict());
      default:
        Fail(value.IsUndefined() ? value.reason()
                                 : fmt::format("{} has no JSON form", value.Noun()));
    }
  }

  Text Take() { return std::move(out_); }

 private:
  static std::string Number(double value) {
    if (std::isnan(value)) return "NaN";
    if (std::isinf(value)) return value > 0 ? "Infinity" : "-Infinity";
    return FloatRepr(value);
  }

  void WriteString(const Text& text) {
    budget_.ChargeBytes(text.size() * 4);
    out_.Append("\"");
    AppendEscaped(text, style_.ensure_ascii ? JsonEscapeToAscii : JsonEscape, out_);
    out_.Append("\"");
  }

  void WriteKey(const Value& key) {
    if (key.IsString()) return WriteString(key.text());
    if (!key.IsNumber() && !key.Is(Kind::kNone)) {
      Fail(fmt::format("a {} is no JSON key", key.Noun()));
    }
    out_.Append("\"");
    Write(key);
    out_.Append("\"");
  }

  void WriteList(const Items& items) {
    if (items.empty()) return out_.Append("[]");
    Open("[");
    for (size_t i = 0; i < items.size(); ++i) {
      Separate(i);
      Write(items[i]);
    }
    Close("]");
  }

  void WriteDict(const Dict& dict) {
    if (dict.entries.empty()) return out_.Append("{}");
    auto entries = dict.entries;
    if (style_.sort_keys) {
      std::stable_sort(entries.begin(), entries.end(),
                       [&](const auto& a, const auto& b) { return Less(a.first, b.first); });
    }
    Open("{");
    for (size_t i = 0; i < entries.size(); ++i) {
      Separate(i);
      WriteKey(entries[i].first);
      out_.Append(style_.key_separator);
      Write(entries[i].second);
    }
    Close("}");
  }

  static bool Less(const Value& a, const Value& b) {
    if (a.IsString() && b.IsString()) return a.bytes() < b.bytes();
    if (a.IsNumber() && b.IsNumber()) return a.number() < b.number();
    Fail(fmt::format("cannot sort keys {} and {}", a.Noun(), b.Noun()));
  }

  void Open(std::string_view bracket) {
    out_.Append(bracket);
    ++level_;
    NewLine();
  }
  void Separate(size_t index) {
    if (index == 0) return;
    out_.Append(style_.item_separator);
    NewLine();
  }
  void Close(std::string_view bracket) {
    --level_;
    NewLine();
    out_.Append(bracket);
  }
  void NewLine() {
    if (style_.indent < 0) return;
    const size_t spaces = static_cast<size_t>(style_.indent) * level_;
    budget_.ChargeBytes(spaces);
    out_.Append("\n");
    out_.Append(std::string(spaces, ' '));
  }

  const JsonStyle& style_;
  Budget& budget_;
  Text out_;
  size_t level_ = 0;
};

}  // namespace

Text Str(const Value& value, Budget& budget) {
  if (value.IsString()) return value.text();
  if (value.IsUndefined()) return Text();
  Text out;
  AppendRepr(value, out, budget);
  return out;
}

Text ToJson(const Value& value, const JsonStyle& style, Budget& budget) {
  JsonWriter writer(style, budget);
  writer.Write(value);
  return writer.Take();
}

}  // namespace espalier::jinja
