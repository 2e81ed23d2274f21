// Fuzzes the way from gRPC's bytes to messages. The input: a letter for the kind of request, a byte
// that says where gRPC cut the rest in two, then the message's bytes.
#include <grpcpp/grpcpp.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "espalier/v1/espalier.pb.h"
#include "server/wire.h"
#include "tests/fuzz/fuzz_check.h"

namespace espalier {
namespace {

std::unique_ptr<google::protobuf::Message> NewMessage(uint8_t letter) {
  switch (letter) {
    case 'g':
      return std::make_unique<v1::GenerateRequest>();
    case 's':
      return std::make_unique<v1::ScoreRequest>();
    case 't':
      return std::make_unique<v1::TokenizeRequest>();
    case 'd':
      return std::make_unique<v1::DetokenizeRequest>();
    default:
      return nullptr;
  }
}

void RequireTellable(const RpcError& error) {
  Require(error.status.error_code() == grpc::StatusCode::INVALID_ARGUMENT, "the caller's fault");
  Require(error.status.error_message().find('\n') == std::string::npos, "an error is one line");
  Require(error.status.error_message().size() + error.status.error_details().size() * 4 / 3 < 8000,
          "an error fits the trailers");
}

}  // namespace
}  // namespace espalier

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace espalier;  // NOLINT: the entry point cannot lie in it
  const auto message = size < 2 ? nullptr : NewMessage(data[0]);
  if (message == nullptr) return 0;
  const std::string_view bytes(reinterpret_cast<const char*>(data) + 2, size - 2);
  const size_t cut = data[1] * bytes.size() / 256;
  const grpc::Slice slices[] = {grpc::Slice(bytes.data(), cut),
                                grpc::Slice(bytes.data() + cut, bytes.size() - cut)};
  if (const auto error = Unpack(grpc::ByteBuffer(slices, 2), message.get())) {
    RequireTellable(*error);
    return 0;
  }
  grpc::ByteBuffer packed;
  Pack(*message, &packed);
  const std::unique_ptr<google::protobuf::Message> again(message->New());
  Require(!Unpack(packed, again.get()).has_value(), "what was packed unpacks");
  Require(again->SerializeAsString() == message->SerializeAsString(), "to the same message");
  return 0;
}
