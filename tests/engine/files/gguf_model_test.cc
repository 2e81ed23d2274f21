#include "engine/model/files/gguf_model.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <string>

#include "tests/support/model_writer.h"

namespace espalier {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::StartsWith;

absl::StatusOr<std::unique_ptr<ModelFile>> Open(const GgufParts& parts) {
  const TemporaryFolder folder;
  return ModelFile::Open(folder.Write("m.gguf", parts.Bytes()));
}

// What is wrong after one change to a model that is right; without the path.
template <typename Change>
std::string FaultAfter(Change change) {
  GgufParts parts = TinyGguf();
  change(parts);
  const auto file = Open(parts);
  const std::string message(file.status().message());
  const size_t path_end = message.find("m.gguf: ");
  EXPECT_TRUE(file.ok() || path_end != std::string::npos) << "no path in: " << message;
  return file.ok() ? "" : message.substr(path_end + 8);
}

std::string FaultAfterSetting(std::string_view key, const GgufPart& value) {
  return FaultAfter([&](GgufParts& parts) { parts.Set(key, value); });
}

TEST(GgufModel, IsWhatTheFileSays) {
  const auto file = Open(TinyGguf());
  ASSERT_TRUE(file.ok()) << file.status();
  const ModelConfig& config = (*file)->config();
  EXPECT_EQ(config.name, "tiny");
  EXPECT_EQ(config.layers, 2);
  EXPECT_EQ(config.hidden, 16);
  EXPECT_EQ(config.heads, 2);
  EXPECT_EQ(config.kv_heads, 1);
  EXPECT_EQ(config.head_dim, 8);
  EXPECT_EQ(config.channels, 24);
  EXPECT_EQ(config.vocabulary, 260);
  EXPECT_EQ(config.context, 128);
  EXPECT_EQ(config.rms_eps, 1e-5f);
  EXPECT_EQ(config.rope_theta, 10000);
  EXPECT_FALSE(config.rope_scaling.llama3);
  EXPECT_TRUE(config.rope_interleaved);
  EXPECT_TRUE(config.tied_embeddings);

  const Vocabulary& vocabulary = (*file)->vocabulary();
  EXPECT_EQ(vocabulary.pre_tokenizer, PreTokenizer::kSmolLm);
  ASSERT_EQ(vocabulary.tokens.size(), 260);
  EXPECT_EQ(vocabulary.tokens['a'].text, "a");
  EXPECT_EQ(vocabulary.tokens['a'].kind, TokenKind::kNormal);
  EXPECT_EQ(vocabulary.tokens[258].text, "<|im_end|>");
  EXPECT_EQ(vocabulary.tokens[258].kind, TokenKind::kControl);
  EXPECT_THAT(vocabulary.merges, ElementsAre(std::pair<std::string, std::string>("t", "h")));
  EXPECT_EQ(vocabulary.bos, 257);
  EXPECT_EQ(vocabulary.eos, 258);
  EXPECT_THAT(vocabulary.end_tokens, ElementsAre(258));
  EXPECT_FALSE(vocabulary.add_bos);
  EXPECT_THAT(vocabulary.chat_template, StartsWith("{% for m in messages %}"));
}

TEST(GgufModel, FillsInWhatIsLeftOut) {
  GgufParts parts = TinyGguf();
  for (const char* key :
       {"general.name", "llama.rope.freq_base", "llama.rope.dimension_count", "llama.vocab_size",
        "tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id",
        "tokenizer.ggml.add_bos_token", "tokenizer.chat_template"}) {
    parts.Remove(key);
  }
  const auto file = Open(parts);
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ((*file)->config().name, "m");
  EXPECT_EQ((*file)->config().rope_theta, 10000);
  EXPECT_EQ((*file)->config().vocabulary, 260);
  EXPECT_EQ((*file)->vocabulary().bos, -1);
  EXPECT_EQ((*file)->vocabulary().eos, -1);
  EXPECT_TRUE((*file)->vocabulary().end_tokens.empty());
  EXPECT_FALSE((*file)->vocabulary().add_bos);
  EXPECT_EQ((*file)->vocabulary().chat_template, "");
}

TEST(GgufModel, EndsAtEveryTokenTheFileCallsAnEnd) {
  GgufParts parts = TinyGguf();
  parts.Set("tokenizer.ggml.eot_token_id", GgufPart::U32(256));
  parts.Set("tokenizer.ggml.eom_token_id", GgufPart::U32(258));
  const auto file = Open(parts);
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_THAT((*file)->vocabulary().end_tokens, ElementsAre(258, 256));
}

TEST(GgufModel, HasAHeadOfItsOwnIfThereIsAnOutput) {
  GgufParts parts = TinyGguf();
  GgufTensorPart output = parts.tensor("token_embd.weight");
  output.name = "output.weight";
  parts.tensors.push_back(output);
  const auto file = Open(parts);
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_FALSE((*file)->config().tied_embeddings);
  EXPECT_TRUE((*file)->Find("output.weight", 260, 16).ok());
}

TEST(GgufModel, KnowsTheKindsOfTokens) {
  std::vector<int32_t> types(260, 1);
  types[256] = 2;
  types[257] = 4;
  types[258] = 5;
  GgufParts parts = TinyGguf();
  parts.Set("tokenizer.ggml.token_type", GgufPart::Integers(types));
  const auto file = Open(parts);
  ASSERT_TRUE(file.ok()) << file.status();
  const Vocabulary& vocabulary = (*file)->vocabulary();
  EXPECT_EQ(vocabulary.tokens[256].kind, TokenKind::kControl);
  EXPECT_EQ(vocabulary.tokens[257].kind, TokenKind::kAdded);
  EXPECT_EQ(vocabulary.tokens[258].kind, TokenKind::kUnused);
  types[3] = 6;
  EXPECT_EQ(FaultAfterSetting("tokenizer.ggml.token_type", GgufPart::Integers(types)),
            "key \"tokenizer.ggml.token_type\", token 3: expected 1 to 5, got 6");
  types.pop_back();
  EXPECT_EQ(FaultAfterSetting("tokenizer.ggml.token_type", GgufPart::Integers(types)),
            "key \"tokenizer.ggml.token_type\": expected 260 elements, one a token, got 259");
}

TEST(GgufModel, RefusesWhatItWouldComputeWrongly) {
  const auto setting = FaultAfterSetting;
  EXPECT_EQ(setting("general.architecture", GgufPart::Text("gemma")),
            "key \"general.architecture\": architecture \"gemma\" is not supported, only llama, "
            "qwen2, qwen3");
  EXPECT_EQ(setting("tokenizer.ggml.model", GgufPart::Text("llama")),
            "key \"tokenizer.ggml.model\": tokenizer \"llama\" is not supported, only gpt2 "
            "(byte-level BPE)");
  EXPECT_EQ(setting("tokenizer.ggml.pre", GgufPart::Text("llama-bpe")),
            "key \"tokenizer.ggml.pre\": pre-tokenizer \"llama-bpe\" is not supported, only gpt-2, "
            "smollm and qwen2");
  EXPECT_THAT(FaultAfter([](GgufParts& parts) { parts.Remove("tokenizer.ggml.pre"); }),
              HasSubstr("pre-tokenizer \"(none)\" is not supported"));
  EXPECT_EQ(setting("llama.attention.sliding_window", GgufPart::U32(7)),
            "key \"llama.attention.sliding_window\": a window of 7 tokens is not supported, only "
            "none or the context's 128");
  EXPECT_EQ(setting("llama.attention.sliding_window", GgufPart::U32(0)), "");
  EXPECT_EQ(setting("llama.attention.sliding_window", GgufPart::U32(128)), "");
  EXPECT_EQ(setting("llama.rope.scaling.type", GgufPart::Text("yarn")),
            "key \"llama.rope.scaling.type\": scaling \"yarn\" is not supported, only none");
  EXPECT_EQ(setting("llama.rope.scaling.type", GgufPart::Text("none")), "");
  EXPECT_EQ(setting("llama.rope.scale_linear", GgufPart::F32(4)),
            "key \"llama.rope.scale_linear\": a factor of 4 is not supported, only 1");
  EXPECT_EQ(setting("llama.rope.dimension_count", GgufPart::U32(4)),
            "key \"llama.rope.dimension_count\": expected 8, got 4");
  for (const char* name : {"rope_freqs.weight", "blk.0.attn_q.bias", "blk.0.attn_q_norm.weight"}) {
    EXPECT_EQ(FaultAfter([&](GgufParts& parts) {
                GgufTensorPart extra = parts.tensor("output_norm.weight");
                extra.name = name;
                parts.tensors.push_back(extra);
              }),
              std::string("tensor \"") + name +
                  "\": a tensor of this name is not supported, only those of a plain llama");
  }
}

TEST(GgufModel, RefusesDimensionsThatDoNotFit) {
  const auto setting = [](std::string_view key, uint32_t value) {
    return FaultAfterSetting(key, GgufPart::U32(value));
  };
  for (const char* key : {"block_count", "embedding_length", "feed_forward_length",
                          "attention.head_count", "attention.head_count_kv", "context_length"}) {
    const std::string name = std::string("llama.") + key;
    EXPECT_THAT(setting(name, 0), StartsWith("key \"" + name + "\": expected an integer in 1.."));
    EXPECT_THAT(setting(name, UINT32_MAX), HasSubstr("got 4294967295"));
  }
  EXPECT_EQ(setting("llama.attention.head_count_kv", 3),
            "KV heads: expected a divisor of 2 heads, got 3");
  EXPECT_EQ(setting("llama.attention.head_count", 16),
            "key \"llama.rope.dimension_count\": expected 1, got 8");
  EXPECT_EQ(FaultAfter([](GgufParts& parts) {
              parts.Remove("llama.rope.dimension_count");
              parts.Set("llama.attention.key_length", GgufPart::U32(7));
            }),
            "head dimension: expected a positive even number, for rotary pairs, got 7");
  EXPECT_EQ(FaultAfter([](GgufParts& parts) {
              parts.Remove("llama.rope.dimension_count");
              parts.Set("llama.attention.key_length", GgufPart::U32(1024));
              parts.Set("llama.attention.head_count", GgufPart::U32(1 << 20));
            }),
            "heads x head dimension: expected at most 1048576, got 1048576 x 1024");
  EXPECT_EQ(setting("llama.vocab_size", 261), "tokenizer: expected 261 tokens, got 260");
  EXPECT_EQ(setting("llama.embedding_length", 32),
            "key \"llama.rope.dimension_count\": expected 16, got 8");
  EXPECT_EQ(setting("llama.feed_forward_length", 25),
            "tensor \"blk.0.ffn_gate.weight\": expected 25 x 16 (rows x columns), got 24 x 16");
  EXPECT_EQ(setting("llama.block_count", 3), "tensor \"blk.2.attn_norm.weight\" is missing");
  EXPECT_EQ(setting("llama.block_count", 1),
            "tensor \"blk.1.attn_k.weight\": a tensor of this name is not supported, only those of "
            "a plain llama");
  EXPECT_EQ(setting("tokenizer.ggml.eos_token_id", 260),
            "key \"tokenizer.ggml.eos_token_id\": expected an integer in 0..259, got 260");
  EXPECT_EQ(
      FaultAfterSetting("llama.attention.layer_norm_rms_epsilon", GgufPart::F32(0)),
      "key \"llama.attention.layer_norm_rms_epsilon\": expected a 32-bit float above 0 and at most "
      "1, got 0");
  // Not 0 in the file's 64 bits, but in ours.
  const double tiny = 1e-60;
  EXPECT_EQ(FaultAfterSetting("llama.rope.freq_base",
                              {12, std::string(reinterpret_cast<const char*>(&tiny), 8)}),
            "key \"llama.rope.freq_base\": expected a 32-bit float above 0 and at most "
            "1000000000000, got 1e-60");
}

TEST(GgufModel, RefusesRotaryFrequenciesThatAFloatCannotHold) {
  EXPECT_EQ(FaultAfter([](GgufParts& parts) {
              parts.Remove("llama.rope.dimension_count");
              parts.Set("llama.attention.key_length", GgufPart::U32(64));
              parts.Set("llama.rope.freq_base", GgufPart::F32(1e-42f));
            }),
            "rotary base and scaling: expected frequencies that a float can hold, got a base of "
            "1e-42");
}

TEST(GgufModel, RefusesMergesThatAreNoPair) {
  for (const char* merge : {"th", "t h e", ""}) {
    EXPECT_EQ(FaultAfterSetting("tokenizer.ggml.merges", GgufPart::Texts({"t h", merge})),
              std::string("key \"tokenizer.ggml.merges\", merge 1: expected two tokens and a space "
                          "between, got \"") +
                  merge + "\"");
  }
}

TEST(GgufModel, NamesEachKeyThatIsMissing) {
  for (const char* key :
       {"general.architecture", "llama.block_count", "llama.context_length",
        "llama.embedding_length", "llama.feed_forward_length", "llama.attention.head_count",
        "llama.attention.layer_norm_rms_epsilon", "tokenizer.ggml.model", "tokenizer.ggml.tokens",
        "tokenizer.ggml.token_type", "tokenizer.ggml.merges"}) {
    EXPECT_EQ(FaultAfter([&](GgufParts& parts) { parts.Remove(key); }),
              std::string("key \"") + key + "\": expected a value, got none");
  }
}

}  // namespace
}  // namespace espalier
