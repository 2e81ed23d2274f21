#include <gmock/gmock.h>
#include <grpcpp/generic/generic_stub.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "server/rpc_error.h"
#include "tests/e2e/local_server.h"

namespace espalier {
namespace {

using google::rpc::BadRequest;
using google::rpc::ErrorInfo;
using google::rpc::QuotaFailure;
using google::rpc::RetryInfo;
using grpc::StatusCode;
using testing::HasSubstr;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

struct BadField {
  const char* field;  // as the violation names it
  std::function<void(v1::GenerateRequest*)> spoil;
};

std::vector<BadField> BadFields() {
  using R = v1::GenerateRequest;
  std::vector<BadField> cases = {
      {"prompt", [](R* r) { r->clear_text(); }},
      {"text", [](R* r) { r->set_text(""); }},
      {"request_id", [](R* r) { r->set_request_id(std::string(129, 'x')); }},
      {"token_ids.ids", [](R* r) { r->mutable_token_ids(); }},
      {"token_ids.ids[1]",
       [](R* r) {
         r->mutable_token_ids()->add_ids(1);
         r->mutable_token_ids()->add_ids(258);
       }},
      {"token_ids.ids[0]", [](R* r) { r->mutable_token_ids()->add_ids(-1); }},
      {"chat.messages", [](R* r) { r->mutable_chat(); }},
      {"chat.messages[0].role",
       [](R* r) { r->mutable_chat()->add_messages()->set_content("no role"); }},
      {"parse_special",
       [](R* r) {
         r->mutable_token_ids()->add_ids(1);
         r->set_parse_special(true);
       }},
      {"sampling.top_k", [](R* r) { r->mutable_sampling()->set_top_k(-1); }},
      {"sampling.logit_bias[258]",
       [](R* r) { (*r->mutable_sampling()->mutable_logit_bias())[258] = 1; }},
      {"sampling.logit_bias[5]",
       [](R* r) { (*r->mutable_sampling()->mutable_logit_bias())[5] = kNan; }},
      {"sampling.logit_bias",
       [](R* r) {
         for (int i = 0; i < 1025; ++i) (*r->mutable_sampling()->mutable_logit_bias())[i] = 0;
       }},
      {"stop.max_tokens", [](R* r) { r->mutable_stop()->set_max_tokens(0); }},
      {"stop.max_tokens", [](R* r) { r->mutable_stop()->set_max_tokens(-7); }},
      {"stop.min_tokens", [](R* r) { r->mutable_stop()->set_min_tokens(-1); }},
      {"stop.min_tokens", [](R* r) { r->mutable_stop()->set_min_tokens(11); }},
      {"stop.stop[0]", [](R* r) { r->mutable_stop()->add_stop(""); }},
      {"stop.stop[0]", [](R* r) { r->mutable_stop()->add_stop(std::string(257, 's')); }},
      {"stop.stop",
       [](R* r) {
         for (int i = 0; i < 17; ++i) r->mutable_stop()->add_stop(std::string(1, 's'));
       }},
      {"stop.stop_token_ids[0]", [](R* r) { r->mutable_stop()->add_stop_token_ids(1 << 30); }},
      {"stop.stop_token_ids",
       [](R* r) {
         for (int i = 0; i < 65; ++i) r->mutable_stop()->add_stop_token_ids(1);
       }},
      {"logprobs.top", [](R* r) { r->mutable_logprobs()->set_top(1); }},
      {"logprobs.top",
       [](R* r) {
         r->mutable_logprobs()->set_enabled(true);
         r->mutable_logprobs()->set_top(21);
       }},
  };
  const auto floats = [&](const char* field, std::vector<float> bad, auto set) {
    for (const float value : bad) {
      cases.push_back({field, [set, value](R* r) { set(r, value); }});
    }
  };
  floats("sampling.temperature", {-0.1f, 100.5f, kNan, kInf},
         [](R* r, float v) { r->mutable_sampling()->set_temperature(v); });
  floats("sampling.top_p", {0, -1, 1.01f, kNan, kInf},
         [](R* r, float v) { r->mutable_sampling()->set_top_p(v); });
  floats("sampling.min_p", {-0.01f, 1.01f, kNan},
         [](R* r, float v) { r->mutable_sampling()->set_min_p(v); });
  floats("sampling.repetition_penalty", {0, -1, 101, kNan, kInf},
         [](R* r, float v) { r->mutable_sampling()->set_repetition_penalty(v); });
  floats("sampling.presence_penalty", {-2.1f, 2.1f, kNan},
         [](R* r, float v) { r->mutable_sampling()->set_presence_penalty(v); });
  floats("sampling.frequency_penalty", {-2.1f, 2.1f, kNan, -kInf},
         [](R* r, float v) { r->mutable_sampling()->set_frequency_penalty(v); });
  floats("prune.max_prune_ratio", {-0.1f, 1.1f, kNan},
         [](R* r, float v) { r->mutable_prune()->set_max_prune_ratio(v); });
  floats("prune.max_quality_loss", {-1, kNan},
         [](R* r, float v) { r->mutable_prune()->set_max_quality_loss(v); });
  for (const int rung : {-1, 3}) {
    cases.push_back({"prune.rung", [rung](R* r) { r->mutable_prune()->set_rung(rung); }});
  }
  return cases;
}

TEST(Status, EveryBadFieldIsNamed) {
  LocalServer server;
  for (const BadField& bad : BadFields()) {
    v1::GenerateRequest request = TextRequest("x", 10);
    bad.spoil(&request);
    const Answer answer = Generate(server.stub(), request);
    EXPECT_EQ(answer.status.error_code(), StatusCode::INVALID_ARGUMENT) << bad.field;
    EXPECT_THAT(answer.status.error_message(), HasSubstr(bad.field));
    const std::optional<BadRequest> detail = DetailOf<BadRequest>(answer.status);
    ASSERT_TRUE(detail.has_value()) << bad.field;
    EXPECT_EQ(detail->field_violations(0).field(), bad.field);
    EXPECT_FALSE(detail->field_violations(0).description().empty());
    EXPECT_EQ(answer.messages, 0);
  }
  EXPECT_TRUE(server.Idle()) << "no place in the queue is left taken";
  EXPECT_TRUE(Generate(server.stub(), TextRequest("x", 10)).status.ok());
}

TEST(Status, TextThatIsNotUtf8IsNamedByItsField) {
  LocalServer server;
  const auto expect_named = [](const grpc::Status& status, std::string_view field) {
    EXPECT_EQ(status.error_code(), StatusCode::INVALID_ARGUMENT) << field;
    EXPECT_THAT(status.error_message(), HasSubstr("UTF-8"));
    const auto detail = DetailOf<BadRequest>(status);
    ASSERT_TRUE(detail.has_value()) << field;
    EXPECT_EQ(detail->field_violations(0).field(), field);
  };
  expect_named(Generate(server.stub(), TextRequest("a\xff", 10)).status, "text");
  v1::GenerateRequest request;
  request.mutable_chat()->add_messages()->set_content("good");
  request.mutable_chat()->add_messages()->set_content("b\xc3");
  expect_named(Generate(server.stub(), request).status, "chat.messages[1].content");
  request = TextRequest("x", 10);
  for (const char* stop : {"a", "b", "\xed\xa0\x80"}) request.mutable_stop()->add_stop(stop);
  expect_named(Generate(server.stub(), request).status, "stop.stop[2]");

  v1::ScoreRequest score;
  score.set_text("\xc0\x80");
  v1::ScoreResponse scored;
  grpc::ClientContext score_context;
  expect_named(server.stub().Score(&score_context, score, &scored), "text");
  v1::TokenizeRequest tokenize;
  tokenize.set_text("\xf5");
  v1::TokenizeResponse tokenized;
  grpc::ClientContext tokenize_context;
  expect_named(server.stub().Tokenize(&tokenize_context, tokenize, &tokenized), "text");
}

TEST(Status, BytesThatAreNoMessageAreInvalid) {
  LocalServer server;
  const grpc::Slice slice("\xff\xff\xff", 3);
  const grpc::ByteBuffer garbage(&slice, 1);
  grpc::GenericStub stub(server.Channel());
  for (const char* method :
       {"Generate", "Score", "Tokenize", "Detokenize", "GetModel", "GetLoad"}) {
    grpc::ClientContext context;
    grpc::CompletionQueue queue;
    const auto call = stub.PrepareUnaryCall(
        &context, std::string("/espalier.v1.EspalierService/") + method, garbage, &queue);
    call->StartCall();
    grpc::ByteBuffer answer;
    grpc::Status status;
    call->Finish(&answer, &status, nullptr);
    void* tag;
    bool ok;
    ASSERT_TRUE(queue.Next(&tag, &ok));
    EXPECT_EQ(status.error_code(), StatusCode::INVALID_ARGUMENT) << method;
    EXPECT_THAT(status.error_message(), HasSubstr(method)) << "names the message";
  }
  EXPECT_TRUE(server.Idle());
}

TEST(Status, AllFaultsAreToldAtOnceButBounded) {
  LocalServer server;
  v1::GenerateRequest request = TextRequest("x", 10);
  request.mutable_sampling()->set_top_p(2);
  request.mutable_sampling()->set_min_p(2);
  for (int i = 0; i < 1000; ++i) (*request.mutable_sampling()->mutable_logit_bias())[-1 - i] = 0;
  const Answer answer = Generate(server.stub(), request);
  const std::optional<BadRequest> detail = DetailOf<BadRequest>(answer.status);
  ASSERT_TRUE(detail.has_value());
  EXPECT_EQ(detail->field_violations(0).field(), "sampling.top_p");
  EXPECT_EQ(detail->field_violations(1).field(), "sampling.min_p");
  EXPECT_EQ(detail->field_violations_size(), 16);
}

TEST(Status, BoundariesAreLegal) {
  LocalServer server;
  v1::GenerateRequest request = TextRequest("x", 4095);
  v1::SamplingParams* sampling = request.mutable_sampling();
  sampling->set_temperature(0);
  sampling->set_top_p(1);
  sampling->set_min_p(1);
  sampling->set_repetition_penalty(100);
  sampling->set_presence_penalty(-2);
  sampling->set_frequency_penalty(2);
  sampling->set_top_k(INT32_MAX);
  (*sampling->mutable_logit_bias())[257] = -100;
  request.mutable_stop()->set_min_tokens(4095);
  request.mutable_prune()->set_max_prune_ratio(1);
  request.mutable_prune()->set_max_quality_loss(kInf);
  const Answer answer = Generate(server.stub(), request);
  EXPECT_TRUE(answer.status.ok()) << answer.status.error_message();
  EXPECT_EQ(answer.ids.size(), 4095u);
}

TEST(Status, WhatCanNeverFitIsToldTheLengthThatWould) {
  LocalServer server;
  Answer answer = Generate(server.stub(), TextRequest("12345", 4092));
  EXPECT_EQ(answer.status.error_code(), StatusCode::OUT_OF_RANGE);
  EXPECT_THAT(answer.status.error_message(), HasSubstr("at most 4091"));
  EXPECT_EQ(DetailOf<BadRequest>(answer.status)->field_violations(0).field(), "stop.max_tokens");

  answer = Generate(server.stub(), TextRequest("12345", INT32_MAX));
  EXPECT_EQ(answer.status.error_code(), StatusCode::OUT_OF_RANGE);

  v1::GenerateRequest no_length;
  no_length.set_text(std::string(4096, 'x'));
  answer = Generate(server.stub(), no_length);
  EXPECT_EQ(answer.status.error_code(), StatusCode::OUT_OF_RANGE);
  EXPECT_THAT(answer.status.error_message(), HasSubstr("at most 4095"));
  EXPECT_EQ(DetailOf<BadRequest>(answer.status)->field_violations(0).field(), "text");
  EXPECT_EQ(DetailOf<ErrorInfo>(answer.status)->metadata().at("max_sequence_tokens"), "4096");

  no_length.set_text(std::string(4095, 'x'));
  answer = Generate(server.stub(), no_length);
  EXPECT_TRUE(answer.status.ok()) << answer.status.error_message();
  EXPECT_EQ(answer.ids.size(), 1u) << "the default is what is left";
}

TEST(Status, ScoreAndShortCallsCheckTheirFieldsToo) {
  LocalServer server;
  const auto score = [&](const v1::ScoreRequest& request) {
    grpc::ClientContext context;
    v1::ScoreResponse response;
    return server.stub().Score(&context, request, &response);
  };
  v1::ScoreRequest request;
  EXPECT_EQ(score(request).error_code(), StatusCode::INVALID_ARGUMENT);
  request.set_text("ok");
  request.set_top(21);
  EXPECT_EQ(DetailOf<BadRequest>(score(request))->field_violations(0).field(), "top");
  request.set_top(0);
  request.set_model("other");
  EXPECT_EQ(score(request).error_code(), StatusCode::NOT_FOUND);
  request.set_model("letters");
  EXPECT_TRUE(score(request).ok());
  request.set_text(std::string(5000, 'x'));
  EXPECT_EQ(score(request).error_code(), StatusCode::OUT_OF_RANGE);

  grpc::ClientContext tokenize, detokenize;
  v1::TokenizeResponse tokens;
  EXPECT_EQ(server.stub().Tokenize(&tokenize, {}, &tokens).error_code(),
            StatusCode::INVALID_ARGUMENT);
  v1::DetokenizeRequest ids;
  ids.add_token_ids(-5);
  v1::DetokenizeResponse text;
  EXPECT_EQ(server.stub().Detokenize(&detokenize, ids, &text).error_code(),
            StatusCode::INVALID_ARGUMENT);
}

TEST(Status, UnknownModelIsNotFound) {
  LocalServer server;
  v1::GenerateRequest request = TextRequest("x", 1);
  request.set_model(std::string(100'000, 'm'));
  const Answer answer = Generate(server.stub(), request);
  EXPECT_EQ(answer.status.error_code(), StatusCode::NOT_FOUND);
  EXPECT_LT(answer.status.error_message().size(), 200u);
  request.set_model("letters");
  EXPECT_TRUE(Generate(server.stub(), request).status.ok());
}

TEST(Status, FullQueueRefusesWithARetryDelayAndItsNumbers) {
  LocalServer server({.scheduler = {.max_sequences = 1, .max_waiting = 4096}, .max_waiting = 2});
  EXPECT_TRUE(Generate(server.stub(), TextRequest("x", 3)).status.ok()) << "a rate to go by";
  server.executor().Hold();
  std::vector<std::unique_ptr<grpc::ClientContext>> contexts;
  std::vector<std::unique_ptr<grpc::ClientReader<v1::GenerateResponse>>> readers;
  const auto send = [&] {
    contexts.push_back(std::make_unique<grpc::ClientContext>());
    readers.push_back(server.stub().Generate(contexts.back().get(), TextRequest("y", 5)));
  };
  // One in the step that is held, which still counts, and one behind it.
  send();
  send();
  while (server.thread().load().waiting() < 2) std::this_thread::yield();

  const Answer answer = Generate(server.stub(), TextRequest("z", 5));
  EXPECT_EQ(answer.status.error_code(), StatusCode::RESOURCE_EXHAUSTED);
  const std::optional<RetryInfo> retry = DetailOf<RetryInfo>(answer.status);
  ASSERT_TRUE(retry.has_value());
  const int64_t delay_ms =
      retry->retry_delay().seconds() * 1000 + retry->retry_delay().nanos() / 1'000'000;
  EXPECT_GE(delay_ms, 50);
  EXPECT_LE(delay_ms, 60'000);
  EXPECT_EQ(answer.pushback_ms, std::to_string(delay_ms));
  const std::optional<ErrorInfo> info = DetailOf<ErrorInfo>(answer.status);
  ASSERT_TRUE(info.has_value());
  EXPECT_EQ(info->reason(), "QUEUE_FULL");
  EXPECT_EQ(info->domain(), "espalier");
  EXPECT_EQ(info->metadata().at("waiting"), "2");
  EXPECT_EQ(info->metadata().at("max_waiting"), "2");
  EXPECT_EQ(DetailOf<QuotaFailure>(answer.status)->violations_size(), 1);

  server.executor().Go();
  for (const auto& reader : readers) {
    for (v1::GenerateResponse message; reader->Read(&message);) {
    }
    EXPECT_TRUE(reader->Finish().ok());
  }
  EXPECT_TRUE(Generate(server.stub(), TextRequest("z", 5)).status.ok());
}

TEST(Status, RetryDelayIsTheQueueOverTheMeasuredRate) {
  using std::chrono::milliseconds;
  LoadSnapshot load;
  load.stats.waiting = 20;
  load.finished_per_second = 10;
  EXPECT_EQ(RetryDelay(load), milliseconds(2000));
  load.finished_per_second = 1e6;
  EXPECT_EQ(RetryDelay(load), milliseconds(50));
  load.finished_per_second = 0;
  EXPECT_EQ(RetryDelay(load), milliseconds(60'000));
}

TEST(Status, LoadingIsUnavailableWithARetryDelay) {
  LocalServer server({.open = false});
  const Answer answer = Generate(server.stub(), TextRequest("x", 1));
  EXPECT_EQ(answer.status.error_code(), StatusCode::UNAVAILABLE);
  EXPECT_EQ(DetailOf<ErrorInfo>(answer.status)->reason(), "LOADING");
  EXPECT_TRUE(DetailOf<RetryInfo>(answer.status).has_value());
  grpc::ClientContext context;
  v1::GetModelResponse model;
  EXPECT_EQ(server.stub().GetModel(&context, {}, &model).error_code(), StatusCode::UNAVAILABLE);
  server.Open();
  EXPECT_TRUE(Generate(server.stub(), TextRequest("x", 1)).status.ok());
}

TEST(Status, DeadlineEndsACallWhileQueuedAndWhileRunning) {
  LocalServer server({.scheduler = {.max_sequences = 1, .max_waiting = 4096}});
  server.executor().set_step_time(std::chrono::milliseconds(2));
  std::thread runs([&] {
    const Answer answer =
        Generate(server.stub(), TextRequest("x", 4000), std::chrono::milliseconds(300));
    EXPECT_EQ(answer.status.error_code(), StatusCode::DEADLINE_EXCEEDED);
    EXPECT_EQ(answer.text, Letters('x', static_cast<int>(answer.ids.size())));
    EXPECT_FALSE(answer.ids.empty());
  });
  ASSERT_TRUE(server.Running(1));
  const Answer answer =
      Generate(server.stub(), TextRequest("y", 10), std::chrono::milliseconds(50));
  EXPECT_EQ(answer.status.error_code(), StatusCode::DEADLINE_EXCEEDED);
  EXPECT_EQ(answer.messages, 0);
  runs.join();
  EXPECT_TRUE(server.Idle());
}

TEST(Status, TooLargeAMessageIsTheLibrarysRefusalWithoutDetails) {
  LocalServer server;
  const Answer answer = Generate(server.stub(), TextRequest(std::string(5 << 20, 'x'), 1));
  EXPECT_EQ(answer.status.error_code(), StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_FALSE(DetailOf<ErrorInfo>(answer.status).has_value());
}

}  // namespace
}  // namespace espalier
