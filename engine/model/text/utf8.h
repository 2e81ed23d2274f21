// Reading UTF-8 one step at a time, well-formed or not (Unicode 15, table 3-7).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace espalier {

struct Utf8Step {
  enum class Kind : uint8_t {
    kCharacter,  // `length` bytes encode `code_point`
    kIllFormed,  // `length` bytes are a maximal subpart: together they become one U+FFFD
    kCutOff,     // all `length` bytes, the last there are, begin a character
  };
  Kind kind;
  uint8_t length;
  char32_t code_point = 0;
};

// The step at the front of `bytes`, which must not be empty.
inline Utf8Step ReadUtf8(std::string_view bytes) {
  using Kind = Utf8Step::Kind;
  const auto lead = static_cast<uint8_t>(bytes[0]);
  if (lead < 0x80) return {Kind::kCharacter, 1, lead};
  if (lead < 0xC2 || lead > 0xF4) return {Kind::kIllFormed, 1};
  const uint8_t length = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
  // Only the second byte's range depends on the lead: no overlong form, surrogate or > U+10FFFF.
  uint8_t low = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
  uint8_t high = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
  char32_t code_point = lead & (0x7F >> length);
  for (uint8_t i = 1; i < length; ++i) {
    if (i == bytes.size()) return {Kind::kCutOff, i};
    const auto byte = static_cast<uint8_t>(bytes[i]);
    if (byte < low || byte > high) return {Kind::kIllFormed, i};
    code_point = code_point << 6 | (byte & 0x3F);
    low = 0x80;
    high = 0xBF;
  }
  return {Kind::kCharacter, length, code_point};
}

}  // namespace espalier
