// A string that remembers, byte for byte, whether it came from the template or from the caller.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

namespace espalier::jinja {

// The memory of origins survives everything a template can do to a string, because every operation
// is made of Append and Substr. At most kMaxText bytes: Append fails beyond.
class Text {
 public:
  Text() = default;
  explicit Text(std::string_view bytes, bool from_caller = false) { Append(bytes, from_caller); }

  std::string_view bytes() const { return bytes_; }
  size_t size() const { return bytes_.size(); }
  bool empty() const { return bytes_.empty(); }

  void Append(std::string_view bytes, bool from_caller = false);
  void Append(const Text& text) { Append(text, 0, text.size()); }
  void Append(const Text& text, size_t begin, size_t end);
  Text Substr(size_t begin, size_t end) const;

  // The same origins over other bytes, as many as before.
  Text WithBytes(std::string bytes) const;

  struct Run {
    size_t begin, end;
    bool from_caller;
  };
  // The maximal stretches of one origin in [begin, end), in order, none of them empty.
  std::vector<Run> Runs(size_t begin, size_t end) const;
  std::vector<Run> Runs() const { return Runs(0, size()); }

 private:
  std::string bytes_;
  std::vector<size_t>
      borders_;  // rising positions where the origin flips; the template comes first
};

// UTF-8 as Python's str sees it: a sequence of code points. Bytes that are no UTF-8 count as one
// code point each, so that no operation loses them.
size_t CodePointEnd(std::string_view s, size_t begin);
char32_t CodePointAt(std::string_view s, size_t begin);
std::vector<size_t> CodePointBegins(std::string_view s);
size_t CodePointCount(std::string_view s);
void AppendUtf8(char32_t code_point, std::string& out);
bool IsAscii(std::string_view s);

bool IsSpace(char32_t code_point);  // str.isspace, which is wider than Unicode's White_Space

// The borders of s without the code points at its ends that are in chars, or that are white space
// if chars is null.
struct Span {
  size_t begin, end;
};
Span Strip(std::string_view s, const std::string_view* chars, bool left, bool right);

}  // namespace espalier::jinja
