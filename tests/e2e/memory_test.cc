// What the real server holds in memory against what its ledger says that it must.
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <chrono>
#include <functional>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "tests/support/server_process.h"
#include "tests/support/test_data.h"
#include "tools/load_run.h"

namespace espalier {
namespace {

TEST(Memory, ServerThatServedAFullBatchHoldsLittleMoreThanWeightsAndKv) {
  ESPALIER_PATH_OR_SKIP(model, "ESPALIER_MODEL");
  constexpr int kStreams = 32, kTokens = 256;  // prompt and output: together they fill the pool
  ServerProcess server(ESPALIER_SERVER,
                       {"--model", model, "--metrics-port", "-1", "--log-level", "warning",
                        "--kv-memory", "96MiB", "--reserve-output", "1"});
  ASSERT_NE(server.port(), 0);
  const RemoteOptions remote{.address = fmt::format("127.0.0.1:{}", server.port())};
  const auto stub = v1::EspalierService::NewStub(Connect(remote));
  v1::GetLoadResponse load;
  for (int i = 0;
       i < 3000 &&
       !UnaryCall(remote, &v1::EspalierService::Stub::GetLoad, v1::GetLoadRequest(), &load).ok();
       ++i) {
    usleep(10'000);
  }
  const LoadReport report = RunLoad(stub.get(), remote,
                                    {.requests = kStreams,
                                     .concurrency = kStreams,
                                     .prompt_tokens = kTokens / 2,
                                     .max_tokens = kTokens / 2,
                                     .vocabulary = 49152},
                                    [](int64_t, int64_t) {});
  ASSERT_EQ(report.finished, kStreams);
  ASSERT_TRUE(
      UnaryCall(remote, &v1::EspalierService::Stub::GetLoad, v1::GetLoadRequest(), &load).ok());
  const v1::MemoryLedger& ledger = load.memory();
  const double weights = static_cast<double>(ledger.weights());
  const double kv = static_cast<double>(ledger.kv_used() + ledger.kv_reusable() + ledger.kv_free());
  const auto resident = static_cast<double>(server.resident_bytes());
  fmt::print(
      "resident {:.1f} MB: weights {:.1f}, KV {:.1f}, workspace {:.1f}; {:.2f} of weights + KV\n",
      resident / 1e6, weights / 1e6, kv / 1e6, static_cast<double>(ledger.workspace()) / 1e6,
      resident / (weights + kv));
  EXPECT_GT(weights, 5e7);
  // Nearly all of the pool was written to, or the bound below would mean little.
  EXPECT_GT(resident, 0.9 * (weights + kv));
  EXPECT_LT(resident, 1.3 * (weights + kv));
}

class SqueezedServer {
 public:
  SqueezedServer(const std::string& model, const std::string& policy)
      : server_(ESPALIER_SERVER, {"--model", model, "--ladder", ESPALIER_LADDER, "--policy", policy,
                                  "--metrics-port", "-1", "--log-level", "warning", "--kv-memory",
                                  "96MiB", "--admin", "--prefix-cache=false",
                                  // Of memory alone: a slow machine refuses nobody.
                                  "--ttft-target", "300", "--tpot-target", "30"}),
        remote_{.address = fmt::format("127.0.0.1:{}", server_.port())},
        stub_(v1::EspalierService::NewStub(Connect(remote_))) {
    for (int i = 0; i < 3000 && !Load().has_value(); ++i) usleep(10'000);
  }

  std::optional<v1::MemoryLedger> Load() {
    v1::GetLoadResponse load;
    const absl::Status status =
        UnaryCall(remote_, &v1::EspalierService::Stub::GetLoad, v1::GetLoadRequest(), &load);
    running_ = load.running_requests();
    return status.ok() ? std::optional(load.memory()) : std::nullopt;
  }
  void SetBudget(uint64_t bytes) {
    v1::SetMemoryBudgetRequest request;
    request.set_bytes(bytes);
    v1::SetMemoryBudgetResponse response;
    const absl::Status status =
        UnaryCall(remote_, &v1::EspalierService::Stub::SetMemoryBudget, request, &response);
    ASSERT_TRUE(status.ok()) << status;
  }
  // Waits until it is so, for seconds.
  bool Becomes(const std::function<bool(const v1::MemoryLedger&)>& so) {
    for (int i = 0; i < 1500; ++i, usleep(10'000)) {
      const std::optional<v1::MemoryLedger> memory = Load();
      if (memory.has_value() && so(*memory)) return true;
    }
    return false;
  }
  bool Run(int streams) {
    return Becomes([&](const v1::MemoryLedger&) { return running_ == streams; });
  }
  LoadReport Stream(int streams, int rung) {
    return RunLoad(stub_.get(), remote_,
                   {.requests = streams,
                    .concurrency = streams,
                    .prompt_tokens = 64,
                    .max_tokens = 192,
                    .rung = rung,
                    .vocabulary = 49152},
                   [](int64_t, int64_t) {});
  }
  // Tokens and log-probabilities of a greedy answer by the full model alone.
  std::vector<std::pair<int32_t, float>> FullAnswer() {
    v1::GenerateRequest request;
    request.set_text("The wall behind the espalier was");
    request.mutable_sampling()->set_temperature(0);
    request.mutable_stop()->set_max_tokens(24);
    request.mutable_logprobs()->set_enabled(true);
    request.mutable_prune()->set_never(true);
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::minutes(5));
    const auto stream = stub_->Generate(&context, request);
    std::vector<std::pair<int32_t, float>> answer;
    v1::GenerateResponse message;
    while (stream->Read(&message)) {
      for (const v1::TokenLogprob& token : message.logprobs()) {
        answer.emplace_back(token.token_id(), token.logprob());
      }
      for (const v1::RungUse& use : message.finished().served().rungs()) EXPECT_EQ(use.rung(), 0);
    }
    const grpc::Status status = stream->Finish();
    EXPECT_TRUE(status.ok()) << status.error_message();
    return answer;
  }

 private:
  ServerProcess server_;
  const RemoteOptions remote_;
  std::unique_ptr<v1::EspalierService::Stub> stub_;
  int running_ = 0;
};

// Under a budget below weights and KV in use the weights of rungs that nobody is at leave, first of
// all; who wants the full model alone gets it, in turn for others' weights; and all come back.
TEST(Memory, ABudgetBelowWeightsAndKvTakesWeightsNobodyNeeds) {
  ESPALIER_PATH_OR_SKIP(model, "ESPALIER_MODEL");
  if (!model.ends_with("SmolLM2-135M-Instruct.Q4_1.gguf")) GTEST_SKIP() << "the ladder's model";
  for (const int rung : {0, 5}) {
    SqueezedServer server(model, "ladder");
    const std::vector<std::pair<int32_t, float>> full = server.FullAnswer();
    ASSERT_EQ(full.size(), 24u);
    const uint64_t idle = server.Load()->resident();
    LoadReport report;
    std::thread streams([&] { report = server.Stream(24, rung); });
    EXPECT_TRUE(server.Run(24));
    usleep(500'000);
    const v1::MemoryLedger before = *server.Load();
    EXPECT_EQ(before.weights_released(), 0u);
    const uint64_t budget = idle - 20'000'000;
    server.SetBudget(budget);
    EXPECT_TRUE(server.Becomes([&](const v1::MemoryLedger& memory) {
      return memory.weights_released() > 30'000'000 && memory.resident() < budget + (6 << 20);
    }));
    const v1::MemoryLedger after = *server.Load();
    fmt::print("rung {}: weights {:.1f} to {:.1f} MB, resident {:.1f} to {:.1f}, budget {:.1f}\n",
               rung, before.weights() / 1e6, after.weights() / 1e6, before.resident() / 1e6,
               after.resident() / 1e6, budget / 1e6);
    EXPECT_EQ(after.weights() + after.weights_released(), before.weights());
    EXPECT_EQ(server.FullAnswer(), full) << "the full model to the bit, while memory is short";
    streams.join();
    EXPECT_EQ(report.finished, 24);
    EXPECT_EQ(server.FullAnswer(), full);
    server.SetBudget(0);
    EXPECT_TRUE(server.Becomes([](const v1::MemoryLedger& memory) {
      return memory.weights_released() == 0;
    })) << "though nobody calls";
    EXPECT_EQ(server.FullAnswer(), full) << "to the bit, after all came back";
  }
}

}  // namespace
}  // namespace espalier
