#include "server/front.h"

#include <fmt/format.h>
#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/health_check_service_interface.h>
#include <grpcpp/resource_quota.h>
#include <netdb.h>

#include <algorithm>
#include <utility>

#include "absl/status/status.h"
#include "grpc/health/v1/health.pb.h"

namespace espalier {
namespace {

constexpr std::string_view kServiceName = "espalier.v1.EspalierService";

// Clients and sidecars ping as often as this, also between calls and during long unary ones, and
// must not be sent away for it ("too_many_pings").
constexpr int kMinPingMs = 10'000;
// A client that vanished without a word is found after this, and its pages come back.
constexpr int kKeepaliveMs = 30'000;
constexpr int kKeepaliveTimeoutMs = 10'000;
// What gRPC may hold in buffers before it sheds connections: many messages, but not all memory.
constexpr size_t kMinQuotaBytes = size_t{256} << 20;

void SetLimits(const ServerOptions& options, grpc::ServerBuilder* builder) {
  builder->SetMaxReceiveMessageSize(static_cast<int>(options.max_message_bytes));
  // The macros: the core ignores a name that it does not know without a word.
  builder->AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, kMinPingMs);
  builder->AddChannelArgument(GRPC_ARG_HTTP2_MAX_PING_STRIKES, 0);
  builder->AddChannelArgument(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, kKeepaliveMs);
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, kKeepaliveTimeoutMs);
  // A port in use is an error, not a port shared with another process.
  builder->AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  if (options.max_connection_age.count() > 0) {
    builder->AddChannelArgument(GRPC_ARG_MAX_CONNECTION_AGE_MS,
                                static_cast<int>(options.max_connection_age.count()));
    if (options.max_connection_age_grace.count() > 0) {
      builder->AddChannelArgument(GRPC_ARG_MAX_CONNECTION_AGE_GRACE_MS,
                                  static_cast<int>(options.max_connection_age_grace.count()));
    }
  }
  grpc::ResourceQuota quota("espalier");
  quota.Resize(std::max(kMinQuotaBytes, size_t{16} * options.max_message_bytes));
  builder->SetResourceQuota(quota);
}

}  // namespace

absl::StatusOr<std::unique_ptr<Front>> Front::Start(const ServerOptions& options,
                                                    ApiService* service) {
  // Both before the builder is made. Naming the plugin and a health message links them in.
  grpc::EnableDefaultHealthCheckService(true);
  grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  (void)grpc::health::v1::HealthCheckRequest::descriptor();

  std::unique_ptr<Front> front(new Front);
  grpc::ServerBuilder builder;
  const std::string address = options.host.find(':') == std::string::npos
                                  ? fmt::format("{}:{}", options.host, options.port)
                                  : fmt::format("[{}]:{}", options.host, options.port);
  addrinfo* found = nullptr;
  if (const int error = getaddrinfo(options.host.c_str(), nullptr, nullptr, &found); error != 0) {
    return absl::UnavailableError(
        fmt::format("--host: cannot resolve {}: {}", options.host, gai_strerror(error)));
  }
  freeaddrinfo(found);
  builder.AddListeningPort(address, grpc::InsecureServerCredentials(), &front->port_);
  builder.RegisterService(service);
  SetLimits(options, &builder);
  front->server_ = builder.BuildAndStart();
  if (front->server_ == nullptr || front->port_ == 0) {
    return absl::UnavailableError(
        fmt::format("--host, --port: cannot listen at {}: in use or not ours", address));
  }
  front->SetServing(false);
  return front;
}

Front::~Front() {
  if (server_ != nullptr) Shutdown(std::chrono::milliseconds(0));
}

void Front::SetServing(bool serving) {
  grpc::HealthCheckServiceInterface* health = server_->GetHealthCheckService();
  health->SetServingStatus("", serving);
  health->SetServingStatus(std::string(kServiceName), serving);
}

void Front::Shutdown(std::chrono::milliseconds grace) {
  server_->GetHealthCheckService()->Shutdown();
  server_->Shutdown(std::chrono::system_clock::now() + grace);
  server_->Wait();
}

}  // namespace espalier
