#include "engine/model/chat/lexer.h"

#include <fmt/format.h>

#include <algorithm>

#include "engine/model/chat/failure.h"
#include "engine/model/chat/text.h"

namespace espalier::jinja {

namespace {

constexpr size_t kMaxName = 200;  // bytes; names are compared and quoted at every use

bool IsDigit(char c) { return c >= '0' && c <= '9'; }
bool IsNameStart(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_'; }
bool IsNamePart(char c) { return IsNameStart(c) || IsDigit(c); }

// Every line break becomes "\n"; the last one goes.
std::string NormalizeNewlines(std::string_view source) {
  std::string normal;
  normal.reserve(source.size());
  for (size_t i = 0; i < source.size(); ++i) {
    if (source[i] != '\r') {
      normal += source[i];
    } else if (i + 1 == source.size() || source[i + 1] != '\n') {
      normal += '\n';
    }
  }
  if (normal.ends_with('\n')) normal.pop_back();
  return normal;
}

class Lexer {
 public:
  explicit Lexer(std::string_view source) : source_(NormalizeNewlines(source)) {}

  std::vector<Token> Run() {
    while (position_ < source_.size()) {
      const size_t tag = FindTag(position_);
      if (tag == std::string::npos) {
        Emit(TokenKind::kData, source_.substr(position_));
        MoveTo(source_.size());
        break;
      }
      LexTextAndTag(tag);
    }
    Emit(TokenKind::kEnd, "");
    return std::move(tokens_);
  }

 private:
  [[noreturn]] void FailHere(std::string_view what) const {
    Fail(fmt::format("line {}: {}", line_, what));
  }

  char At(size_t i) const { return i < source_.size() ? source_[i] : '\0'; }
  bool Sees(std::string_view text) const { return SeesAt(position_, text); }
  bool SeesAt(size_t i, std::string_view text) const {
    return source_.compare(std::min(i, source_.size()), text.size(), text) == 0;
  }

  void Emit(TokenKind kind, std::string text) {
    if (kind == TokenKind::kData && text.empty()) return;
    tokens_.push_back({kind, std::move(text), line_});
  }

  void MoveTo(size_t position) {
    line_ += static_cast<int>(std::count(source_.begin() + static_cast<ptrdiff_t>(position_),
                                         source_.begin() + static_cast<ptrdiff_t>(position), '\n'));
    position_ = position;
  }

  size_t FindTag(size_t from) const {
    for (size_t i = source_.find('{', from); i != std::string::npos; i = source_.find('{', i + 1)) {
      const char mark = At(i + 1);
      if (mark == '%' || mark == '{' || mark == '#') return i;
    }
    return std::string::npos;
  }

  size_t SkipSpace(size_t i) const {
    while (i < source_.size() && IsSpace(CodePointAt(source_, i))) i = CodePointEnd(source_, i);
    return i;
  }

  // The text before a tag whose begin is followed by sign ('-', '+' or anything else).
  std::string TextBefore(size_t tag, char sign, bool is_variable) const {
    std::string_view text = std::string_view(source_).substr(position_, tag - position_);
    if (sign == '-') return std::string(text.substr(0, Strip(text, nullptr, false, true).end));
    if (sign == '+' || is_variable) return std::string(text);
    const size_t newline = text.rfind('\n');
    const size_t line_begin = newline == std::string_view::npos ? 0 : newline + 1;
    const bool starts_line = position_ == 0 || source_[position_ - 1] == '\n';
    const Span rest = Strip(text.substr(line_begin), nullptr, true, false);
    const bool blank = line_begin + rest.begin == text.size();
    if (blank && (line_begin > 0 || starts_line)) text = text.substr(0, line_begin);
    return std::string(text);
  }

  void LexTextAndTag(size_t tag) {
    const char mark = source_[tag + 1];
    const char sign = At(tag + 2);
    Emit(TokenKind::kData, TextBefore(tag, sign, mark == '{'));
    MoveTo(tag);
    if (mark == '%' && LexRaw()) return;
    const bool has_sign = sign == '-' || sign == '+';
    if (mark == '#') return LexComment(tag + 2 + has_sign);
    const bool is_variable = mark == '{';
    Emit(is_variable ? TokenKind::kVariableBegin : TokenKind::kBlockBegin, "");
    MoveTo(tag + 2 + has_sign);
    LexTag(is_variable);
  }

  // After the end of a block or a comment: all white space behind '-', one newline otherwise.
  void MoveBehind(size_t end, char sign) {
    if (sign == '-') {
      MoveTo(SkipSpace(end));
    } else {
      MoveTo(end + (sign != '+' && At(end) == '\n'));
    }
  }

  void LexComment(size_t begin) {
    const size_t end = source_.find("#}", begin);
    if (end == std::string::npos) FailHere("a comment without its end");
    const char sign = end > begin ? source_[end - 1] : '\0';
    MoveBehind(end + 2, sign);
  }

  // {% name %} with any signs; npos if there is none at i. Leaves the sign of its end in sign.
  size_t EndOfBareTag(size_t i, std::string_view name, char& sign) const {
    if (!SeesAt(i, "{%")) return std::string::npos;
    i += 2;
    if (At(i) == '-' || At(i) == '+') ++i;
    i = SkipSpace(i);
    if (!SeesAt(i, name)) return std::string::npos;
    i = SkipSpace(i + name.size());
    sign = At(i);
    if (sign == '-' || sign == '+') ++i;
    return SeesAt(i, "%}") ? i + 2 : std::string::npos;
  }

  bool LexRaw() {
    char sign = '\0';
    const size_t begin = EndOfBareTag(position_, "raw", sign);
    if (begin == std::string::npos || sign == '+') return false;
    MoveTo(sign == '-' ? SkipSpace(begin) : begin);  // trim_blocks does not reach behind raw
    for (size_t i = source_.find("{%", position_); i != std::string::npos;
         i = source_.find("{%", i + 1)) {
      const size_t end = EndOfBareTag(i, "endraw", sign);
      if (end == std::string::npos) continue;
      Emit(TokenKind::kData, TextBefore(i, At(i + 2), false));
      MoveBehind(end, sign);
      return true;
    }
    FailHere("a raw block without its end");
  }

  void LexTag(bool is_variable) {
    std::string open_brackets;
    while (true) {
      MoveTo(SkipSpace(position_));
      if (position_ == source_.size()) FailHere("a tag without its end");
      if (open_brackets.empty() && LexTagEnd(is_variable)) return;
      const char c = source_[position_];
      if (IsDigit(c)) {
        LexNumber();
      } else if (IsNameStart(c)) {
        size_t end = position_;
        while (IsNamePart(At(end))) ++end;
        if (end - position_ > kMaxName) FailHere("a name of over 200 characters");
        EmitUpTo(TokenKind::kName, end);
      } else if (c == '\'' || c == '"') {
        LexString(c);
      } else {
        LexOperator(open_brackets);
      }
    }
  }

  bool LexTagEnd(bool is_variable) {
    const char sign = source_[position_];
    const bool signed_end = sign == '-' || (sign == '+' && !is_variable);
    if (!SeesAt(position_ + signed_end, is_variable ? "}}" : "%}")) return false;
    Emit(is_variable ? TokenKind::kVariableEnd : TokenKind::kBlockEnd, "");
    const size_t end = position_ + signed_end + 2;
    if (is_variable) {
      MoveTo(sign == '-' ? SkipSpace(end) : end);
    } else {
      MoveBehind(end, signed_end ? sign : '\0');
    }
    return true;
  }

  void EmitUpTo(TokenKind kind, size_t end) {
    Emit(kind, source_.substr(position_, end - position_));
    MoveTo(end);
  }

  // Digits, single underscores between them.
  size_t EndOfDigits(size_t i) const {
    while (IsDigit(At(i)) || (At(i) == '_' && IsDigit(At(i + 1)))) ++i;
    return i;
  }

  void LexNumber() {
    size_t end = EndOfDigits(position_);
    const bool after_dot = position_ > 0 && source_[position_ - 1] == '.';
    bool is_float = false;
    if (!after_dot) {
      if (At(end) == '.' && IsDigit(At(end + 1))) {
        end = EndOfDigits(end + 1);
        is_float = true;
      }
      size_t exponent = end + 1;
      if (At(exponent) == '+' || At(exponent) == '-') ++exponent;
      if ((At(end) == 'e' || At(end) == 'E') && IsDigit(At(exponent))) {
        end = EndOfDigits(exponent);
        is_float = true;
      }
    }
    std::string digits = source_.substr(position_, end - position_);
    std::erase(digits, '_');
    if (!is_float && digits.size() > 1 && digits[0] == '0') FailHere("a number with a leading 0");
    if (IsNameStart(At(end))) FailHere("a name that starts with a digit, or a hexadecimal number");
    Emit(is_float ? TokenKind::kFloat : TokenKind::kInteger, std::move(digits));
    MoveTo(end);
  }

  void LexOperator(std::string& open_brackets) {
    static constexpr std::string_view kLong[] = {"//", "**", "==", "!=", "<=", ">="};
    for (const std::string_view op : kLong) {
      if (Sees(op)) return EmitUpTo(TokenKind::kOperator, position_ + op.size());
    }
    const char c = source_[position_];
    if (std::string_view("+-*/%~[](){}<>=.:|,;").find(c) == std::string_view::npos) {
      const size_t end = CodePointEnd(source_, position_);
      FailHere(fmt::format("unexpected '{}'", source_.substr(position_, end - position_)));
    }
    if (c == '(') open_brackets += ')';
    if (c == '[') open_brackets += ']';
    if (c == '{') open_brackets += '}';
    if (c == ')' || c == ']' || c == '}') {
      if (!open_brackets.ends_with(c)) FailHere(fmt::format("unexpected '{}'", c));
      open_brackets.pop_back();
    }
    EmitUpTo(TokenKind::kOperator, position_ + 1);
  }

  void LexString(char quote) {
    size_t end = position_ + 1;
    while (end < source_.size() && source_[end] != quote) end += source_[end] == '\\' ? 2 : 1;
    if (end >= source_.size()) FailHere("a string without its end");
    Emit(TokenKind::kString, Unescape(source_.substr(position_ + 1, end - position_ - 1)));
    MoveTo(end + 1);
  }

  std::string Unescape(std::string_view raw) const {
    std::string text;
    for (size_t i = 0; i < raw.size(); ++i) {
      if (raw[i] != '\\') {
        text += raw[i];
        continue;
      }
      const char c = raw[++i];  // a string never ends in a single backslash
      static constexpr std::string_view kNames = "\\'\"abfnrtv";
      static constexpr std::string_view kMeanings = "\\'\"\a\b\f\n\r\t\v";
      const size_t known = kNames.find(c);
      const size_t hex_digits = c == 'x' ? 2 : c == 'u' ? 4 : c == 'U' ? 8 : 0;
      if (known != std::string_view::npos) {
        text += kMeanings[known];
      } else if (hex_digits > 0) {
        AppendNumeric(raw.substr(i + 1, hex_digits), hex_digits, 16, text);
        i += hex_digits;
      } else if (c >= '0' && c <= '7') {
        size_t length = 1;
        while (length < 3 && i + length < raw.size() && raw[i + length] >= '0' &&
               raw[i + length] <= '7') {
          ++length;
        }
        AppendNumeric(raw.substr(i, length), length, 8, text);
        i += length - 1;
      } else if (c == 'N' || static_cast<signed char>(c) < 0) {
        FailHere("unsupported escape in a string");
      } else if (c != '\n') {  // a backslash joins lines; before anything else it stays
        text += '\\';
        text += c;
      }
    }
    return text;
  }

  void AppendNumeric(std::string_view digits, size_t length, int base, std::string& text) const {
    char32_t code_point = 0;
    for (const char c : digits) {
      const int digit = IsDigit(c)             ? c - '0'
                        : c >= 'a' && c <= 'f' ? c - 'a' + 10
                        : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                               : base;
      if (digit >= base) FailHere("a malformed escape in a string");
      code_point = code_point * static_cast<char32_t>(base) + static_cast<char32_t>(digit);
    }
    const bool surrogate = code_point >= 0xD800 && code_point <= 0xDFFF;
    if (digits.size() != length || surrogate || code_point > 0x10FFFF) {
      FailHere("an escape in a string that is no Unicode character");
    }
    AppendUtf8(code_point, text);
  }

  const std::string source_;
  size_t position_ = 0;
  int line_ = 1;
  std::vector<Token> tokens_;
};

}  // namespace

std::vector<Token> Tokenize(std::string_view source) { return Lexer(source).Run(); }

}  // namespace espalier::jinja
