#include "engine/model/files/hf_folder.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "tests/support/model_writer.h"

namespace espalier {
namespace {

using testing::HasSubstr;
using testing::StartsWith;

template <typename Change>
std::string FaultAfter(Change change) {
  HfParts parts = TinyHf();
  change(parts);
  const TemporaryFolder folder;
  parts.WriteTo(folder);
  const auto file = ModelFile::Open(folder.path());
  const std::string message(file.status().message());
  EXPECT_TRUE(file.ok() || message.starts_with(folder.path())) << "no path in: " << message;
  if (file.ok()) return "";
  // "<folder>/config.json: ..." or "<folder>: ..."
  const std::string rest = message.substr(folder.path().size());
  return rest.substr(rest.starts_with(": ") ? 2 : 1);
}

TEST(HfFolder, HoldsTheSameModelAsTheGguf) {
  const TemporaryFolder folder;
  TinyHf().WriteTo(folder);
  const auto hf = ModelFile::Open(folder.path());
  const auto gguf = ModelFile::Open(folder.Write("m.gguf", TinyGguf().Bytes()));
  ASSERT_TRUE(hf.ok()) << hf.status();
  ASSERT_TRUE(gguf.ok()) << gguf.status();
  const ModelConfig& config = (*hf)->config();
  const ModelConfig& other = (*gguf)->config();
  EXPECT_THAT(config.name, StartsWith("espalier-"));
  EXPECT_EQ(config.layers, other.layers);
  EXPECT_EQ(config.hidden, other.hidden);
  EXPECT_EQ(config.heads, other.heads);
  EXPECT_EQ(config.kv_heads, other.kv_heads);
  EXPECT_EQ(config.head_dim, other.head_dim);
  EXPECT_EQ(config.channels, other.channels);
  EXPECT_EQ(config.vocabulary, other.vocabulary);
  EXPECT_EQ(config.context, other.context);
  EXPECT_EQ(config.rms_eps, other.rms_eps);
  EXPECT_EQ(config.rope_theta, other.rope_theta);
  EXPECT_EQ(config.tied_embeddings, other.tied_embeddings);
  EXPECT_FALSE(config.rope_interleaved);
  EXPECT_TRUE(other.rope_interleaved);

  ASSERT_EQ((*hf)->tensors().size(), (*gguf)->tensors().size());
  for (const StoredTensor& tensor : (*gguf)->tensors()) {
    const auto twin = (*hf)->Find(tensor.name, tensor.rows, tensor.cols);
    ASSERT_TRUE(twin.ok()) << twin.status();
    const bool rotary =
        tensor.name.ends_with("attn_q.weight") || tensor.name.ends_with("attn_k.weight");
    for (int row = 0; row < tensor.rows; ++row) {
      // Rows 2i and 2i + 1 of a head in the GGUF are rows i and i + 4 of the folder.
      const int in_head = row % 8;
      const int twin_row = rotary ? row - in_head + in_head / 2 + in_head % 2 * 4 : row;
      std::vector<float> values(tensor.cols);
      std::vector<float> twin_values(tensor.cols);
      tensor.ReadRow(row, values.data());
      (*twin)->ReadRow(twin_row, twin_values.data());
      EXPECT_EQ(values, twin_values) << tensor.name << " row " << row;
    }
  }
}

TEST(HfFolder, ReadsShards) {
  HfParts parts = TinyHf();
  const TemporaryFolder folder;
  const size_t half = parts.tensors.size() / 2;
  const std::vector<SafetensorsPart> first(parts.tensors.begin(), parts.tensors.begin() + half);
  const std::vector<SafetensorsPart> second(parts.tensors.begin() + half, parts.tensors.end());
  nlohmann::json map;
  for (const auto& tensor : first) map[tensor.name] = "model-00001-of-00002.safetensors";
  for (const auto& tensor : second) map[tensor.name] = "model-00002-of-00002.safetensors";
  parts.tensors.clear();
  parts.WriteTo(folder);
  folder.Write("model.safetensors.index.json", nlohmann::json{{"weight_map", map}}.dump());
  folder.Write("model-00001-of-00002.safetensors", SafetensorsBytes(first));
  EXPECT_EQ(ModelFile::Open(folder.path()).status().message(),
            folder.Path("model-00002-of-00002.safetensors") + ": open: No such file or directory");
  folder.Write("model-00002-of-00002.safetensors", SafetensorsBytes(second));
  EXPECT_EQ(ModelFile::Open(folder.path()).status(), absl::OkStatus());

  folder.Write("model-00002-of-00002.safetensors", SafetensorsBytes(TinyHf().tensors));
  EXPECT_THAT(std::string(ModelFile::Open(folder.path()).status().message()),
              HasSubstr("expected it once, got it twice"));

  map["extra"] = "../elsewhere";
  folder.Write("model.safetensors.index.json", nlohmann::json{{"weight_map", map}}.dump());
  EXPECT_EQ(ModelFile::Open(folder.path()).status().message(),
            folder.Path("model.safetensors.index.json") +
                ": key \"weight_map.extra\": expected the name of a file in this folder, got "
                "\"../elsewhere\"");
}

TEST(HfFolder, ReadsRotaryScalingInAllItsSpellings) {
  const nlohmann::json llama3 = {{"rope_type", "llama3"},
                                 {"factor", 8.0},
                                 {"low_freq_factor", 1.0},
                                 {"high_freq_factor", 4.0},
                                 {"original_max_position_embeddings", 64}};
  const auto check = [](const HfParts& parts, float theta) {
    const TemporaryFolder folder;
    parts.WriteTo(folder);
    const auto file = ModelFile::Open(folder.path());
    ASSERT_TRUE(file.ok()) << file.status();
    const RopeScaling& scaling = (*file)->config().rope_scaling;
    EXPECT_TRUE(scaling.llama3);
    EXPECT_EQ(scaling.factor, 8);
    EXPECT_EQ(scaling.low_freq_factor, 1);
    EXPECT_EQ(scaling.high_freq_factor, 4);
    EXPECT_EQ(scaling.original_context, 64);
    EXPECT_EQ((*file)->config().rope_theta, theta);
  };
  HfParts parts = TinyHf();
  parts.config["rope_scaling"] = llama3;
  check(parts, 10000);
  parts.config.erase("rope_scaling");
  parts.config["rope_parameters"] = llama3;
  parts.config["rope_parameters"]["rope_theta"] = 500000;
  check(parts, 500000);

  const auto fault = [&](const char* key, const nlohmann::json& value) {
    return FaultAfter([&](HfParts& p) {
      p.config["rope_scaling"] = llama3;
      p.config["rope_scaling"][key] = value;
    });
  };
  EXPECT_EQ(fault("rope_type", "yarn"),
            "config.json: key \"rope_scaling.rope_type\": \"yarn\" is not supported, only default "
            "and llama3");
  EXPECT_EQ(fault("factor", -1),
            "config.json: key \"rope_scaling.factor\": expected a 32-bit float above 0 and at most "
            "1000000, got -1");
  EXPECT_EQ(FaultAfter([](HfParts& p) { p.config["rms_norm_eps"] = 1e-60; }),
            "config.json: key \"rms_norm_eps\": expected a 32-bit float above 0 and at most 1, got "
            "1e-60");
  EXPECT_EQ(fault("high_freq_factor", 1.0),
            "config.json: key \"rope_scaling.high_freq_factor\": expected above 1, got 1.0");
  EXPECT_EQ(FaultAfter([](HfParts& p) { p.config["rope_scaling"] = "yarn"; }),
            "config.json: key \"rope_scaling\": expected an object, got \"yarn\"");
}

void AddVector(HfParts& parts, int layer, std::string_view name, int size) {
  parts.tensors.push_back({fmt::format("model.layers.{}.self_attn.{}", layer, name),
                           {static_cast<uint64_t>(size)},
                           "F32",
                           std::string(size * sizeof(float), '\0')});
}

void MakeQwen2(HfParts& parts) {
  parts.config["model_type"] = "qwen2";
  for (int layer = 0; layer < 2; ++layer) {
    AddVector(parts, layer, "q_proj.bias", 16);
    AddVector(parts, layer, "k_proj.bias", 8);
    AddVector(parts, layer, "v_proj.bias", 8);
  }
}

void MakeQwen3(HfParts& parts) {
  parts.config["model_type"] = "qwen3";
  parts.config["head_dim"] = 8;
  for (int layer = 0; layer < 2; ++layer) {
    for (const char* name : {"q_norm.weight", "k_norm.weight"}) AddVector(parts, layer, name, 8);
  }
}

TEST(HfFolder, ReadsQwen2AndQwen3) {
  EXPECT_EQ(FaultAfter(MakeQwen2), "");
  EXPECT_EQ(FaultAfter(MakeQwen3), "");
  EXPECT_EQ(FaultAfter([](HfParts& p) { p.config["model_type"] = "qwen2"; }),
            "tensor \"blk.0.attn_q.bias\" is missing");
  EXPECT_EQ(FaultAfter([](HfParts& p) {
              MakeQwen3(p);
              p.config.erase("head_dim");
            }),
            "config.json: key \"head_dim\": expected a value, got none");
  EXPECT_EQ(FaultAfter([](HfParts& p) {
              MakeQwen2(p);
              p.config["use_sliding_window"] = true;
            }),
            "config.json: key \"use_sliding_window\": true is not supported, only false");
  EXPECT_EQ(FaultAfter([](HfParts& p) {
              MakeQwen3(p);
              p.config["layer_types"] = {"full_attention", "sliding_attention"};
            }),
            "config.json: key \"layer_types\": [\"full_attention\",\"sliding_attention\"] is not "
            "supported, only full_attention");
  EXPECT_EQ(FaultAfter([](HfParts& p) {
              MakeQwen3(p);
              p.config["attention_bias"] = true;
              AddVector(p, 0, "q_proj.bias", 16);
            }),
            "tensor \"blk.0.attn_q.bias\": a tensor of this name is not supported, only those of a "
            "plain qwen3");
}

TEST(HfFolder, RefusesWhatItWouldComputeWrongly) {
  EXPECT_EQ(FaultAfter([](HfParts& p) { p.config["model_type"] = "gemma"; }),
            "config.json: key \"model_type\": architecture \"gemma\" is not supported, only llama, "
            "qwen2, qwen3");
  EXPECT_EQ(FaultAfter([](HfParts& p) { p.config["hidden_act"] = "gelu"; }),
            "config.json: key \"hidden_act\": \"gelu\" is not supported, only silu");
  EXPECT_EQ(FaultAfter([](HfParts& p) {
              p.tensors.push_back({"model.layers.0.self_attn.q_proj.bias", {1}, "F32", "1234"});
            }),
            "tensor \"blk.0.attn_q.bias\": a tensor of this name is not supported, only those of a "
            "plain llama");
  EXPECT_EQ(FaultAfter([](HfParts& p) { p.config["tie_word_embeddings"] = false; }),
            "tensor \"output.weight\" is missing");
  EXPECT_EQ(
      FaultAfter([](HfParts& p) {
        p.tensors.push_back({"model.layers.0.self_attn.rotary_emb.inv_freq", {1}, "F32", "...."});
        p.tensors.push_back({"lm_head.weight", {1}, "F32", "...."});
      }),
      "")
      << "both follow from the config";
}

TEST(HfFolder, RefusesDimensionsThatDoNotFit) {
  EXPECT_EQ(FaultAfter([](HfParts& p) { p.config["hidden_size"] = 1 << 30; }),
            "config.json: key \"hidden_size\": expected an integer in 1..1048576, got 1073741824");
  EXPECT_EQ(FaultAfter([](HfParts& p) { p.config.erase("num_attention_heads"); }),
            "config.json: key \"num_attention_heads\": expected a value, got none");
  EXPECT_EQ(FaultAfter([](HfParts& p) { p.config["num_key_value_heads"] = nullptr; }),
            "tensor \"blk.0.attn_k.weight\": expected 16 x 16 (rows x columns), got 8 x 16");
  EXPECT_EQ(FaultAfter([](HfParts& p) { p.config["head_dim"] = 9; }),
            "head dimension: expected a positive even number, for rotary pairs, got 9");
  EXPECT_EQ(FaultAfter([](HfParts& p) { p.config["vocab_size"] = 300; }),
            "tensor \"token_embd.weight\": expected 300 x 16 (rows x columns), got 260 x 16");
}

TEST(HfFolder, NamesTheFileThatIsMissing) {
  EXPECT_EQ(FaultAfter([](HfParts& p) { p.config = nullptr; }),
            "config.json: open: No such file or directory");
  EXPECT_EQ(FaultAfter([](HfParts& p) { p.tensors.clear(); }),
            "model.safetensors: open: No such file or directory");
}

}  // namespace
}  // namespace espalier
