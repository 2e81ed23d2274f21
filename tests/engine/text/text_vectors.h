// Reads what the tokenizer tests compare with: JSON lines and Hugging Face's tokenizer.json.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "engine/model/text/tokenizer.h"

namespace espalier {

// One value a line; fails the test, naming file and line, at what is no JSON.
std::vector<nlohmann::json> ReadJsonLines(const std::string& path);

// A byte-level BPE tokenizer.json; its own pre-tokenizer is not read.
Vocabulary ReadTokenizerJson(const std::string& path, PreTokenizer pre_tokenizer);

// Create, which must succeed.
std::unique_ptr<const Tokenizer> MakeTokenizer(Vocabulary vocabulary);

// Encode, which must succeed.
std::vector<int32_t> EncodeOrFail(const Tokenizer& tokenizer, const std::string& text,
                                  Tokenizer::Special special);

// Checks Decode and StreamingDetokenizer, token by token.
void ExpectDecodes(const Tokenizer& tokenizer, const std::vector<int32_t>& ids,
                   const std::vector<std::string>& chunks, const std::string& flush,
                   const std::string& without_special);

std::string FromHex(const std::string& hex);

}  // namespace espalier
