// A whole server in this process, on an executor that draws known letters, and a client to it.
#pragma once

#include <grpcpp/grpcpp.h>

#include <chrono>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "espalier/v1/espalier.grpc.pb.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"
#include "server/api_service.h"
#include "server/engine_thread.h"
#include "server/front.h"
#include "tests/server/paced_executor.h"

namespace espalier {

// Token id = byte, for 0 to 255; 256 is <|im_start|>, 257 <|im_end|>.
inline constexpr int32_t kImStart = 256;
inline constexpr int32_t kImEnd = 257;
ServedModel LettersModel();

struct LocalServerOptions {
  SchedulerOptions scheduler = {.max_batch_tokens = 256, .max_sequences = 64, .max_waiting = 4096};
  KvGeometry geometry = {.layers = 2, .pages = 8192, .context = 4096};
  int max_waiting = 256;
  // As long as the longest answer: letters come faster than gRPC sends them.
  int stream_buffer_tokens = 4096;
  bool open = true;  // false: still "loading"
};

class LocalServer {
 public:
  explicit LocalServer(LocalServerOptions options = {});
  ~LocalServer();

  void Open();
  std::shared_ptr<grpc::Channel> Channel(grpc::ChannelArguments arguments = {});

  PacedExecutor& executor() { return engine_.executor; }
  EngineThread& thread() { return *thread_; }
  Front& front() { return *front_; }
  ApiService& service() { return *service_; }
  v1::EspalierService::Stub& stub() { return *stub_; }
  std::vector<RequestSummary> summaries();

  // Waits until the engine holds no request and no page; false after 20 s.
  bool Idle();
  // Waits until so many requests run.
  bool Running(int count);

 private:
  bool WaitUntil(const std::function<bool(const LoadSnapshot&)>& condition);

  std::shared_ptr<ServedModel> model_;
  ServedModels models_;
  PromptEncoder encoder_;
  PacedEngine engine_;
  ReadyQueue ready_{1};
  std::unique_ptr<EngineThread> thread_;
  std::mutex mutex_;
  std::vector<RequestSummary> summaries_;
  Backstage backstage_;
  std::unique_ptr<ApiService> service_;
  std::unique_ptr<Front> front_;
  std::unique_ptr<v1::EspalierService::Stub> stub_;
};

// What came back of a Generate call.
struct Answer {
  grpc::Status status;
  std::string text;
  std::vector<int32_t> ids;
  std::vector<v1::TokenLogprob> logprobs;
  std::optional<v1::Finished> finished;
  std::string request_id;
  std::string pushback_ms;  // the trailer
  int messages = 0;
};

// Reads a call to its end.
Answer Generate(v1::EspalierService::Stub& stub, const v1::GenerateRequest& request,
                std::chrono::milliseconds timeout = std::chrono::seconds(30));

v1::GenerateRequest TextRequest(std::string_view text, int max_tokens);

// The text that the executor answers a prompt beginning with `first` with.
std::string Letters(char first, int count);

// A detail of a status; none if it has none of this type.
template <typename Detail>
std::optional<Detail> DetailOf(const grpc::Status& status) {
  google::rpc::Status details;
  if (!details.ParseFromString(status.error_details())) return std::nullopt;
  for (const auto& any : details.details()) {
    Detail detail;
    if (any.UnpackTo(&detail)) return detail;
  }
  return std::nullopt;
}

}  // namespace espalier
