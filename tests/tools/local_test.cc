// The command on a model of this process: what it scores and measures, against the golden files.
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <span>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "engine/sim/cost_model.h"
#include "policy/blocks/block_orders.h"
#include "policy/ladder_file.h"
#include "tests/support/model_writer.h"
#include "tests/support/run_command.h"

namespace espalier {
namespace {

using testing::HasSubstr;

constexpr int kVocabulary = 320;
const std::string kData = ESPALIER_SOURCE_DIR "/tests/golden/data/";
const std::string kModel = kData + "tiny-llama.gguf";

std::string ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

// The golden tokens, and what the golden logits say that each but the first costs, nats.
struct Golden {
  std::string ids;
  std::vector<double> nll;

  Golden() {
    std::ifstream expected(kData + "expected.json");
    const std::vector<int> tokens = nlohmann::json::parse(expected)["ids"];
    ids = fmt::format("{}", fmt::join(tokens, " "));
    std::ifstream file(kData + "tiny-llama.logits.f32", std::ios::binary);
    std::vector<float> row(kVocabulary);
    for (size_t i = 0; i + 1 < tokens.size(); ++i) {
      file.read(reinterpret_cast<char*>(row.data()), kVocabulary * sizeof(float));
      double sum = 0;
      const double most = *std::max_element(row.begin(), row.end());
      for (const float logit : row) sum += std::exp(logit - most);
      nll.push_back(most + std::log(sum) - row[tokens[i + 1]]);
    }
  }

