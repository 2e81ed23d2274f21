#include "tests/engine/text/text_vectors.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>

namespace espalier {

using nlohmann::json;

std::vector<json> ReadJsonLines(const std::string& path) {
  std::vector<json> values;
  std::ifstream file(path);
  EXPECT_TRUE(file) << "cannot read " << path;
  for (std::string line; std::getline(file, line);) {
    values.push_back(json::parse(line, nullptr, /*allow_exceptions=*/false));
    EXPECT_FALSE(values.back().is_discarded()) << path << ":" << values.size();
  }
  return values;
}

Vocabulary ReadTokenizerJson(const std::string& path, PreTokenizer pre_tokenizer) {
  std::ifstream file(path);
  EXPECT_TRUE(file) << "cannot read " << path;
  const json root = json::parse(file, nullptr, /*allow_exceptions=*/false);
  Vocabulary vocabulary;
  vocabulary.pre_tokenizer = pre_tokenizer;
  const auto set = [&](size_t id, const std::string& text, TokenKind kind) {
    vocabulary.tokens.resize(std::max(vocabulary.tokens.size(), id + 1));
    vocabulary.tokens[id] = {text, kind};
  };
  for (const auto& [text, id] : root["model"]["vocab"].items()) set(id, text, TokenKind::kNormal);
  for (const json& added : root["added_tokens"]) {
    set(added["id"], added["content"], added["special"] ? TokenKind::kControl : TokenKind::kAdded);
  }
  for (const json& merge : root["model"]["merges"]) {
    vocabulary.merges.emplace_back(merge[0], merge[1]);
  }
  return vocabulary;
}

std::unique_ptr<const Tokenizer> MakeTokenizer(Vocabulary vocabulary) {
  auto tokenizer = Tokenizer::Create(std::move(vocabulary));
  EXPECT_TRUE(tokenizer.ok()) << tokenizer.status();
  return *std::move(tokenizer);
}

std::vector<int32_t> EncodeOrFail(const Tokenizer& tokenizer, const std::string& text,
                                  Tokenizer::Special special) {
  auto tokens = tokenizer.Encode(text, special);
  EXPECT_TRUE(tokens.ok()) << tokens.status() << " for " << json(text);
  return *std::move(tokens);
}

void ExpectDecodes(const Tokenizer& tokenizer, const std::vector<int32_t>& ids,
                   const std::vector<std::string>& chunks, const std::string& flush,
                   const std::string& without_special) {
  const auto shown = [&] { return "ids " + json(ids).dump(); };
  ASSERT_EQ(chunks.size(), ids.size()) << shown();
  StreamingDetokenizer detokenizer(tokenizer);
  std::string text;
  for (size_t i = 0; i < ids.size(); ++i) {
    EXPECT_EQ(detokenizer.Push(ids[i]), chunks[i]) << shown() << " at " << i;
    text += chunks[i];
  }
  EXPECT_EQ(detokenizer.Flush(), flush) << shown();
  EXPECT_EQ(detokenizer.Flush(), "") << shown();
  EXPECT_EQ(tokenizer.Decode(ids, /*skip_special=*/false), text + flush) << shown();
  EXPECT_EQ(tokenizer.Decode(ids, /*skip_special=*/true), without_special) << shown();
}

std::string FromHex(const std::string& hex) {
  std::string bytes;
  for (size_t i = 0; i < hex.size(); i += 2) {
    bytes.push_back(static_cast<char>(std::stoi(hex.substr(i, 2), nullptr, 16)));
  }
  return bytes;
}

}  // namespace espalier
