#include "engine/model/text/pre_tokenizer.h"

#include "engine/model/text/utf8.h"

namespace espalier {
namespace {

bool IsNewline(char32_t code) { return code == '\r' || code == '\n'; }

}  // namespace

PieceScanner::PieceScanner(PreTokenizer kind, std::string_view text)
    : table_(CharacterTable::Get()), kind_(kind), text_(text) {}

std::string_view PieceScanner::Next() {
  if (at_ == text_.size()) return {};
  const size_t begin = at_;
  at_ = kind_ == PreTokenizer::kQwen2 ? EndOfPieceQwen2(begin) : EndOfPieceGpt2(begin);
  return text_.substr(begin, at_ - begin);
}

PieceScanner::Character PieceScanner::Read(size_t at) const {
  if (at >= text_.size()) return {0, Category::kEnd, at};
  const Utf8Step step = ReadUtf8(text_.substr(at));
  return {step.code_point, table_.Of(step.code_point), at + step.length};
}

size_t PieceScanner::EndOfRun(Category category, size_t at) const {
  for (Character c = Read(at); c.category == category; c = Read(at)) at = c.end;
  return at;
}

// `at`, unless 's 't 're 've 'm 'll or 'd stands there (kQwen2: in either case).
size_t PieceScanner::EndOfContraction(size_t at) const {
  if (text_[at] != '\'') return at;
  const auto folded = [this](const Character& c) {
    return kind_ == PreTokenizer::kQwen2 ? FoldCase(c.code) : c.code;
  };
  const Character first = Read(at + 1);
  const char32_t letter = folded(first);
  if (letter == 's' || letter == 't' || letter == 'm' || letter == 'd') return first.end;
  const Character second = Read(first.end);
  const char32_t last = letter == 'r' || letter == 'v' ? U'e' : letter == 'l' ? U'l' : U'\0';
  return last != U'\0' && folded(second) == last ? second.end : at;
}

// White space from `at` on: \s+(?!\S)|\s+, which leaves the last one to a word behind; kQwen2 first
// tries \s*[\r\n]+, which ends at the last newline.
size_t PieceScanner::EndOfSpace(size_t at) const {
  size_t last = at;
  size_t end = at;
  size_t newline_end = at;
  Character c = Read(at);
  for (; c.category == Category::kSpace; c = Read(end)) {
    last = end;
    end = c.end;
    if (IsNewline(c.code)) newline_end = end;
  }
  if (kind_ == PreTokenizer::kQwen2 && newline_end > at) return newline_end;
  const bool at_end = c.category == Category::kEnd ||
                      (kind_ == PreTokenizer::kSmolLm && c.category == Category::kNumber);
  return at_end || last == at ? end : last;
}

size_t PieceScanner::EndOfPieceGpt2(size_t at) const {
  if (const size_t end = EndOfContraction(at); end > at) return end;
  const Character first = Read(at);
  const Character body = first.code == ' ' ? Read(first.end) : first;
  switch (body.category) {
    case Category::kNumber:
      if (kind_ == PreTokenizer::kSmolLm) return first.end;  // the number, or the space before it
      [[fallthrough]];
    case Category::kLetter:
    case Category::kOther:
      return EndOfRun(body.category, body.end);
    case Category::kSpace:
    case Category::kEnd:
      break;
  }
  return EndOfSpace(at);
}

size_t PieceScanner::EndOfPieceQwen2(size_t at) const {
  if (const size_t end = EndOfContraction(at); end > at) return end;
  const Character first = Read(at);
  if (first.category == Category::kNumber) return first.end;
  if (first.category == Category::kLetter) return EndOfRun(Category::kLetter, first.end);
  const Character second = Read(first.end);
  if (!IsNewline(first.code) && second.category == Category::kLetter) {
    return EndOfRun(Category::kLetter, second.end);
  }
  const Character body = first.code == ' ' ? second : first;
  if (body.category != Category::kOther) return EndOfSpace(at);
  size_t end = EndOfRun(Category::kOther, body.end);
  while (IsNewline(Read(end).code)) end = Read(end).end;
  return end;
}

}  // namespace espalier
