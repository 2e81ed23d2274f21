// A row's result does not depend on its neighbours: alone, in a crowd of 32, in chunks, on one
// thread or two, the same request gives bit-equal logits and the same tokens. And a keep profile
// gives what a model without the dropped rows would give.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "engine/model/model_executor.h"
#include "engine/model/sampler.h"
#include "fmt/format.h"
#include "gtest/gtest.h"
#include "tests/engine/model/forward_harness.h"
#include "tests/support/test_data.h"

namespace espalier {
namespace {

// One of each architecture.
constexpr const char* kTinyModels[] = {"tiny-llama", "tiny-qwen2-quantized",
                                       "tiny-qwen3-quantized"};

std::vector<int32_t> RandomIds(int count, int vocabulary, uint64_t seed) {
  std::vector<int32_t> ids(count);
  for (int i = 0; i < count; ++i) {
    ids[i] = static_cast<int32_t>(UniformAt(seed, i) * vocabulary);
  }
  return ids;
}

bool BitEqual(std::span<const float> a, std::span<const float> b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size_bytes()) == 0;
}

struct Path {
  const char* model;
  Isa isa;
  WeightPlan weights;

  std::string file() const {
    return fmt::format("{}/tests/golden/data/{}.gguf", ESPALIER_SOURCE_DIR, model);
  }
};

std::vector<Path> AllPaths() {
  std::vector<Path> paths;
  for (const char* model : kTinyModels) {
    for (Isa isa : SupportedIsas()) {
      for (WeightPlan weights :
           {WeightPlan::kF32, WeightPlan::kBf16, WeightPlan::kInt8, WeightPlan::kInt4})
        paths.push_back({model, isa, weights});
    }
  }
  return paths;
}

std::string PathName(const Path& path) {
  const std::string_view architecture = std::string_view(path.model).substr(5, 5);
  return fmt::format("{}_{}_{}", architecture, IsaName(path.isa), WeightPlanName(path.weights));
}

KvType KvOf(const Path& path) { return DefaultKvType(path.weights, false); }

class IndependenceTest : public ::testing::TestWithParam<Path> {
 protected:
  // The real model if it is at hand, for its widths; a tiny one always. bf16 goes f32's ways.
  static std::vector<std::string> Models() {
    std::vector<std::string> models = {GetParam().file()};
    const std::string real = PathFromEnvironment("ESPALIER_MODEL");
    if (!real.empty() && GetParam().model == kTinyModels[0] &&
        GetParam().isa == SupportedIsas().back() && GetParam().weights != WeightPlan::kBf16) {
      models.push_back(real);
    }
    return models;
  }
};

TEST_P(IndependenceTest, LogitsAreBitEqualAloneChunkedAndInACrowd) {
  constexpr int kCrowd = 32;
  for (const std::string& path : Models()) {
    ForwardHarness model(path, {.isa = GetParam().isa,
                                .weights = GetParam().weights,
                                .kv = KvOf(GetParam()),
                                .max_rows = 768,
                                .sequences = kCrowd});
    const int vocabulary = model.file().config().vocabulary;
    const std::vector<int32_t> ids = RandomIds(41, vocabulary, 1);
    const std::vector<float> alone = model.Logits(ids);
    EXPECT_TRUE(BitEqual(alone, model.Logits(ids, 1))) << "token by token";
    EXPECT_TRUE(BitEqual(alone, model.Logits(ids, 7))) << "in chunks of 7";

    // The sequence sits at place 20 of 32 mates of other lengths, prefilled in two steps and then
    // decoded, so that its rows meet prefill and decode rows.
    std::vector<std::vector<int32_t>> mates;
    for (int i = 0; i < kCrowd; ++i) {
      mates.push_back(i == 20 ? ids : RandomIds(5 + (i * 7) % 17, vocabulary, 100 + i));
    }
    std::vector<float> crowded;
    int at = 0;  // rows of `ids` done
    for (int size : {13, 11, 1, 1, 1, 14}) {
      std::vector<ForwardHarness::Chunk> chunks;
      int row = 0, mine = -1;
      for (int i = 0; i < kCrowd; ++i) {
        const std::span<const int32_t> all(mates[i]);
        if (i == 20) {
          mine = row;
          chunks.push_back({.sequence = i, .start = at, .ids = all.subspan(at, size)});
        } else {
          chunks.push_back({.sequence = i, .start = 0, .ids = all});
        }
        row += static_cast<int>(chunks.back().ids.size());
      }
      const std::vector<float> logits = model.Step(chunks);
      crowded.insert(crowded.end(), logits.begin() + static_cast<int64_t>(mine) * vocabulary,
                     logits.begin() + static_cast<int64_t>(mine + size) * vocabulary);
      at += size;
    }
    EXPECT_TRUE(BitEqual(alone, crowded)) << path;
  }
}

TEST_P(IndependenceTest, LogitsAreBitEqualOnOneThreadAndTwo) {
  const ForwardHarness::Options options{.isa = GetParam().isa,
                                        .weights = GetParam().weights,
                                        .kv = KvOf(GetParam()),
                                        .max_rows = 64,
                                        .threads = 1};
  ForwardHarness::Options two = options;
  two.threads = 2;
  ForwardHarness one_thread(GetParam().file(), options), two_threads(GetParam().file(), two);
  const std::vector<int32_t> ids = RandomIds(40, one_thread.file().config().vocabulary, 2);
  EXPECT_TRUE(BitEqual(one_thread.Logits(ids), two_threads.Logits(ids)));
}

// The same counts in every layer.
KeepProfile Uniform(const ModelConfig& config, int heads, int channels) {
  KeepProfile keep = KeepProfile::Dense(config.sites());
  for (int layer = 0; layer < config.layers; ++layer) {
    keep.Keep(layer, SiteKind::kHeads, heads);
    keep.Keep(layer, SiteKind::kChannels, channels);
  }
  return keep;
}

// A third of the channels left out, then also the attention of a layer and heads of the others, and
// then, where K and V are int8, half of their bits.
Ladder TestLadder(const ModelConfig& config, KvType kv) {
  Ladder ladder = Ladder::DenseOnly(config.sites());
  KeepProfile keep = Uniform(config, config.heads, config.channels * 2 / 3 / 32 * 32);
  EXPECT_TRUE(ladder.Append({.prefill = keep, .decode = keep}));
  for (int layer = 0; layer < config.layers; ++layer) {
    keep.Keep(layer, SiteKind::kHeads, layer == 1 ? 0 : config.heads - 1);
  }
  EXPECT_TRUE(ladder.Append({.prefill = keep, .decode = keep}));
  if (kv != KvType::kInt8) return ladder;
  keep.Keep(0, SiteKind::kChannels, 32);
  EXPECT_TRUE(ladder.Append({.prefill = keep, .decode = keep, .price = {}, .int4_kv = true}));
  return ladder;
}

// Runs requests through the engine as served and returns the tokens and told log-probabilities.
class Served {
 public:
  explicit Served(const Path& path, int kv_pages_tokens = 0, bool ladder = false)
      : policy_(ladder ? kMostRungs : 0) {
    backend_ = CreateCpuBackend({.isa = path.isa}).value();
    const auto file = ModelFile::Open(path.file()).value();
    const ModelConfig& config = file->config();
    ModelOptions options{.weights = path.weights, .kv = KvOf(path), .max_batch_tokens = 48};
    if (kv_pages_tokens > 0) {
      options.kv_bytes =
          KvPoolShape{.type = KvOf(path), .kv_heads = config.kv_heads, .head_dim = config.head_dim}
              .page_bytes() *
          config.layers * (kv_pages_tokens / kPageTokens);
    }
    executor_ = ModelExecutor::Load(*file, backend_.get(), options).value();
    if (ladder) {
      const absl::Status status =
          executor_->SetLadder(TestLadder(config, KvOf(path)), StaticSelector(config.sites()));
      EXPECT_TRUE(status.ok()) << status;
    }
    engine_ = std::make_unique<Engine>(
        SchedulerOptions{.max_batch_tokens = 48, .max_sequences = 40, .reserve_output = 0},
        executor_->kv_geometry(), executor_->ladder(), executor_.get(), &policy_);
  }

