// Loading a model: faults named, memory counted, progress told.
#include "engine/model/model_executor.h"

#include <cmath>
#include <cstring>
#include <filesystem>
#include <functional>
#include <limits>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "engine/machine_memory.h"
#include "engine/model/decoder.h"
#include "engine/model/pruning_file.h"
#include "fmt/format.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"
#include "tests/support/model_writer.h"
#include "tests/support/test_data.h"

namespace espalier {
namespace {

using ::testing::HasSubstr;

class ModelExecutorTest : public ::testing::Test {
 protected:
  absl::StatusOr<std::unique_ptr<ModelExecutor>> Load(
      const GgufParts& parts, const ModelOptions& options,
      const ModelExecutor::Progress& progress = {}) {
    const auto file = ModelFile::Open(folder_.Write("model.gguf", parts.Bytes()));
    EXPECT_TRUE(file.ok()) << file.status();
    return ModelExecutor::Load(**file, backend_.get(), options, progress);
  }

  TemporaryFolder folder_;
  std::unique_ptr<Backend> backend_ = CreateCpuBackend({.threads = 1}).value();
};

TEST_F(ModelExecutorTest, NamesTheTensorWhoseValuesAreNotFinite) {
  for (const std::string name : {"blk.1.ffn_norm.weight", "blk.0.ffn_down.weight",
                                 "blk.0.attn_q.weight", "output_norm.weight"}) {
    for (const float fault : {std::numeric_limits<float>::infinity(), std::nanf("")}) {
      GgufParts parts = TinyGguf();
      std::memcpy(parts.tensor(name).data.data() + 4, &fault, sizeof(fault));
      const absl::Status status = Load(parts, {.kv_bytes = 1 << 20}).status();
      EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
      EXPECT_THAT(std::string(status.message()), HasSubstr("model.gguf: tensor " + name + ": "));
      EXPECT_THAT(std::string(status.message()), HasSubstr("expected finite values"));
    }
  }
}

TEST_F(ModelExecutorTest, ReadsNothingAfterTheFirstFault) {
  GgufParts parts = TinyGguf();
  const float fault = std::nanf("");
  std::memcpy(parts.tensor("blk.0.attn_norm.weight").data.data(), &fault, sizeof(fault));
  int loaded = 0;
  const absl::Status status = Load(parts, {.kv_bytes = 1 << 20}, [&](int done, int) {
                                return (loaded = done) > 0;
                              }).status();
  EXPECT_THAT(std::string(status.message()), HasSubstr("blk.0.attn_norm.weight"));
  EXPECT_EQ(loaded, 1) << "the embedding alone";
}

TEST_F(ModelExecutorTest, ReadsNothingMoreOnceItIsToldToStop) {
  int loaded = 0;
  const absl::Status status = Load(TinyGguf(), {.kv_bytes = 1 << 20}, [&](int done, int) {
                                return (loaded = done) < 3;
                              }).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kCancelled);
  EXPECT_THAT(std::string(status.message()), HasSubstr("model.gguf"));
  EXPECT_EQ(loaded, 3);
}

TEST_F(ModelExecutorTest, RefusesKvMemoryThatHoldsNoSequence) {
  const absl::Status status = Load(TinyGguf(), {.kv_bytes = 700}).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("KV memory of 700 bytes"));
}

TEST_F(ModelExecutorTest, RefusesAWorkspaceThatNoMachineHas) {
  const absl::Status status =
      Load(TinyGguf(), {.kv_bytes = 1 << 20, .max_batch_tokens = std::numeric_limits<int>::max()})
          .status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(status.message()), HasSubstr("steps of 2147483647 rows"));
}

