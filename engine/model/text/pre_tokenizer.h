// Cuts text into the pieces that merges never cross: the models' regexes, written out as scanners.
#pragma once

#include <cstddef>
#include <string_view>

#include "engine/model/text/characters.h"
#include "engine/model/text/vocabulary.h"

namespace espalier {

// kGpt2   's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
// kSmolLm \p{N} first, each a piece of its own; then kGpt2 on each stretch between, whose end
// counts
//         as the end of the text
// kQwen2  (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|
//          ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+
//
// Each alternative that can match is told by the first two characters, so no step goes back further
// than one character: linear in the text.
class PieceScanner {
 public:
  // `text`: valid UTF-8 that outlives the scanner; for kQwen2 in NFC already.
  PieceScanner(PreTokenizer kind, std::string_view text);

  // The pieces in order, without gaps; "" at the end.
  std::string_view Next();

 private:
  struct Character {
    char32_t code;
    Category category;
    size_t end;  // offset of the next one
  };

  Character Read(size_t at) const;
  size_t EndOfRun(Category category, size_t at) const;
  size_t EndOfContraction(size_t at) const;
  size_t EndOfSpace(size_t at) const;
  size_t EndOfPieceGpt2(size_t at) const;
  size_t EndOfPieceQwen2(size_t at) const;

  const CharacterTable& table_;
  PreTokenizer kind_;
  std::string_view text_;
  size_t at_ = 0;
};

}  // namespace espalier
