#include "engine/model/chat/strings.h"

#include <fmt/format.h>
#include <unicode/bytestream.h>
#include <unicode/casemap.h>

#include <algorithm>

#include "engine/model/chat/operators.h"

namespace espalier::jinja::strings {

namespace {

bool Given(const std::optional<Value>& argument) { return argument && !argument->Is(Kind::kNone); }

const Text& AsString(const Value& value) {
  if (value.IsUndefined()) Fail(value.reason());
  if (!value.IsString()) Fail(fmt::format("a string is needed, not a {}", value.Noun()));
  return value.text();
}

// A count, where a negative one stands for "all".
size_t AsLimit(const std::optional<Value>& argument) {
  if (!Given(argument)) return SIZE_MAX;
  if (!argument->IsInteger()) Fail(fmt::format("a number is needed, not a {}", argument->Noun()));
  return argument->integer() < 0 ? SIZE_MAX : static_cast<size_t>(argument->integer());
}

Items SplitAtSeparator(const Text& text, std::string_view separator, size_t limit, bool from_right,
                       Budget& budget) {
  if (separator.empty()) Fail("split() at an empty string");
  const std::string_view bytes = text.bytes();
  Items parts;
  Span rest{0, bytes.size()};
  while (parts.size() < limit) {
    budget.ChargeItems(1);
    const std::string_view left = bytes.substr(0, rest.end);
    // rfind looks for a begin, so that separators do not overlap what was already cut.
    const size_t at = from_right ? left.rfind(separator) : left.find(separator, rest.begin);
    if (at == std::string_view::npos) break;
    if (from_right) {
      parts.push_back(text.Substr(at + separator.size(), rest.end));
      rest.end = at;
    } else {
      parts.push_back(text.Substr(rest.begin, at));
      rest.begin = at + separator.size();
    }
  }
  parts.push_back(text.Substr(rest.begin, rest.end));
  if (from_right) std::reverse(parts.begin(), parts.end());
  return parts;
}

// The stretches without white space, and how far they reach.
std::vector<Span> Words(std::string_view s) {
  std::vector<Span> words;
  bool in_word = false;
  for (size_t i = 0; i < s.size();) {
    const size_t end = CodePointEnd(s, i);
    if (IsSpace(CodePointAt(s, i))) {
      in_word = false;
    } else if (std::exchange(in_word, true)) {
      words.back().end = end;
    } else {
      words.push_back({i, end});
    }
    i = end;
  }
  return words;
}

// Beyond the limit the rest is one part, with its outer white space on the side not yet reached.
Items SplitAtSpace(const Text& text, size_t limit, bool from_right, Budget& budget) {
  std::vector<Span> words = Words(text.bytes());
  if (words.size() > limit) {
    if (from_right) {
      const size_t end = words[words.size() - limit - 1].end;
      words.erase(words.begin(), words.end() - static_cast<ptrdiff_t>(limit) - 1);
      words.front() = {0, end};
    } else {
      words.resize(limit + 1);
      words.back().end = text.size();
    }
  }
  budget.ChargeItems(words.size());
  Items parts;
  for (const Span& word : words) parts.push_back(text.Substr(word.begin, word.end));
  return parts;
}

bool IsLower(char c) { return c >= 'a' && c <= 'z'; }
bool IsUpper(char c) { return c >= 'A' && c <= 'Z'; }
char ToUpper(char c) { return IsLower(c) ? static_cast<char>(c - 'a' + 'A') : c; }
char ToLower(char c) { return IsUpper(c) ? static_cast<char>(c - 'A' + 'a') : c; }

// Run by run, for a letter may become several.
Text MapCase(const Text& text,
             void (*map)(const char* locale, uint32_t options, icu::StringPiece source,
                         icu::ByteSink& sink, icu::Edits* edits, UErrorCode& error)) {
  Text result;
  for (const Text::Run& run : text.Runs()) {
    const std::string_view part = text.bytes().substr(run.begin, run.end - run.begin);
    std::string mapped;
    icu::StringByteSink<std::string> sink(&mapped);
    UErrorCode error = U_ZERO_ERROR;
    map("", 0, {part.data(), static_cast<int32_t>(part.size())}, sink, nullptr, error);
    if (U_FAILURE(error)) Fail(fmt::format("upper or lower case: {}", u_errorName(error)));
    result.Append(mapped, run.from_caller);
  }
  return result;
}

std::string AsciiOf(const Text& text) {
  if (!IsAscii(text.bytes())) Fail("title and capitalize of non-ASCII text are not supported");
  return std::string(text.bytes());
}

// Line by line as str.splitlines cuts them, without their ends.
std::vector<Span> Lines(std::string_view s) {
  std::vector<Span> lines;
  size_t begin = 0;
  for (size_t i = 0; i < s.size();) {
    const char32_t c = CodePointAt(s, i);
    size_t end = CodePointEnd(s, i);
    const bool breaks = (c >= 0x0A && c <= 0x0D) || (c >= 0x1C && c <= 0x1E) || c == 0x85 ||
                        c == 0x2028 || c == 0x2029;
    if (breaks) {
      lines.push_back({begin, i});
      if (c == '\r' && end < s.size() && s[end] == '\n') ++end;
      begin = end;
    }
    i = end;
  }
  if (begin < s.size()) lines.push_back({begin, s.size()});
  return lines;
}

}  // namespace

Text Strip(const Text& text, const std::optional<Value>& chars, Side side) {
  const std::string_view set = Given(chars) ? AsString(*chars).bytes() : std::string_view();
  const Span rest = jinja::Strip(text.bytes(), Given(chars) ? &set : nullptr, side != Side::kRight,
                                 side != Side::kLeft);
  return text.Substr(rest.begin, rest.end);
}

Items Split(const Text& text, const std::optional<Value>& separator,
            const std::optional<Value>& max_splits, bool from_right, Budget& budget) {
  budget.ChargeBytes(text.size());
  const size_t limit = AsLimit(max_splits);
  if (!Given(separator)) return SplitAtSpace(text, limit, from_right, budget);
  return SplitAtSeparator(text, AsString(*separator).bytes(), limit, from_right, budget);
}

Text Replace(const Text& text, const Text& old_part, const Text& new_part,
             const std::optional<Value>& max_count, Budget& budget) {
  const std::string_view bytes = text.bytes();
  size_t left = AsLimit(max_count);
  Text result;
  size_t begin = 0;
  if (old_part.empty()) {  // then every gap between code points is a match
    for (; left > 0 && begin < bytes.size(); --left) {
      budget.Charge(1);
      const size_t end = CodePointEnd(bytes, begin);
      result.Append(new_part);
      result.Append(text, begin, end);
      begin = end;
    }
    if (left > 0) result.Append(new_part);
  }
  while (left-- > 0 && !old_part.empty()) {
    budget.Charge(1);
    const size_t at = bytes.find(old_part.bytes(), begin);
    if (at == std::string_view::npos) break;
    result.Append(text, begin, at);
    result.Append(new_part);
    begin = at + old_part.size();
  }
  result.Append(text, begin, text.size());
  budget.ChargeBytes(result.size());
  return result;
}

bool HasAffix(const Text& text, const Value& affix, Side side, Budget& budget) {
  if (affix.Is(Kind::kTuple)) {
    return std::any_of(affix.items().begin(), affix.items().end(), [&](const Value& one) {
      budget.Charge(1);
      return HasAffix(text, Value(AsString(one)), side, budget);
    });
  }
  const std::string_view bytes = AsString(affix).bytes();
  return side == Side::kLeft ? text.bytes().starts_with(bytes) : text.bytes().ends_with(bytes);
}

Text RemoveAffix(const Text& text, const Value& affix, Side side) {
  const std::string_view bytes = AsString(affix).bytes();
  if (side == Side::kLeft) {
    return text.bytes().starts_with(bytes) ? text.Substr(bytes.size(), text.size()) : text;
  }
  return text.bytes().ends_with(bytes) ? text.Substr(0, text.size() - bytes.size()) : text;
}

Text Indent(const Text& text, const std::optional<Value>& width, bool first, bool blank,
            Budget& budget) {
  Text indention("    ");
  if (width && width->IsString()) {
    indention = width->text();
  } else if (width) {
    if (!width->IsInteger()) Fail(fmt::format("indent: the width is a {}", width->Noun()));
    if (width->integer() > 1000) Fail("indent: the width is over 1000");
    indention = Text(std::string(std::max<int64_t>(width->integer(), 0), ' '));
  }
  Text ended = text;  // the filter adds a line end, so that a last empty line counts
  ended.Append("\n");
  Text result;
  bool is_first = true;
  for (const Span& line : Lines(ended.bytes())) {
    budget.Charge(1);
    if (!is_first) result.Append("\n");
    if (is_first ? first : blank || line.begin < line.end) result.Append(indention);
    result.Append(ended, line.begin, line.end);
    is_first = false;
  }
  budget.ChargeBytes(result.size());
  return result;
}

Text Upper(const Text& text) { return MapCase(text, icu::CaseMap::utf8ToUpper); }
Text Lower(const Text& text) { return MapCase(text, icu::CaseMap::utf8ToLower); }

namespace {

// Upper case where starts(the byte before) holds, lower case elsewhere.
template <typename Starts>
Text Recase(const Text& text, Starts starts) {
  std::string bytes = AsciiOf(text);
  for (size_t i = 0; i < bytes.size(); ++i) {
    const bool upper = i == 0 || starts(bytes[i - 1]);
    bytes[i] = upper ? ToUpper(bytes[i]) : ToLower(bytes[i]);
  }
  return text.WithBytes(std::move(bytes));
}

}  // namespace

Text Capitalize(const Text& text) {
  return Recase(text, [](char) { return false; });
}

Text TitleLetters(const Text& text) {
  return Recase(text, [](char before) { return !IsLower(before) && !IsUpper(before); });
}

Text TitleWords(const Text& text) {
  return Recase(text, [](char before) {
    return IsSpace(static_cast<unsigned char>(before)) ||
           std::string_view("-({[<").find(before) != std::string_view::npos;
  });
}

}  // namespace espalier::jinja::strings