TEST_F(ModelExecutorTest, KvTypeFollowsWeightsAndBiasUnlessSaid) {
  const auto backend = CreateCpuBackend({}).value();
  const auto type_of = [&](const std::string& name, ModelOptions options) {
    options.kv_bytes = 1 << 20;
    const auto file = ModelFile::Open(ESPALIER_GOLDEN_DATA "/" + name + ".gguf").value();
    return ModelExecutor::Load(*file, backend.get(), options).value()->kv_type();
  };
  EXPECT_EQ(type_of("tiny-llama", {}), KvType::kInt8);
  EXPECT_EQ(type_of("tiny-llama", {.weights = WeightPlan::kInt4}), KvType::kInt8);
  EXPECT_EQ(type_of("tiny-llama", {.weights = WeightPlan::kInt8}), KvType::kF16);
  EXPECT_EQ(type_of("tiny-llama", {.weights = WeightPlan::kBf16}), KvType::kF16);
  EXPECT_EQ(type_of("tiny-llama", {.weights = WeightPlan::kF32}), KvType::kF32);
  EXPECT_EQ(type_of("tiny-llama", {.weights = WeightPlan::kF32, .kv = KvType::kF16}), KvType::kF16);
  EXPECT_EQ(type_of("tiny-qwen2-quantized", {}), KvType::kF16) << "keys have a bias";
  EXPECT_EQ(type_of("tiny-qwen2-quantized", {.kv = KvType::kInt8}), KvType::kInt8);
  EXPECT_EQ(type_of("tiny-qwen3-quantized", {}), KvType::kInt8);
}

TEST_F(ModelExecutorTest, CountsPagesAndBytes) {
  // Keys and values of 16 tokens, one KV head of 8 in int8, and a scale for each.
  constexpr uint64_t kPageBytes = 2 * 16 * (8 + 4);
  const auto executor = Load(TinyGguf(), {.kv_bytes = 10 * kPageBytes + 7});
  ASSERT_TRUE(executor.ok()) << executor.status();
  const KvGeometry geometry = (*executor)->kv_geometry();
  EXPECT_EQ(geometry.layers, 2);
  EXPECT_EQ(geometry.pages, 10);
  EXPECT_EQ(geometry.page_tokens, 16);
  EXPECT_EQ(geometry.context, (*executor)->config().context);
  const Ledger ledger =
      (*executor)->ledger({.pages_total = 10, .pages_free = 6, .pages_used = 3, .pages_cached = 1});
  EXPECT_EQ(ledger.kv_free, 6 * kPageBytes);
  EXPECT_EQ(ledger.kv_used, 3 * kPageBytes);
  EXPECT_EQ(ledger.kv_reusable, kPageBytes);
  EXPECT_GT(ledger.weights, 0u);
  // 128 rows of 2 * (hidden 16 + heads and KV heads (2 + 1) * 8 + channels 24), 64 of 260 logits,
  // 8 samplers with 5 words a token, and the backend's own.
  EXPECT_EQ(ledger.workspace, (128u * 2 * (16 + 24 + 24) + 64u * 260 + 8u * 5 * 260) * 4 +
                                  backend_->workspace_bytes());
  EXPECT_EQ(ledger.foreign, 0u);
}

// Log-probabilities of a text's tokens: `before` of them computed at rung 0, the rest at `rung`,
// after `between`.
std::vector<float> Score(ModelExecutor* executor, std::vector<std::vector<int32_t>> tables,
                         int before, int rung,
                         const std::function<void(std::vector<std::vector<int32_t>>*)>& between) {
  constexpr int kTokens = 60;
  std::vector<int32_t> tokens(kTokens + 1);
  for (int i = 0; i <= kTokens; ++i) tokens[i] = 7 * i % 251;
  const SamplingParams sampling;
  std::vector<float> scores;
  StepResult result;
  const auto run = [&](int start, int rows, int at_rung) {
    Batch batch;
    batch.tokens.assign(tokens.begin() + start, tokens.begin() + start + rows);
    batch.spans.push_back(
        {.id = 1, .rows = rows, .start = start, .rung = at_rung, .page_tables = tables});
    batch.prefill_rows = rows;
    for (int row = 0; row < rows; ++row) {
      batch.logits.push_back({.row = row,
                              .use = LogitRow::Use::kScore,
                              .target = tokens[start + row + 1],
                              .sampling = &sampling,
                              .tokens = std::span(tokens).first(start + row + 1),
                              .prompt_tokens = start + row + 1});
    }
    EXPECT_TRUE(executor->Execute(batch, &result).ok());
    for (const TokenResult& token : result.tokens) scores.push_back(token.logprob);
  };
  run(0, before, 0);
  between(&tables);
  run(before, kTokens - before, rung);
  return scores;
}

