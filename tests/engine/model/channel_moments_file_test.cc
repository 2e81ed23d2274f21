// Second moments of a model's channels: gathered of a layer at a time, of rows of rung 0 that are
// not at position 0, without a bit of what is served; kept over a restart, and of this very model
// or refused by what differs.
#include "engine/model/channel_moments_file.h"

#include <cmath>
#include <filesystem>
#include <functional>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "engine/model/files/gguf_writer.h"
#include "engine/model/model_executor.h"
#include "engine/model/own_file.h"
#include "engine/model/pruning_file.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"
#include "tests/support/model_writer.h"

namespace espalier {
namespace {

using ::testing::HasSubstr;

class ChannelMomentsFileTest : public ::testing::Test {
 protected:
  ChannelMomentsFileTest()
      : model_(ModelFile::Open(folder_.Write("model.gguf", TinyGguf().Bytes())).value()),
        executor_(ModelExecutor::Load(*model_, backend_.get(),
                                      {.kv_bytes = 4 << 20, .max_batch_tokens = 256})
                      .value()),
        path_(folder_.path() + "/channels.gguf") {}

  struct Prompt {
    int first_token = 0;
    int rows = 0;
    int start = 0;
    int rung = 0;
  };

  // A step of prompts; the log-probabilities of the tokens behind their rows.
  std::vector<float> Step(const std::vector<Prompt>& prompts) {
    const int layers = model_->config().layers;
    Batch batch;
    std::vector<std::vector<std::vector<int32_t>>> tables(prompts.size());
    int32_t page = 0;
    for (size_t i = 0; i < prompts.size(); ++i) {
      const Prompt& prompt = prompts[i];
      for (int layer = 0; layer < layers; ++layer) {
        std::vector<int32_t>& table = tables[i].emplace_back();
        for (int at = 0; at < prompt.start + prompt.rows; at += kPageTokens) {
          table.push_back(page++);
        }
      }
      batch.spans.push_back({.id = static_cast<RequestId>(i + 1),
                             .first_row = batch.rows(),
                             .rows = prompt.rows,
                             .start = prompt.start,
                             .rung = prompt.rung,
                             .page_tables = tables[i]});
      for (int row = 0; row < prompt.rows; ++row) {
        batch.logits.push_back({.row = batch.rows(),
                                .span = static_cast<int>(i),
                                .use = LogitRow::Use::kScore,
                                .target = 3,
                                .sampling = &sampling_});
        batch.tokens.push_back((prompt.first_token + row) % model_->config().vocabulary);
      }
    }
    batch.prefill_rows = batch.rows();
    StepResult result;
    EXPECT_TRUE(executor_->Execute(batch, &result).ok());
    std::vector<float> told;
    for (const TokenResult& token : result.tokens) told.push_back(token.logprob);
    return told;
  }

  // What met a layer's `down` in a step, [rows, channels].
  std::vector<float> HiddenOf(int layer, const std::vector<Prompt>& prompts) {
    std::vector<float> all;
    executor_->set_channel_observer([&](int of, ConstMatrix rows) {
      if (of != layer) return;
      for (int r = 0; r < rows.rows; ++r) {
        all.insert(all.end(), rows.row(r), rows.row(r) + rows.cols);
      }
    });
    Step(prompts);
    executor_->set_channel_observer({});
    return all;
  }

  ChannelMoments Made() { return {model_->config().layers, model_->config().channels}; }

  // Of so many steps of 17 rows, and so 16 in turn of either layer.
  ChannelMoments Gathered(int steps = 4) {
    ChannelMoments moments = Made();
    executor_->set_channel_moments(&moments, 1);
    for (int step = 0; step < steps; ++step) Step({{.first_token = 11 * step, .rows = 17}});
    executor_->set_channel_moments(nullptr, 1);
    return moments;
  }

  void ExpectEqual(const ChannelMoments& a, const ChannelMoments& b) {
    for (int layer = 0; layer < model_->config().layers; ++layer) {
      EXPECT_EQ(a.layer(layer).tokens, b.layer(layer).tokens);
      EXPECT_EQ(a.layer(layer).sums, b.layer(layer).sums);
      EXPECT_EQ(a.layer(layer).products, b.layer(layer).products);
      EXPECT_EQ(a.layer(layer).sinks.rows, b.layer(layer).sinks.rows);
      for (int c = 0; c < a.channels(); ++c) {
        EXPECT_FLOAT_EQ(a.layer(layer).sinks.sums[c], b.layer(layer).sinks.sums[c]);
      }
    }
  }

