// What a server gathers prunes a model as its text would: `espalier prune --moments`.
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "engine/model/model_executor.h"
#include "engine/model/moments_file.h"
#include "engine/model/own_file.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"
#include "tests/support/model_writer.h"
#include "tests/support/run_command.h"
#include "tools/weight_pruning.h"

namespace espalier {
namespace {

using ::testing::HasSubstr;

constexpr int kLength = 64;

std::string BytesOf(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

// A step of each window, as a server would run them one after the other.
void RunEach(std::span<const std::vector<int32_t>> windows, ModelExecutor* executor) {
  const auto length = static_cast<int>(windows.front().size());
  const int layers = executor->config().layers;
  const int pages = (length + kPageTokens - 1) / kPageTokens;
  std::vector<std::vector<int32_t>> table(layers);
  for (int32_t page = 0; page < layers * pages; ++page) table[page % layers].push_back(page);
  for (const std::vector<int32_t>& window : windows) {
    Batch batch;
    batch.tokens = window;
    batch.spans.push_back({.id = 1, .rows = length, .page_tables = table});
    batch.prefill_rows = length;
    StepResult result;
    EXPECT_TRUE(executor->Execute(batch, &result).ok());
  }
}

class PruneMomentsTest : public ::testing::Test {
 protected:
  PruneMomentsTest() {
    for (int w = 0; w < 3; ++w) {
      std::vector<int32_t>& window = windows_.emplace_back();
      for (int i = 0; i < kLength; ++i) {
        window.push_back((w * 97 + i * i * 13 + i) % file_->config().vocabulary);
      }
    }
  }

  // As a server would, from steps of a window each.
  InputMoments Gather() {
    const auto executor = ModelExecutor::Load(*file_, backend_.get(),
                                              {.weights = WeightPlan::kF32, .kv_bytes = 8 << 20})
                              .value();
    InputMoments moments(file_->config());
    executor->set_input_moments(&moments, 1);
    RunEach(windows_, executor.get());
    return moments;
  }

  std::string Prune(const std::string& name, const InputMoments* moments) {
    WeightPruningOptions options{.metric = Metric::kFluctuation,
                                 .compensate_mean = true,
                                 .calibrated_on = CalibratedOn::kDense,
                                 .moments = moments,
                                 .weights = WeightPlan::kF32};
    options.mask.pattern = *ParsePattern("2:4");
    const std::string out = folder_.Path(name);
    const auto rewriter = ModelRewriter::Create(*file_, out, BlockType::kF32, IsPruned).value();
    const auto report =
        PruneWeights(options, *file_,
                     moments == nullptr ? std::span(windows_) : std::span<std::vector<int32_t>>(),
                     rewriter.get(), backend_.get(), [](int, int) { return true; });
    EXPECT_TRUE(report.ok()) << report.status();
    EXPECT_EQ(report->tokens, 3 * kLength);
    EXPECT_TRUE(rewriter->Finish().ok());
    return BytesOf(out);
  }

  TemporaryFolder folder_;
  const std::string model_ = ESPALIER_SOURCE_DIR "/tests/golden/data/tiny-llama.gguf";
  std::unique_ptr<ModelFile> file_ = ModelFile::Open(model_).value();
  std::unique_ptr<Backend> backend_ = CreateCpuBackend({.threads = 2}).value();
  std::vector<std::vector<int32_t>> windows_;
};

TEST_F(PruneMomentsTest, GatheredMomentsPruneAsTheTextThatWasServed) {
  const InputMoments moments = Gather();
  const std::string path = folder_.Path("m.moments");
  ASSERT_TRUE(WriteMoments(path, LineageOf(*file_), file_->config(), moments).ok());
  const InputMoments read = ReadMoments(path, *file_).value();
  const std::string by_text = Prune("text.gguf", nullptr);
  EXPECT_EQ(Prune("moments.gguf", &read), by_text);
  // Other inputs, other masks: the files would not be equal by themselves.
  windows_.resize(1, {});
  windows_.front().assign(3 * kLength, 5);
  EXPECT_NE(Prune("other.gguf", nullptr), by_text);
}

TEST_F(PruneMomentsTest, CommandPrunesWithoutAText) {
  const std::string moments = folder_.Path("m.moments"), out = folder_.Path("out.gguf");
  const InputMoments gathered = Gather();
  ASSERT_TRUE(WriteMoments(moments, LineageOf(*file_), file_->config(), gathered).ok());
  const Outcome pruned =
      RunWith({"prune", "--model", model_, "--moments", moments, "--out", out, "--store", "f32"});
  ASSERT_EQ(pruned.code, 0) << pruned.err;
  EXPECT_THAT(pruned.out, HasSubstr("2:4 by swift, 192 tokens"));
  EXPECT_EQ(BytesOf(out), Prune("again.gguf", &gathered));
  // So that what a pruned model was fed prunes the one it was made from.
  const std::unique_ptr<ModelFile> made = ModelFile::Open(out).value();
  EXPECT_EQ(LineageOf(*made), LineageOf(*file_));
  EXPECT_NE(FingerprintOf(*made), FingerprintOf(*file_));
  EXPECT_TRUE(ReadMoments(moments, *made).ok());
  const auto other =
      ModelFile::Open(ESPALIER_SOURCE_DIR "/tests/golden/data/tiny-llama-quantized.gguf");
  EXPECT_NE(LineageOf(*other.value()), LineageOf(*file_));

  const auto refusal = [&](std::vector<std::string> more) {
    std::vector<std::string> words = {
        "prune", "--model", model_, "--moments", moments, "--out", folder_.Path("never.gguf")};
    words.insert(words.end(), more.begin(), more.end());
    const Outcome outcome = RunWith(words);
    EXPECT_EQ(outcome.code, 1);
    EXPECT_FALSE(std::filesystem::exists(folder_.Path("never.gguf")));
    return outcome.err;
  };
  EXPECT_THAT(refusal({"--text", "self"}), HasSubstr("--calibration: "));
  EXPECT_THAT(refusal({"--quality"}), HasSubstr("--quality: needs products"));
  EXPECT_THAT(refusal({"--method", "sparsegpt"}), HasSubstr("--method: needs products"));
  EXPECT_THAT(refusal({"--method", "magnitude"}), HasSubstr("--moments: this method looks at no"));
  EXPECT_THAT(refusal({"--activations", "pruned"}), HasSubstr("--activations: "));
  EXPECT_THAT(refusal({"--activations", "sequential"}), HasSubstr("--activations: "));
  EXPECT_THAT(refusal({"--tokens", "5"}), HasSubstr("--tokens: "));
  EXPECT_THAT(refusal({"--skip-first"}), HasSubstr("--skip-first: "));
  ASSERT_TRUE(
      WriteMoments(moments, LineageOf(*file_), file_->config(), InputMoments(file_->config()))
          .ok());
  EXPECT_THAT(refusal({}), HasSubstr("espalier.tokens: expected some, got 0"));
  ASSERT_TRUE(WriteMoments(moments, "x", file_->config(), gathered).ok());
  EXPECT_THAT(refusal({}), HasSubstr("made for another model"));
}

struct FixedPoint {
  const char* name;
  const char* model;
  WeightPlan weights;
  int length;  // of a window: whole pages or not
  bool skip_first;
};

class MatrixByMatrix : public ::testing::TestWithParam<FixedPoint> {};

// A fixed point: what the matrices of the pruned model meet is what they were pruned by. Of floats:
// where weights are integers the embedding is, too, but not where text is embedded to prune.
TEST_P(MatrixByMatrix, IsPrunedByWhatThePrunedModelMeets) {
  const auto& [name, stem, weights, length, skip_first] = GetParam();
  const TemporaryFolder folder;
  const auto backend = CreateCpuBackend({.threads = 2}).value();
  const auto file = ModelFile::Open(ESPALIER_SOURCE_DIR "/tests/golden/data/" + std::string(stem));
  ASSERT_TRUE(file.ok()) << file.status();
  const ModelConfig& config = (*file)->config();
  std::vector<std::vector<int32_t>> windows(3);
  for (int w = 0; w < 3; ++w) {
    for (int i = 0; i < length; ++i) {
      windows[w].push_back((w * 97 + i * i * 13 + i) % config.vocabulary);
    }
  }
  const auto prune = [&](const char* out, const InputMoments* moments, CalibratedOn calibrated_on) {
    WeightPruningOptions options{.metric = Metric::kFluctuation,
                                 .compensate_mean = true,
                                 .calibrated_on = calibrated_on,
                                 .skip_first = skip_first && moments == nullptr,
                                 .moments = moments,
                                 .weights = weights};
    options.mask.pattern = *ParsePattern("2:4");
    const std::string path = folder.Path(out);
    const auto rewriter = ModelRewriter::Create(**file, path, BlockType::kF32, IsPruned).value();
    const auto report = PruneWeights(
        options, **file, moments == nullptr ? std::span(windows) : std::span(windows).first(0),
        rewriter.get(), backend.get(), [](int, int) { return true; });
    EXPECT_TRUE(report.ok()) << report.status();
    EXPECT_TRUE(rewriter->Finish().ok());
    return path;
  };
  const std::string by_text = prune("text.gguf", nullptr, CalibratedOn::kPrunedMatrices);

  const auto pruned = ModelFile::Open(by_text).value();
  const KvType kv = DefaultKvType(weights, config.qkv_bias);
  const auto executor = ModelExecutor::Load(*pruned, backend.get(),
                                            {.weights = weights, .kv = kv, .kv_bytes = 8 << 20})
                            .value();
  InputMoments met(config);
  const auto meet = [&](int layer, MatrixInput input, ConstMatrix rows) {
    const int skipped = skip_first ? 1 : 0;
    met.of(layer, input)
        .Add(ConstMatrix(rows.row(skipped), rows.rows - skipped, rows.cols, rows.stride),
             backend.get());
  };
  executor->set_input_observer(meet);
  executor->set_channel_observer(
      [&](int layer, ConstMatrix rows) { meet(layer, MatrixInput::kDown, rows); });
  RunEach(windows, executor.get());
  // No EXPECT_EQ, which would print them.
  EXPECT_TRUE(BytesOf(prune("moments.gguf", &met, CalibratedOn::kDense)) == BytesOf(by_text));
  // Which neither of the others is.
  for (const CalibratedOn other : {CalibratedOn::kPrunedLayers, CalibratedOn::kDense}) {
    EXPECT_FALSE(BytesOf(prune("other.gguf", nullptr, other)) == BytesOf(by_text));
  }
}

INSTANTIATE_TEST_SUITE_P(
    , MatrixByMatrix,
    ::testing::Values(
        FixedPoint{"F32", "tiny-llama.gguf", WeightPlan::kF32, 64, false},
        FixedPoint{"SkipFirst", "tiny-llama.gguf", WeightPlan::kF32, 33, true},
        FixedPoint{"Bf16", "tiny-llama.gguf", WeightPlan::kBf16, 33, false},
        FixedPoint{"QkvBias", "tiny-qwen2-quantized.gguf", WeightPlan::kF32, 33, true},
        FixedPoint{"QkNorm", "tiny-qwen3-quantized.gguf", WeightPlan::kF32, 40, false}),
    [](const auto& tested) { return std::string(tested.param.name); });

}  // namespace
}  // namespace espalier
