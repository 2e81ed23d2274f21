// `espalier prune` in this process: what it writes is what pruning in memory makes, it opens and is
// scored as any model, and nothing in a model or its inputs makes it a NaN.
#include "tools/weight_pruning.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <map>
#include <random>
#include <span>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "kernels/cpu/cpu_backend.h"
#include "tests/support/model_writer.h"
#include "tests/support/run_command.h"

namespace espalier {
namespace {

using testing::HasSubstr;

const std::string kModel = ESPALIER_SOURCE_DIR "/tests/golden/data/tiny-llama.gguf";
const std::string kFolder = ESPALIER_SOURCE_DIR "/tests/golden/data/tiny-llama";
const std::string kText = ESPALIER_SOURCE_DIR "/tests/golden/data/prose.txt";

Outcome Prune(const std::string& model, const std::string& out,
              const std::vector<std::string>& more = {}) {
  std::vector<std::string> arguments = {"prune", "--model",       model, "--out",
                                        out,     "--calibration", kText, "--window",
                                        "32",    "--tokens",      "256"};
  arguments.insert(arguments.end(), more.begin(), more.end());
  return RunWith(arguments);
}

std::vector<float> ValuesOf(const StoredTensor& tensor) {
  std::vector<float> values(static_cast<size_t>(tensor.rows) * tensor.cols);
  for (int r = 0; r < tensor.rows; ++r) {
    tensor.ReadRow(r, values.data() + static_cast<size_t>(r) * tensor.cols);
  }
  return values;
}

// Keeps what it is given.
class InMemory final : public ModelRewriter {
 public:
  absl::Status Write(const StoredTensor& tensor, std::span<const float> values) override {
    written[tensor.name].assign(values.begin(), values.end());
    return absl::OkStatus();
  }
  absl::Status Finish() override { return absl::OkStatus(); }

