#include "engine/model/text/tokenizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <ctime>
#include <numeric>
#include <random>
#include <thread>

#include "engine/model/text/byte_alphabet.h"
#include "engine/model/text/characters.h"
#include "tests/engine/text/text_vectors.h"

namespace espalier {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;

constexpr auto kAsText = Tokenizer::Special::kAsText;
constexpr auto kParse = Tokenizer::Special::kParse;

Vocabulary SmallVocabulary(PreTokenizer pre_tokenizer) {
  return ReadTokenizerJson(ESPALIER_TEXT_DATA "/tokenizer.json", pre_tokenizer);
}

// The small vocabulary with a token for the bytes that have none, too.
std::unique_ptr<const Tokenizer> WithEveryByte(PreTokenizer pre_tokenizer) {
  Vocabulary vocabulary = SmallVocabulary(pre_tokenizer);
  for (int b = 0; b < 256; ++b) {
    const std::string spelled = SpellByte(static_cast<uint8_t>(b));
    if (std::none_of(vocabulary.tokens.begin(), vocabulary.tokens.end(),
                     [&](const VocabularyToken& token) { return token.text == spelled; })) {
      vocabulary.tokens.push_back({spelled, TokenKind::kNormal});
    }
  }
  return MakeTokenizer(std::move(vocabulary));
}

// Text of all kinds at once: bits of 7, 11, 16 and 21 bits, spaces, digits, specials.
std::string RandomText(std::mt19937& random) {
  static const std::vector<std::string> kBits = {
      " ",      "  ",      "\n",    "\r\n",         "the",    "'s",
      "1",      "42",      "\t",    "e\u0301",      "<tool>", "!?",
      "\u00a0", "<|end|>", "trees", "\u0323\u0301", "'",      "\U0001F333"};
  std::string text;
  for (int n = std::uniform_int_distribution<>(0, 40)(random); n > 0; --n) {
    if (random() % 2 == 0) {
      text += kBits[random() % kBits.size()];
      continue;
    }
    static constexpr uint32_t kLimits[] = {0x80, 0x800, 0x10000, 0x110000};
    uint32_t c = random() % kLimits[random() % 4];
    if (c >= 0xD800 && c < 0xE000) c -= 0x1000;
    const int length = c < 0x80 ? 1 : c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    static constexpr uint32_t kLead[] = {0, 0, 0xC0, 0xE0, 0xF0};
    text.push_back(static_cast<char>(kLead[length] | c >> 6 * (length - 1)));
    for (int i = length - 2; i >= 0; --i) {
      text.push_back(static_cast<char>(0x80 | (c >> 6 * i & 0x3F)));
    }
  }
  return text;
}

class TokenizerVectors : public ::testing::TestWithParam<std::pair<const char*, PreTokenizer>> {};

TEST_P(TokenizerVectors, EncodeAsTheReferenceDoes) {
  const auto [name, pre_tokenizer] = GetParam();
  const auto tokenizer = MakeTokenizer(SmallVocabulary(pre_tokenizer));
  int compared = 0;
  for (const json& line : ReadJsonLines(ESPALIER_TEXT_DATA "/vectors.jsonl")) {
    if (!line.contains("text")) continue;
    const json& expected = line.contains(name) ? line[name] : line["gpt2"];
    const std::string text = line["text"];
    const json ids = expected["ids"];
    EXPECT_EQ(json(EncodeOrFail(*tokenizer, text, kAsText)), ids) << line;
    EXPECT_EQ(json(EncodeOrFail(*tokenizer, text, kParse)), expected.value("special", ids)) << line;
    EXPECT_EQ(json(tokenizer->PieceLengths(text)), expected["pieces"]) << line;
    ++compared;
  }
  EXPECT_GT(compared, 150);
}

INSTANTIATE_TEST_SUITE_P(All, TokenizerVectors,
                         ::testing::Values(std::pair{"gpt2", PreTokenizer::kGpt2},
                                           std::pair{"smollm", PreTokenizer::kSmolLm},
                                           std::pair{"qwen2", PreTokenizer::kQwen2}),
                         [](const auto& info) { return info.param.first; });

TEST(Tokenizer, DecodesAsTheReferenceDoes) {
  const auto tokenizer = MakeTokenizer(SmallVocabulary(PreTokenizer::kSmolLm));
  int compared = 0;
  for (const json& line : ReadJsonLines(ESPALIER_TEXT_DATA "/vectors.jsonl")) {
    if (!line.contains("decode")) continue;
    ExpectDecodes(*tokenizer, line["decode"], line["chunks"], line["flush"], line["skipped"]);
    ++compared;
  }
  EXPECT_GT(compared, 60);
}

TEST(Tokenizer, RandomTextComesBack) {
  std::mt19937 random(1);
  for (const auto kind : {PreTokenizer::kGpt2, PreTokenizer::kSmolLm, PreTokenizer::kQwen2}) {
    const auto tokenizer = WithEveryByte(kind);
    for (int i = 0; i < 2000; ++i) {
      const std::string text = RandomText(random);
      std::string normalised;
      const bool nfc = kind == PreTokenizer::kQwen2 && text.find('<') == std::string::npos;
      if (kind == PreTokenizer::kQwen2 && !nfc) continue;  // NFC between the specials only
      const std::string expected(nfc ? ToNfc(text, &normalised) : std::string_view(text));
      for (const auto special : {kAsText, kParse}) {
        const auto ids = EncodeOrFail(*tokenizer, text, special);
        ASSERT_EQ(tokenizer->Decode(ids, /*skip_special=*/false), expected) << json(text);
      }
      const auto lengths = tokenizer->PieceLengths(text);
      ASSERT_EQ(std::accumulate(lengths.begin(), lengths.end(), size_t{0}), expected.size());
      ASSERT_TRUE(std::all_of(lengths.begin(), lengths.end(), [](int n) { return n > 0; }));
    }
  }
}

TEST(Tokenizer, StreamingNeverSplitsACharacterAndJoinsToDecode) {
  const auto tokenizer = WithEveryByte(PreTokenizer::kSmolLm);
  std::mt19937 random(2);
  for (int i = 0; i < 3000; ++i) {
    std::vector<int32_t> ids(random() % 20);
    for (int32_t& id : ids) id = static_cast<int32_t>(random() % tokenizer->size());
    for (const bool skip_special : {false, true}) {
      StreamingDetokenizer detokenizer(*tokenizer, skip_special);
      std::string joined;
      for (const int32_t id : ids) {
        const std::string chunk = detokenizer.Push(id);
        ASSERT_EQ(ValidUtf8Prefix(chunk), chunk.size());
        joined += chunk;
      }
      joined += detokenizer.Flush();
      ASSERT_EQ(joined, tokenizer->Decode(ids, skip_special));
    }
  }
}

TEST(Tokenizer, TokensKnowTheirBytes) {
  Vocabulary vocabulary = SmallVocabulary(PreTokenizer::kSmolLm);
  vocabulary.tokens.push_back({"[PAD445]", TokenKind::kUnused});
  const auto tokenizer = MakeTokenizer(vocabulary);
  EXPECT_EQ(tokenizer->size(), 446);
  const auto space = EncodeOrFail(*tokenizer, " ", kAsText);
  ASSERT_EQ(space.size(), 1u);
  EXPECT_EQ(tokenizer->TokenBytes(space[0]), " ");
  EXPECT_EQ(tokenizer->TokenBytes(441), "<|end|>");
  EXPECT_EQ(tokenizer->TokenBytes(443), "<tool>");
  EXPECT_EQ(tokenizer->TokenBytes(445), "");
  EXPECT_EQ(tokenizer->TokenBytes(446), "");
  EXPECT_EQ(tokenizer->TokenBytes(-1), "");
  EXPECT_TRUE(tokenizer->IsSpecial(441));
  for (const int32_t id : {-1, 0, 443, 445, 446}) EXPECT_FALSE(tokenizer->IsSpecial(id)) << id;
  EXPECT_THAT(EncodeOrFail(*tokenizer, "[PAD445]", kParse), testing::Not(testing::Contains(445)));
}

TEST(Tokenizer, NeighboursMergeAcrossADroppedByte) {
  Vocabulary vocabulary;
  vocabulary.tokens = {{"!"}, {"!!"}};
  vocabulary.merges = {{"!", "!"}};
  const auto tokenizer = MakeTokenizer(vocabulary);
  EXPECT_EQ(EncodeOrFail(*tokenizer, "!\u0004!\u0004", kAsText), std::vector<int32_t>{1});
  EXPECT_EQ(EncodeOrFail(*tokenizer, "\u0004", kAsText), std::vector<int32_t>{});
}

TEST(Tokenizer, RefusesTextThatIsNotUtf8) {
  const auto tokenizer = MakeTokenizer(SmallVocabulary(PreTokenizer::kSmolLm));
  for (const std::string bad :
       {"\x80", "\xC0\x80", "\xED\xA0\x80", "\xF4\x90\x80\x80", "\xE2\x82"}) {
    const auto tokens = tokenizer->Encode("caf\u00e9" + bad, kAsText);
    EXPECT_EQ(tokens.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(tokens.status().message()), HasSubstr("byte offset 5"));
  }
}

TEST(Tokenizer, IsSharedByThreads) {
  const auto tokenizer = MakeTokenizer(SmallVocabulary(PreTokenizer::kQwen2));
  const std::string text = "The trees e\u0301 <tool> 42<|end|>";
  const auto expected = EncodeOrFail(*tokenizer, text, kParse);
  std::array<bool, 4> same{};
  std::vector<std::thread> threads;
  for (bool& mine : same) {
    threads.emplace_back([&] {
      mine = true;
      for (int i = 0; i < 200; ++i) {
        const auto tokens = tokenizer->Encode(text, kParse);
        mine = mine && tokens.ok() && *tokens == expected &&
               tokenizer->Decode(*tokens, /*skip_special=*/true) == "The trees \u00e9 <tool> 42";
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_THAT(same, testing::Each(true));
}

// A text that a caller could send to keep a thread busy: a quadratic step would take minutes.
TEST(Tokenizer, HostileTextIsNoSlowerThanItsLength) {
  constexpr size_t kBytes = ESPALIER_HOSTILE_BYTES;
  const auto repeated = [](std::string_view unit) {
    std::string text;
    while (text.size() < kBytes) text += unit;
    return text;
  };
  const std::vector<std::string> hostile = {
      repeated("a"), repeated(" "), repeated("\n "),    repeated("\u3000"),
      repeated("!"), repeated("<"), repeated("<|end|"), "x" + repeated(" ") + "x"};
  const std::vector<std::string> unordered_marks = {
      repeated("\u0323\u0301"), repeated("\u0301") + repeated("\u0323"), repeated("\u0344")};
  const auto expect_fast = [](const Tokenizer& tokenizer, const std::vector<std::string>& texts) {
    for (const std::string& text : texts) {
      constexpr double kSecondsOfCpu = 2;
      const std::clock_t begin = std::clock();
      EXPECT_FALSE(EncodeOrFail(tokenizer, text, kParse).empty());
      const double seconds = static_cast<double>(std::clock() - begin) / CLOCKS_PER_SEC;
      EXPECT_LT(seconds, kSecondsOfCpu) << json(text.substr(0, 12));
    }
  };
  const auto smollm = MakeTokenizer(SmallVocabulary(PreTokenizer::kSmolLm));
  const auto qwen2 = MakeTokenizer(SmallVocabulary(PreTokenizer::kQwen2));
  expect_fast(*smollm, hostile);
  expect_fast(*qwen2, hostile);
  expect_fast(*qwen2, unordered_marks);  // the one that normalises
}

struct BadVocabulary {
  const char* name;
  void (*spoil)(Vocabulary&);
  const char* message;
};

class TokenizerRefuses : public ::testing::TestWithParam<BadVocabulary> {};

TEST_P(TokenizerRefuses, NamingTheCause) {
  Vocabulary vocabulary = SmallVocabulary(PreTokenizer::kSmolLm);
  GetParam().spoil(vocabulary);
  const auto tokenizer = Tokenizer::Create(std::move(vocabulary));
  ASSERT_EQ(tokenizer.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(tokenizer.status().message()), HasSubstr(GetParam().message));
}

INSTANTIATE_TEST_SUITE_P(
    All, TokenizerRefuses,
    ::testing::Values(
        BadVocabulary{"NoTokens", [](Vocabulary& v) { v.tokens.clear(); }, "has no tokens"},
        BadVocabulary{"EmptyToken", [](Vocabulary& v) { v.tokens[7].text.clear(); },
                      "token 7 \"\" is empty"},
        BadVocabulary{"LongToken", [](Vocabulary& v) { v.tokens[7].text.assign(1025, 'a'); },
                      "is 1025 bytes long, limit 1024"},
        BadVocabulary{"RawSpace", [](Vocabulary& v) { v.tokens[7].text = "a b"; },
                      "token 7 \"a b\" is not in the byte-level alphabet"},
        BadVocabulary{"RawByte", [](Vocabulary& v) { v.tokens[7].text = "\xC4"; },
                      "is not in the byte-level alphabet"},
        BadVocabulary{"ControlNotUtf8", [](Vocabulary& v) { v.tokens[441].text = "<\xFF>"; },
                      "token 441 \"<\\xff>\" is not UTF-8"},
        BadVocabulary{"TokenTwice", [](Vocabulary& v) { v.tokens[9] = v.tokens[8]; },
                      "is there twice"},
        BadVocabulary{"SpecialTwice", [](Vocabulary& v) { v.tokens[443] = v.tokens[441]; },
                      "token 443 \"<|end|>\" is there twice"},
        BadVocabulary{"MergeLeft", [](Vocabulary& v) { v.merges[3].first = "zqz"; },
                      "merge 3 (\"zqz\" + "},
        BadVocabulary{"MergeRight", [](Vocabulary& v) { v.merges[3].second = "zqz"; },
                      "unknown token on the right"},
        BadVocabulary{"MergeProduct", [](Vocabulary& v) { v.merges[3] = {"q", "q"}; },
                      "merge 3 (\"q\" + \"q\") makes an unknown token"},
        BadVocabulary{"MergeTwice", [](Vocabulary& v) { v.merges[3] = v.merges[2]; },
                      "is there twice"},
        BadVocabulary{"Bos", [](Vocabulary& v) { v.bos = 445; },
                      "bos is token 445, expected 0..444"},
        BadVocabulary{"Eos", [](Vocabulary& v) { v.eos = -2; }, "eos is token -2"},
        BadVocabulary{"EndToken", [](Vocabulary& v) { v.end_tokens = {441, -1}; },
                      "an end token is token -1"},
        BadVocabulary{"EosNoEndToken", [](Vocabulary& v) { v.eos = 441; },
                      "eos 441 is not among the end tokens"},
        BadVocabulary{"AddBos", [](Vocabulary& v) { v.add_bos = true; }, "without a bos"}),
    [](const auto& info) { return info.param.name; });

TEST(ValidUtf8Prefix, EndsBeforeTheFirstIllFormedByte) {
  EXPECT_EQ(ValidUtf8Prefix(""), 0u);
  EXPECT_EQ(ValidUtf8Prefix("a\u00e9\u20ac\U0001F333"), 10u);
  EXPECT_EQ(ValidUtf8Prefix("a\xC3"), 1u);
  EXPECT_EQ(ValidUtf8Prefix("\xF0\x9F\x8C"), 0u);
  EXPECT_EQ(ValidUtf8Prefix("ab\xFF"
                            "cd"),
            2u);
  EXPECT_EQ(ValidUtf8Prefix(std::string_view("a\0b", 3)), 3u);
}

}  // namespace
}  // namespace espalier
