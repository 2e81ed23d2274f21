#include "engine/model/text/byte_alphabet.h"

#include <array>

#include "engine/model/text/utf8.h"

namespace espalier {
namespace {

constexpr int kCharacters = 0x144;  // U+0000..U+0143: 256 in use
constexpr int kNoByte = -1;

struct Alphabet {
  std::array<char32_t, 256> character;
  std::array<int, kCharacters> byte;
};

constexpr Alphabet MakeAlphabet() {
  Alphabet alphabet{};
  alphabet.byte.fill(kNoByte);
  char32_t next = 0x100;
  for (int b = 0; b < 256; ++b) {
    const bool printable = (b > 0x20 && b < 0x7F) || (b > 0xA0 && b != 0xAD);
    alphabet.character[b] = printable ? static_cast<char32_t>(b) : next++;
    alphabet.byte[alphabet.character[b]] = b;
  }
  return alphabet;
}

constexpr Alphabet kAlphabet = MakeAlphabet();

}  // namespace

std::string SpellByte(uint8_t byte) {
  const char32_t c = kAlphabet.character[byte];  // below U+0800: at most two bytes of UTF-8
  if (c < 0x80) return {static_cast<char>(c)};
  return {static_cast<char>(0xC0 | c >> 6), static_cast<char>(0x80 | (c & 0x3F))};
}

bool AppendSpelledBytes(std::string_view text, std::string& bytes) {
  while (!text.empty()) {
    const Utf8Step step = ReadUtf8(text);
    if (step.kind != Utf8Step::Kind::kCharacter || step.code_point >= kCharacters) return false;
    const int byte = kAlphabet.byte[step.code_point];
    if (byte == kNoByte) return false;
    bytes.push_back(static_cast<char>(byte));
    text.remove_prefix(step.length);
  }
  return true;
}

}  // namespace espalier
