#include "engine/model/files/checksum.h"

#include <fmt/format.h>

#include <cstring>

namespace espalier {
namespace {

constexpr uint64_t kBasis = 0xcbf29ce484222325;
constexpr uint64_t kPrime = 0x100000001b3;

uint64_t Mixed(uint64_t hash, uint64_t word) { return (hash ^ word) * kPrime; }

}  // namespace

void Checksum::Add(const void* bytes, size_t size) {
  const auto* from = static_cast<const char*>(bytes);
  size_ += size;
  while (size > 0) {
    uint64_t words[kLanes] = {};
    const size_t piece = size < sizeof(words) ? size : sizeof(words);
    std::memcpy(words, from, piece);
    for (int i = 0; i < kLanes; ++i) lanes_[i] = Mixed(lanes_[i], words[i]);
    from += piece;
    size -= piece;
  }
}

uint64_t Checksum::value() const {
  uint64_t hash = Mixed(kBasis, size_);
  for (const uint64_t lane : lanes_) hash = Mixed(hash, lane);
  return hash;
}

std::string ModelChecksum(std::span<const NamedSum> sums) {
  uint64_t hash = kBasis;
  for (const NamedSum& each : sums) {
    for (const char c : each.name) hash = Mixed(hash, static_cast<unsigned char>(c));
    hash = Mixed(hash, each.sum);
  }
  return fmt::format("{:016x}", hash);
}

std::string ModelChecksum(const std::vector<StoredTensor>& tensors) {
  std::vector<NamedSum> sums;
  for (const StoredTensor& tensor : tensors) {
    Checksum sum;
    sum.Add(tensor.data, tensor.bytes);
    sums.push_back({tensor.name, sum.value()});
  }
  return ModelChecksum(sums);
}

}  // namespace espalier