// Pages of four bits are not far from what they were made of, wherever they come to lie, and what
// means are left out of keys is not seen.
TEST_F(ModelExecutorTest, PacksTheKAndVOfWhoRuns) {
  const auto file = ModelFile::Open(ESPALIER_GOLDEN_DATA "/tiny-llama.gguf");
  ASSERT_TRUE(file.ok()) << file.status();
  auto loaded = ModelExecutor::Load(**file, backend_.get(), {.kv_bytes = 1 << 20});
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  ModelExecutor* executor = loaded->get();
  const ModelConfig& config = executor->config();
  PruningData means;
  means.layers.resize(config.layers);
  for (PruningData::Layer& layer : means.layers) {
    for (int i = 0; i < config.kv_heads * config.head_dim; ++i) {
      layer.key_mean.push_back(i % 2 == 0 ? 0.1f : -0.05f);
    }
  }
  Ladder ladder = Ladder::DenseOnly(config.sites());
  Rung packed = ladder.rung(0);
  packed.int4_kv = true;
  ASSERT_TRUE(ladder.Append(packed));
  ASSERT_TRUE(executor->SetLadder(ladder, PruningDataSelector(config.sites(), &means)).ok());

  std::vector<std::vector<int32_t>> tables(config.layers);
  for (int layer = 0; layer < config.layers; ++layer) {
    for (int page = 0; page < 4; ++page) tables[layer].push_back(4 * layer + page);
  }
  constexpr int kBefore = 40;  // two pages and a half
  const std::vector<float> plain = Score(executor, tables, kBefore, 0, [](auto*) {});
  const std::vector<float> fewer = Score(executor, tables, kBefore, 1, [&](auto* tables) {
    std::vector<PagePacking> packings;
    for (int layer = 0; layer < config.layers; ++layer) {
      std::vector<int32_t>& table = (*tables)[layer];
      const int32_t other = 4 * config.layers + layer;
      packings.push_back({.layer = layer, .first = table[0], .second = table[1], .to = other});
      packings.push_back({.layer = layer, .first = table[2], .second = -1, .to = table[2]});
      table = {other, table[2]};
    }
    executor->PackPages(packings);
  });
  ASSERT_EQ(fewer.size(), plain.size());
  double far = 0, apart = 0;  // mean squares: of a token's two scores, of two tokens' scores
  for (size_t i = 0; i < plain.size(); ++i) {
    if (i < kBefore) {
      EXPECT_EQ(fewer[i], plain[i]) << i;
      continue;
    }
    far += std::pow(fewer[i] - plain[i], 2) / 20;
    for (size_t j = kBefore; j < plain.size(); ++j) {
      apart += std::pow(plain[j] - plain[i], 2) / (20 * 19);
    }
  }
  EXPECT_GT(far, 0);
  EXPECT_LT(far, 0.05 * apart);

  auto half =
      ModelExecutor::Load(**file, backend_.get(), {.kv = KvType::kF16, .kv_bytes = 1 << 20});
  ASSERT_TRUE(half.ok()) << half.status();
  const absl::Status refused = (*half)->SetLadder(ladder, StaticSelector(config.sites()));
  EXPECT_THAT(std::string(refused.message()), HasSubstr("rung 1: kv=int4 needs KV in int8"));
}