  double Sum(size_t terms) const {
    double sum = 0;
    for (const double each : std::span(nll).first(terms)) sum += each;
    return sum;
  }
};

nlohmann::json Score(const std::vector<std::string>& options) {
  std::vector<std::string> arguments = {"score", "--json", "--token-ids", Golden().ids};
  arguments.insert(arguments.end(), options.begin(), options.end());
  const Outcome outcome = RunWith(arguments);
  EXPECT_EQ(outcome.code, 0) << outcome.err;
  return nlohmann::json::parse(outcome.out, nullptr, false);
}

TEST(Score, InF32IsWhatTheGoldenLogitsSay) {
  const Golden golden;
  for (const char* model : {"tiny-llama.gguf", "tiny-llama"}) {
    const nlohmann::json score = Score({"--model", kData + model, "--weights", "f32"});
    EXPECT_EQ(score["terms"], golden.nll.size());
    EXPECT_NEAR(score["nll"], golden.Sum(golden.nll.size()), 1e-3) << model;
  }
}

TEST(Score, EachWindowStartsFromAnEmptyCache) {
  const Golden golden;
  const nlohmann::json score =
      Score({"--model", kModel, "--weights", "f32", "--window", "8", "--step-rows", "3"});
  ASSERT_EQ(score["nll_per_window"].size(), 3u);
  EXPECT_NEAR(score["nll_per_window"][0], golden.Sum(7), 1e-3);
  // Its context is another than the golden one.
  EXPECT_GT(std::abs(score["nll_per_window"][1].get<double>() - (golden.Sum(15) - golden.Sum(8))),
            1e-2);
}

TEST(Score, OverlappingWindowsScoreWhatIsNew) {
  const Golden golden;
  const nlohmann::json score =
      Score({"--model", kModel, "--weights", "f32", "--window", "8", "--stride", "3"});
  const auto windows = static_cast<int64_t>(score["nll_per_window"].size());
  EXPECT_EQ(windows, 1 + (static_cast<int64_t>(golden.nll.size()) + 1 - 8) / 3);
  EXPECT_EQ(score["terms"], 7 + 3 * (windows - 1));
  EXPECT_NEAR(score["nll_per_window"][0], golden.Sum(7), 1e-3);
}

TEST(Score, InInt8IsClose) {
  const Golden golden;
  const double nll = Score({"--model", kModel})["nll"];
  EXPECT_NEAR(nll, golden.Sum(golden.nll.size()), 0.03 * golden.Sum(golden.nll.size()));
  EXPECT_NE(nll, golden.Sum(golden.nll.size()));
}

TEST(Score, OffTheReferenceFails) {
  const double ppl = Score({"--model", kModel, "--weights", "f32"})["ppl"];
  const auto check = [&](double reference) {
    return RunWith({"score", "--model", kModel, "--weights", "f32", "--token-ids", Golden().ids,
                    "--reference-ppl", fmt::format("{}", reference)});
  };
  EXPECT_EQ(check(ppl).code, 0);
  EXPECT_EQ(check(ppl * 1.001).code, 1);
  EXPECT_THAT(check(ppl * 1.001).err, HasSubstr("off the reference"));
}

TEST(Score, BadIdsAreTold) {
  const auto error = [](const char* ids) {
    return RunWith({"score", "--model", kModel, "--token-ids", ids}).err;
  };
  EXPECT_THAT(error("1 2 x"), HasSubstr("byte 4"));
  EXPECT_THAT(error("1 -2"), HasSubstr("byte 2"));
  EXPECT_THAT(error("1 320"), HasSubstr("token id 320: the vocabulary has 320 tokens"));
  EXPECT_THAT(error("1"), HasSubstr("at least 2"));
}

TEST(Tokenize, IsTheSameForTextAndItsChat) {
  const Outcome text = RunWith({"tokenize", "--model", kModel, "tree", "--ids"});
  EXPECT_EQ(text.code, 0) << text.err;
  const Outcome chat = RunWith({"tokenize", "--model", kModel, "tree", "--ids", "--chat"});
  EXPECT_EQ(chat.code, 0) << chat.err;
  EXPECT_TRUE(chat.out.starts_with("1 ")) << chat.out;  // <|im_start|>
  EXPECT_THAT(chat.out, HasSubstr(" 2 "));              // <|im_end|>
  const Outcome special = RunWith({"tokenize", "--model", kModel, "<|im_end|>", "--special"});
  EXPECT_EQ(special.out, "      2 <|im_end|>\n");
  EXPECT_EQ(RunWith({"tokenize", "--model", kModel, "<|im_end|>", "--chat"}).code, 1);
}

TEST(Bench, WritesItsFigures) {
  const TemporaryFolder temporary;
  const std::string figures = temporary.Path("made/bench.json");
  const Outcome outcome = RunWith({"bench", "--model", kModel, "--batch", "1,3", "--prompt", "8",
                                   "--generate", "4", "--long-prompt", "40", "--turns", "2",
                                   "--footprint", "1", "--phases", "--figures", figures});
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  EXPECT_THAT(outcome.out, HasSubstr("ms per step"));
  std::ifstream file(figures);
  const nlohmann::json json = nlohmann::json::parse(file, nullptr, false);
  for (const char* key : {"dram_read_bytes_per_s", "int8_ops_per_s", "f32_ops_per_s",
                          "prefill_p8_b1_tokens_per_s", "decode_p8_b3_tokens_per_s",
                          "decode_p8_b3_roofline_share", "prefill_p40_b1_tokens_per_s"}) {
    ASSERT_TRUE(json.contains(key)) << key;
    EXPECT_GT(json[key].get<double>(), 0) << key;
  }
  EXPECT_FALSE(json.contains("decode_p40_b1_tokens_per_s"));
  EXPECT_FALSE(json["machine"].get<std::string>().empty());
  EXPECT_FALSE(json["commit"].get<std::string>().empty());
  std::filesystem::remove_all(std::filesystem::path(figures).parent_path());
}

TEST(Bench, FitsWhatStepsTake) {
  const TemporaryFolder temporary;
  const std::string path = temporary.Path("bench.costs");
  const Outcome outcome = RunWith({"bench", "--model", kModel, "--fit", path});
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  EXPECT_THAT(outcome.out, HasSubstr("R^2"));
  CostModel costs;
  std::string error;
  ASSERT_TRUE(ParseCosts(ReadFile(path), &costs, &error)) << error;
  ASSERT_EQ(costs.rungs.size(), 1u);
  EXPECT_GT(costs.rungs[0].prefill, 0);
  std::filesystem::remove(path);
}

TEST(Train, OrdersBlocksThatCalibrationThenDrops) {
  const TemporaryFolder temporary;
  const std::string folder = temporary.Path("");
  const auto train = [&](const std::string& out, const std::string& seed) {
    return RunWith({"train",
                    "--task",
                    "rap",
                    "--model",
                    kModel,
                    "--text",
                    ESPALIER_SOURCE_DIR "/tests/golden/data/prose.txt",
                    "--tokens",
                    "256",
                    "--confirm-tokens",
                    "512",
                    "--held-out-tokens",
                    "256",
                    "--episodes",
                    "8",
                    "--tasks",
                    "4",
                    "--seed",
                    seed,
                    "--out",
                    out,
                    "--figures",
                    folder + "figures.json"});
  };
  const Outcome first = train(folder + "a", "1");
  ASSERT_EQ(first.code, 0) << first.err;
  for (const char* method : {"greedy sequential (GSI)", "agent (double DQN)", "one-shot",
                             "ShortGPT", "evenly spaced", "random"}) {
    EXPECT_THAT(first.out, HasSubstr(method));
  }
  EXPECT_THAT(first.out, HasSubstr("on 256 tokens searched on, on 512 to confirm by, on 256"));
  BlockOrders orders;
  std::string error;
  const std::string text = ReadFile(folder + "a");
  ASSERT_TRUE(ParseBlockOrders(text, &orders, &error)) << error;
  EXPECT_EQ(orders.orders.size(), 4u);
  EXPECT_EQ(train(folder + "b", "1").code, 0);
  EXPECT_EQ(ReadFile(folder + "b"), text);
  // From what was measured before, to the same.
  std::filesystem::remove(folder + "a");
  EXPECT_EQ(train(folder + "a", "1").code, 0);
  EXPECT_EQ(ReadFile(folder + "a"), text);
  const nlohmann::json figures = nlohmann::json::parse(ReadFile(folder + "figures.json"));
  // Of a model without meaning, of whatever sign.
  EXPECT_TRUE(std::isfinite(figures["rap_dqn_vs_greedy"].get<double>()));

  const Outcome calibrated = RunWith(
      {"calibrate", "--model", kModel, "--text", ESPALIER_SOURCE_DIR "/tests/golden/data/prose.txt",
       "--tokens", "1000", "--rungs", "0+3", "--dense-layers", "0", "--compensate", "none",
       "--blocks", folder + "a", "--out", folder + "m.ladder"});
  ASSERT_EQ(calibrated.code, 0) << calibrated.err;
  EXPECT_THAT(ReadFile(folder + "m.ladder"),
              HasSubstr("--last-dense-layers 0 --slope 0 --rank elimination --compensate none "
                        "--blocks a --resident-tokens 8192"));
  Ladder ladder = Ladder::DenseOnly({});
  ASSERT_TRUE(ParseLadder(ReadFile(folder + "m.ladder"), &ladder, &error)) << error;
  // Three of two layers' blocks: attention is among them, whose KV makes the rung worth its place
  // whatever its steps were timed at.
  ASSERT_EQ(ladder.size(), 2);
  for (const int block : std::span(orders.For(8192).blocks).first(3)) {
    EXPECT_EQ(ladder.rung(1).decode.kept(
                  LayerOfBlock(block), IsAttention(block) ? SiteKind::kHeads : SiteKind::kChannels),
              0);
  }
  EXPECT_THAT(RunWith({"calibrate", "--model", kModel, "--text",
                       ESPALIER_SOURCE_DIR "/tests/golden/data/prose.txt", "--dense-layers", "0",
                       "--blocks", kData + "expected.json", "--out", folder + "n.ladder"})
                  .err,
              HasSubstr("expected.json: line 1: expected 'espalier-blocks 1'"));
  std::filesystem::remove_all(folder);
}

}  // namespace
}  // namespace espalier
