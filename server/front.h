// The server on the network: listening, limits, health, reflection. It is up before the model is.
#pragma once

#include <grpcpp/grpcpp.h>

#include <chrono>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "server/api_service.h"
#include "server/options.h"

namespace espalier {

class Front {
 public:
  // Listens at options.host:port and answers health (NOT_SERVING) and reflection from then on.
  // `service` must outlive it. Unavailable, naming the address, if it cannot be listened at.
  static absl::StatusOr<std::unique_ptr<Front>> Start(const ServerOptions& options,
                                                      ApiService* service);
  ~Front();

  int port() const { return port_; }

  // Health of "" and of our service; Watch is told.
  void SetServing(bool serving);

  // Closes all connections, after `grace` also those with calls, and waits. Health says NOT_SERVING
  // for good.
  void Shutdown(std::chrono::milliseconds grace);

 private:
  Front() = default;

  std::unique_ptr<grpc::Server> server_;
  int port_ = 0;
};

}  // namespace espalier
