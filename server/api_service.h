// espalier.v1.EspalierService: hands streamed calls to their reactors and answers the short ones.
#pragma once

#include <grpcpp/support/byte_buffer.h>

#include <atomic>
#include <functional>
#include <string>

#include "espalier/v1/espalier.grpc.pb.h"
#include "server/call.h"

namespace espalier {

// The service with every method on bytes: see wire.h.
using RawService = v1::EspalierService::WithRawCallbackMethod_Generate<
    v1::EspalierService::WithRawCallbackMethod_Score<
        v1::EspalierService::WithRawCallbackMethod_Tokenize<
            v1::EspalierService::WithRawCallbackMethod_Detokenize<
                v1::EspalierService::WithRawCallbackMethod_GetModel<
                    v1::EspalierService::WithRawCallbackMethod_GetLoad<
                        v1::EspalierService::WithRawCallbackMethod_GetDecisions<
                            v1::EspalierService::WithRawCallbackMethod_SetMemoryBudget<
                                v1::EspalierService::WithRawCallbackMethod_ReloadModel<
                                    v1::EspalierService::Service>>>>>>>>>;

class ApiService final : public RawService {
 public:
  // `foreign_bytes`: what other processes hold of the machine's memory, asked per GetLoad.
  ApiService(CallOptions options, std::string server_version,
             std::function<uint64_t()> foreign_bytes)
      : options_(std::move(options)),
        server_version_(std::move(server_version)),
        foreign_bytes_(std::move(foreign_bytes)) {}

  // From here on calls are served; before, they are UNAVAILABLE. `backstage` outlives the calls.
  void Open(const Backstage* backstage) { backstage_.store(backstage, std::memory_order_release); }

  // Waits until no streamed call is left; false at `until`, or if nobody reads for as long as
  // CallOptions::stall_grace.
  bool WaitForCalls(Instant until) {
    return options_.count->WaitForNone(until, options_.stall_grace);
  }

  grpc::ServerWriteReactor<grpc::ByteBuffer>* Generate(grpc::CallbackServerContext* context,
                                                       const grpc::ByteBuffer* request) override;
  grpc::ServerUnaryReactor* Score(grpc::CallbackServerContext* context,
                                  const grpc::ByteBuffer* request,
                                  grpc::ByteBuffer* response) override;
  grpc::ServerUnaryReactor* Tokenize(grpc::CallbackServerContext* context,
                                     const grpc::ByteBuffer* request,
                                     grpc::ByteBuffer* response) override;
  grpc::ServerUnaryReactor* Detokenize(grpc::CallbackServerContext* context,
                                       const grpc::ByteBuffer* request,
                                       grpc::ByteBuffer* response) override;
  grpc::ServerUnaryReactor* GetModel(grpc::CallbackServerContext* context,
                                     const grpc::ByteBuffer* request,
                                     grpc::ByteBuffer* response) override;
  grpc::ServerUnaryReactor* GetLoad(grpc::CallbackServerContext* context,
                                    const grpc::ByteBuffer* request,
                                    grpc::ByteBuffer* response) override;
  grpc::ServerUnaryReactor* GetDecisions(grpc::CallbackServerContext* context,
                                         const grpc::ByteBuffer* request,
                                         grpc::ByteBuffer* response) override;
  grpc::ServerUnaryReactor* SetMemoryBudget(grpc::CallbackServerContext* context,
                                            const grpc::ByteBuffer* request,
                                            grpc::ByteBuffer* response) override;
  grpc::ServerUnaryReactor* ReloadModel(grpc::CallbackServerContext* context,
                                        const grpc::ByteBuffer* request,
                                        grpc::ByteBuffer* response) override;

 private:
  const Backstage* backstage() const { return backstage_.load(std::memory_order_acquire); }

  const CallOptions options_;
  const std::string server_version_;
  const std::function<uint64_t()> foreign_bytes_;
  std::atomic<const Backstage*> backstage_{nullptr};
};

}  // namespace espalier