  static Request MakeRequest(RequestId id, int vocabulary) {
    Request request{.id = id, .prompt = RandomIds(9 + id % 23, vocabulary, 500 + id)};
    request.sampling = {.temperature = id % 3 == 0 ? 0.0f : 0.8f,
                        .top_p = id % 2 == 0 ? 0.9f : 1.0f,
                        .repetition_penalty = id % 5 == 0 ? 1.2f : 1.0f,
                        .seed = id,
                        .top_logprobs = 5};
    request.stop.max_tokens = 40;
    return request;
  }

  struct Answer {
    std::vector<int32_t> tokens;
    std::vector<float> logprobs;  // of the token, then of its five rivals
    int preemptions = 0;
    int rung = 0;

    bool operator==(const Answer& other) const {
      return tokens == other.tokens && BitEqual(logprobs, other.logprobs);
    }
  };

  std::vector<Answer> Run(std::span<const RequestId> ids) {
    std::vector<Answer> answers(ids.size());
    for (RequestId id : ids) {
      Request request = MakeRequest(id, executor_->config().vocabulary);
      const Ladder& ladder = executor_->ladder();
      const int rung = static_cast<int>(id) % ladder.size();
      request.bounds.max_prune_ratio = ladder.rung(rung).prefill.prune_ratio();
      const absl::Status status = engine_->Submit(std::move(request));
      EXPECT_TRUE(status.ok()) << status;
    }
    for (int step = 0; !engine_->idle(); ++step) {
      const auto report = engine_->Step(Instant(step));
      EXPECT_TRUE(report.ok()) << report.status();
      for (const SequenceOutput& output : (*report)->outputs) {
        Answer& answer = answers[std::find(ids.begin(), ids.end(), output.id) - ids.begin()];
        for (const TokenResult& token : output.tokens) {
          answer.tokens.push_back(token.token);
          answer.logprobs.push_back(token.logprob);
          for (const auto& [rival, logprob] : token.top) answer.logprobs.push_back(logprob);
        }
        answer.preemptions = std::max(answer.preemptions, output.preemptions);
        answer.rung = output.rung;
      }
      engine_->scheduler().CheckInvariants();
      if (step > 20000) {
        ADD_FAILURE() << "no end";
        break;
      }
    }
    return answers;
  }