// A model whose rung 1 narrows all MLPs, layer 0's with a `down` and a bias of its own, and whose
// rung 2 drops layer 0's attention too and keeps fewer channels.
class ReleasedWeightsTest : public ModelExecutorTest {
 protected:
  void SetUp() override {
    std::filesystem::copy_file(ESPALIER_GOLDEN_DATA "/tiny-llama.gguf", path_);
    auto opened = ModelFile::Open(path_);
    ASSERT_TRUE(opened.ok()) << opened.status();
    file_ = *std::move(opened);
    executor_ = ModelExecutor::Load(*file_, backend_.get(), {.kv_bytes = 1 << 20}).value();
    const ModelConfig& config = executor_->config();
    ASSERT_GT(config.channels, 2 * kQuantGroup);
    data_.layers.resize(config.layers);
    for (PruningData::Layer& layer : data_.layers) {
      for (int i = 0; i < config.channels; ++i) {
        layer.ranking.push_back((5 * i + 3) % config.channels);
      }
      ASSERT_EQ(std::gcd(5, config.channels), 1);
    }
    RefittedDown& down = data_.layers[0].refits[2 * kQuantGroup];
    for (int i = 0; i < 2 * config.hidden; ++i) {
      FourBitGroup group{.scale = 0x2400, .minimum = 0x9c00};  // 2^-6, -2^-8
      for (int j = 0; j < kQuantGroup / 2; ++j) group.u[j] = static_cast<uint8_t>(37 * i + 11 * j);
      down.down.push_back(group);
    }
    down.bias.assign(config.hidden, 0.01f);
    Ladder ladder = Ladder::DenseOnly(config.sites());
    Rung rung = ladder.rung(0);
    const auto narrow = [&](SiteKind kind, int layer, int count) {
      rung.prefill.Keep(layer, kind, count);
      rung.decode.Keep(layer, kind, count);
    };
    for (int layer = 0; layer < config.layers; ++layer) {
      narrow(SiteKind::kChannels, layer, 2 * kQuantGroup);
    }
    ASSERT_TRUE(ladder.Append(rung));
    for (int layer = 0; layer < config.layers; ++layer) {
      narrow(SiteKind::kChannels, layer, kQuantGroup);
    }
    narrow(SiteKind::kHeads, 0, 0);
    ASSERT_TRUE(ladder.Append(rung));
    channels_ = std::make_shared<PruningDataSelector>(config.sites(), &data_);
    ASSERT_TRUE(executor_->SetLadder(ladder, *channels_).ok());
    for (int rung = 0; rung < 3; ++rung) whole_.push_back(At(rung));
    ASSERT_NE(whole_[0], whole_[1]);
    ASSERT_NE(whole_[1], whole_[2]);
    executor_->KeepSources({.model = file_, .channels = channels_, .files = file_->files()});
  }

  std::vector<float> At(int rung) {
    const ModelConfig& config = executor_->config();
    std::vector<std::vector<int32_t>> tables(config.layers);
    for (int layer = 0; layer < config.layers; ++layer) {
      for (int page = 0; page < 4; ++page) tables[layer].push_back(4 * layer + page);
    }
    if (rung == 2) tables[0].clear();
    return Score(executor_.get(), tables, 0, rung, [](auto*) {});
  }

  void Fit(RungSet served) {
    const auto fit = executor_->FitWeights(served, true);
    ASSERT_TRUE(fit.ok()) << fit.status();
    ASSERT_TRUE(fit->done);
  }

  const std::string path_ = folder_.path() + "/model.gguf";
  std::shared_ptr<const ModelFile> file_;
  std::unique_ptr<ModelExecutor> executor_;
  PruningData data_;
  std::shared_ptr<const ChannelSelector> channels_;
  std::vector<std::vector<float>> whole_;  // [rungs]: scores before any weight left
};

TEST_F(ReleasedWeightsTest, ComeBackToTheBit) {
  // Every set after every other.
  for (RungSet before = 1; before < 8; ++before) {
    for (RungSet served = 1; served < 8; ++served) {
      Fit(before);
      Fit(served);
      for (int rung = 0; rung < 3; ++rung) {
        if (!Has(served, rung)) continue;
        ASSERT_EQ(At(rung), whole_[rung]) << "rungs " << before << ", " << served << ": " << rung;
      }
    }
  }
}

