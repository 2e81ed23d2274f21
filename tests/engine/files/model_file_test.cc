#include "engine/model/files/model_file.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <string>

namespace espalier {
namespace {

// The value of an environment variable that names a file or folder; skips the test if it is unset.
#define PATH_OR_SKIP(path, variable)                                      \
  const char* path##_value = std::getenv(variable);                       \
  if (path##_value == nullptr) GTEST_SKIP() << variable << " is not set"; \
  const std::filesystem::path path = path##_value

TEST(RealModel, HasTheDimensionsOfSmolLm2) {
  PATH_OR_SKIP(path, "ESPALIER_MODEL");
  const auto file = ModelFile::Open(path);
  ASSERT_TRUE(file.ok()) << file.status();
  const ModelConfig& config = (*file)->config();
  EXPECT_EQ(config.architecture, Architecture::kLlama);
  EXPECT_EQ(config.layers, 30);
  EXPECT_EQ(config.hidden, 576);
  EXPECT_EQ(config.heads, 9);
  EXPECT_EQ(config.kv_heads, 3);
  EXPECT_EQ(config.head_dim, 64);
  EXPECT_EQ(config.channels, 1536);
  EXPECT_EQ(config.vocabulary, 49152);
  EXPECT_EQ(config.context, 8192);
  EXPECT_FLOAT_EQ(config.rms_eps, 1e-5f);
  EXPECT_EQ(config.rope_theta, 100000.0f);
  EXPECT_TRUE(config.rope_interleaved);
  EXPECT_TRUE(config.tied_embeddings);
  EXPECT_EQ((*file)->tensors().size(), 272);
  const auto embedding = (*file)->Find("token_embd.weight", 49152, 576);
  ASSERT_TRUE(embedding.ok()) << embedding.status();
  EXPECT_EQ((*embedding)->type, BlockType::kQ8_0);

  const Vocabulary& vocabulary = (*file)->vocabulary();
  EXPECT_EQ(vocabulary.tokens.size(), 49152);
  EXPECT_EQ(vocabulary.pre_tokenizer, PreTokenizer::kSmolLm);
  EXPECT_EQ(vocabulary.bos, 1);
  EXPECT_EQ(vocabulary.eos, 2);
  EXPECT_THAT(vocabulary.end_tokens, testing::ElementsAre(2));
  EXPECT_FALSE(vocabulary.add_bos);
  EXPECT_EQ(vocabulary.tokens[2].text, "<|im_end|>");
  EXPECT_EQ(vocabulary.tokens[2].kind, TokenKind::kControl);
  EXPECT_THAT(vocabulary.chat_template, testing::HasSubstr("<|im_start|>"));
}

}  // namespace
}  // namespace espalier
