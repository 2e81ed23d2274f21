#include "engine/model/text/characters.h"

#include <fmt/format.h>
#include <unicode/bytestream.h>
#include <unicode/normalizer2.h>
#include <unicode/uchar.h>
#include <unicode/unistr.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <utility>

#include "engine/model/text/utf8.h"

namespace espalier {
namespace {

Category Classify(UChar32 code_point) {
  const uint32_t mask = U_GET_GC_MASK(code_point);
  if (mask & U_GC_L_MASK) return Category::kLetter;
  if (mask & U_GC_N_MASK) return Category::kNumber;
  return u_isUWhiteSpace(code_point) ? Category::kSpace : Category::kOther;
}

void CheckIcu(UErrorCode error, std::string_view what) {
  if (U_SUCCESS(error)) return;
  fmt::print(stderr, "ICU: {} failed: {}\n", what, u_errorName(error));
  std::abort();
}

// UAX 15's quick check: no character that may compose, marks in order.
bool IsSurelyNfc(std::string_view text) {
  constexpr char32_t kFirstNotInert = 0x300;
  uint8_t last_class = 0;
  while (!text.empty()) {
    const Utf8Step step = ReadUtf8(text);
    text.remove_prefix(step.length);
    uint8_t combining_class = 0;
    if (step.code_point >= kFirstNotInert) {
      const auto code_point = static_cast<UChar32>(step.code_point);
      if (u_getIntPropertyValue(code_point, UCHAR_NFC_QUICK_CHECK) != UNORM_YES) return false;
      combining_class = u_getCombiningClass(code_point);
      if (combining_class != 0 && combining_class < last_class) return false;
    }
    last_class = combining_class;
  }
  return true;
}

// Canonical decomposition with marks in canonical order. ICU alone inserts marks one by one, which
// is quadratic for a long run of unordered ones; on ordered text it is linear.
std::string Decompose(const icu::Normalizer2& nfc, std::string_view text) {
  struct Mark {
    uint8_t combining_class;
    UChar32 code_point;
  };
  icu::UnicodeString ordered;
  std::vector<Mark> marks;
  const auto flush_marks = [&] {
    std::stable_sort(marks.begin(), marks.end(), [](const Mark& a, const Mark& b) {
      return a.combining_class < b.combining_class;
    });
    for (const Mark& mark : marks) ordered.append(mark.code_point);
    marks.clear();
  };
  const auto add = [&](UChar32 code_point) {
    const uint8_t combining_class = u_getCombiningClass(code_point);
    if (combining_class != 0) {
      marks.push_back({combining_class, code_point});
    } else {
      flush_marks();
      ordered.append(code_point);
    }
  };
  icu::UnicodeString parts;
  while (!text.empty()) {
    const Utf8Step step = ReadUtf8(text);
    text.remove_prefix(step.length);
    if (nfc.getDecomposition(static_cast<UChar32>(step.code_point), parts)) {
      for (int32_t i = 0; i < parts.length(); i = parts.moveIndex32(i, 1)) add(parts.char32At(i));
    } else {
      add(static_cast<UChar32>(step.code_point));
    }
  }
  flush_marks();
  std::string utf8;
  return ordered.toUTF8String(utf8);
}

}  // namespace

CharacterTable::CharacterTable() {
  std::map<Block, uint16_t> known;
  for (size_t b = 0; b < block_of_.size(); ++b) {
    Block block;
    for (size_t i = 0; i < kBlock; ++i) block[i] = Classify(static_cast<UChar32>(b * kBlock + i));
    const auto [entry, is_new] = known.try_emplace(block, static_cast<uint16_t>(blocks_.size()));
    if (is_new) blocks_.push_back(block);
    block_of_[b] = entry->second;
  }
}

const CharacterTable& CharacterTable::Get() {
  static const CharacterTable table;
  return table;
}

char32_t FoldCase(char32_t code_point) {
  return static_cast<char32_t>(u_foldCase(static_cast<UChar32>(code_point), U_FOLD_CASE_DEFAULT));
}

std::string_view ToNfc(std::string_view text, std::string* storage) {
  if (IsSurelyNfc(text)) return text;
  UErrorCode error = U_ZERO_ERROR;
  const icu::Normalizer2* nfc = icu::Normalizer2::getNFCInstance(error);
  CheckIcu(error, "loading the NFC data");
  const std::string ordered = Decompose(*nfc, text);
  storage->clear();
  icu::StringByteSink<std::string> sink(storage);
  const icu::StringPiece source(ordered.data(), static_cast<int32_t>(ordered.size()));
  nfc->normalizeUTF8(0, source, sink, nullptr, error);
  CheckIcu(error, "composing");
  return *storage;
}

}  // namespace espalier
