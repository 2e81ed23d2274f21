#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <random>
#include <thread>

#include "grpc/health/v1/health.grpc.pb.h"
#include "server/steady_clock.h"
#include "tests/e2e/local_server.h"

namespace espalier {
namespace {

using google::rpc::ErrorInfo;
using google::rpc::RetryInfo;
using grpc::StatusCode;
using grpc::health::v1::Health;
using grpc::health::v1::HealthCheckRequest;
using grpc::health::v1::HealthCheckResponse;
using std::chrono::milliseconds;
using std::chrono::seconds;
using testing::HasSubstr;

TEST(Cancel, GivesPagesBackQueuedInPrefillInDecodeAndTwice) {
  LocalServer server(
      {.scheduler = {.max_batch_tokens = 8, .max_sequences = 2, .max_waiting = 4096}});
  server.executor().set_step_time(milliseconds(1));
  grpc::ClientContext decoding, prefilling, queued;
  const auto in_decode = server.stub().Generate(&decoding, TextRequest("x", 4000));
  v1::GenerateResponse message;
  ASSERT_TRUE(in_decode->Read(&message));
  const auto in_prefill =
      server.stub().Generate(&prefilling, TextRequest(std::string(3000, 'p'), 10));
  ASSERT_TRUE(server.Running(2));
  const auto in_queue = server.stub().Generate(&queued, TextRequest("q", 10));
  while (server.thread().load().stats.waiting < 1) std::this_thread::yield();
  queued.TryCancel();
  prefilling.TryCancel();
  EXPECT_EQ(in_queue->Finish().error_code(), StatusCode::CANCELLED);
  EXPECT_EQ(in_prefill->Finish().error_code(), StatusCode::CANCELLED);
  ASSERT_TRUE(server.Running(1));
  decoding.TryCancel();
  decoding.TryCancel();
  while (in_decode->Read(&message)) {
  }
  EXPECT_EQ(in_decode->Finish().error_code(), StatusCode::CANCELLED);
  EXPECT_TRUE(server.Idle());
}

TEST(Cancel, OfAScoreReachesTheEngine) {
  LocalServer server({.scheduler = {.max_batch_tokens = 8}});
  server.executor().set_step_time(milliseconds(1));
  v1::ScoreRequest request;
  request.set_text(std::string(4000, 'x'));
  v1::ScoreResponse response;
  grpc::ClientContext context;
  std::thread canceller([&] {
    EXPECT_TRUE(server.Running(1));
    context.TryCancel();
  });
  EXPECT_EQ(server.stub().Score(&context, request, &response).error_code(), StatusCode::CANCELLED);
  canceller.join();
  EXPECT_TRUE(server.Idle());
}

// Calls that end in every way at once, over few and many connections. Every call that was begun is
// reported once, which is when Finish is called, and nothing is left behind.
TEST(Cancel, StormLeavesNothingBehind) {
  LocalServer server(
      {.scheduler = {.max_batch_tokens = 64, .max_sequences = 16, .max_waiting = 4096},
       .max_waiting = 24});
  constexpr int kClients = 8, kCalls = 50;
  std::atomic<int> begun = 0, wrong = 0;
  std::vector<std::thread> clients;
  for (int client = 0; client < kClients; ++client) {
    clients.emplace_back([&, client] {
      std::mt19937 random(static_cast<unsigned>(client));
      const auto stub = v1::EspalierService::NewStub(server.Channel());
      for (int i = 0; i < kCalls; ++i) {
        grpc::ClientContext context;
        const char first = static_cast<char>('a' + random() % 26);
        v1::GenerateRequest request =
            TextRequest(std::string(1 + random() % 60, first), 1 + static_cast<int>(random() % 80));
        if (random() % 4 == 0) request.mutable_stop()->add_stop(Letters(first, 9).substr(5));
        context.set_deadline(std::chrono::system_clock::now() +
                             (random() % 5 == 0 ? milliseconds(random() % 8) : seconds(30)));
        const auto reader = stub->Generate(&context, request);
        const int reads = static_cast<int>(random() % 20);
        std::string text;
        v1::GenerateResponse message;
        int read = 0;
        while (reader->Read(&message)) {
          text += message.text();
          if (++read == reads && random() % 2 == 0) context.TryCancel();
        }
        const grpc::Status status = reader->Finish();
        if (Letters(first, 80).substr(0, text.size()) != text) ++wrong;
        switch (status.error_code()) {
          case StatusCode::OK:
          case StatusCode::CANCELLED:
          case StatusCode::DEADLINE_EXCEEDED:
          case StatusCode::RESOURCE_EXHAUSTED:
            break;
          default:
            ++wrong;
        }
        ++begun;
      }
    });
  }
  for (std::thread& client : clients) client.join();
  EXPECT_EQ(wrong, 0);
  EXPECT_TRUE(server.Idle());
  EXPECT_TRUE(Generate(server.stub(), TextRequest("x", 50)).status.ok());
  // A call whose deadline passed on the way was never begun here.
  EXPECT_LE(server.summaries().size(), static_cast<size_t>(begun + 1));
  std::vector<RequestId> ids;
  for (const RequestSummary& summary : server.summaries()) ids.push_back(summary.id);
  std::sort(ids.begin(), ids.end());
  EXPECT_EQ(std::adjacent_find(ids.begin(), ids.end()), ids.end()) << "told twice";
}

// A stream whose reader does not read, behind a window that a few messages fill.
struct UnreadStream {
  UnreadStream(LocalServer* server, int max_tokens) {
    grpc::ChannelArguments small;
    small.SetInt(GRPC_ARG_HTTP2_STREAM_LOOKAHEAD_BYTES, 16384);
    small.SetInt(GRPC_ARG_HTTP2_BDP_PROBE, 0);
    stub = v1::EspalierService::NewStub(server->Channel(small));
    v1::GenerateRequest request = TextRequest("x", max_tokens);
    request.mutable_logprobs()->set_enabled(true);
    request.mutable_logprobs()->set_top(20);
    reader = stub->Generate(&context, request);
  }

