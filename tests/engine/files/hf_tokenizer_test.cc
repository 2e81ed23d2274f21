#include "engine/model/files/hf_tokenizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <utility>

#include "tests/support/model_writer.h"

namespace espalier {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

constexpr int kRows = 264;  // of the embedding: four more than there are tokens

absl::StatusOr<Vocabulary> Read(const HfParts& parts) {
  const TemporaryFolder folder;
  parts.WriteTo(folder);
  // Through text, as a file's config comes.
  return ReadHfVocabulary(folder.path(), nlohmann::json::parse(parts.config.dump()), kRows);
}

HfParts Parts() {
  HfParts parts = TinyHf();
  parts.tensors.clear();
  return parts;
}

// What is wrong after one change to a tokenizer that is right; without the folder.
template <typename Change>
std::string FaultAfter(Change change) {
  HfParts parts = Parts();
  change(parts);
  const auto vocabulary = Read(parts);
  if (vocabulary.ok()) return "";
  const std::string message(vocabulary.status().message());
  return message.substr(message.rfind('/', message.find(".json: ")) + 1);
}

TEST(HfTokenizer, IsWhatTheFilesSay) {
  const auto vocabulary = Read(Parts());
  ASSERT_TRUE(vocabulary.ok()) << vocabulary.status();
  EXPECT_EQ(vocabulary->pre_tokenizer, PreTokenizer::kSmolLm);
  ASSERT_EQ(vocabulary->tokens.size(), kRows);
  EXPECT_EQ(vocabulary->tokens['a'].text, "a");
  EXPECT_EQ(vocabulary->tokens['a'].kind, TokenKind::kNormal);
  EXPECT_EQ(vocabulary->tokens[256].kind, TokenKind::kControl);
  EXPECT_EQ(vocabulary->tokens[259].text, "th");
  EXPECT_EQ(vocabulary->tokens[260].kind, TokenKind::kUnused);
  EXPECT_THAT(vocabulary->merges, ElementsAre(std::pair<std::string, std::string>("t", "h")));
  EXPECT_EQ(vocabulary->bos, 257);
  EXPECT_EQ(vocabulary->eos, 258);
  EXPECT_THAT(vocabulary->end_tokens, ElementsAre(258, 256));
  EXPECT_FALSE(vocabulary->add_bos);
  EXPECT_THAT(vocabulary->chat_template, HasSubstr("<|im_start|>"));
}

TEST(HfTokenizer, DoesWithTokenizerJsonAndConfigAlone) {
  HfParts parts = Parts();
  parts.tokenizer_config = nullptr;
  parts.generation_config = nullptr;
  parts.config["bos_token_id"] = 1;
  parts.config["eos_token_id"] = {2, 3};
  const auto vocabulary = Read(parts);
  ASSERT_TRUE(vocabulary.ok()) << vocabulary.status();
  EXPECT_EQ(vocabulary->bos, 1);
  EXPECT_EQ(vocabulary->eos, 2);
  EXPECT_THAT(vocabulary->end_tokens, ElementsAre(2, 3));
  EXPECT_EQ(vocabulary->chat_template, "");
}

TEST(HfTokenizer, ReadsBothSpellingsOfMergesAndOfTokens) {
  HfParts parts = Parts();
  parts.tokenizer["model"]["merges"] = nlohmann::json::parse(R"([["t", "h"]])");
  parts.tokenizer["added_tokens"][0]["special"] = false;
  parts.tokenizer_config["bos_token"] = {{"content", "<|endoftext|>"}, {"lstrip", false}};
  parts.tokenizer_config["add_bos_token"] = true;
  parts.generation_config["eos_token_id"] = 258;
  const auto vocabulary = Read(parts);
  ASSERT_TRUE(vocabulary.ok()) << vocabulary.status();
  EXPECT_THAT(vocabulary->merges, ElementsAre(std::pair<std::string, std::string>("t", "h")));
  EXPECT_EQ(vocabulary->tokens[256].kind, TokenKind::kAdded);
  EXPECT_EQ(vocabulary->bos, 256);
  EXPECT_TRUE(vocabulary->add_bos);
  EXPECT_THAT(vocabulary->end_tokens, ElementsAre(258));
}

TEST(HfTokenizer, TellsPreTokenizersByTheirStructure) {
  const nlohmann::json byte_level = {
      {"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}};
  HfParts parts = Parts();
  parts.tokenizer["pre_tokenizer"] = byte_level;
  auto vocabulary = Read(parts);
  ASSERT_TRUE(vocabulary.ok()) << vocabulary.status();
  EXPECT_EQ(vocabulary->pre_tokenizer, PreTokenizer::kGpt2);

  nlohmann::json no_regex = byte_level;
  no_regex["use_regex"] = false;
  const nlohmann::json split = {
      {"type", "Split"},
      {"pattern",
       {{"Regex",
         "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| "
         "?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"}}},
      {"behavior", "Isolated"},
      {"invert", false}};
  parts.tokenizer["normalizer"] = {{"type", "NFC"}};
  parts.tokenizer["pre_tokenizer"] = {{"type", "Sequence"}, {"pretokenizers", {split, no_regex}}};
  vocabulary = Read(parts);
  ASSERT_TRUE(vocabulary.ok()) << vocabulary.status();
  EXPECT_EQ(vocabulary->pre_tokenizer, PreTokenizer::kQwen2);
}

TEST(HfTokenizer, RefusesByNameWhatItWouldCutWrongly) {
  EXPECT_EQ(
      FaultAfter([](HfParts& p) { p.tokenizer["pre_tokenizer"] = {{"type", "Metaspace"}}; }),
      "tokenizer.json: key \"pre_tokenizer\": {\"type\":\"Metaspace\"} is not supported, only "
      "those of GPT-2, SmolLM and (with NFC) Qwen2");
  EXPECT_THAT(FaultAfter([](HfParts& p) {
                p.tokenizer["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = true;
              }),
              HasSubstr("key \"pre_tokenizer\""));
  EXPECT_THAT(FaultAfter([](HfParts& p) { p.tokenizer["normalizer"] = {{"type", "Lowercase"}}; }),
              HasSubstr("key \"normalizer\": {\"type\":\"Lowercase\"} is not supported"));
  EXPECT_THAT(FaultAfter([](HfParts& p) { p.tokenizer["normalizer"] = {{"type", "NFC"}}; }),
              HasSubstr("key \"pre_tokenizer\""))
      << "SmolLM's pieces are of the text as it is";
  EXPECT_THAT(FaultAfter([](HfParts& p) {
                p.tokenizer["post_processor"] = {{"type", "TemplateProcessing"}};
              }),
              HasSubstr("key \"post_processor\""));
  EXPECT_EQ(FaultAfter([](HfParts& p) { p.tokenizer["post_processor"] = {{"type", "ByteLevel"}}; }),
            "");
  EXPECT_THAT(FaultAfter([](HfParts& p) { p.tokenizer["model"]["type"] = "Unigram"; }),
              HasSubstr("key \"model.type\": \"Unigram\" is not supported, only BPE"));
  EXPECT_THAT(FaultAfter([](HfParts& p) { p.tokenizer["model"]["ignore_merges"] = true; }),
              HasSubstr("key \"model.ignore_merges\": true is not supported, only false"));
  EXPECT_THAT(FaultAfter([](HfParts& p) { p.tokenizer["model"]["unk_token"] = "<unk>"; }),
              HasSubstr("key \"model.unk_token\": \"<unk>\" is not supported"));
  EXPECT_THAT(FaultAfter([](HfParts& p) { p.tokenizer["model"]["end_of_word_suffix"] = "</w>"; }),
              HasSubstr("key \"model.end_of_word_suffix\""));
  EXPECT_THAT(FaultAfter([](HfParts& p) { p.tokenizer["added_tokens"][1]["lstrip"] = true; }),
              HasSubstr("key \"added_tokens[1].lstrip\": true is not supported, only false"));
}

TEST(HfTokenizer, RefusesContradictions) {
  EXPECT_THAT(FaultAfter([](HfParts& p) { p.tokenizer["model"]["vocab"]["th"] = kRows; }),
              HasSubstr("key \"model.vocab.th\": expected an integer in 0..263, got 264"));
  EXPECT_THAT(FaultAfter([](HfParts& p) { p.tokenizer["model"]["vocab"]["th"] = 'b'; }),
              HasSubstr("expected an id of its own, got 98"));
  EXPECT_THAT(FaultAfter([](HfParts& p) { p.tokenizer["model"].erase("vocab"); }),
              HasSubstr("key \"model.vocab\": expected an object, got none"));
  EXPECT_THAT(
      FaultAfter([](HfParts& p) { p.tokenizer["model"]["merges"] = {"t h", "t h e"}; }),
      HasSubstr("merge 1: expected two tokens, in a list or with a space between, got \"t"));
  EXPECT_THAT(FaultAfter([](HfParts& p) { p.tokenizer["model"]["merges"] = 3; }),
              HasSubstr("key \"model.merges\": expected a list, got 3"));
  EXPECT_THAT(FaultAfter([](HfParts& p) { p.tokenizer["added_tokens"][0].erase("id"); }),
              HasSubstr("key \"added_tokens[0].id\": expected a value, got none"));
  EXPECT_THAT(FaultAfter([](HfParts& p) { p.tokenizer_config["eos_token"] = "</s>"; }),
              HasSubstr("key \"eos_token\": expected a token of the vocabulary, got \"</s>\""));
  EXPECT_THAT(FaultAfter([](HfParts& p) { p.generation_config["eos_token_id"] = {1, -1}; }),
              HasSubstr("key \"eos_token_id\": expected ids in 0..263, got [1,-1]"));
  EXPECT_EQ(FaultAfter([](HfParts& p) { p.tokenizer = nullptr; }),
            "tokenizer.json: open: No such file or directory");
}

TEST(HfTokenizer, FindsTheChatTemplateWhereverItIs) {
  HfParts parts = Parts();
  parts.tokenizer_config["chat_template"] = {{{"name", "tool_use"}, {"template", "tools"}},
                                             {{"name", "default"}, {"template", "plain"}}};
  auto vocabulary = Read(parts);
  ASSERT_TRUE(vocabulary.ok()) << vocabulary.status();
  EXPECT_EQ(vocabulary->chat_template, "plain");
  parts.chat_template = "of its own file";
  vocabulary = Read(parts);
  ASSERT_TRUE(vocabulary.ok()) << vocabulary.status();
  EXPECT_EQ(vocabulary->chat_template, "of its own file");
}

}  // namespace
}  // namespace espalier
