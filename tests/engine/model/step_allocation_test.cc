// Whole steps allocate nothing once warm: scheduling, forward pass, sampling, telling tokens.
//
// What may: Submit, which takes a request over, the step that admits one, which makes its page
// tables, the step after which there are fewer pages, which moves some, and log-probabilities of
// more tokens than the drawn one.
#include <string>
#include <tuple>
#include <vector>

#include "engine/engine.h"
#include "engine/model/model_executor.h"
#include "fmt/format.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"
#include "server/token_stream.h"
#include "tests/support/allocations.h"

namespace espalier {
namespace {

using Case = std::tuple<const char*, WeightPlan, KvType, Isa>;

class StepAllocationTest : public ::testing::TestWithParam<Case> {
 protected:
  // `squeezed`: there may be fewer pages, in every step, than those who were accepted need.
  void Serve(ModelExecutor* executor, bool prefix_cache, bool squeezed = false);
};

constexpr int kRequests = 6;

// Prompts of several chunks, which prefill beside decoding ones; every way of drawing.
Request MakeRequest(int i, RequestId id) {
  Request request{.id = id, .prompt = std::vector<int32_t>(5 + 9 * i, 3 + i)};
  request.stop.max_tokens = 24 + 3 * i;
  request.stop.min_tokens = 4 * i;
  request.stop.stop_tokens = {7};
  request.sampling.temperature = i == 0 ? 0.0f : 0.8f;
  request.sampling.top_k = i == 2 ? 5 : 0;
  request.sampling.top_p = i == 3 ? 0.7f : 1.0f;
  request.sampling.min_p = i == 4 ? 0.1f : 0.0f;
  request.sampling.repetition_penalty = i == 5 ? 1.2f : 1.0f;
  if (i == 1) request.prompt_logprobs = true;
  return request;
}

TEST_P(StepAllocationTest, WarmStepsAllocateNothing) {
  const auto& [name, weights, kv, isa] = GetParam();
  auto backend = CreateCpuBackend({.isa = isa, .threads = 2}).value();
  const auto file = ModelFile::Open(std::string(ESPALIER_GOLDEN_DATA "/") + name).value();
  auto executor = ModelExecutor::Load(
                      *file, backend.get(),
                      {.weights = weights, .kv = kv, .kv_bytes = 8 << 20, .max_batch_tokens = 16})
                      .value();
  for (const bool prefix_cache : {false, true}) Serve(executor.get(), prefix_cache);
  Serve(executor.get(), /*prefix_cache=*/true, /*squeezed=*/true);
  InputMoments moments(executor->config());
  ChannelMoments channels(executor->config().layers, executor->config().channels);
  executor->set_input_moments(&moments, 1);
  executor->set_channel_moments(&channels, 1);
  Serve(executor.get(), /*prefix_cache=*/false);
  EXPECT_GT(moments.tokens(), 0);
  EXPECT_GT(channels.tokens(), 0);
}

void StepAllocationTest::Serve(ModelExecutor* executor, bool prefix_cache, bool squeezed) {
  FixedPolicy dense(0);
  Engine engine({.max_batch_tokens = 16, .prefix_cache = prefix_cache}, executor->kv_geometry(),
                executor->ladder(), executor, &dense);

  RequestId next = 1;
  int quiet = 0, decoding = 0, mixed = 0;
  const auto serve = [&](bool warm) {
    const RequestId first = next;
    engine.LimitPages(executor->kv_geometry().pages, Instant(0));
    std::vector<std::unique_ptr<TokenStream>> told;
    for (int i = 0; i < kRequests; ++i) {
      told.push_back(std::make_unique<TokenStream>(next, 1024, std::weak_ptr<StreamReader>()));
      ASSERT_TRUE(engine.Submit(MakeRequest(i, next++)).ok());
    }
    TokenStream::Pending pending;
    pending.tokens.reserve(1);
    for (auto& stream : told) {  // both of a stream's buffers are used once
      SequenceOutput output{.tokens = std::vector<TokenResult>(1)};
      for (int i = 0; i < 2; ++i) {
        stream->Push(output, Instant(0));
        stream->Drain(&pending);
      }
    }
    if (squeezed) engine.LimitPages(0, Instant(0));
    while (!engine.idle()) {
      const SchedulerStats stats = engine.scheduler().stats();
      const int64_t before = Allocations();
      const StepReport& report = **engine.Step(Instant(0));
      bool scores = false;
      for (const SequenceOutput& output : report.outputs) {
        scores |= !output.prompt_scores.empty();
        told[output.id - first]->Push(output, Instant(0));
        told[output.id - first]->Drain(&pending);
      }
      if (!warm || scores || report.stats.pages_total != stats.pages_total) continue;
      if (report.stats.waiting != stats.waiting) continue;  // it admitted someone
      EXPECT_EQ(Allocations() - before, 0)
          << report.decode_rows << " decode rows, " << report.prefill_rows << " prefill rows";
      ++quiet;
      decoding += report.decode_rows > 0 && report.prefill_rows == 0;
      mixed += report.decode_rows > 0 && report.prefill_rows > 0;
    }
  };
  serve(/*warm=*/false);
  serve(/*warm=*/false);  // with the prefix cache, in other batches than the first time
  serve(/*warm=*/true);
  EXPECT_GT(quiet, 20);
  EXPECT_GT(decoding, 10);
  // What is left of a prompt that is cached is computed in the step that admits it.
  if (!prefix_cache) {
    EXPECT_GT(mixed, 0);
  }
}

std::string CaseName(const ::testing::TestParamInfo<Case>& info) {
  const auto& [name, weights, kv, isa] = info.param;
  std::string file(name);
  file = file.substr(5, file.find('.') - 5);
  std::erase(file, '-');
  return fmt::format("{}_{}_kv_{}_{}", file, WeightPlanName(weights), KvTypeName(kv), IsaName(isa));
}

INSTANTIATE_TEST_SUITE_P(Types, StepAllocationTest,
                         ::testing::Combine(::testing::Values("tiny-llama.gguf"),
                                            ::testing::Values(WeightPlan::kInt4, WeightPlan::kInt8,
                                                              WeightPlan::kBf16, WeightPlan::kF32),
                                            ::testing::Values(KvType::kInt8, KvType::kF16,
                                                              KvType::kF32),
                                            ::testing::ValuesIn(SupportedIsas())),
                         CaseName);

INSTANTIATE_TEST_SUITE_P(
    Architectures, StepAllocationTest,
    ::testing::Combine(::testing::Values("tiny-qwen2-quantized.gguf", "tiny-qwen3-quantized.gguf"),
                       ::testing::Values(WeightPlan::kAuto), ::testing::Values(KvType::kInt8),
                       ::testing::ValuesIn(SupportedIsas())),
    CaseName);

}  // namespace
}  // namespace espalier
