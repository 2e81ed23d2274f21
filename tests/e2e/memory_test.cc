// What the real server holds in memory against what its ledger says that it must.
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <string>

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

}  // namespace
}  // namespace espalier
