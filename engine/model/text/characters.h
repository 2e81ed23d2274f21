// What the pre-tokenizers need to know of Unicode: character categories, folding, NFC.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace espalier {

enum class Category : uint8_t {
  kOther,
  kLetter,  // \p{L}
  kNumber,  // \p{N}: Nd, Nl and No
  kSpace,   // White_Space, which is \s: not U+001C..U+001F, U+200B or U+FEFF
  kEnd,     // no character: past the end of the text
};

// Categories of all code points, in about 60 KB. The versions follow ICU's (72: Unicode 15).
class CharacterTable {
 public:
  // Made on first use (some milliseconds), then shared by all threads.
  static const CharacterTable& Get();

  Category Of(char32_t code_point) const {
    return blocks_[block_of_[code_point / kBlock]][code_point % kBlock];
  }

 private:
  static constexpr size_t kBlock = 256;
  using Block = std::array<Category, kBlock>;

  CharacterTable();

  std::array<uint16_t, 0x110000 / kBlock> block_of_;
  std::vector<Block> blocks_;  // distinct ones only
};

// Simple case folding, e.g. U+017F to 's'.
char32_t FoldCase(char32_t code_point);

// `text`, valid UTF-8, in normalisation form C: `text` itself if it is so already, else made in
// `*storage`. Takes O(n log n) for any text: a long run of combining marks is sorted, not inserted.
std::string_view ToNfc(std::string_view text, std::string* storage);

}  // namespace espalier
