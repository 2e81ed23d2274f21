// GPT-2's byte-level alphabet: each byte as one printable character, as vocabularies spell them.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace espalier {

// The character of a byte: itself for printable Latin-1, else U+0100 and up in byte order.
std::string SpellByte(uint8_t byte);

// Appends the bytes that `text` spells. False at a character outside the alphabet or not UTF-8.
bool AppendSpelledBytes(std::string_view text, std::string& bytes);

}  // namespace espalier
