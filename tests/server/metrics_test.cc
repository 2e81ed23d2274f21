#include "server/metrics.h"

#include <arpa/inet.h>
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <string>
#include <thread>
#include <vector>

namespace espalier {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

constexpr char kLabels[] = R"({engine="0",model_name="smol")";

Metrics MakeMetrics() {
  return Metrics({.version = "1.2.3",
                  .model_name = "smol",
                  .weights = "int8",
                  .kv_type = "f16",
                  .device = "CPU, avx512, 2 threads",
                  .page_tokens = 16,
                  .kv_blocks = 300},
                 [] { return uint64_t{777}; });
}

LoadSnapshot Load() {
  LoadSnapshot load;
  load.stats = {.running = 3,
                .waiting = 4,
                .pages_total = 200,
                .pages_free = 140,
                .pages_used = 50,
                .pages_cached = 10,
                .preemptions = 2,
                .recomputed_tokens = 30,
                .prefix_queries = 400,
                .prefix_hits = 160,
                .prefix_evicted_pages = 60};
  load.weights = {.rungs = 3, .releases = 2, .returns = 1, .return_s = 0.25};
  load.ledger = {.weights = 100,
                 .weights_released = 40,
                 .kv_used = 25,
                 .kv_reusable = 5,
                 .kv_free = 70,
                 .workspace = 9};
  load.arriving = 1;
  load.max_waiting = 256;
  return load;
}

StepReport Step() {
  StepReport report;
  report.outputs.resize(2);
  report.outputs[0].tokens.resize(1);
  report.outputs[1].tokens.resize(2);
  report.phases = {.attention = 0.001, .mlp = 0.25};
  report.decode_rows = 3;
  report.prefill_rows = 64;
  return report;
}

RequestSummary Finished() {
  RequestSummary summary;
  summary.outcome = "stop";
  summary.prompt_tokens = 40;
  summary.cached_tokens = 8;
  summary.output_tokens = 11;
  summary.max_tokens = 64;
  summary.rung = 2;
  summary.rung_tokens = {4, 0, 7};
  summary.mean_prune_ratio = 0.3;
  summary.estimated_loss = 0.25;
  summary.queue_s = 0.01;
  summary.first_token_s = 0.05;
  summary.last_token_s = 0.25;
  summary.total_s = 0.26;
  return summary;
}

// GET `target` at 127.0.0.1:port, whole answer.
std::string Get(int port, const std::string& target) {
  const int connection = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  std::string answer;
  if (connect(connection, reinterpret_cast<sockaddr*>(&address), sizeof(address)) == 0) {
    const std::string request =
        "GET " + target + " HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
    EXPECT_EQ(write(connection, request.data(), request.size()), ssize_t(request.size()));
    char buffer[4096];
    for (ssize_t n; (n = read(connection, buffer, sizeof(buffer))) > 0;) answer.append(buffer, n);
  }
  close(connection);
  return answer;
}

TEST(MetricsTest, AStepShowsInGaugesCountersAndHistograms) {
  Metrics metrics = MakeMetrics();
  constexpr double kGaps[] = {0.04, 0.5};
  metrics.OnLadder(9);
  metrics.OnMemory(900, 1000, 300);
  metrics.OnStep(Step(), Load(), {.step = 0.3, .oldest_wait = 1.5, .token_gaps = kGaps});
  const std::string text = metrics.Text();
  for (const std::string& line : {
           fmt::format("vllm:num_requests_running{}}} 3\n", kLabels),
           fmt::format("vllm:num_requests_waiting{}}} 5\n", kLabels),
           fmt::format("vllm:kv_cache_usage_perc{}}} 0.25\n", kLabels),
           fmt::format("vllm:num_preemptions_total{}}} 2\n", kLabels),
           fmt::format("vllm:prefix_cache_queries_total{}}} 400\n", kLabels),
           fmt::format("vllm:prefix_cache_hits_total{}}} 160\n", kLabels),
           std::string("espalier_prefix_cache_evicted_pages_total 60\n"),
           std::string("espalier_prefix_cache_pages 10\n"),
           fmt::format("vllm:generation_tokens_total{}}} 3\n", kLabels),
           fmt::format("vllm:iteration_tokens_total_bucket{},le=\"64\"}} 0\n", kLabels),
           fmt::format("vllm:iteration_tokens_total_bucket{},le=\"128\"}} 1\n", kLabels),
           fmt::format("vllm:inter_token_latency_seconds_count{}}} 2\n", kLabels),
           fmt::format("vllm:inter_token_latency_seconds_sum{}}} 0.54\n", kLabels),
           std::string("espalier_step_seconds_sum 0.3\n"),
           std::string("espalier_step_phase_seconds_total{phase=\"mlp\"} 0.25\n"),
           std::string("espalier_batch_rows_sum{kind=\"decode\"} 3\n"),
           std::string("espalier_batch_rows_sum{kind=\"prefill\"} 64\n"),
           std::string("espalier_queue_requests 5\n"),
           std::string("espalier_queue_limit 256\n"),
           std::string("espalier_queue_oldest_seconds 1.5\n"),
           std::string("espalier_recomputed_tokens_total 30\n"),
           std::string("espalier_memory_bytes{part=\"weights\"} 100\n"),
           std::string("espalier_memory_bytes{part=\"kv_used\"} 25\n"),
           std::string("espalier_memory_bytes{part=\"kv_reusable\"} 5\n"),
           std::string("espalier_memory_bytes{part=\"kv_free\"} 70\n"),
           std::string("espalier_memory_bytes{part=\"workspace\"} 9\n"),
           std::string("espalier_memory_bytes{part=\"foreign\"} 777\n"),
           std::string("espalier_memory_bytes{part=\"weights_released\"} 40\n"),
           std::string("process_resident_memory_bytes 900\n"),
           std::string("espalier_memory_budget_bytes 1000\n"),
           std::string("espalier_kv_allowed_bytes 300\n"),
           std::string("espalier_hardest_rung 8\n"),
           std::string("espalier_weights_return_seconds 0.25\n"),
           std::string("espalier_weights_returns_total 1\n"),
           std::string("espalier_weights_releases_total 2\n"),
       }) {
    EXPECT_THAT(text, HasSubstr(line));
  }
  EXPECT_THAT(text, HasSubstr("version=\"1.2.3\""));
}

TEST(MetricsTest, TotalsSinceStartAreNotAddedTwice) {
  Metrics metrics = MakeMetrics();
  LoadSnapshot load = Load();
  metrics.OnStep(Step(), load, {.step = 0.1});
  metrics.OnStep(Step(), load, {.step = 0.1});
  load.stats.preemptions = 5;
  load.stats.prefix_hits = 176;
  metrics.OnStep(Step(), load, {.step = 0.1});
  EXPECT_THAT(metrics.Text(),
              AllOf(HasSubstr(fmt::format("vllm:num_preemptions_total{}}} 5\n", kLabels)),
                    HasSubstr(fmt::format("vllm:prefix_cache_hits_total{}}} 176\n", kLabels))));
}

TEST(MetricsTest, AnIdleReportIsNoStep) {
  Metrics metrics = MakeMetrics();
  metrics.OnStep(Step(), Load(), {.step = 0.1, .oldest_wait = 2});
  LoadSnapshot idle = Load();
  idle.stats.running = 0;
  metrics.OnStep(StepReport(), idle, {.step = 0.1});
  const std::string text = metrics.Text();
  EXPECT_THAT(text, HasSubstr("espalier_step_seconds_count 1\n"));
  EXPECT_THAT(text, HasSubstr(fmt::format("vllm:num_requests_running{}}} 0\n", kLabels)));
  EXPECT_THAT(text, HasSubstr("espalier_queue_oldest_seconds 0\n"));
}

TEST(MetricsTest, AFinishedRequestShowsOnce) {
  Metrics metrics = MakeMetrics();
  metrics.OnFinished(Finished());
  const std::string text = metrics.Text();
  for (const std::string& line : {
           fmt::format("vllm:time_to_first_token_seconds_bucket{},le=\"0.04\"}} 0\n", kLabels),
           fmt::format("vllm:time_to_first_token_seconds_bucket{},le=\"0.06\"}} 1\n", kLabels),
           fmt::format("vllm:request_time_per_output_token_seconds_sum{}}} 0.02\n", kLabels),
           fmt::format("vllm:e2e_request_latency_seconds_sum{}}} 0.26\n", kLabels),
           fmt::format("vllm:request_queue_time_seconds_sum{}}} 0.01\n", kLabels),
           fmt::format("vllm:request_prefill_time_seconds_sum{}}} 0.04\n", kLabels),
           fmt::format("vllm:request_decode_time_seconds_sum{}}} 0.2\n", kLabels),
           fmt::format("vllm:request_inference_time_seconds_sum{}}} 0.24\n", kLabels),
           fmt::format("vllm:request_params_max_tokens_sum{}}} 64\n", kLabels),
           fmt::format("vllm:request_prompt_tokens_sum{}}} 40\n", kLabels),
           fmt::format("vllm:request_generation_tokens_sum{}}} 11\n", kLabels),
           fmt::format("vllm:prompt_tokens_total{}}} 40\n", kLabels),
           fmt::format("vllm:prompt_tokens_cached_total{}}} 8\n", kLabels),
           std::string("vllm:cache_config_info{block_size=\"16\",engine=\"0\",") +
               "model_name=\"smol\",num_gpu_blocks=\"300\"} 1\n",
           std::string("vllm:request_success_total{engine=\"0\",finished_reason=\"stop\",") +
               "model_name=\"smol\"} 1\n",
           std::string("espalier_requests_finished_total{outcome=\"stop\"} 1\n"),
           std::string("espalier_prune_ratio_sum 0.3\n"),
           std::string("espalier_estimated_loss_nats_sum 0.25\n"),
           std::string("espalier_tokens_by_rung_total{rung=\"2\"} 7\n"),
       }) {
    EXPECT_THAT(text, HasSubstr(line));
  }
}

TEST(MetricsTest, ARefusalTouchesNoLatency) {
  Metrics metrics = MakeMetrics();
  RequestSummary refused;
  refused.outcome = "queue_full";
  refused.total_s = 0.001;
  metrics.OnFinished(refused);
  const std::string text = metrics.Text();
  EXPECT_THAT(text, HasSubstr("espalier_requests_refused_total{reason=\"queue_full\"} 1\n"));
  EXPECT_THAT(text, HasSubstr("espalier_requests_refused_total{reason=\"draining\"} 0\n"));
  EXPECT_THAT(text, HasSubstr(fmt::format("e2e_request_latency_seconds_count{}}} 0\n", kLabels)));
}

TEST(MetricsTest, ACancelledRequestInTheQueueHasNoFirstToken) {
  Metrics metrics = MakeMetrics();
  RequestSummary cancelled;
  cancelled.outcome = "cancelled";
  cancelled.prompt_tokens = 12;
  cancelled.total_s = 3;
  metrics.OnFinished(cancelled);
  const std::string text = metrics.Text();
  EXPECT_THAT(text, HasSubstr("espalier_requests_finished_total{outcome=\"cancelled\"} 1\n"));
  EXPECT_THAT(text, HasSubstr("finished_reason=\"abort\",model_name=\"smol\"} 1\n"));
  EXPECT_THAT(text, HasSubstr(fmt::format("time_to_first_token_seconds_count{}}} 0\n", kLabels)));
  EXPECT_THAT(text, HasSubstr(fmt::format("vllm:prompt_tokens_total{}}} 0\n", kLabels)));
}

TEST(MetricsTest, AStallShowsWhileItLastsAndIsCounted) {
  Metrics metrics = MakeMetrics();
  EXPECT_THAT(metrics.Text(), HasSubstr("espalier_engine_stalled 0\n"));
  metrics.OnStall(true);
  EXPECT_THAT(metrics.Text(), HasSubstr("espalier_engine_stalled 1\n"));
  metrics.OnStall(false);
  EXPECT_THAT(metrics.Text(), HasSubstr("espalier_engine_stalled 0\n"));
  EXPECT_THAT(metrics.Text(), HasSubstr("espalier_engine_stalls_total 1\n"));
}

TEST(MetricsTest, AReloadIsCountedAndTellsTheNewModel) {
  Metrics metrics = MakeMetrics();
  EXPECT_THAT(metrics.Text(), HasSubstr("espalier_reloads_total 0\n"));
  metrics.OnReload({.version = "1.2.3", .model_name = "smaller", .weights = "int4"}, 2, 3);
  const std::string text = metrics.Text();
  EXPECT_THAT(text, HasSubstr("espalier_reloads_total 1\n"));
  EXPECT_THAT(text, HasSubstr("espalier_hardest_rung 1\n"));
  EXPECT_THAT(text, HasSubstr(R"(model_name="smaller",)"));
  EXPECT_THAT(text, Not(HasSubstr(R"(weights="int8")")));
  EXPECT_THAT(text, Not(HasSubstr("espalier_measured_loss_nats{")));
  metrics.OnGathered(77, {});
  EXPECT_THAT(metrics.Text(), HasSubstr("espalier_moments_tokens 77\n"));
  EXPECT_THAT(metrics.Text(), HasSubstr("espalier_channel_moments_tokens 0\n"));
  metrics.OnGathered({}, 78);
  EXPECT_THAT(metrics.Text(), HasSubstr("espalier_moments_tokens 77\n"));
  EXPECT_THAT(metrics.Text(), HasSubstr("espalier_channel_moments_tokens 78\n"));
}

TEST(MetricsTest, ServesOverHttpAndNamesAPortThatIsTaken) {
  Metrics metrics = MakeMetrics();
  const absl::StatusOr<int> port = metrics.Serve("127.0.0.1", 0);
  ASSERT_TRUE(port.ok()) << port.status().message();
  EXPECT_GT(*port, 0);
  const std::string answer = Get(*port, "/metrics");
  EXPECT_THAT(answer, HasSubstr("200 OK"));
  EXPECT_THAT(answer, HasSubstr("espalier_build_info{"));

  Metrics other = MakeMetrics();
  const absl::StatusOr<int> taken = other.Serve("127.0.0.1", *port);
  ASSERT_FALSE(taken.ok());
  EXPECT_THAT(std::string(taken.status().message()), HasSubstr(fmt::format(":{}", *port)));
}

// Steps, endings and scrapes at once: TSan's business, and that nothing is lost.
TEST(MetricsTest, ThreadsMayReportAndScrapeAtOnce) {
  Metrics metrics = MakeMetrics();
  constexpr int kRounds = 200;
  std::atomic<bool> done = false;
  std::thread scraper([&] {
    while (!done) EXPECT_THAT(metrics.Text(), Not(HasSubstr("nan")));
  });
  std::vector<std::thread> finishers;
  for (int t = 0; t < 2; ++t) {
    finishers.emplace_back([&] {
      for (int i = 0; i < kRounds; ++i) metrics.OnFinished(Finished());
    });
  }
  for (int i = 0; i < kRounds; ++i) metrics.OnStep(Step(), Load(), {.step = 0.001});
  for (std::thread& finisher : finishers) finisher.join();
  done = true;
  scraper.join();
  const std::string text = metrics.Text();
  EXPECT_THAT(text, HasSubstr(fmt::format("espalier_step_seconds_count {}\n", kRounds)));
  EXPECT_THAT(text, HasSubstr(fmt::format("outcome=\"stop\"}} {}\n", 2 * kRounds)));
}

// The median is what a scrape costs; the bound is lax because machines that run tests are busy.
TEST(MetricsTest, AScrapeIsCheap) {
  Metrics metrics = MakeMetrics();
  for (int i = 0; i < 100; ++i) {
    metrics.OnStep(Step(), Load(), {.step = 0.001 * i});
    metrics.OnFinished(Finished());
  }
  std::vector<double> milliseconds;
  size_t bytes = 0;
  for (int i = 0; i < 51; ++i) {
    const auto start = std::chrono::steady_clock::now();
    bytes = metrics.Text().size();
    const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - start;
    milliseconds.push_back(took.count());
  }
  std::nth_element(milliseconds.begin(), milliseconds.begin() + 25, milliseconds.end());
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < 1000; ++i) metrics.OnStep(Step(), Load(), {.step = 0.001});
  const std::chrono::duration<double, std::micro> steps = std::chrono::steady_clock::now() - start;
  fmt::print("scrape: {:.2f} ms, {} bytes; step: {:.2f} us\n", milliseconds[25], bytes,
             steps.count() / 1000);
  EXPECT_LT(milliseconds[25], 20);
  EXPECT_LT(steps.count() / 1000, 500);
}

}  // namespace
}  // namespace espalier
