// What a request is answered does not depend on whether its prefix was found computed: the same
// traffic with the prefix cache and without gives the same tokens and bit-equal log-probabilities.
#include <algorithm>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "engine/model/model_executor.h"
#include "fmt/format.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"
#include "tests/support/test_data.h"

namespace espalier {
namespace {

struct Case {
  const char* model;
  Isa isa;
  WeightPlan weights;
  KvType kv;
};

std::string CaseName(const testing::TestParamInfo<Case>& info) {
  const Case& c = info.param;
  std::string name = fmt::format("{}_{}_{}_kv_{}", c.model, IsaName(c.isa),
                                 c.weights == WeightPlan::kF32 ? "fp32" : "int8", KvTypeName(c.kv));
  std::ranges::replace(name, '-', '_');
  return name;
}

std::vector<Case> AllCases() {
  std::vector<Case> cases;
  for (const char* model : {"tiny-llama", "tiny-qwen3-quantized"}) {
    for (const Isa isa : SupportedIsas()) {
      cases.push_back({model, isa, WeightPlan::kF32, KvType::kF32});
      cases.push_back({model, isa, WeightPlan::kInt8, KvType::kF16});
      cases.push_back({model, isa, WeightPlan::kInt8, KvType::kInt8});
    }
  }
  return cases;
}

struct Answer {
  std::vector<int32_t> tokens;
  std::vector<float> logprobs;  // of the prompt where asked for, then of the tokens
  int cached_tokens = 0;
};

class Server {
 public:
  Server(const std::string& path, const Case& c, bool prefix_cache, int kv_tokens) {
    backend_ = CreateCpuBackend({.isa = c.isa}).value();
    const auto file = ModelFile::Open(path).value();
    const ModelConfig& config = file->config();
    const KvPoolShape shape{.type = c.kv, .kv_heads = config.kv_heads, .head_dim = config.head_dim};
    executor_ = ModelExecutor::Load(
                    *file, backend_.get(),
                    {.weights = c.weights,
                     .kv = c.kv,
                     .kv_bytes = shape.page_bytes() * config.layers * (kv_tokens / kPageTokens),
                     .max_batch_tokens = 48})
                    .value();
    engine_ = std::make_unique<Engine>(SchedulerOptions{.max_batch_tokens = 48,
                                                        .max_sequences = 12,
                                                        .reserve_output = 0,
                                                        .prefix_cache = prefix_cache},
                                       executor_->kv_geometry(), executor_->ladder(),
                                       executor_.get(), &policy_);
  }

  int vocabulary() const { return executor_->config().vocabulary; }
  SchedulerStats stats() const { return engine_->scheduler().stats(); }

  // Runs `requests` to their end, cancelling every seventh after some steps.
  std::map<RequestId, Answer> Run(const std::vector<Request>& requests) {
    std::map<RequestId, Answer> answers;
    for (const Request& request : requests) {
      EXPECT_EQ(engine_->Submit(request), absl::OkStatus());
    }
    for (int step = 1; !engine_->idle(); ++step) {
      const auto report = engine_->Step(Instant(step));
      EXPECT_TRUE(report.ok()) << report.status();
      for (const SequenceOutput& output : (*report)->outputs) {
        Answer& answer = answers[output.id];
        answer.cached_tokens = output.cached_tokens;
        for (const TokenResult& score : output.prompt_scores) {
          answer.logprobs.push_back(score.logprob);
        }
        for (const TokenResult& token : output.tokens) {
          answer.tokens.push_back(token.token);
          answer.logprobs.push_back(token.logprob);
        }
      }
      engine_->scheduler().CheckInvariants();
      if (step % 5 == 0 && engine_->Cancel(step / 5 * 7)) answers.erase(step / 5 * 7);
    }
    return answers;
  }

 private:
  FixedPolicy policy_{0};
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<ModelExecutor> executor_;
  std::unique_ptr<Engine> engine_;
};

std::vector<int32_t> Text(int count, int vocabulary, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<int32_t> ids(count);
  for (int32_t& id : ids) id = static_cast<int32_t>(random() % vocabulary);
  return ids;
}

// One of three system prompts of 40 to 72 tokens and up to 19 of its own.
Request MakeRequest(RequestId id, int vocabulary) {
  Request request{.id = id, .prompt = Text(40 + 16 * (id % 3), vocabulary, 1 + id % 3)};
  const std::vector<int32_t> own = Text(id % 20, vocabulary, 100 + id);
  request.prompt.insert(request.prompt.end(), own.begin(), own.end());
  request.sampling = {.temperature = id % 2 == 0 ? 0.0f : 0.9f, .seed = id, .top_logprobs = 0};
  request.stop.max_tokens = 24;
  request.prompt_logprobs = id % 11 == 0;
  return request;
}

class PrefixReuseTest : public testing::TestWithParam<Case> {};

void ExpectTheSameAnswers(const std::string& path, const Case& c, int count) {
  // Room for two or three sequences beside what they share: preemptions and evictions.
  constexpr int kKvTokens = 288;
  Server with(path, c, true, kKvTokens), without(path, c, false, kKvTokens);
  std::vector<Request> requests;
  for (RequestId id = 1; id <= static_cast<RequestId>(count); ++id) {
    requests.push_back(MakeRequest(id, with.vocabulary()));
  }
  int found = 0;
  for (int turn = 0; turn < 2; ++turn) {
    std::map<RequestId, Answer> answers = with.Run(requests);
    const std::map<RequestId, Answer> expected = without.Run(requests);
    for (Request& request : requests) {
      // How far a cancelled one gets is a matter of steps.
      if (!answers.contains(request.id) || !expected.contains(request.id)) continue;
      const Answer& answer = answers.at(request.id);
      EXPECT_EQ(answer.tokens, expected.at(request.id).tokens) << "request " << request.id;
      EXPECT_EQ(answer.logprobs, expected.at(request.id).logprobs) << "request " << request.id;
      EXPECT_EQ(expected.at(request.id).cached_tokens, 0);
      found += answer.cached_tokens;
      // The next turn of the chat.
      request.prompt.insert(request.prompt.end(), answer.tokens.begin(), answer.tokens.end());
      request.prompt.push_back(1);
    }
  }
  EXPECT_GT(found, 16 * count);
  EXPECT_GT(with.stats().preemptions, 0u);
  EXPECT_GT(with.stats().prefix_evicted_pages, 0u);
  EXPECT_EQ(without.stats().prefix_hits, 0u);
}

TEST_P(PrefixReuseTest, TheSameTokensWithAndWithout) {
  const std::string tiny =
      fmt::format("{}/tests/golden/data/{}.gguf", ESPALIER_SOURCE_DIR, GetParam().model);
  ExpectTheSameAnswers(tiny, GetParam(), 36);
}

INSTANTIATE_TEST_SUITE_P(Paths, PrefixReuseTest, testing::ValuesIn(AllCases()), CaseName);

TEST(PrefixReuseOfTheRealModel, TheSameTokensWithAndWithout) {
  const std::string real = PathFromEnvironment("ESPALIER_MODEL");
  if (real.empty()) GTEST_SKIP() << "ESPALIER_MODEL is not set";
  ExpectTheSameAnswers(real, {"real", SupportedIsas().back(), WeightPlan::kAuto, KvType::kInt8}, 8);
}

}  // namespace
}  // namespace espalier
