// `espalier health`: whether the server serves, for scripts.
#include <fmt/format.h>
#include <grpc/health/v1/health.grpc.pb.h>

#include <cstdio>
#include <memory>
#include <string>

#include <CLI/CLI.hpp>

#include "tools/command.h"
#include "tools/interrupt.h"
#include "tools/remote.h"

namespace espalier {
namespace {

namespace health = grpc::health::v1;

struct Options {
  RemoteOptions remote;
  std::string service;
  bool watch = false;
  bool wait = false;
};

// Prints every change; ends when the server serves if only that is waited for.
absl::Status Watch(const Options& options, health::Health::Stub* stub,
                   const health::HealthCheckRequest& request) {
  grpc::ClientContext context;
  context.set_wait_for_ready(options.wait);  // it may not listen yet
  Limit(options.remote, &context);
  const Interrupt interrupt([&context] { context.TryCancel(); });
  const auto reader = stub->Watch(&context, request);
  health::HealthCheckResponse response;
  while (reader->Read(&response)) {
    fmt::print("{}\n", health::HealthCheckResponse::ServingStatus_Name(response.status()));
    std::fflush(stdout);
    if (options.wait && response.status() == health::HealthCheckResponse::SERVING) {
      context.TryCancel();
      reader->Finish();
      return absl::OkStatus();
    }
  }
  return FromGrpc(reader->Finish());
}

absl::Status Run(const Options& options) {
  const auto stub = health::Health::NewStub(Connect(options.remote));
  health::HealthCheckRequest request;
  request.set_service(options.service);
  if (options.watch || options.wait) return Watch(options, stub.get(), request);

  grpc::ClientContext context;
  Limit(options.remote, &context);
  health::HealthCheckResponse response;
  const absl::Status status = FromGrpc(stub->Check(&context, request, &response));
  if (!status.ok()) return status;
  const std::string name = health::HealthCheckResponse::ServingStatus_Name(response.status());
  fmt::print("{}\n", name);
  if (response.status() == health::HealthCheckResponse::SERVING) return absl::OkStatus();
  return absl::UnavailableError(fmt::format("the server is {}", name));
}

}  // namespace

void AddHealth(CLI::App& root, Action* action) {
  auto options = std::make_shared<Options>();
  CLI::App* sub =
      root.add_subcommand("health", "Print the server's health; exit code 0 only if it is SERVING");
  sub->add_option("--service", options->service,
                  "Service asked about, e.g. espalier.v1.EspalierService; empty: the whole server")
      ->type_name("NAME");
  CLI::Option* watch =
      sub->add_flag("--watch", options->watch, "Print every change until interrupted");
  sub->add_flag("--wait", options->wait, "Wait until it is SERVING, at most --deadline seconds")
      ->excludes(watch);
  AddRemoteOptions(*sub, &options->remote);
  sub->final_callback([options, action] { *action = [options] { return Run(*options); }; });
}

}  // namespace espalier