  std::map<std::string, std::vector<float>> written;
};

class WeightPruningTest : public testing::Test {
 protected:
  TemporaryFolder folder_;
};

TEST_F(WeightPruningTest, WritesWhatPruningInMemoryMakes) {
  // Without inputs to look at, so that both have the same.
  ASSERT_EQ(Prune(kModel, folder_.Path("m.gguf"),
                  {"--method", "magnitude", "--pattern", "2:4", "--store", "f32"})
                .code,
            0);
  const auto dense = ModelFile::Open(kModel).value();
  const auto backend = CreateCpuBackend({.threads = 2}).value();
  InMemory memory;
  const auto report =
      PruneWeights({.metric = Metric::kMagnitude, .mask = {.pattern = *ParsePattern("2:4")}},
                   *dense, {}, &memory, backend.get(), [](int, int) { return true; });
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_EQ(report->layers.size(), static_cast<size_t>(dense->config().layers));
  EXPECT_EQ(2 * report->Sum().zeros, report->Sum().weights);
  const auto pruned = ModelFile::Open(folder_.Path("m.gguf"));
  ASSERT_TRUE(pruned.ok()) << pruned.status();
  ASSERT_EQ((*pruned)->tensors().size(), dense->tensors().size());
  for (size_t i = 0; i < dense->tensors().size(); ++i) {
    const StoredTensor& tensor = (*pruned)->tensors()[i];
    const auto found = memory.written.find(tensor.name);
    EXPECT_EQ(found != memory.written.end(), IsPruned(tensor)) << tensor.name;
    const std::vector<float> expected =
        found == memory.written.end() ? ValuesOf(dense->tensors()[i]) : found->second;
    EXPECT_EQ(ValuesOf(tensor), expected) << tensor.name;
  }
}

// As a GGUF and as a folder, by every method and pattern: the zeros asked for, and a score.
TEST_F(WeightPruningTest, ServesWhatItWrote) {
  const std::vector<std::vector<std::string>> methods = {
      {"--method", "swift"},     {"--method", "swift", "--quality"},
      {"--method", "wanda"},     {"--method", "sparsegpt"},
      {"--method", "magnitude"}, {"--method", "ria", "--activations", "dense", "--skip-first"}};
  double dense_nll = 0;
  const auto score = [&](const std::string& model) {
    const Outcome scored = RunWith(
        {"score", "--json", "--model", model, "--file", kText, "--window", "64", "--windows", "8"});
    EXPECT_EQ(scored.code, 0) << scored.err;
    return nlohmann::json::parse(scored.out, nullptr, false)["mean_nll"].get<double>();
  };
  dense_nll = score(kModel);
  for (const std::vector<std::string>& method : methods) {
    for (const char* pattern : {"0.5", "4:8", "2:4"}) {
      for (const bool folder : {false, true}) {
        SCOPED_TRACE(testing::Message() << method[1] << ' ' << pattern << ' ' << folder);
        const std::string out = folder_.Path(folder ? "folder" : "m.gguf");
        std::vector<std::string> more = method;
        more.insert(more.end(), {"--pattern", pattern, "--json", folder_.Path("report")});
        const Outcome outcome = Prune(folder ? kFolder : kModel, out, more);
        ASSERT_EQ(outcome.code, 0) << outcome.err;
        EXPECT_THAT(outcome.out, HasSubstr("ffn_down"));
        std::ifstream file(folder_.Path("report"));
        const nlohmann::json report = nlohmann::json::parse(file, nullptr, false);
        EXPECT_NEAR(report["sparsity"].get<double>(), 0.5, 0.005);
        ASSERT_EQ(report["layers"].size(), 2u);
        const nlohmann::json& site = report["layers"][1]["sites"]["attn_v"];
        EXPECT_EQ(site["weights"], 64 * 32);
        EXPECT_GT(site["saliency_kept"].get<double>(), 0.5);
        EXPECT_LT(site["saliency_kept"].get<double>(), 1);
        EXPECT_GT(report["seconds"]["all"].get<double>(), 0);
        const double nll = score(out);
        EXPECT_TRUE(std::isfinite(nll));
        EXPECT_NE(nll, dense_nll);
      }
    }
  }
}

TEST_F(WeightPruningTest, CalibratesOnWhatTheModelMakesUp) {
  const auto prune = [&](const char* name, const char* seed) {
    return RunWith({"prune", "--model", kModel, "--out", folder_.Path(name), "--calibration",
                    "self", "--window", "32", "--tokens", "128", "--seed", seed});
  };
  for (const auto& [name, seed] : {std::pair{"a.gguf", "1"}, {"b.gguf", "1"}, {"c.gguf", "2"}}) {
    const Outcome outcome = prune(name, seed);
    ASSERT_EQ(outcome.code, 0) << outcome.err;
    EXPECT_THAT(outcome.out, HasSubstr("128 tokens of calibration"));
  }
  const auto bytes = [&](const char* name) {
    std::ifstream file(folder_.Path(name), std::ios::binary);
    return std::string(std::istreambuf_iterator<char>(file), {});
  };
  EXPECT_EQ(bytes("a.gguf"), bytes("b.gguf"));
  EXPECT_NE(bytes("a.gguf"), bytes("c.gguf"));
}

void SetValue(GgufParts* parts, const std::string& tensor, size_t index, float value) {
  std::memcpy(parts->tensor(tensor).data.data() + index * sizeof(value), &value, sizeof(value));
}

TEST_F(WeightPruningTest, NamesTheWeightThatIsNoNumber) {
  for (const float value :
       {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity()}) {
    GgufParts parts = TinyGguf();
    SetValue(&parts, "blk.1.ffn_up.weight", 3 * 16 + 5, value);
    const std::string model = folder_.Write("m.gguf", parts.Bytes());
    for (const char* method : {"swift", "magnitude", "sparsegpt"}) {
      const Outcome outcome = Prune(model, folder_.Path("out.gguf"), {"--method", method});
      EXPECT_EQ(outcome.code, 1);
      EXPECT_THAT(outcome.err, HasSubstr("tensor blk.1.ffn_up.weight, row 3, column 5: expected a "
                                         "finite weight"));
      EXPECT_FALSE(std::filesystem::exists(folder_.Path("out.gguf")));
      EXPECT_FALSE(std::filesystem::exists(folder_.Path("out.gguf.new")));
    }
  }
}

TEST_F(WeightPruningTest, NamesTheNormThatIsNoNumber) {
  GgufParts parts = TinyGguf();
  SetValue(&parts, "blk.1.attn_norm.weight", 5, std::numeric_limits<float>::quiet_NaN());
  const std::string model = folder_.Write("m.gguf", parts.Bytes());
  const Outcome outcome = Prune(model, folder_.Path("out.gguf"));
  EXPECT_EQ(outcome.code, 1);
  EXPECT_THAT(outcome.err, HasSubstr("m.gguf: tensor blk.1.attn_norm.weight, row 0, column 5"));
}

// What options stand for where they are left out.
TEST_F(WeightPruningTest, DefaultsAreWhatTheySay) {
  // Compared by ==: EXPECT_EQ would print them.
  const auto bytes = [&](const std::vector<std::string>& more) {
    const std::string out = folder_.Path("out.gguf");
    const Outcome outcome = Prune(kModel, out, more);
    EXPECT_EQ(outcome.code, 0) << outcome.err;
    std::ifstream file(out, std::ios::binary);
    return std::string(std::istreambuf_iterator<char>(file), {});
  };
  using Words = std::vector<std::string>;
  const std::string swift = bytes({});
  EXPECT_TRUE(bytes({"--metric", "fluctuation", "--compensate", "mean", "--select", "auto",
                     "--activations", "sequential"}) == swift);
  for (const Words& other : {Words{"--metric", "wanda"}, Words{"--compensate", "none"},
                             Words{"--activations", "pruned"}, Words{"--activations", "dense"}}) {
    EXPECT_FALSE(bytes(other) == swift) << other[1];
  }
  EXPECT_TRUE(bytes({"--compensate", "none"}) ==
              bytes({"--compensate", "none", "--metric", "wanda"}));
  EXPECT_TRUE(bytes({"--method", "wanda"}) ==
              bytes({"--compensate", "none", "--metric", "wanda", "--activations", "pruned"}));
  for (const Words& method :
       {Words{"--quality"}, Words{"--method", "wanda"}, Words{"--method", "sparsegpt"}}) {
    Words spelled = method, other = method;
    spelled.insert(spelled.end(), {"--activations", "pruned"});
    other.insert(other.end(), {"--activations", "sequential"});
    EXPECT_TRUE(bytes(spelled) == bytes(method)) << method.back();
    EXPECT_FALSE(bytes(other) == bytes(method)) << method.back();
  }
}

// A column of weights that are zero, an input that is always zero, a row of zeros, a whole matrix.
TEST_F(WeightPruningTest, ZerosMakeNoNaN) {
  GgufParts parts = TinyGguf();
  for (int r = 0; r < 16; ++r) SetValue(&parts, "blk.0.attn_q.weight", r * 16 + 3, 0);
  for (int j = 0; j < 16; ++j) SetValue(&parts, "blk.0.ffn_gate.weight", 7 * 16 + j, 0);
  for (int i = 0; i < 8 * 16; ++i) SetValue(&parts, "blk.1.attn_v.weight", i, 0);
  SetValue(&parts, "blk.0.attn_norm.weight", 2, 0);
  SetValue(&parts, "blk.1.ffn_norm.weight", 9, 0);
  const std::string model = folder_.Write("m.gguf", parts.Bytes()), out = folder_.Path("out.gguf");
  for (const std::vector<std::string>& method : std::vector<std::vector<std::string>>{
           {"--method", "swift"},
           {"--method", "swift", "--quality"},
           {"--method", "swift", "--metric", "lscore", "--select", "ewma"},
           {"--method", "ria"},
           {"--method", "sparsegpt"},
           {"--method", "magnitude"}}) {
    for (const char* pattern : {"0.5", "2:4"}) {
      SCOPED_TRACE(testing::Message() << testing::PrintToString(method) << pattern);
      if (std::ranges::count(method, "ewma") > 0 && pattern[1] == ':') continue;
      std::vector<std::string> more = method;
      more.insert(more.end(), {"--pattern", pattern});
      const Outcome outcome = Prune(model, out, more);
      ASSERT_EQ(outcome.code, 0) << outcome.err;
      const auto file = ModelFile::Open(out);
      ASSERT_TRUE(file.ok()) << file.status();
      for (const StoredTensor& tensor : (*file)->tensors()) {
        const std::vector<float> values = ValuesOf(tensor);
        EXPECT_TRUE(std::ranges::all_of(values, [](float v) { return std::isfinite(v); }))
            << tensor.name;
        if (!IsPruned(tensor)) continue;
        EXPECT_GE(2 * std::ranges::count(values, 0.0f), std::ssize(values)) << tensor.name;
      }
    }
  }
}

TEST_F(WeightPruningTest, SaysWhatContradicts) {
  const auto error = [&](std::vector<std::string> more) {
    const Outcome outcome = Prune(kModel, folder_.Path("m.gguf"), more);
    EXPECT_NE(outcome.code, 0);
    EXPECT_FALSE(std::filesystem::exists(folder_.Path("m.gguf")));
    return outcome.err;
  };
  EXPECT_THAT(error({"--method", "wanda", "--metric", "ria"}), HasSubstr("--metric"));
  EXPECT_THAT(error({"--method", "wanda", "--quality"}), HasSubstr("--quality"));
  EXPECT_THAT(error({"--pattern", "2:4", "--select", "ewma"}), HasSubstr("--select"));
  EXPECT_THAT(error({"--pattern", "4:4"}), HasSubstr("--pattern"));
  EXPECT_THAT(RunWith({"prune", "--model", kModel, "--out", folder_.Path("m.gguf")}).err,
              HasSubstr("--calibration"));
  EXPECT_THAT(RunWith({"prune", "--model", kModel, "--out", folder_.Path("m.gguf"), "--calibration",
                       kText, "--window", "1"})
                  .err,
              HasSubstr("--window: of one token"));
  EXPECT_THAT(error({"--json", folder_.Path("none") + "/report"}), HasSubstr("--json: "));
  EXPECT_THAT(RunWith({"prune", "--model", kModel, "--out", kModel, "--method", "magnitude"}).err,
              HasSubstr("another than the model's own"));
  EXPECT_THAT(RunWith({"prune", "--model", kModel, "--out", folder_.Path("folder"), "--method",
                       "magnitude"})
                  .err,
              HasSubstr("a .gguf, as the model is"));
}

// What stands where a run writes aside is written over only if an interrupted run left it.
TEST_F(WeightPruningTest, WritesOverNobodysFile) {
  const std::string out = folder_.Path("m.gguf"), aside = out + ".new";
  const auto refusal = [&](const std::string& model, const std::string& text) {
    const Outcome outcome = RunWith({"prune", "--model", model, "--out", out, "--calibration", text,
                                     "--window", "32", "--tokens", "256"});
    EXPECT_EQ(outcome.code, 1);
    EXPECT_THAT(outcome.err, HasSubstr("m.gguf.new: is nothing that an interrupted run left"));
    EXPECT_FALSE(std::filesystem::exists(out));
  };
  const auto bytes = [](const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    return std::string(std::istreambuf_iterator<char>(file), {});
  };
  std::filesystem::copy_file(kModel, aside);
  refusal(aside, kText);
  EXPECT_TRUE(bytes(aside) == bytes(kModel));
  std::filesystem::remove(aside);
  std::filesystem::copy_file(kText, aside);
  refusal(kModel, aside);
  EXPECT_TRUE(bytes(aside) == bytes(kText));
  std::filesystem::remove(aside);
  const std::string source = folder_.Path("source.gguf");
  std::filesystem::copy_file(kModel, source);
  std::filesystem::create_symlink(source, aside);
  refusal(source, kText);
  EXPECT_TRUE(bytes(source) == bytes(kModel));
  std::filesystem::remove(aside);
  // As a killed run leaves it: tensors, no header.
  folder_.Write("m.gguf.new", std::string(5000, '\0') + "tensors");
  EXPECT_EQ(Prune(kModel, out).code, 0);
  EXPECT_FALSE(std::filesystem::exists(aside));
}

// A folder is as it was until all of it is new.
TEST_F(WeightPruningTest, FailsWithoutTouchingAFolder) {
  const std::string out = folder_.Path("folder");
  const std::string empty = folder_.Write("empty.txt", "");
  const auto fail = [&] {
    return RunWith({"prune", "--model", kFolder, "--out", out, "--calibration", empty}).code;
  };
  EXPECT_EQ(fail(), 1);
  EXPECT_FALSE(std::filesystem::exists(out));
  ASSERT_EQ(Prune(kFolder, out).code, 0);
  std::ofstream(out + "/config.json") << "mine";
  EXPECT_EQ(fail(), 1);
  std::ifstream config(out + "/config.json");
  EXPECT_EQ(std::string(std::istreambuf_iterator<char>(config), {}), "mine");
  for (const std::string& json : {out + "/config.json", kFolder + "/report.json"}) {
    const Outcome outcome = Prune(kFolder, out, {"--json", json});
    EXPECT_EQ(outcome.code, 1);
    EXPECT_THAT(outcome.err, HasSubstr("--json: lies in --"));
  }
}

TEST_F(WeightPruningTest, NamesTheEmbeddingThatIsNoNumber) {
  GgufParts parts = TinyGguf();
  std::vector<uint8_t> none(parts.tensor("token_embd.weight").data.size(), 0xff);
  std::memcpy(parts.tensor("token_embd.weight").data.data(), none.data(), none.size());
  const std::string model = folder_.Write("m.gguf", parts.Bytes());
  for (const char* method : {"swift", "wanda", "ria"}) {
    const Outcome outcome = Prune(model, folder_.Path("out.gguf"), {"--method", method});
    EXPECT_EQ(outcome.code, 1);
    EXPECT_THAT(outcome.err, HasSubstr("tensor token_embd.weight, row "));
  }
}

}  // namespace
}  // namespace espalier
