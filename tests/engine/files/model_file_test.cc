#include "engine/model/files/model_file.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "tests/support/model_writer.h"
#include "tests/support/test_data.h"

namespace espalier {
namespace {

namespace fs = std::filesystem;

std::string FaultOf(const std::string& path) {
  return std::string(ModelFile::Open(path).status().message());
}

TEST(ModelFile, SaysInOneLineWhyAPathIsNoModel) {
  const TemporaryFolder folder;
  const std::string missing = folder.Path("missing");
  EXPECT_TRUE(absl::IsNotFound(ModelFile::Open(missing).status()));
  EXPECT_EQ(FaultOf(missing), missing + ": open: No such file or directory");
  const std::string empty = folder.Write("empty", "");
  EXPECT_EQ(FaultOf(empty),
            empty + ": model file: expected GGUF or a folder with config.json, got an empty file");
  const std::string text = folder.Write("text", "Dear model,\n");
  EXPECT_EQ(FaultOf(text), text +
                               ": model file: expected GGUF or a folder with config.json, got a "
                               "file that starts with \"Dear\"");
  EXPECT_EQ(FaultOf(folder.path()),
            folder.path() + "/config.json: open: No such file or directory");
}

TEST(ModelFile, FindsTensorsByNameAndShape) {
  const TemporaryFolder folder;
  const std::string path = folder.Write("m.gguf", TinyGguf().Bytes());
  const auto file = ModelFile::Open(path);
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ((*file)->path(), path);
  const auto found = (*file)->Find("blk.1.ffn_up.weight", 24, 16);
  ASSERT_TRUE(found.ok()) << found.status();
  EXPECT_EQ((*found)->name, "blk.1.ffn_up.weight");
  const auto absent = (*file)->Find("nothing", 1, 1);
  EXPECT_TRUE(absl::IsNotFound(absent.status()));
  EXPECT_EQ(absent.status().message(), path + ": tensor \"nothing\" is missing");
  const auto other = (*file)->Find("blk.1.ffn_up.weight", 16, 24);
  EXPECT_EQ(other.status().message(), path +
                                          ": tensor \"blk.1.ffn_up.weight\": expected 16 x 24 "
                                          "(rows x columns), got 24 x 16");
}

TEST(StoredTensor, ReadsRowsOfEveryWidthOfBlock) {
  // Two rows of two Q8_0 blocks each: d = 1 then 32 values.
  std::string bytes;
  for (int block = 0; block < 4; ++block) {
    bytes += std::string("\x00\x3C", 2) + std::string(32, static_cast<char>(block + 1));
  }
  const StoredTensor tensor = {.type = BlockType::kQ8_0,
                               .rows = 2,
                               .cols = 64,
                               .data = reinterpret_cast<const std::byte*>(bytes.data()),
                               .bytes = bytes.size()};
  std::vector<float> row(64);
  tensor.ReadRow(1, row.data());
  EXPECT_EQ(row[0], 3);
  EXPECT_EQ(row[31], 3);
  EXPECT_EQ(row[32], 4);
  EXPECT_EQ(row[63], 4);
}

// Whatever happens to a file, opening it gives a status of one line that names it.
class Damage : public testing::Test {
 protected:
  // True if it opened all the same.
  bool Open(const std::string& path) {
    const auto file = ModelFile::Open(path);
    if (!file.ok()) {
      const std::string message(file.status().message());
      EXPECT_TRUE(message.starts_with(folder_.path())) << message;
      EXPECT_EQ(message.find('\n'), std::string::npos) << message;
      EXPECT_LT(message.size(), 512) << message;
      return false;
    }
    // What opens can be read to its end.
    std::vector<float> row(1 << 16);
    for (const StoredTensor& tensor : (*file)->tensors()) {
      for (int r = 0; r < tensor.rows; ++r) tensor.ReadRow(r, row.data());
    }
    return true;
  }

  static void Overwrite(const std::string& path, size_t at, std::string_view bytes) {
    std::fstream file(path, std::ios::binary | std::ios::in | std::ios::out);
    file.seekp(static_cast<std::streamoff>(at));
    file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
    file.close();
    ASSERT_TRUE(file.good()) << path;
  }

