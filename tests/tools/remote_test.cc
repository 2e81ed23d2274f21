// The command against a server that answers from a script: what is sent, shown and made of errors.
#include "tools/remote.h"

#include <gmock/gmock.h>
#include <google/rpc/error_details.pb.h>
#include <google/rpc/status.pb.h>
#include <gtest/gtest.h>

#include <chrono>
#include <csignal>
#include <initializer_list>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "tools/command.h"

namespace espalier {
namespace {

using testing::ContainsRegex;
using testing::HasSubstr;
using testing::Not;

grpc::Status QueueFull() {
  google::rpc::RetryInfo retry;
  retry.mutable_retry_delay()->set_nanos(250'000'000);
  google::rpc::Status details;
  details.set_code(grpc::StatusCode::RESOURCE_EXHAUSTED);
  details.add_details()->PackFrom(retry);
  return {grpc::StatusCode::RESOURCE_EXHAUSTED, "the queue is full", details.SerializeAsString()};
}

class ScriptedService final : public v1::EspalierService::Service {
 public:
  grpc::Status Generate(grpc::ServerContext* context, const v1::GenerateRequest* request,
                        grpc::ServerWriter<v1::GenerateResponse>* writer) override {
    int call = 0;
    {
      const std::lock_guard lock(mutex);
      last = *request;
      call = calls++;
    }
    // Of a burst of token prompts every third call is refused.
    if (request->text() == "refuse" || (request->has_token_ids() && call % 3 == 2)) {
      return QueueFull();
    }
    v1::GenerateResponse response;
    response.set_text("Bonjour");
    response.add_token_ids(5);
    writer->Write(response);
    while (request->text() == "hang" && !context->IsCancelled()) {
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    response.set_text(" le monde");
    response.add_token_ids(6);
    v1::Finished& finished = *response.mutable_finished();
    finished.set_reason(v1::FINISH_REASON_STOP);
    finished.mutable_usage()->set_prompt_tokens(4);
    finished.mutable_usage()->set_completion_tokens(3);
    finished.set_seed(77);
    v1::RungUse& rung = *finished.mutable_served()->add_rungs();
    rung.set_tokens(3);
    writer->Write(response);
    return grpc::Status::OK;
  }

  grpc::Status Tokenize(grpc::ServerContext*, const v1::TokenizeRequest* request,
                        v1::TokenizeResponse* response) override {
    // A token a byte: its value, and itself.
    for (const char c : request->has_chat() ? "<" + request->chat().messages(0).content() + ">"
                                            : request->text()) {
      response->add_token_ids(static_cast<unsigned char>(c));
      response->add_pieces(std::string(1, c));
    }
    return grpc::Status::OK;
  }

  grpc::Status Score(grpc::ServerContext*, const v1::ScoreRequest* request,
                     v1::ScoreResponse* response) override {
    response->set_total_logprob(-2.0 * (request->token_ids().ids_size() - 1));
    for (int i = 1; i < request->token_ids().ids_size(); ++i) {
      response->add_logprobs()->set_logprob(-2);
    }
    return grpc::Status::OK;
  }

  grpc::Status GetModel(grpc::ServerContext*, const v1::GetModelRequest*,
                        v1::GetModelResponse* response) override {
    response->set_vocabulary_size(50);
    return grpc::Status::OK;
  }

  std::mutex mutex;
  v1::GenerateRequest last;
  int calls = 0;
};

class RemoteCommand : public testing::Test {
 protected:
  RemoteCommand() {
    grpc::EnableDefaultHealthCheckService(true);
    grpc::ServerBuilder builder;
    int port = 0;
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
    builder.RegisterService(&service_);
    server_ = builder.BuildAndStart();
    address_ = "127.0.0.1:" + std::to_string(port);
  }
  ~RemoteCommand() override {
    server_->Shutdown(std::chrono::system_clock::now() + std::chrono::seconds(1));
  }

  // Exit code; out_ and err_ are what was printed.
  int Run(std::initializer_list<const char*> arguments) {
    std::vector<const char*> argv = {"espalier"};
    argv.insert(argv.end(), arguments);
    argv.push_back("--address");
    argv.push_back(address_.c_str());
    testing::internal::CaptureStdout();
    testing::internal::CaptureStderr();
    const int code = RunCommand(static_cast<int>(argv.size()), argv.data());
    out_ = testing::internal::GetCapturedStdout();
    err_ = testing::internal::GetCapturedStderr();
    return code;
  }