  grpc::ClientContext context;
  std::unique_ptr<v1::EspalierService::Stub> stub;
  std::unique_ptr<grpc::ClientReader<v1::GenerateResponse>> reader;
};

TEST(StalledReader, IsEndedWithAReasonAndGivesItsPagesBack) {
  LocalServer server({.stream_buffer_tokens = 64});
  server.executor().set_step_time(std::chrono::microseconds(200));
  const UnreadStream stream(&server, 4000);
  v1::GenerateResponse message;
  ASSERT_TRUE(stream.reader->Read(&message));

  // Others go on meanwhile.
  EXPECT_EQ(Generate(server.stub(), TextRequest("y", 200)).text, Letters('y', 200));
  EXPECT_TRUE(server.Idle()) << "the stalled one holds no page";

  int tokens = message.token_ids_size();
  std::string text = message.text();
  while (stream.reader->Read(&message)) {
    tokens += message.token_ids_size();
    text += message.text();
  }
  const grpc::Status status = stream.reader->Finish();
  EXPECT_EQ(status.error_code(), StatusCode::RESOURCE_EXHAUSTED) << status.error_message();
  EXPECT_EQ(DetailOf<ErrorInfo>(status)->reason(), "READER_STALLED");
  EXPECT_FALSE(DetailOf<RetryInfo>(status).has_value());
  EXPECT_LT(tokens, 4000);
  EXPECT_EQ(text, Letters('x', tokens)) << "what was sent before is whole";
}

TEST(StalledReader, ThatNeverReadsAgainIsReset) {
  LocalServer server({.stream_buffer_tokens = 64});
  server.executor().set_step_time(std::chrono::microseconds(200));
  const UnreadStream stream(&server, 4000);
  // Its end is reported although nobody reads: the call does not stay for ever.
  const auto until = std::chrono::steady_clock::now() + seconds(30);
  while (server.summaries().empty() && std::chrono::steady_clock::now() < until) {
    std::this_thread::sleep_for(milliseconds(20));
  }
  ASSERT_EQ(server.summaries().size(), 1u);
  EXPECT_EQ(server.summaries()[0].outcome, "reader_stalled");
  EXPECT_LT(server.summaries()[0].output_tokens, 4000);
  for (v1::GenerateResponse message; stream.reader->Read(&message);) {
  }
  EXPECT_FALSE(stream.reader->Finish().ok());
}

HealthCheckResponse::ServingStatus Check(Health::Stub& stub, const std::string& service) {
  grpc::ClientContext context;
  HealthCheckRequest request;
  request.set_service(service);
  HealthCheckResponse response;
  const grpc::Status status = stub.Check(&context, request, &response);
  return status.ok() ? response.status() : HealthCheckResponse::SERVICE_UNKNOWN;
}

TEST(Health, FollowsLoadingServingAndDraining) {
  LocalServer server({.open = false});
  const auto stub = Health::NewStub(server.Channel());
  const auto watch_stub = Health::NewStub(server.Channel());
  for (const char* service : {"", "espalier.v1.EspalierService"}) {
    EXPECT_EQ(Check(*stub, service), HealthCheckResponse::NOT_SERVING);
  }
  EXPECT_EQ(Check(*stub, "unheard.of"), HealthCheckResponse::SERVICE_UNKNOWN);

  grpc::ClientContext context;
  HealthCheckRequest request;
  request.set_service("espalier.v1.EspalierService");
  const auto watch = watch_stub->Watch(&context, request);
  HealthCheckResponse seen;
  ASSERT_TRUE(watch->Read(&seen));
  EXPECT_EQ(seen.status(), HealthCheckResponse::NOT_SERVING);
  server.Open();
  ASSERT_TRUE(watch->Read(&seen));
  EXPECT_EQ(seen.status(), HealthCheckResponse::SERVING);
  EXPECT_EQ(Check(*stub, ""), HealthCheckResponse::SERVING);
  server.front().SetServing(false);
  ASSERT_TRUE(watch->Read(&seen));
  EXPECT_EQ(seen.status(), HealthCheckResponse::NOT_SERVING);
  context.TryCancel();
}

TEST(Drain, RefusesTheNewAndFinishesTheOld) {
  LocalServer server;
  server.executor().set_step_time(milliseconds(1));
  grpc::ClientContext context;
  const auto reader = server.stub().Generate(&context, TextRequest("x", 400));
  v1::GenerateResponse message;
  ASSERT_TRUE(reader->Read(&message));
  std::string text = message.text();
  std::thread drain([&] { EXPECT_TRUE(server.thread().Drain(seconds(20))); });
  while (!server.thread().inbox().closed()) std::this_thread::yield();

  const Answer refused = Generate(server.stub(), TextRequest("y", 1));
  EXPECT_EQ(refused.status.error_code(), StatusCode::UNAVAILABLE);
  EXPECT_EQ(DetailOf<ErrorInfo>(refused.status)->reason(), "DRAINING");
  EXPECT_TRUE(DetailOf<RetryInfo>(refused.status).has_value());
  while (reader->Read(&message)) text += message.text();
  EXPECT_TRUE(reader->Finish().ok());
  EXPECT_EQ(text, Letters('x', 400));
  drain.join();
}

TEST(Drain, EndsWithUnavailableWhatTakesTooLong) {
  LocalServer server;
  server.executor().set_step_time(milliseconds(2));
  grpc::ClientContext context;
  const auto reader = server.stub().Generate(&context, TextRequest("x", 4000));
  v1::GenerateResponse message;
  ASSERT_TRUE(reader->Read(&message));
  EXPECT_FALSE(server.thread().Drain(milliseconds(20)));
  while (reader->Read(&message)) {
  }
  EXPECT_EQ(reader->Finish().error_code(), StatusCode::UNAVAILABLE);
}

TEST(Drain, DoesNotWaitForAFinishedStreamThatNobodyReads) {
  LocalServer server;
  const UnreadStream stream(&server, 600);
  // A call that comes after the drain began is refused.
  while (server.thread().load().steps == 0) std::this_thread::yield();
  EXPECT_TRUE(server.thread().Drain(seconds(20))) << "the engine is done with it";
  const Instant began = SteadyNow();
  EXPECT_FALSE(server.service().WaitForCalls(began + seconds(20)));
  EXPECT_GE(SteadyNow() - began, milliseconds(300)) << "what a reader may stall";
  EXPECT_LT(SteadyNow() - began, seconds(10));
  for (v1::GenerateResponse message; stream.reader->Read(&message);) {
  }
  EXPECT_TRUE(stream.reader->Finish().ok());
  EXPECT_TRUE(server.service().WaitForCalls(SteadyNow() + seconds(20)));
}

TEST(Drain, WaitsForWhoReadsSlowly) {
  CallCount calls;
  calls.Add(2);
  std::thread reader([&] {
    for (int message = 0; message < 20; ++message) {
      std::this_thread::sleep_for(milliseconds(50));
      calls.NoteWritten();
    }
    calls.Add(-2);
  });
  EXPECT_TRUE(calls.WaitForNone(SteadyNow() + seconds(20), milliseconds(500)));
  reader.join();
}

TEST(LostDevice, IsInternalAfterTokensUnavailableBeforeAndFlipsHealth) {
  LocalServer server({.scheduler = {.max_sequences = 1, .max_waiting = 4096}});
  const auto health = Health::NewStub(server.Channel());
  server.executor().set_step_time(milliseconds(1));
  grpc::ClientContext running_context, waiting_context;
  const auto running = server.stub().Generate(&running_context, TextRequest("x", 4000));
  v1::GenerateResponse message;
  ASSERT_TRUE(running->Read(&message));
  const auto waiting = server.stub().Generate(&waiting_context, TextRequest("y", 10));
  while (server.thread().load().stats.waiting < 1) std::this_thread::yield();
  EXPECT_EQ(Check(*health, ""), HealthCheckResponse::SERVING);
  server.executor().Break(absl::InternalError("the device fell off the bus"));
  while (running->Read(&message)) {
  }
  EXPECT_EQ(running->Finish().error_code(), StatusCode::INTERNAL);
  EXPECT_FALSE(waiting->Read(&message));
  const grpc::Status status = waiting->Finish();
  EXPECT_EQ(status.error_code(), StatusCode::UNAVAILABLE);
  EXPECT_THAT(status.error_message(), HasSubstr("fell off the bus"));
  EXPECT_EQ(Check(*health, ""), HealthCheckResponse::NOT_SERVING);
  const grpc::Status late = Generate(server.stub(), TextRequest("z", 1)).status;
  EXPECT_EQ(late.error_code(), StatusCode::UNAVAILABLE);
  EXPECT_THAT(late.error_message(), HasSubstr("fell off the bus"));
  EXPECT_EQ(DetailOf<ErrorInfo>(late)->reason(), "ENGINE_LOST");
}

TEST(Server, NamesTheOptionOfAHostThatIsNowhere) {
  ServerOptions options;
  options.host = std::string(64, 'a');  // no name has such a part: nobody need be asked
  ApiService service({}, "test", nullptr);
  const auto front = Front::Start(options, &service);
  ASSERT_FALSE(front.ok());
  EXPECT_THAT(front.status().ToString(), HasSubstr("--host: cannot resolve aaaa"));
}

TEST(Server, RefusesAPortThatIsTaken) {
  LocalServer server;
  ServerOptions options;
  options.port = server.front().port();
  ApiService service({}, "test", nullptr);
  const auto second = Front::Start(options, &service);
  ASSERT_FALSE(second.ok());
  EXPECT_THAT(second.status().ToString(), HasSubstr(std::to_string(options.port)));
}

}  // namespace
}  // namespace espalier