  absl::Status Write(const ChannelMoments& moments) {
    return WriteChannelMoments(path_, FingerprintOf(*model_), moments);
  }
  std::string Refusal() {
    const absl::Status status = ReadChannelMoments(path_, *model_).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    return std::string(status.message());
  }

  TemporaryFolder folder_;
  SamplingParams sampling_;
  std::unique_ptr<ModelFile> model_;
  std::unique_ptr<Backend> backend_ = CreateCpuBackend({.threads = 2}).value();
  std::unique_ptr<ModelExecutor> executor_;
  std::string path_;
};

TEST_F(ChannelMomentsFileTest, AStepAddsToOneLayerWhatIsNotAtPositionZero) {
  const int channels = model_->config().channels;
  const std::vector<Prompt> prompts = {{.first_token = 3, .rows = 12},
                                       {.first_token = 40, .rows = 9}};
  ChannelMoments moments = Made();
  executor_->set_channel_moments(&moments, 1);
  Step(prompts);
  EXPECT_EQ(moments.layer(0).tokens, 19);
  EXPECT_EQ(moments.layer(1).tokens, 0);
  Step(prompts);
  EXPECT_EQ(moments.layer(0).tokens, 19);
  EXPECT_EQ(moments.layer(1).tokens, 19);
  executor_->set_channel_moments(nullptr, 1);
  for (int layer = 0; layer < 2; ++layer) {
    std::vector<float> hidden = HiddenOf(layer, prompts);
    ASSERT_EQ(hidden.size(), 21 * channels);
    EXPECT_EQ(moments.layer(layer).sinks.rows, 2);
    for (int c = 0; c < channels; ++c) {
      EXPECT_FLOAT_EQ(moments.layer(layer).sinks.sums[c], hidden[c] + hidden[12 * channels + c]);
    }
    for (int i = 0; i < channels; ++i) {
      for (int j = 0; j <= i; ++j) {
        double product = 0, size = 0;
        for (int row = 0; row < 21; ++row) {
          if (row == 0 || row == 12) continue;
          const float* const h = hidden.data() + row * channels;
          product += double{h[i]} * h[j];
          size += std::abs(double{h[i]} * h[j]);
        }
        ASSERT_NEAR(moments.Product(layer, i, j), product, 1e-5 * size + 1e-12);
      }
    }
  }
}

TEST_F(ChannelMomentsFileTest, OnlyStepsWithRowsEnoughAndOneOfSoManyOfThem) {
  ChannelMoments moments = Made();
  executor_->set_channel_moments(&moments, 3);
  Step({{.rows = 16}});  // one of them at position 0
  EXPECT_EQ(moments.layer(0).tokens, 0);
  for (int step = 0; step < 7; ++step) Step({{.first_token = step, .rows = 16, .start = 1}});
  EXPECT_EQ(moments.layer(0).tokens, 32);
  EXPECT_EQ(moments.layer(1).tokens, 16);
  moments.set_frozen(true);
  for (int step = 0; step < 7; ++step) Step({{.first_token = step, .rows = 16, .start = 1}});
  EXPECT_EQ(moments.tokens(), 16);
  moments.set_frozen(false);
  Step({{.rows = 16, .start = 1}});
  EXPECT_EQ(moments.tokens(), 16);
  for (int step = 0; step < 2; ++step) Step({{.rows = 16, .start = 1}});
  EXPECT_EQ(moments.tokens(), 32);
  executor_->set_channel_moments(nullptr, 1);
}

TEST_F(ChannelMomentsFileTest, OfManyRowsSoManyEvenlySpread) {
  const int channels = model_->config().channels;
  const std::vector<Prompt> prompts = {{.first_token = 5, .rows = 257 - 1, .start = 0}};
  ChannelMoments moments = Made();
  executor_->set_channel_moments(&moments, 1);
  Step(prompts);
  executor_->set_channel_moments(nullptr, 1);
  EXPECT_EQ(moments.layer(0).tokens, ChannelMoments::kMostRows);
  const std::vector<float> hidden = HiddenOf(0, prompts);
  double sum = 0;
  for (int i = 0; i < ChannelMoments::kMostRows; ++i) {
    sum += hidden[(1 + i * 255 / ChannelMoments::kMostRows) * channels];
  }
  EXPECT_NEAR(moments.layer(0).sums[0] / sum, 1, 1e-6);
}

TEST_F(ChannelMomentsFileTest, RowsOfHarderRungsAreLeftOut) {
  const ChannelMoments alone = Gathered(2);
  const SiteWidths sites = model_->config().sites();
  Ladder ladder = Ladder::DenseOnly(sites);
  KeepProfile keep = KeepProfile::Dense(sites);
  keep.Keep(1, SiteKind::kHeads, 0);  // the MLPs of this rung keep all channels
  ASSERT_TRUE(ladder.Append({.prefill = keep, .decode = keep}));
  keep.Keep(0, SiteKind::kChannels, 0);
  ASSERT_TRUE(ladder.Append({.prefill = keep, .decode = keep}));
  ASSERT_TRUE(executor_->SetLadder(ladder, StaticSelector(sites)).ok());
  ChannelMoments moments = Made();
  executor_->set_channel_moments(&moments, 1);
  Step({{.first_token = 7, .rows = 20, .rung = 2},
        {.first_token = 0, .rows = 17},
        {.first_token = 90, .rows = 30, .rung = 1}});
  Step({{.first_token = 7, .rows = 30, .rung = 1}, {.first_token = 2, .rows = 16}});
  Step({{.first_token = 9, .rows = 20, .rung = 1}, {.first_token = 11, .rows = 17}});
  executor_->set_channel_moments(nullptr, 1);
  ExpectEqual(moments, alone);
}

TEST_F(ChannelMomentsFileTest, GatheringLeavesWhatIsServedAndTheOtherSumsAlone) {
  const auto serve = [&](InputMoments* inputs, ChannelMoments* channels) {
    executor_->set_input_moments(inputs, 2);
    executor_->set_channel_moments(channels, 1);
    std::vector<float> told;
    for (int step = 0; step < 4; ++step) {
      const std::vector<float> more =
          Step({{.first_token = step, .rows = 30}, {.first_token = 50, .rows = 1, .start = 3}});
      told.insert(told.end(), more.begin(), more.end());
    }
    executor_->set_input_moments(nullptr, 1);
    executor_->set_channel_moments(nullptr, 1);
    return told;
  };
  InputMoments inputs(model_->config()), both_inputs(model_->config());
  ChannelMoments channels = Made(), both_channels = Made();
  const std::vector<float> plain = serve(nullptr, nullptr);
  EXPECT_EQ(plain.size(), 4 * 31);
  EXPECT_EQ(serve(&inputs, nullptr), plain);
  EXPECT_EQ(serve(nullptr, &channels), plain);
  EXPECT_EQ(serve(&both_inputs, &both_channels), plain);
  EXPECT_EQ(channels.tokens(), 2 * 30);
  ExpectEqual(both_channels, channels);
  EXPECT_EQ(inputs.tokens(), 2 * 31);
  for (int layer = 0; layer < 2; ++layer) {
    for (const MatrixInput input : {MatrixInput::kGateUp, MatrixInput::kDown}) {
      EXPECT_EQ(inputs.of(layer, input).Squares(), both_inputs.of(layer, input).Squares());
      EXPECT_EQ(inputs.of(layer, input).tokens(), both_inputs.of(layer, input).tokens());
    }
  }
}

TEST_F(ChannelMomentsFileTest, ReadsWhatItWrote) {
  EXPECT_EQ(ReadChannelMoments(path_, *model_).status().code(), absl::StatusCode::kNotFound);
  const ChannelMoments moments = Gathered();
  EXPECT_EQ(moments.tokens(), 32);
  ASSERT_TRUE(Write(moments).ok());
  const absl::StatusOr<ChannelMoments> read = ReadChannelMoments(path_, *model_);
  ASSERT_TRUE(read.ok()) << read.status();
  ExpectEqual(*read, moments);
}

TEST_F(ChannelMomentsFileTest, RefusesByTheFirstThingThatDiffers) {
  const ChannelMoments moments = Gathered();
  ASSERT_TRUE(WriteChannelMoments(path_, "another", moments).ok());
  EXPECT_THAT(Refusal(), HasSubstr("made for another model"));
  // A model pruned from this one is of its lineage, and its channels are others.
  ASSERT_TRUE(WriteChannelMoments(path_, LineageOf(*model_), moments).ok());
  EXPECT_THAT(Refusal(), HasSubstr("made for another model"));
  ASSERT_TRUE(WriteChannelMoments(path_, "another", ChannelMoments(2, 40)).ok());
  EXPECT_THAT(Refusal(), HasSubstr("espalier.channels\": expected 24, got 40"));
  ASSERT_TRUE(WriteChannelMoments(path_, "another", ChannelMoments(3, 24)).ok());
  EXPECT_THAT(Refusal(), HasSubstr("espalier.layers\": expected 2, got 3"));
  ASSERT_TRUE(WritePruningFile(path_, *model_, {}).ok());
  EXPECT_THAT(Refusal(), HasSubstr("espalier-channel-moments"));
}

TEST_F(ChannelMomentsFileTest, RefusesSumsThatNoRowsCouldHave) {
  const ChannelMoments moments = Gathered();
  using Layer = ChannelMoments::Layer;
  constexpr int kTile = ChannelMoments::kTile;
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const std::pair<const char*, std::function<void(Layer*)>> faults[] = {
      {"espalier.tokens.1", [](Layer* of) { of->tokens = -1; }},
      {"espalier.tokens.1", [](Layer* of) { of->tokens = (int64_t{1} << 53) + 1; }},
      {"blk.1.ffn_down.products: expected finite", [=](Layer* of) { of->products[70] = nan; }},
      {"blk.1.ffn_down.sums: expected finite",
       [](Layer* of) { of->sums[5] = std::numeric_limits<double>::infinity(); }},
      {"blk.1.ffn_down.products: expected sums that 32 rows may have, got",
       [](Layer* of) { of->products[5 * (kTile + 1)] = -1; }},
      {"of squares of channel 5", [](Layer* of) { of->sums[5] = 1e9; }},
      {"of squares of channel 0", [](Layer* of) { of->products[0] = 0; }},
      {"of channels 7 and 5", [](Layer* of) { of->products[7 * kTile + 5] = 1e9; }},
      {"expected sums that 0 rows may have", [](Layer* of) { of->tokens = 0; }},
  };
  for (const auto& [line, fault] : faults) {
    ChannelMoments broken = moments;
    fault(&broken.layer(1));
    ASSERT_TRUE(Write(broken).ok());
    EXPECT_THAT(Refusal(), HasSubstr(line));
  }
}

TEST_F(ChannelMomentsFileTest, RefusesTensorsOfOtherShapes) {
  const std::vector<float> zeros(65 * 64);
  const auto write = [&](int sum_rows, int product_rows, bool products, bool sinks = true) {
    GgufWriter writer;
    writer.Add("general.architecture", std::string_view("espalier-channel-moments"));
    writer.Add(kFingerprintKey, FingerprintOf(*model_));
    writer.Add("espalier.layers", int64_t{2});
    writer.Add("espalier.channels", int64_t{24});
    for (const char* layer : {"0", "1"}) {
      const std::string name = std::string("blk.") + layer + ".ffn_down.";
      writer.Add(std::string("espalier.tokens.") + layer, int64_t{0});
      writer.Add(std::string("espalier.sinks.") + layer, int64_t{0});
      const auto bytes = std::as_bytes(std::span(zeros));
      if (sinks) writer.AddTensor(name + "sinks", BlockType::kF32, 1, 24, bytes.first(4 * 24));
      writer.AddTensor(name + "sums", BlockType::kF32, sum_rows, 24,
                       bytes.first(4 * sum_rows * 24));
      if (!products) continue;
      writer.AddTensor(name + "products", BlockType::kF32, product_rows, 64,
                       bytes.first(4 * product_rows * 64));
    }
    ASSERT_TRUE(writer.Write(path_).ok());
  };
  write(2, 64, true);
  EXPECT_TRUE(ReadChannelMoments(path_, *model_).ok());
  write(1, 64, true);
  EXPECT_THAT(Refusal(), HasSubstr("tensor blk.0.ffn_down.sums: expected F32 [2, 24], got F32 [1"));
  write(2, 65, true);
  EXPECT_THAT(Refusal(), HasSubstr("ffn_down.products: expected F32 [64, 64], got F32 [65, 64]"));
  write(2, 64, false);
  EXPECT_THAT(Refusal(), HasSubstr("ffn_down.products: expected F32 [64, 64], got none"));
  write(2, 64, true, false);
  EXPECT_THAT(Refusal(), HasSubstr("ffn_down.sinks: expected F32 [1, 24], got none"));
  ASSERT_TRUE(Write(Gathered()).ok());
  std::filesystem::resize_file(path_, std::filesystem::file_size(path_) - 40);
  EXPECT_THAT(Refusal(), HasSubstr("channels.gguf"));
}

TEST_F(ChannelMomentsFileTest, NamesThePathThatCannotBeWritten) {
  const absl::Status status = WriteChannelMoments("/nowhere/channels.gguf", "x", Gathered());
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(status.message()), HasSubstr("/nowhere/channels.gguf"));
}

}  // namespace
}  // namespace espalier
