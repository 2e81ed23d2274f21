#include "server/wire.h"

#include <fmt/format.h>
#include <google/protobuf/descriptor.h>
#include <google/protobuf/unknown_field_set.h>
#include <grpcpp/impl/codegen/proto_utils.h>

#include <map>
#include <string>
#include <utility>

#include "engine/model/text/tokenizer.h"

namespace espalier {
namespace {

using google::protobuf::Descriptor;
using google::protobuf::FieldDescriptor;
using google::protobuf::UnknownField;
using google::protobuf::UnknownFieldSet;

// The path of the first text in `fields`, read as a `type`, that is not UTF-8; empty if none.
std::string BadText(const UnknownFieldSet& fields, const Descriptor& type) {
  std::map<int, int> seen;  // of each field, by number
  for (int i = 0; i < fields.field_count(); ++i) {
    const UnknownField& field = fields.field(i);
    const FieldDescriptor* known = type.FindFieldByNumber(field.number());
    if (known == nullptr || field.type() != UnknownField::TYPE_LENGTH_DELIMITED) continue;
    std::string path(known->name());
    if (known->is_repeated()) path += fmt::format("[{}]", seen[field.number()]++);
    const std::string& bytes = field.length_delimited();
    if (known->type() == FieldDescriptor::TYPE_STRING) {
      if (ValidUtf8Prefix(bytes) != bytes.size()) return path;
    } else if (known->type() == FieldDescriptor::TYPE_MESSAGE) {
      UnknownFieldSet inner;
      if (!inner.ParseFromString(bytes)) continue;
      const std::string below = BadText(inner, *known->message_type());
      if (!below.empty()) return path + "." + below;
    }
  }
  return {};
}

// A message, or the fields of one.
template <typename Message>
bool Parse(grpc::ByteBuffer bytes, Message* message) {
  grpc::ProtoBufferReader reader(&bytes);
  return reader.status().ok() && message->ParseFromZeroCopyStream(&reader);
}

}  // namespace

std::optional<RpcError> Unpack(const grpc::ByteBuffer& bytes, google::protobuf::Message* message) {
  if (Parse(bytes, message)) return std::nullopt;
  const Descriptor& type = *message->GetDescriptor();
  // Fields of a byte or two become objects of fifty: what is larger is not looked into.
  constexpr size_t kLargest = 256 << 10;
  if (UnknownFieldSet fields; bytes.Length() <= kLargest && Parse(bytes, &fields)) {
    if (std::string path = BadText(fields, type); !path.empty()) {
      return BadFields({{std::move(path), "is not UTF-8"}});
    }
  }
  return BadFields({{std::string(type.name()), "cannot be parsed"}});
}

void Pack(const google::protobuf::Message& message, grpc::ByteBuffer* bytes) {
  bytes->Clear();  // gRPC wants it so
  bool own = false;
  (void)grpc::SerializationTraits<google::protobuf::Message>::Serialize(message, bytes, &own);
}

}  // namespace espalier