  ScriptedService service_;
  std::unique_ptr<grpc::Server> server_;
  std::string address_;
  std::string out_;
  std::string err_;
};

TEST_F(RemoteCommand, GenerateStreamsTextAndSaysHowItWasServed) {
  ASSERT_EQ(Run({"generate", "hello"}), 0) << err_;
  EXPECT_EQ(out_, "Bonjour le monde\n");
  EXPECT_THAT(err_, ContainsRegex("4 prompt \\+ 3 new tokens, stop .* seed 77"));
  EXPECT_THAT(err_, HasSubstr("served: rung 0 for 3 tokens"));
}

TEST_F(RemoteCommand, GenerateSendsEveryOption) {
  ASSERT_EQ(Run({"generate",
                 "hello",
                 "--special",
                 "--temperature",
                 "0.5",
                 "--top-k",
                 "40",
                 "--top-p",
                 "0.9",
                 "--min-p",
                 "0.05",
                 "--repetition-penalty",
                 "1.1",
                 "--presence-penalty",
                 "-1",
                 "--frequency-penalty",
                 "2",
                 "--logit-bias",
                 "3=-100",
                 "--logit-bias",
                 "4=2.5",
                 "--seed",
                 "18446744073709551615",
                 "--max-tokens",
                 "9",
                 "--min-tokens",
                 "2",
                 "--stop",
                 "END",
                 "--stop",
                 "\n\n",
                 "--stop-id",
                 "8",
                 "--ignore-eos",
                 "--logprobs",
                 "5",
                 "--priority",
                 "-3",
                 "--never-prune",
                 "--rung",
                 "2",
                 "--max-prune-ratio",
                 "0.25",
                 "--max-quality-loss",
                 "0.1",
                 "--model-name",
                 "m"}),
            0)
      << err_;
  const v1::GenerateRequest& sent = service_.last;
  EXPECT_EQ(sent.text(), "hello");
  EXPECT_TRUE(sent.parse_special());
  EXPECT_EQ(sent.model(), "m");
  EXPECT_FLOAT_EQ(sent.sampling().temperature(), 0.5f);
  EXPECT_EQ(sent.sampling().top_k(), 40);
  EXPECT_FLOAT_EQ(sent.sampling().top_p(), 0.9f);
  EXPECT_FLOAT_EQ(sent.sampling().min_p(), 0.05f);
  EXPECT_FLOAT_EQ(sent.sampling().repetition_penalty(), 1.1f);
  EXPECT_FLOAT_EQ(sent.sampling().presence_penalty(), -1);
  EXPECT_FLOAT_EQ(sent.sampling().frequency_penalty(), 2);
  EXPECT_FLOAT_EQ(sent.sampling().logit_bias().at(3), -100);
  EXPECT_FLOAT_EQ(sent.sampling().logit_bias().at(4), 2.5f);
  EXPECT_EQ(sent.sampling().seed(), 18446744073709551615u);
  EXPECT_EQ(sent.stop().max_tokens(), 9);
  EXPECT_EQ(sent.stop().min_tokens(), 2);
  EXPECT_THAT(sent.stop().stop(), testing::ElementsAre("END", "\n\n"));
  EXPECT_THAT(sent.stop().stop_token_ids(), testing::ElementsAre(8));
  EXPECT_TRUE(sent.stop().ignore_eos());
  EXPECT_TRUE(sent.logprobs().enabled());
  EXPECT_EQ(sent.logprobs().top(), 5);
  EXPECT_EQ(sent.priority(), -3);
  EXPECT_TRUE(sent.prune().never());
  EXPECT_EQ(sent.prune().rung(), 2);
  EXPECT_FLOAT_EQ(sent.prune().max_prune_ratio(), 0.25f);
  EXPECT_FLOAT_EQ(sent.prune().max_quality_loss(), 0.1f);
}

TEST_F(RemoteCommand, WhatIsNotGivenIsLeftToTheServer) {
  ASSERT_EQ(Run({"generate", "hello", "--quiet"}), 0);
  EXPECT_EQ(err_, "");
  EXPECT_FALSE(service_.last.sampling().has_temperature());
  EXPECT_FALSE(service_.last.sampling().has_seed());
  EXPECT_FALSE(service_.last.stop().has_max_tokens());
  EXPECT_FALSE(service_.last.has_prune());
  EXPECT_FALSE(service_.last.logprobs().enabled());
}

TEST_F(RemoteCommand, GenerateInJsonIsOneMessageALine) {
  ASSERT_EQ(Run({"generate", "hello", "--json", "--quiet"}), 0);
  EXPECT_THAT(out_, testing::StartsWith("{\"text\":\"Bonjour\",\"token_ids\":[5]}\n{"));
  EXPECT_THAT(out_, HasSubstr("FINISH_REASON_STOP"));
}

TEST_F(RemoteCommand, ARefusalSaysWhenToTryAgain) {
  EXPECT_EQ(Run({"generate", "refuse"}), 1);
  EXPECT_THAT(err_, HasSubstr("RESOURCE_EXHAUSTED: the queue is full (try again in 0.25 s)"));
}

TEST_F(RemoteCommand, TheDeadlineEndsACall) {
  EXPECT_EQ(Run({"generate", "hang", "--deadline", "0.2"}), 1);
  EXPECT_THAT(err_, HasSubstr("DEADLINE_EXCEEDED"));
}

TEST_F(RemoteCommand, ChatAsksOnceWithASystemMessage) {
  ASSERT_EQ(Run({"chat", "--once", "hello", "--system", "be brief"}), 0) << err_;
  EXPECT_EQ(out_, "Bonjour le monde\n");
  ASSERT_EQ(service_.last.chat().messages_size(), 2);
  EXPECT_EQ(service_.last.chat().messages(0).role(), "system");
  EXPECT_EQ(service_.last.chat().messages(0).content(), "be brief");
  EXPECT_EQ(service_.last.chat().messages(1).role(), "user");
}

TEST_F(RemoteCommand, TokenizePrintsIdsAndPieces) {
  ASSERT_EQ(Run({"tokenize", "a\\\n"}), 0);
  EXPECT_EQ(out_, "     97 a\n     92 \\\\\n     10 \\n\n");
  ASSERT_EQ(Run({"tokenize", "ab", "--ids", "--chat"}), 0);
  EXPECT_EQ(out_, "60 97 98 62\n");
  ASSERT_EQ(Run({"tokenize", "a", "--json"}), 0);
  EXPECT_EQ(out_, "{\"ids\":[97],\"pieces\":[\"a\"]}\n");
}

TEST_F(RemoteCommand, ScoreChecksAgainstAReference) {
  ASSERT_EQ(Run({"score", "abcdefghij", "--window", "5"}), 0) << err_;
  EXPECT_THAT(out_, HasSubstr("2 windows of 5 tokens, 8 terms: NLL 16.000, mean 2.000000"));
  ASSERT_EQ(Run({"score", "abcdefghij", "--window", "5", "--stride", "2"}), 0) << err_;
  EXPECT_THAT(out_, HasSubstr("3 windows of 5 tokens, one every 2, 8 terms: NLL 16.000"));
  EXPECT_EQ(Run({"score", "abcdefghij", "--reference-ppl", "7.389"}), 0) << err_;
  EXPECT_EQ(Run({"score", "abcdefghij", "--reference-ppl", "7.4"}), 1);
  EXPECT_THAT(err_, HasSubstr("off the reference"));
  EXPECT_EQ(Run({"score", "abcdefghij", "--reference-ppl", "7.4", "--tolerance", "0.01"}), 0);
}

TEST_F(RemoteCommand, LoadCountsAnswersAndRefusals) {
  ASSERT_EQ(Run({"load", "--requests", "9", "--concurrency", "3", "--prompt-tokens", "6"}), 0)
      << err_;
  EXPECT_THAT(out_, HasSubstr("9 calls, 6 finished, 0 past their deadline, 18 tokens"));
  EXPECT_THAT(out_, HasSubstr("RESOURCE_EXHAUSTED: 3 calls, 3 with RetryInfo"));
  EXPECT_EQ(service_.last.token_ids().ids_size(), 6);
  for (const int32_t id : service_.last.token_ids().ids()) EXPECT_LT(id, 50);
  EXPECT_TRUE(service_.last.stop().ignore_eos());
}

TEST_F(RemoteCommand, LoadRunsOpenLoopForAWhile) {
  ASSERT_EQ(Run({"load", "--rate", "100", "--duration", "0.3", "--json"}), 0) << err_;
  EXPECT_THAT(out_, ContainsRegex("\"calls\":[1-9]"));
  EXPECT_THAT(out_, HasSubstr("\"ttft_p99_s\":"));
}

TEST_F(RemoteCommand, HealthPrintsAndWaits) {
  EXPECT_EQ(Run({"health"}), 0);
  EXPECT_EQ(out_, "SERVING\n");
  EXPECT_EQ(Run({"health", "--wait", "--deadline", "5"}), 0);
  server_->GetHealthCheckService()->SetServingStatus(false);
  EXPECT_EQ(Run({"health"}), 1);
  EXPECT_EQ(out_, "NOT_SERVING\n");
  EXPECT_EQ(Run({"health", "--wait", "--deadline", "0.2"}), 1);
}

// Last, and in a process of its own: Ctrl-C is remembered for the rest of a process.
TEST_F(RemoteCommand, CtrlCCancelsTheCallAndExits130) {
  std::thread fingers([this] {
    for (bool called = false; !called; std::this_thread::sleep_for(std::chrono::milliseconds(20))) {
      const std::lock_guard lock(service_.mutex);
      called = service_.calls > 0;
    }
    kill(getpid(), SIGINT);
  });
  EXPECT_EQ(Run({"generate", "hang"}), 130);
  fingers.join();
  EXPECT_THAT(err_, Not(HasSubstr("prompt +")));
}

}  // namespace
}  // namespace espalier