 private:
  FixedPolicy policy_;
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<ModelExecutor> executor_;
  std::unique_ptr<Engine> engine_;
};

TEST_P(IndependenceTest, ServedTokensAreTheSameAloneInACrowdAndAfterPreemption) {
  std::vector<RequestId> everyone(32);
  std::iota(everyone.begin(), everyone.end(), 1);
  const std::vector<Served::Answer> crowd = Served(GetParam()).Run(everyone);
  Served alone(GetParam());
  for (RequestId id : {1, 2, 15, 30}) {
    const std::vector<RequestId> only = {id};
    EXPECT_EQ(alone.Run(only)[0], crowd[id - 1]) << "request " << id;
    EXPECT_EQ(crowd[id - 1].tokens.size(), 40u);
  }
  // A pool that holds about three of the thirty-two: most are preempted and recomputed.
  const std::vector<Served::Answer> squeezed = Served(GetParam(), 208).Run(everyone);
  int preemptions = 0;
  for (size_t i = 0; i < everyone.size(); ++i) {
    EXPECT_EQ(squeezed[i], crowd[i]) << "request " << everyone[i];
    preemptions += squeezed[i].preemptions;
  }
  EXPECT_GT(preemptions, 0) << "the pool was meant to be too small";
}

TEST_P(IndependenceTest, EveryRequestHasTheTokensOfItsRungWhateverTheOthersAre) {
  std::vector<RequestId> everyone(24);
  std::iota(everyone.begin(), everyone.end(), 1);
  const std::vector<Served::Answer> crowd = Served(GetParam(), 0, true).Run(everyone);
  const std::vector<Served::Answer> dense = Served(GetParam()).Run(everyone);
  const std::vector<Served::Answer> squeezed = Served(GetParam(), 208, true).Run(everyone);
  Served alone(GetParam(), 0, true);
  const int rungs = KvOf(GetParam()) == KvType::kInt8 ? 4 : 3;
  int changed = 0, preemptions = 0;
  for (size_t i = 0; i < everyone.size(); ++i) {
    const RequestId id = everyone[i];
    EXPECT_EQ(crowd[i].rung, static_cast<int>(id % rungs)) << "request " << id;
    EXPECT_EQ(squeezed[i], crowd[i]) << "request " << id;
    preemptions += squeezed[i].preemptions;
    EXPECT_TRUE(id % rungs != 0 || crowd[i] == dense[i]) << "request " << id;
    changed += !(crowd[i] == dense[i]);
    if (i >= 6) continue;
    EXPECT_EQ(alone.Run(std::span(everyone).subspan(i, 1))[0], crowd[i]) << "request " << id;
  }
  EXPECT_EQ(changed, 24 - 24 / rungs) << "pruning was meant to show";
  EXPECT_GT(preemptions, 0) << "the pool was meant to be too small";
}

Ladder DenseAnd(const ModelConfig& config, const KeepProfile& keep) {
  Ladder ladder = Ladder::DenseOnly(config.sites());
  EXPECT_TRUE(ladder.Append({.prefill = keep, .decode = keep}));
  return ladder;
}

std::vector<int32_t> Shuffled(int n, uint64_t seed) {
  std::vector<int32_t> ranking(n);
  std::iota(ranking.begin(), ranking.end(), 0);
  for (int i = n - 1; i > 0; --i) {
    std::swap(ranking[i], ranking[static_cast<int>(UniformAt(seed, i) * (i + 1))]);
  }
  return ranking;
}

TEST_P(IndependenceTest, AKeepProfileDependsOnTheKeptRowsOnly) {
  ForwardHarness model(GetParam().file(), {.isa = GetParam().isa,
                                           .weights = GetParam().weights,
                                           .kv = KvOf(GetParam()),
                                           .max_rows = 64});
  const ModelConfig& config = model.file().config();
  const std::vector<int32_t> ids = RandomIds(20, config.vocabulary, 3);
  const std::vector<float> dense = model.Logits(ids);

  const int kept = config.channels / 64 * 32;
  ASSERT_GT(kept, 0);
  std::vector<int32_t> channels(config.channels), heads(config.heads);
  std::iota(channels.begin(), channels.end(), 0);
  std::iota(heads.begin(), heads.end(), 0);
  const auto logits = [&] {
    for (int layer = 0; layer < config.layers; ++layer) {
      EXPECT_TRUE(model.selector().SetRanking(layer, SiteKind::kChannels, channels));
      EXPECT_TRUE(model.selector().SetRanking(layer, SiteKind::kHeads, heads));
    }
    model.SetLadder(DenseAnd(config, Uniform(config, config.heads - 1, kept)));
    EXPECT_TRUE(BitEqual(dense, model.Logits(ids))) << "rung 0 beside panels";
    return model.Logits(ids, 1024, 1);
  };
  const std::vector<float> pruned = logits();
  EXPECT_FALSE(BitEqual(dense, pruned));

  std::reverse(channels.begin() + kept, channels.end());  // among the dropped: no difference at all
  EXPECT_TRUE(BitEqual(pruned, logits()));

  std::reverse(channels.begin(), channels.begin() + kept);  // among the kept: another summing order
  std::swap(heads[0], heads[config.heads - 2]);
  const std::vector<float> reordered = logits();
  double moved = 0, pruning = 0;
  for (size_t i = 0; i < pruned.size(); ++i) {
    moved = std::max<double>(moved, std::abs(reordered[i] - pruned[i]));
    pruning = std::max<double>(pruning, std::abs(dense[i] - pruned[i]));
  }
  EXPECT_LT(moved, GetParam().weights == WeightPlan::kF32 ? 1e-3 : 0.5 * pruning);
}

TEST_P(IndependenceTest, RowsOfAStaircaseAreAsAlone) {
  ForwardHarness model(GetParam().file(), {.isa = GetParam().isa,
                                           .weights = GetParam().weights,
                                           .kv = KvOf(GetParam()),
                                           .max_rows = 256,
                                           .sequences = 6});
  const ModelConfig& config = model.file().config();
  uint64_t at_draw = 0;
  const auto draw = [&](int least, int most) {
    return least + static_cast<int>(UniformAt(11, at_draw++) * (most - least + 1));
  };
  // Random nested rungs, of which some drop blocks, others only heads or channels of some layers.
  Ladder ladder = Ladder::DenseOnly(config.sites());
  while (ladder.size() < 5) {
    Rung rung = ladder.rung(ladder.size() - 1);
    for (KeepProfile* keep : {&rung.prefill, &rung.decode}) {
      for (int layer = 0; layer < config.layers; ++layer) {
        if (draw(0, 2) == 0) continue;
        keep->Keep(layer, SiteKind::kHeads, draw(0, keep->kept(layer, SiteKind::kHeads)));
        const int channels = keep->kept(layer, SiteKind::kChannels);
        keep->Keep(layer, SiteKind::kChannels, draw(0, channels / 32) * 32);
      }
    }
    ASSERT_TRUE(ladder.Append(rung));
  }
  for (int layer = 0; layer < config.layers; ++layer) {
    model.selector().SetRanking(layer, SiteKind::kHeads, Shuffled(config.heads, layer));
    model.selector().SetRanking(layer, SiteKind::kChannels, Shuffled(config.channels, 50 + layer));
  }
  model.SetLadder(ladder);

  const std::vector<int32_t> ids = RandomIds(60, config.vocabulary, 3);
  const auto step_of = [&](int sequence, int turn) {
    const int start = turn == 0 ? 0 : 15 + 7 * sequence;
    return ForwardHarness::Chunk{
        .sequence = sequence,
        .start = start,
        .ids = std::span(ids).subspan(start, turn == 0 ? 15 + 7 * sequence : sequence % 2 * 3 + 1),
        .rung = std::min(4, sequence),
        .decode = turn == 1 && sequence % 2 == 0};
  };
  std::vector<std::vector<float>> crowd;  // of each turn
  for (const int turn : {0, 1}) {
    std::vector<ForwardHarness::Chunk> chunks;
    for (int sequence = 0; sequence < 6; ++sequence) chunks.push_back(step_of(sequence, turn));
    crowd.push_back(model.Step(chunks));
  }
  std::vector<size_t> at(2);
  for (int sequence = 0; sequence < 6; ++sequence) {
    for (const int turn : {0, 1}) {
      const ForwardHarness::Chunk alone = step_of(sequence, turn);
      const std::vector<float> want = model.Step({&alone, 1});
      EXPECT_TRUE(BitEqual(std::span(crowd[turn]).subspan(at[turn], want.size()), want))
          << "sequence " << sequence << ", turn " << turn;
      at[turn] += want.size();
    }
  }
}

TEST_P(IndependenceTest, WithoutBlocksARowIsItsTokenAndNothingElse) {
  ForwardHarness model(GetParam().file(), {.isa = GetParam().isa, .weights = GetParam().weights});
  const ModelConfig& config = model.file().config();
  model.SetLadder(DenseAnd(config, Uniform(config, 0, 0)));
  const std::vector<int32_t> ids = RandomIds(6, config.vocabulary, 3);
  const std::vector<float> together = model.Logits(ids, 1024, 1);
  const std::vector<float> lone = model.Logits(std::span(ids).subspan(4, 1), 1024, 1);
  EXPECT_TRUE(BitEqual(
      std::span(together).subspan(size_t{4} * config.vocabulary, config.vocabulary), lone));
}

TEST_P(IndependenceTest, PanelsNeedWholeGroups) {
  ForwardHarness model(GetParam().file(), {.isa = GetParam().isa, .weights = GetParam().weights});
  const ModelConfig& config = model.file().config();
  const absl::Status status = model.decoder().MakePanels(
      DenseAnd(config, Uniform(config, config.heads, 33)), model.selector());
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(status.message().substr(0, 35), "rung 1, layer 0: keeps 33 channels;");
}

INSTANTIATE_TEST_SUITE_P(Paths, IndependenceTest, ::testing::ValuesIn(AllPaths()),
                         [](const auto& info) { return PathName(info.param); });

}  // namespace
}  // namespace espalier
