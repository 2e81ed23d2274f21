#include "engine/model/chat/text.h"

#include <algorithm>

#include "engine/model/chat/failure.h"

namespace espalier::jinja {

void Text::Append(std::string_view bytes, bool from_caller) {
  if (bytes.empty()) return;
  if (bytes.size() > kMaxText - bytes_.size()) FailBound("the text grows beyond 16 MiB");
  const bool ends_in_caller = borders_.size() % 2 == 1;
  if (from_caller != ends_in_caller) borders_.push_back(bytes_.size());
  bytes_.append(bytes);
}

void Text::Append(const Text& text, size_t begin, size_t end) {
  for (const Run& run : text.Runs(begin, end)) {
    Append(text.bytes().substr(run.begin, run.end - run.begin), run.from_caller);
  }
}

Text Text::Substr(size_t begin, size_t end) const {
  Text part;
  part.Append(*this, begin, end);
  return part;
}

Text Text::WithBytes(std::string bytes) const {
  Text other;
  other.bytes_ = std::move(bytes);
  other.borders_ = borders_;
  return other;
}

std::vector<Text::Run> Text::Runs(size_t begin, size_t end) const {
  std::vector<Run> runs;
  auto border = std::upper_bound(borders_.begin(), borders_.end(), begin);
  while (begin < end) {
    const size_t run_end = border == borders_.end() ? end : std::min(*border, end);
    runs.push_back({begin, run_end, (border - borders_.begin()) % 2 == 1});
    begin = run_end;
    if (border != borders_.end()) ++border;
  }
  return runs;
}

namespace {

constexpr char32_t kReplacement = 0xFFFD;

// Length of the well-formed sequence at begin and its value; {1, kReplacement} if there is none.
struct Decoded {
  size_t length;
  char32_t value;
};

Decoded Decode(std::string_view s, size_t begin) {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(s[begin + i]); };
  const unsigned char lead = byte(0);
  const size_t length = lead < 0xC2 ? 1 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : lead < 0xF5 ? 4 : 1;
  if (lead < 0x80) return {1, lead};
  if (length == 1 || s.size() - begin < length) return {1, kReplacement};
  char32_t value = lead & (0x7F >> length);
  for (size_t i = 1; i < length; ++i) {
    if ((byte(i) & 0xC0) != 0x80) return {1, kReplacement};
    value = value << 6 | (byte(i) & 0x3F);
  }
  const bool overlong = value < (length == 4 ? 0x10000u : length == 3 ? 0x800u : 0x80u);
  const bool surrogate = value >= 0xD800 && value <= 0xDFFF;
  if (overlong || surrogate || value > 0x10FFFF) return {1, kReplacement};
  return {length, value};
}

// The begin of the last code point of s[begin, end).
size_t LastCodePoint(std::string_view s, size_t begin, size_t end) {
  for (size_t length = std::min<size_t>(4, end - begin); length > 1; --length) {
    if (CodePointEnd(s.substr(0, end), end - length) == end) return end - length;
  }
  return end - 1;
}

}  // namespace

size_t CodePointEnd(std::string_view s, size_t begin) { return begin + Decode(s, begin).length; }

char32_t CodePointAt(std::string_view s, size_t begin) { return Decode(s, begin).value; }

std::vector<size_t> CodePointBegins(std::string_view s) {
  std::vector<size_t> begins;
  for (size_t i = 0; i < s.size(); i = CodePointEnd(s, i)) begins.push_back(i);
  return begins;
}

size_t CodePointCount(std::string_view s) {
  size_t count = 0;
  for (size_t i = 0; i < s.size(); i = CodePointEnd(s, i)) ++count;
  return count;
}

void AppendUtf8(char32_t c, std::string& out) {
  if (c < 0x80) {
    out += static_cast<char>(c);
    return;
  }
  const int continuations = c < 0x800 ? 1 : c < 0x10000 ? 2 : 3;
  const int lead_mark = 0xFF00 >> (continuations + 1) & 0xFF;  // 110xxxxx, 1110xxxx, 11110xxx
  out += static_cast<char>(lead_mark | c >> (6 * continuations));
  for (int i = continuations - 1; i >= 0; --i) {
    out += static_cast<char>(0x80 | (c >> (6 * i) & 0x3F));
  }
}

bool IsAscii(std::string_view s) {
  return std::all_of(s.begin(), s.end(), [](char c) { return static_cast<signed char>(c) >= 0; });
}

bool IsSpace(char32_t c) {
  return (c >= 0x09 && c <= 0x0D) || (c >= 0x1C && c <= 0x20) || c == 0x85 || c == 0xA0 ||
         c == 0x1680 || (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F ||
         c == 0x205F || c == 0x3000;
}

Span Strip(std::string_view s, const std::string_view* chars, bool left, bool right) {
  const auto goes = [&](size_t begin, size_t end) {
    if (chars == nullptr) return IsSpace(CodePointAt(s, begin));
    const std::string_view one = s.substr(begin, end - begin);
    for (size_t i = 0; i < chars->size(); i = CodePointEnd(*chars, i)) {
      if (chars->substr(i, CodePointEnd(*chars, i) - i) == one) return true;
    }
    return false;
  };
  Span rest{0, s.size()};
  while (left && rest.begin < rest.end && goes(rest.begin, CodePointEnd(s, rest.begin))) {
    rest.begin = CodePointEnd(s, rest.begin);
  }
  while (right && rest.begin < rest.end) {
    const size_t last = LastCodePoint(s, rest.begin, rest.end);
    if (!goes(last, rest.end)) break;
    rest.end = last;
  }
  return rest;
}

}  // namespace espalier::jinja
