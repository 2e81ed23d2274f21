#include "tests/e2e/local_server.h"

#include <fmt/format.h>

#include <cstdio>
#include <cstdlib>
#include <thread>
#include <utility>

#include "server/steady_clock.h"

namespace espalier {
namespace {

constexpr std::string_view kChatTemplate =
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

// The character that stands for a byte in GPT-2's alphabet, as UTF-8.
std::string ByteCharacter(int byte) {
  int point = byte;
  const auto printable = [](int b) {
    return (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
  };
  if (!printable(byte)) {
    point = 256;
    for (int b = 0; b < byte; ++b) point += printable(b) ? 0 : 1;
  }
  if (point < 0x80) return std::string(1, static_cast<char>(point));
  return {static_cast<char>(0xC0 | point >> 6), static_cast<char>(0x80 | (point & 0x3F))};
}

template <typename T>
T Must(absl::StatusOr<T> value) {
  if (!value.ok()) {
    fmt::print(stderr, "{}\n", value.status().ToString());
    std::abort();
  }
  return *std::move(value);
}

}  // namespace

ServedModel LettersModel() {
  Vocabulary vocabulary;
  for (int byte = 0; byte < 256; ++byte) {
    vocabulary.tokens.push_back({ByteCharacter(byte), TokenKind::kNormal});
  }
  vocabulary.tokens.push_back({"<|im_start|>", TokenKind::kControl});
  vocabulary.tokens.push_back({"<|im_end|>", TokenKind::kControl});
  vocabulary.eos = kImEnd;
  vocabulary.end_tokens = {kImEnd};
  ServedModel model;
  model.name = "letters";
  model.config = {
      .name = "letters", .layers = 2, .hidden = 8, .heads = 2, .kv_heads = 1, .vocabulary = 258};
  model.tokenizer = Must(Tokenizer::Create(std::move(vocabulary)));
  model.chat_template = Must(ChatTemplate::Compile(kChatTemplate, "", "<|im_end|>"));
  model.weight_type = "f32";
  model.kv_type = "f32";
  model.device = "strings";
  model.ladder = PacedEngine::Rungs();
  model.policy = "fixed:0";
  return model;
}

LocalServer::LocalServer(LocalServerOptions options)
    : model_(std::make_shared<ServedModel>(LettersModel())),
      models_(model_),
      encoder_(model_->tokenizer.get(), model_->chat_template.get()),
      engine_(options.scheduler, options.geometry) {
  model_->max_sequence_tokens = engine_.engine.scheduler().max_sequence_tokens();
  thread_ = std::make_unique<EngineThread>(
      &engine_.engine, &ready_, options.max_waiting,
      EngineHooks{.on_lost = [this](const absl::Status&) { front_->SetServing(false); }});
  backstage_ = {.models = &models_, .encoder = &encoder_, .engine = thread_.get()};
  service_ = std::make_unique<ApiService>(
      CallOptions{.stream_buffer_tokens = static_cast<size_t>(options.stream_buffer_tokens),
                  .stall_grace = std::chrono::milliseconds(300),
                  .on_finished =
                      [this](const RequestSummary& summary) {
                        std::lock_guard lock(mutex_);
                        summaries_.push_back(summary);
                      }},
      "test", nullptr);
  ServerOptions server;
  server.port = 0;
  front_ = Must(Front::Start(server, service_.get()));
  if (options.open) Open();
  stub_ = v1::EspalierService::NewStub(Channel());
}

LocalServer::~LocalServer() {
  executor().Go();
  thread_->Drain(Instant::zero());
  front_->Shutdown(std::chrono::milliseconds(0));
}

void LocalServer::Open() {
  service_->Open(&backstage_);
  front_->SetServing(true);
}

std::shared_ptr<grpc::Channel> LocalServer::Channel(grpc::ChannelArguments arguments) {
  // Otherwise channels to one address share a connection.
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  return grpc::CreateCustomChannel(fmt::format("127.0.0.1:{}", front_->port()),
                                   grpc::InsecureChannelCredentials(), arguments);
}

std::vector<RequestSummary> LocalServer::summaries() {
  std::lock_guard lock(mutex_);
  return summaries_;
}

bool LocalServer::WaitUntil(const std::function<bool(const LoadSnapshot&)>& condition) {
  for (const Instant until = SteadyNow() + std::chrono::seconds(20); SteadyNow() < until;) {
    if (condition(thread_->load())) return true;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return false;
}

bool LocalServer::Idle() {
  return WaitUntil([](const LoadSnapshot& load) {
    return load.stats.running + load.waiting() + load.stats.pages_used == 0;
  });
}

bool LocalServer::Running(int count) {
  return WaitUntil([count](const LoadSnapshot& load) { return load.stats.running == count; });
}

Answer Generate(v1::EspalierService::Stub& stub, const v1::GenerateRequest& request,
                std::chrono::milliseconds timeout) {
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + timeout);
  const auto reader = stub.Generate(&context, request);
  Answer answer;
  for (v1::GenerateResponse message; reader->Read(&message);) {
    ++answer.messages;
    answer.text += message.text();
    answer.ids.insert(answer.ids.end(), message.token_ids().begin(), message.token_ids().end());
    answer.logprobs.insert(answer.logprobs.end(), message.logprobs().begin(),
                           message.logprobs().end());
    if (message.has_finished()) answer.finished = message.finished();
    answer.request_id += message.request_id();  // in one message only
  }
  answer.status = reader->Finish();
  const auto& trailers = context.GetServerTrailingMetadata();
  if (const auto found = trailers.find("grpc-retry-pushback-ms"); found != trailers.end()) {
    answer.pushback_ms.assign(found->second.data(), found->second.size());
  }
  return answer;
}

v1::GenerateRequest TextRequest(std::string_view text, int max_tokens) {
  v1::GenerateRequest request;
  request.set_text(std::string(text));
  request.mutable_stop()->set_max_tokens(max_tokens);
  return request;
}

std::string Letters(char first, int count) {
  std::string text;
  for (int i = 0; i < count; ++i) text += static_cast<char>(PacedToken(first, i));
  return text;
}

}  // namespace espalier
