// What a token costs the engine thread: written by itself, or handed to the writer thread.
//
// Both ways stream to 32 real gRPC clients of this process (8 connections). Prints CPU time of the
// thread that plays the engine, per token, paced as a decode step is and unpaced.
#include <fmt/format.h>
#include <grpcpp/grpcpp.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <memory>
#include <string_view>
#include <thread>
#include <vector>

#include "espalier/v1/espalier.grpc.pb.h"
#include "server/ready_queue.h"
#include "server/serial_gate.h"

namespace espalier {
namespace {

constexpr int kStreams = 32;
constexpr int kConnections = 8;

double ThreadCpuSeconds() {
  timespec time{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

// The write loop of GenerateCall without text.
class Writer final : public grpc::ServerWriteReactor<v1::GenerateResponse>, public StreamReader {
 public:
  void OnReady() override {
    if (gate_.Enter()) Advance();
  }
  void OnWriteDone(bool ok) override {
    if (ok) Advance();
  }
  void OnDone() override { done = true; }

  std::shared_ptr<TokenStream> stream;
  std::atomic<bool> done = false;

 private:
  void Advance() {
    do {
      message_.Clear();
      stream->Drain(&pending_);
      for (const TokenResult& token : pending_.tokens) message_.add_token_ids(token.token);
      message_.set_text(" word");
      if (pending_.end.has_value()) {
        StartWriteAndFinish(&message_, grpc::WriteOptions(), grpc::Status::OK);
        return;
      }
      if (message_.token_ids_size() > 0) {
        StartWrite(&message_);
        return;
      }
    } while (!gate_.Leave());
  }

  SerialGate gate_;
  TokenStream::Pending pending_;
  v1::GenerateResponse message_;
};

class Service final : public v1::EspalierService::CallbackService {
 public:
  grpc::ServerWriteReactor<v1::GenerateResponse>* Generate(grpc::CallbackServerContext*,
                                                           const v1::GenerateRequest*) override {
    auto writer = std::make_shared<Writer>();
    writer->stream = std::make_shared<TokenStream>(0, TokenStream::kUnbounded, writer);
    std::lock_guard lock(mutex);
    writers.push_back(writer);
    return writer.get();
  }

  std::mutex mutex;
  std::vector<std::shared_ptr<Writer>> writers;
};

void Measure(bool hand_off, std::chrono::microseconds step, int tokens) {
  Service service;
  grpc::ServerBuilder builder;
  int port = 0;
  builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
  builder.RegisterService(&service);
  const std::unique_ptr<grpc::Server> server = builder.BuildAndStart();
  std::vector<std::thread> clients;
  std::atomic<int> messages = 0;
  for (int i = 0; i < kConnections; ++i) {
    clients.emplace_back([&] {
      grpc::ChannelArguments own;
      own.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
      const auto stub = v1::EspalierService::NewStub(grpc::CreateCustomChannel(
          fmt::format("127.0.0.1:{}", port), grpc::InsecureChannelCredentials(), own));
      std::vector<std::thread> readers;
      for (int j = 0; j < kStreams / kConnections; ++j) {
        readers.emplace_back([&] {
          grpc::ClientContext context;
          const auto reader = stub->Generate(&context, {});
          for (v1::GenerateResponse message; reader->Read(&message);) ++messages;
          reader->Finish();
        });
      }
      for (std::thread& reader : readers) reader.join();
    });
  }
  for (size_t ready = 0; ready < kStreams; std::this_thread::yield()) {
    std::lock_guard lock(service.mutex);
    ready = service.writers.size();
  }

  double cpu = 0;
  {
    ReadyQueue queue(1);
    std::vector<std::shared_ptr<TokenStream>> posts;
    SequenceOutput output{.tokens = {{.token = 7}}};
    const double began = ThreadCpuSeconds();
    for (int token = 0; token < tokens; ++token) {
      for (const auto& writer : service.writers) {
        writer->stream->Push(output, Instant(token));
        if (token + 1 == tokens) writer->stream->End({});
        if (hand_off) {
          posts.push_back(writer->stream);
        } else {
          writer->OnReady();
        }
      }
      if (hand_off) queue.Post(&posts);
      if (step.count() > 0) std::this_thread::sleep_for(step);
    }
    cpu = ThreadCpuSeconds() - began;
  }
  for (std::thread& client : clients) client.join();
  server->Shutdown();
  const double all = double(tokens) * kStreams;
  fmt::print(
      "{:<12} {:>8} us/step  {:7.2f} us/token on the engine thread  {:5.2f} tokens/message\n",
      hand_off ? "hand-off" : "StartWrite", step.count(), 1e6 * cpu / all, all / messages);
}

}  // namespace
}  // namespace espalier

int main() {
  for (const int step_us : {10'000, 2'000, 0}) {
    for (const bool hand_off : {false, true}) {
      espalier::Measure(hand_off, std::chrono::microseconds(step_us), step_us > 0 ? 300 : 3000);
    }
  }
}
