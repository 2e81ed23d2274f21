// A tokenizer's data as a model file carries it: what both file formats are read into.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace espalier {

enum class TokenKind : uint8_t {
  kNormal,   // text in the byte-level alphabet, made by merges
  kControl,  // special: matched only where special tokens are parsed, left out of plain text
  kAdded,    // added but not special: its string is matched in plain text too
  kUnused,
};

enum class PreTokenizer : uint8_t {
  kGpt2,    // the GPT-2 regex
  kSmolLm,  // every \p{N} alone first, then the GPT-2 regex on each stretch
  kQwen2,   // NFC, then Qwen2's regex
};

struct VocabularyToken {
  std::string text;  // kNormal: byte-level alphabet (GPT-2's 256 printable characters); else plain
  TokenKind kind = TokenKind::kNormal;
};

struct Vocabulary {
  std::vector<VocabularyToken> tokens;                      // index = token id
  std::vector<std::pair<std::string, std::string>> merges;  // by rank, byte-level alphabet
  PreTokenizer pre_tokenizer = PreTokenizer::kGpt2;
  int32_t bos = -1;  // -1: none
  int32_t eos = -1;
  std::vector<int32_t> end_tokens;  // every token that ends a generation, eos among them
  bool add_bos = false;
  std::string chat_template;  // Jinja; empty: none
};

}  // namespace espalier