TEST_F(ReleasedWeightsTest, ComeBackInPieces) {
  Fit(0b100);
  absl::StatusOr<WeightsFit> fit;
  do {
    fit = executor_->FitWeights(0b111, false);
    ASSERT_TRUE(fit.ok()) << fit.status();
    ASSERT_EQ(At(2), whole_[2]) << "what was served is served meanwhile";
  } while (!fit->done);
  for (int rung = 0; rung < 3; ++rung) EXPECT_EQ(At(rung), whole_[rung]);
}

TEST_F(ReleasedWeightsTest, AreNotRunOn) {
  Fit(0b110);
  EXPECT_DEATH(At(0), "runs at rung 0, whose weights are released");
}

TEST_F(ReleasedWeightsTest, AreLostWithTheirFile) {
  const KvGeometry geometry = executor_->kv_geometry();
  Fit(0b110);
  std::filesystem::resize_file(path_, std::filesystem::file_size(path_) / 2);
  EXPECT_EQ(At(1), whole_[1]) << "what is in memory is served";
  const auto fit = executor_->FitWeights(0b111, true);
  EXPECT_EQ(fit.status().code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(std::string(fit.status().message()), HasSubstr("has changed since it was opened"));
  EXPECT_EQ(geometry.pages, executor_->kv_geometry().pages);
}

TEST_F(ReleasedWeightsTest, StayWhereTheFileHasChangedAlready) {
  std::filesystem::resize_file(path_, std::filesystem::file_size(path_) - 1);
  Fit(0b001);
  EXPECT_EQ(executor_->ReleasablePages(0b001), 0);
  for (int rung = 0; rung < 3; ++rung) EXPECT_EQ(At(rung), whole_[rung]);
}

TEST_F(ReleasedWeightsTest, OtherValuesAreNotTakenForThem) {
  Fit(0b110);
  // The refit's: in memory here, so no file tells that it changed.
  Fit(0b001);
  data_.layers[0].refits[2 * kQuantGroup].down[5].u[3] ^= 1;
  const auto fit = executor_->FitWeights(0b011, true);
  EXPECT_EQ(fit.status().code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(std::string(fit.status().message()), HasSubstr("`down` of layer 0 for 64 channels"));
}

// Of the real model: bytes that leave resident memory, and come back.
TEST(ReleasedWeights, LeaveResidentMemory) {
  ESPALIER_PATH_OR_SKIP(model, "ESPALIER_MODEL");
  const std::string path = std::string(ESPALIER_GOLDEN_DATA) +
                           "/../../../deploy/ladders/SmolLM2-135M-Instruct.Q4_1.ladder";
  if (!model.ends_with("SmolLM2-135M-Instruct.Q4_1.gguf")) GTEST_SKIP() << "of another model";
  const std::unique_ptr<Backend> backend = CreateCpuBackend({}).value();
  const std::shared_ptr<const ModelFile> file = ModelFile::Open(model).value();
  const auto executor = ModelExecutor::Load(*file, backend.get(), {.kv_bytes = 4 << 20}).value();
  CalibratedLadder ladder = OpenLadder(path, *file).value();
  std::vector<const MappedFile*> files = file->files();
  files.insert(files.end(), ladder.files.begin(), ladder.files.end());
  ASSERT_TRUE(executor->SetLadder(std::move(ladder.ladder), *ladder.channels).ok());
  executor->KeepSources({.model = file, .channels = ladder.channels, .files = files});
  const RungSet all = UpTo(executor->ladder().size() - 1);
  const uint64_t whole = executor->ledger({}).weights;
  for (const RungSet served : {RungSet{0b11}, all & ~RungSet{0b111}, RungSet{1} << 8, all}) {
    const uint64_t before = ResidentMemoryBytes(), had = executor->ledger({}).weights_released;
    const auto fit = executor->FitWeights(served, true);
    ASSERT_TRUE(fit.ok()) << fit.status();
    const Ledger ledger = executor->ledger({});
    EXPECT_EQ(ledger.weights + ledger.weights_released, whole);
    const double freed = static_cast<double>(before) - static_cast<double>(ResidentMemoryBytes());
    const double planned = static_cast<double>(ledger.weights_released) - static_cast<double>(had);
    fmt::print("rungs {:09b}: weights {:.1f} MB, {:.1f} released; {:.1f} MB freed, {:.0f} ms\n",
               served, static_cast<double>(ledger.weights) / 1e6,
               static_cast<double>(ledger.weights_released) / 1e6, freed / 1e6, 1e3 * fit->seconds);
    EXPECT_NEAR(freed, planned, 3e6);
  }
  EXPECT_EQ(executor->ledger({}).weights_released, 0u);
}

// Told in the order in which rows come to them; a layer that is told of has the same bits as one
// that is not, and what is replaced meanwhile is what the rows meet.
TEST_F(ModelExecutorTest, WeightsAreReplacedBeforeRowsMeetThem) {
  for (const WeightPlan plan :
       {WeightPlan::kF32, WeightPlan::kBf16, WeightPlan::kInt8, WeightPlan::kInt4}) {
    SCOPED_TRACE(WeightPlanName(plan));
    const auto executor = Load(TinyGguf(), {.weights = plan, .kv_bytes = 1 << 20}).value();
    const ModelConfig& config = executor->config();
    constexpr int kRows = 5;
    Batch batch;
    batch.tokens.assign(kRows, 0);
    batch.prefill_rows = kRows;
    const std::vector<std::vector<int32_t>> table = {{0}, {1}};
    ASSERT_EQ(config.layers, 2);
    batch.spans.push_back({.id = 1, .rows = kRows, .page_tables = table});
    std::vector<float> before(kRows * config.hidden);
    for (size_t i = 0; i < before.size(); ++i) before[i] = std::sin(static_cast<float>(7 * i + 1));
    const auto run = [&] {
      std::vector<float> rows = before;
      EXPECT_TRUE(executor->ExecuteLayer(batch, 1, Matrix(rows.data(), kRows, config.hidden)).ok());
      return rows;
    };
    const std::vector<float> plain = run();
    std::vector<MatrixInput> told;
    executor->set_before_weights([&](int layer, MatrixInput input, ConstMatrix rows) {
      EXPECT_EQ(layer, 1);
      EXPECT_EQ(rows.rows, kRows);
      told.push_back(input);
    });
    EXPECT_EQ(run(), plain);
    using enum MatrixInput;
    EXPECT_THAT(told, ::testing::ElementsAre(kQkv, kO, kGateUp, kDown));

    const uint64_t bytes = executor->ledger({}).weights;
    const std::vector<float> zeros(config.hidden * std::max(config.hidden, config.channels));
    executor->set_before_weights([&](int layer, MatrixInput input, ConstMatrix rows) {
      const bool o = input == kO, down = input == kDown;
      if (!o && !down) return;
      EXPECT_TRUE(executor
                      ->ReplaceWeight(layer, o ? "attn_output" : "ffn_down",
                                      ConstMatrix(zeros.data(), config.hidden, rows.cols))
                      .ok());
    });
    EXPECT_EQ(run(), before) << "neither block adds anything";
    EXPECT_EQ(executor->ledger({}).weights, bytes);
  }
}

TEST_F(ModelExecutorTest, TellsEachWeightOnceUntilAllAreLoaded) {
  std::vector<std::pair<int, int>> told;
  const auto executor = Load(TinyGguf(), {.kv_bytes = 1 << 20}, [&](int done, int total) {
    told.emplace_back(done, total);
    return true;
  });
  ASSERT_TRUE(executor.ok()) << executor.status();
  ASSERT_EQ(told.size(), 2u + 2 * 9);  // embedding and final norm, nine a layer, a tied head
  for (size_t i = 0; i < told.size(); ++i) {
    EXPECT_EQ(told[i], std::pair(static_cast<int>(i) + 1, 20));
  }
}

}  // namespace
}  // namespace espalier
