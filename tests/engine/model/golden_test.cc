// The forward pass against golden figures: tiny models in every file type, and the real model.
//
// ESPALIER_GOLDEN names the folder of golden data, ESPALIER_MODEL the real model's file,
// ESPALIER_TEXT the perplexity text; what is absent is skipped by name. Tolerances are those of the
// golden data's README.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <fstream>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

#include "engine/model/text/tokenizer.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tests/engine/model/forward_harness.h"
#include "tests/support/test_data.h"

namespace espalier {
namespace {

using nlohmann::json;

std::string ReadFile(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  EXPECT_TRUE(in.good()) << path;
  std::stringstream text;
  text << in.rdbuf();
  return text.str();
}

json ReadJson(const std::string& path) { return json::parse(ReadFile(path)); }

// A NumPy v1 file of float32, C order; the shape is the caller's business.
std::vector<float> ReadNpy(const std::string& path) {
  const std::string bytes = ReadFile(path);
  EXPECT_EQ(bytes.substr(1, 5), "NUMPY") << path;
  const size_t header = 10 + static_cast<uint8_t>(bytes[8]) + 256 * static_cast<uint8_t>(bytes[9]);
  std::vector<float> values((bytes.size() - header) / sizeof(float));
  std::memcpy(values.data(), bytes.data() + header, values.size() * sizeof(float));
  return values;
}

double MaxDifference(const std::vector<float>& a, const std::vector<float>& b) {
  EXPECT_EQ(a.size(), b.size());
  double worst = 0;
  for (size_t i = 0; i < std::min(a.size(), b.size()); ++i) {
    worst = std::max(worst, std::abs(static_cast<double>(a[i]) - b[i]));
  }
  return worst;
}

class GoldenTest : public ::testing::TestWithParam<Isa> {};

TEST_P(GoldenTest, TinyModelsInFp32MatchInEveryFileType) {
  ESPALIER_PATH_OR_SKIP(golden, "ESPALIER_GOLDEN");
  const std::string tiny = golden + "/tiny/";
  const auto ids = ReadJson(tiny + "manifest.json")["seq"].get<std::vector<int32_t>>();
  for (const std::string name :
       {"llama", "llama3rope", "llama-F32.gguf", "llama-Q8_0.gguf", "llama-Q4_0.gguf",
        "llama-Q4_1.gguf", "llamawide-Q4_K_M.gguf", "qwen2", "qwen2-BF16.gguf", "qwen2-Q8_0.gguf",
        "qwen2-Q4_1.gguf", "qwen3", "qwen3-F16.gguf", "qwen3-Q4_0.gguf"}) {
    ForwardHarness model(tiny + name, {.isa = GetParam(), .weights = WeightPlan::kF32});
    const bool gguf = name.ends_with(".gguf");
    const std::vector<float> expected =
        ReadNpy(tiny + (gguf ? name.substr(0, name.size() - 5) + ".logits_f32.npy"
                             : name + "/logits_f32.npy"));
    EXPECT_LE(MaxDifference(model.Logits(ids), expected), 1e-3) << name;
    EXPECT_LE(MaxDifference(model.Logits(ids, 3), expected), 1e-3) << name << " in chunks of 3";
  }
}

TEST_P(GoldenTest, TinyModelsInBf16KeepABf16FileBitForBit) {
  ESPALIER_PATH_OR_SKIP(golden, "ESPALIER_GOLDEN");
  const std::string tiny = golden + "/tiny/";
  const auto ids = ReadJson(tiny + "manifest.json")["seq"].get<std::vector<int32_t>>();
  for (const std::string name : {"qwen2-BF16", "llama-F32", "llama-Q4_1", "qwen3-F16"}) {
    const std::string path = tiny + name + ".gguf";
    ForwardHarness exact(path, {.isa = GetParam(), .weights = WeightPlan::kF32});
    ForwardHarness model(path, {.isa = GetParam(), .weights = WeightPlan::kBf16});
    const double distance = MaxDifference(model.Logits(ids), exact.Logits(ids));
    std::cout << name << ": max difference " << distance << "\n";
    // Elsewhere 8 significant bits a weight: a third of int8's distance.
    EXPECT_LE(distance, name == "qwen2-BF16" ? 0 : 0.2) << name;
  }
}

TEST_P(GoldenTest, TinyModelsInInt8StayWithinTwiceLlamaCppsDistance) {
  ESPALIER_PATH_OR_SKIP(golden, "ESPALIER_GOLDEN");
  const std::string tiny = golden + "/tiny/";
  const json manifest = ReadJson(tiny + "manifest.json");
  const auto ids = manifest["seq"].get<std::vector<int32_t>>();
  for (const std::string name : {"llama-Q8_0", "llama-Q4_0", "llama-Q4_1", "llamawide-Q4_K_M",
                                 "qwen2-Q8_0", "qwen2-Q4_1", "qwen3-Q4_0"}) {
    ForwardHarness model(tiny + name + ".gguf", {.isa = GetParam(), .weights = WeightPlan::kInt8});
    const std::vector<float> expected = ReadNpy(tiny + name + ".logits_f32.npy");
    const std::vector<float> logits = model.Logits(ids);
    const double allowed = 2 * manifest["models"][name]["llama_cpp_max_abs_diff"].get<double>();
    const double distance = MaxDifference(logits, expected);
    std::cout << name << ": max difference " << distance << " of " << allowed << " allowed\n";
    EXPECT_LE(distance, allowed) << name;
    const size_t vocabulary = expected.size() / ids.size();
    for (size_t i = 0; i < ids.size(); ++i) {
      const auto row = [&](const std::vector<float>& all) {
        return std::vector<float>(all.begin() + i * vocabulary, all.begin() + (i + 1) * vocabulary);
      };
      std::vector<float> sorted = row(expected);
      std::nth_element(sorted.begin(), sorted.begin() + 1, sorted.end(), std::greater<>());
      if (sorted[0] - sorted[1] <= allowed) continue;
      const std::vector<float> ours = row(logits), theirs = row(expected);
      EXPECT_EQ(std::max_element(ours.begin(), ours.end()) - ours.begin(),
                std::max_element(theirs.begin(), theirs.end()) - theirs.begin())
          << name << " position " << i;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Isas, GoldenTest, ::testing::ValuesIn(SupportedIsas()),
                         [](const auto& info) { return std::string(IsaName(info.param)); });

class RealModelTest : public ::testing::Test {
 protected:
  void SetUp() override {
    ESPALIER_PATH_OR_SKIP(golden, "ESPALIER_GOLDEN");
    ESPALIER_PATH_OR_SKIP(model, "ESPALIER_MODEL");
    golden_ = golden;
    path_ = model;
  }

  std::string golden_;
  std::string path_;
};

TEST_F(RealModelTest, Fp32LogitsMatchAtEveryGoldenPosition) {
  ForwardHarness model(path_, {.weights = WeightPlan::kF32});
  const int vocabulary = model.file().config().vocabulary;
  double worst = 0;
  for (const json& sequence : ReadJson(golden_ + "/logits/logits.json")) {
    const auto ids = sequence["ids"].get<std::vector<int32_t>>();
    const std::vector<float> logits = model.Logits(ids);
    for (const json& position : sequence["positions"]) {
      const float* row = &logits[position["pos"].get<size_t>() * vocabulary];
      for (size_t i = 0; i < position["top_ids"].size(); ++i) {
        const double difference = std::abs(row[position["top_ids"][i].get<int>()] -
                                           position["top_logits"][i].get<double>());
        worst = std::max(worst, difference);
        EXPECT_LE(difference, 5e-3) << sequence["name"] << " position " << position["pos"];
      }
      double sum = 0;
      const double max = position["top_logits"][0].get<double>();
      for (int i = 0; i < vocabulary; ++i) sum += std::exp(row[i] - max);
      EXPECT_NEAR(max + std::log(sum), position["lse"].get<double>(), 5e-3);
    }
    for (const std::string name : {"capital", "chat", "len512"}) {
      if (sequence["name"].get<std::string>() != name) continue;
      const std::vector<float> last(logits.end() - vocabulary, logits.end());
      EXPECT_LE(MaxDifference(last, ReadNpy(golden_ + "/logits/full_" + name + "_f32.npy")), 5e-3);
    }
  }
  std::cout << "largest difference of a top-64 logit: " << worst << "\n";
}

TEST_F(RealModelTest, HiddenStatesMatchLayerByLayer) {
  ForwardHarness model(path_, {.weights = WeightPlan::kF32});
  const json expected = ReadJson(golden_ + "/logits/layers_sixteen.json");
  const auto ids = expected["ids"].get<std::vector<int32_t>>();
  model.decoder().set_layer_observer([&](int layer, ConstMatrix residual) {
    const json& golden = expected["layers"][layer];
    for (int r = 0; r < residual.rows; ++r) {
      double sum = 0;
      for (int c = 0; c < residual.cols; ++c)
        sum += double{residual.row(r)[c]} * residual.row(r)[c];
      const double l2 = golden["l2_per_pos"][r].get<double>();
      EXPECT_NEAR(std::sqrt(sum), l2, 1e-3 * l2) << "layer " << layer << " position " << r;
    }
    const double last_l2 = golden["l2_per_pos"].back().get<double>();
    for (int c = 0; c < 8; ++c) {
      EXPECT_NEAR(residual.row(residual.rows - 1)[c], golden["first8_last"][c].get<double>(),
                  1e-3 * last_l2)
          << "layer " << layer;
    }
  });
  model.Logits(ids);
}

TEST_F(RealModelTest, PerplexityOfTheFirstWindows) {
  ESPALIER_PATH_OR_SKIP(text_path, "ESPALIER_TEXT");
  const json golden = ReadJson(golden_ + "/ppl/ppl.json");
  const int window = golden["window"].get<int>();
  // The whole text is `espalier score`'s business; two windows catch what the tests can catch.
  constexpr int kFp32Windows = 2, kInt8Windows = 6;
  const auto measure = [&](WeightPlan weights, KvType kv, int windows) {
    ForwardHarness model(path_, {.weights = weights, .kv = kv, .max_rows = window});
    auto tokenizer = Tokenizer::Create(model.file().vocabulary());
    EXPECT_TRUE(tokenizer.ok()) << tokenizer.status();
    const auto ids =
        (*tokenizer)->Encode(ReadFile(text_path).substr(0, 200000), Tokenizer::Special::kAsText);
    EXPECT_TRUE(ids.ok()) << ids.status();
    double total = 0, expected = 0;
    for (int w = 0; w < windows; ++w) {
      total += model.NegativeLogLikelihood(std::span(*ids).subspan(w * window, window));
      expected += golden["nll_per_window"][w].get<double>();
    }
    const double terms = windows * (window - 1.0);
    const double relative = std::exp((total - expected) / terms) - 1;
    std::cout << "perplexity of " << windows << " windows: " << std::exp(total / terms)
              << ", golden fp32 " << std::exp(expected / terms) << ", relative difference "
              << relative << "\n";
    return std::abs(relative);
  };
  EXPECT_LE(measure(WeightPlan::kF32, KvType::kF32, kFp32Windows), 1e-4);
  // As served by default, and each quantisation by itself.
  EXPECT_LE(measure(WeightPlan::kAuto, DefaultKvType(WeightPlan::kAuto, false), kInt8Windows),
            5e-3);
  EXPECT_LE(measure(WeightPlan::kAuto, KvType::kF16, kInt8Windows), 5e-3);
  EXPECT_LE(measure(WeightPlan::kInt8, KvType::kF16, kInt8Windows), 5e-3);
}

}  // namespace
}  // namespace espalier