  TemporaryFolder folder_;
};

TEST_F(Damage, TruncationOfAGgufIsAlwaysNoticed) {
  const std::string bytes = TinyGguf().Bytes();
  const std::string path = folder_.Write("m.gguf", bytes);
  ASSERT_TRUE(Open(path));
  for (size_t size = (bytes.size() - 1) / 64 * 64; size > 0; size -= 64) {
    fs::resize_file(path, size);
    EXPECT_FALSE(Open(path)) << size;
  }
}

TEST_F(Damage, TruncationOfAFolderIsAlwaysNoticed) {
  TinyHf().WriteTo(folder_);
  ASSERT_TRUE(Open(folder_.path()));
  for (const char* name : {"model.safetensors", "tokenizer.json", "config.json"}) {
    const fs::path path = folder_.Path(name);
    fs::copy_file(path, folder_.Path("whole"), fs::copy_options::overwrite_existing);
    for (size_t size = (fs::file_size(path) - 1) / 64 * 64; size > 0; size -= 64) {
      fs::resize_file(path, size);
      EXPECT_FALSE(Open(folder_.path())) << name << " cut to " << size;
    }
    fs::copy_file(folder_.Path("whole"), path, fs::copy_options::overwrite_existing);
  }
}

TEST_F(Damage, FalseLengthsInAGgufNeverReachBeyondIt) {
  const GgufParts parts = TinyGguf();
  const std::string bytes = parts.Bytes();
  size_t end = bytes.size();  // of all that is not tensor data
  for (const GgufTensorPart& tensor : parts.tensors) end -= tensor.data.size();
  const std::string path = folder_.Write("m.gguf", bytes);
  int opened = 0;
  for (const uint32_t lie : {0u, 0x7FFFFFFFu, 0x80000000u, 0xFFFFFFFFu}) {
    for (size_t at = 0; at + 4 < end; at += 7) {
      Overwrite(path, at, std::string_view(reinterpret_cast<const char*>(&lie), sizeof(lie)));
      opened += Open(path);
      Overwrite(path, at, std::string_view(bytes).substr(at, sizeof(lie)));
    }
  }
  EXPECT_GT(opened, 0) << "some bytes are only names";
}

TEST_F(Damage, FalseBytesInASafetensorsHeaderNeverReachBeyondIt) {
  TinyHf().WriteTo(folder_);
  const std::string bytes = SafetensorsBytes(TinyHf().tensors);
  uint64_t header;
  std::memcpy(&header, bytes.data(), sizeof(header));
  for (const char lie : {'\0', '9', '-', '"', '[', '\xff'}) {
    for (size_t at = 0; at < header + 8; at += 7) {
      Overwrite(folder_.Path("model.safetensors"), at, {&lie, 1});
      Open(folder_.path());
      Overwrite(folder_.Path("model.safetensors"), at, std::string_view(bytes).substr(at, 1));
    }
  }
}

TEST(OwnModels, OfOtherArchitecturesOpen) {
  const fs::path data = ESPALIER_SOURCE_DIR "/tests/golden/data";
  const auto qwen2 = ModelFile::Open(data / "tiny-qwen2-quantized.gguf");
  ASSERT_TRUE(qwen2.ok()) << qwen2.status();
  EXPECT_EQ((*qwen2)->config().architecture, Architecture::kQwen2);
  EXPECT_EQ((*qwen2)->config().head_dim, 16);  // of hidden and heads
  EXPECT_TRUE((*qwen2)->config().qkv_bias);
  EXPECT_FALSE((*qwen2)->config().qk_norm);
  const auto qwen3 = ModelFile::Open(data / "tiny-qwen3-quantized.gguf");
  ASSERT_TRUE(qwen3.ok()) << qwen3.status();
  EXPECT_EQ((*qwen3)->config().architecture, Architecture::kQwen3);
  EXPECT_EQ((*qwen3)->config().head_dim, 32);  // of the key that says so
  EXPECT_FALSE((*qwen3)->config().qkv_bias);
  EXPECT_TRUE((*qwen3)->config().qk_norm);
  for (const ModelFile* file : {qwen2->get(), qwen3->get()}) {
    EXPECT_FALSE(file->config().rope_interleaved);
    EXPECT_EQ(file->vocabulary().pre_tokenizer, PreTokenizer::kQwen2);
  }
}

TEST(OwnModels, OpenInAllTheirForms) {
  const fs::path data = ESPALIER_SOURCE_DIR "/tests/golden/data";
  for (const char* name : {"tiny-llama.gguf", "tiny-llama-quantized.gguf", "tiny-llama"}) {
    const auto file = ModelFile::Open(data / name);
    ASSERT_TRUE(file.ok()) << file.status();
    EXPECT_EQ((*file)->config().name, "tiny-llama");
    EXPECT_EQ((*file)->config().channels, 96);
    EXPECT_EQ((*file)->config().rope_interleaved, std::string_view(name).ends_with(".gguf"));
    EXPECT_EQ((*file)->vocabulary().tokens[3].kind, TokenKind::kAdded);
    EXPECT_EQ((*file)->vocabulary().merges.size(), 60);
    EXPECT_THAT((*file)->vocabulary().end_tokens, testing::ElementsAre(2));
    EXPECT_THAT((*file)->vocabulary().chat_template, testing::HasSubstr("<|im_start|>assistant"));
  }
}

// Files that other programs wrote.
TEST(GoldenModels, Open) {
  ESPALIER_PATH_OR_SKIP(golden, "ESPALIER_GOLDEN");
  const fs::path tiny = fs::path(golden) / "tiny";
  for (const char* name :
       {"llama-F32.gguf", "llama-Q8_0.gguf", "llama-Q4_0.gguf", "llama-Q4_1.gguf",
        "llamawide-Q4_K_M.gguf", "llama", "llama3rope", "qwen2", "qwen2-BF16.gguf",
        "qwen2-Q8_0.gguf", "qwen2-Q4_1.gguf", "qwen3", "qwen3-F16.gguf", "qwen3-Q4_0.gguf"}) {
    const auto file = ModelFile::Open(tiny / name);
    ASSERT_TRUE(file.ok()) << file.status();
    EXPECT_TRUE(
        std::string_view(name).starts_with(ArchitectureName((*file)->config().architecture)));
    EXPECT_EQ((*file)->config().vocabulary, 320);
    EXPECT_EQ((*file)->config().rope_scaling.llama3, std::string(name) == "llama3rope");
    EXPECT_EQ(
        (*file)->config().tied_embeddings,
        !fs::path(name).stem().string().starts_with("llama-") && std::string(name) != "llama");
    EXPECT_EQ((*file)->vocabulary().pre_tokenizer, PreTokenizer::kSmolLm);
    EXPECT_EQ((*file)->vocabulary().eos, 2);
  }
}

TEST(RealModel, HasTheDimensionsOfSmolLm2) {
  ESPALIER_PATH_OR_SKIP(path, "ESPALIER_MODEL");
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
