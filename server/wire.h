// Messages from and to gRPC's bytes, by our hands so that a message that is none gets a reason.
//
// gRPC's callback API answers one that it cannot parse with UNIMPLEMENTED and no word.
#pragma once

#include <google/protobuf/message.h>
#include <grpcpp/support/byte_buffer.h>

#include <optional>

#include "server/rpc_error.h"

namespace espalier {

// INVALID_ARGUMENT if `bytes` are no such message; names the field where a text is not UTF-8, which
// is all that a client with the right proto can get wrong.
std::optional<RpcError> Unpack(const grpc::ByteBuffer& bytes, google::protobuf::Message* message);

void Pack(const google::protobuf::Message& message, grpc::ByteBuffer* bytes);

}  // namespace espalier
