// The forward pass against make_tiny_model.py's, over all forms of the project's own models.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "nlohmann/json.hpp"
#include "tests/engine/model/forward_harness.h"

namespace espalier {
namespace {

const std::string kData = ESPALIER_SOURCE_DIR "/tests/golden/data/";

// fp32 against fp64, the weights being the same: logits have a standard deviation of about 5, the
// largest difference seen is 2.3e-5.
constexpr float kTolerance = 2e-4f;

nlohmann::json Expected() {
  std::ifstream file(kData + "expected.json");
  return nlohmann::json::parse(file);
}

std::vector<float> ReadFloats(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const std::string bytes{std::istreambuf_iterator<char>(file), {}};
  std::vector<float> values(bytes.size() / sizeof(float));
  std::memcpy(values.data(), bytes.data(), values.size() * sizeof(float));
  return values;
}

struct Form {
  const char* name;
  const char* model;
  const char* weights;  // by which expected values are named
};

class TinyModels : public testing::TestWithParam<Form> {
 protected:
  TinyModels() : harness_(kData + GetParam().model, {.max_rows = 64, .threads = 1}) {}

  ForwardHarness harness_;
};

TEST_P(TinyModels, HasTheLogitsOfTheIndependentForwardPass) {
  const auto ids = Expected()["ids"].get<std::vector<int32_t>>();
  const std::vector<float> expected =
      ReadFloats(kData + GetParam().weights + std::string(".logits.f32"));
  ASSERT_EQ(expected.size(), ids.size() * harness_.file().config().vocabulary);
  const std::vector<float> logits = harness_.Logits(ids);
  ASSERT_EQ(logits.size(), expected.size());
  float worst = 0;
  for (size_t i = 0; i < logits.size(); ++i) {
    worst = std::max(worst, std::fabs(logits[i] - expected[i]));
  }
  RecordProperty("worst_difference", std::to_string(worst));
  EXPECT_LT(worst, kTolerance);
}

TEST_P(TinyModels, ContinuesGreedilyAsExpected) {
  const nlohmann::json expected = Expected();
  auto ids = expected["ids"].get<std::vector<int32_t>>();
  const nlohmann::json& answer = expected[GetParam().weights];
  ASSERT_EQ(answer["greedy"].size(), 32);
  ASSERT_GT(std::ranges::min(answer["margins"].get<std::vector<float>>()), 2 * kTolerance);
  for (const int32_t token : answer["greedy"].get<std::vector<int32_t>>()) {
    const std::vector<float> logits = harness_.Logits(ids);
    const auto last = logits.end() - harness_.file().config().vocabulary;
    ASSERT_EQ(std::max_element(last, logits.end()) - last, token);
    ids.push_back(token);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Forms, TinyModels,
    testing::Values(Form{"GgufF32", "tiny-llama.gguf", "tiny-llama"},
                    Form{"FolderBF16", "tiny-llama", "tiny-llama"},
                    Form{"GgufQuantized", "tiny-llama-quantized.gguf", "tiny-llama-quantized"},
                    Form{"Qwen2", "tiny-qwen2-quantized.gguf", "tiny-qwen2-quantized"},
                    Form{"Qwen3", "tiny-qwen3-quantized.gguf", "tiny-qwen3-quantized"}),
    [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace espalier
