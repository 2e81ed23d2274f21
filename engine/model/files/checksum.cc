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

std::string ModelChecksum(std::span<const TensorSum> sums) {
  uint64_t layout = kBasis, bytes = kBasis;
  for (const TensorSum& each : sums) {
    for (const char c : each.name) layout = Mixed(layout, static_cast<unsigned char>(c));
    for (const int number : {static_cast<int>(each.type), each.rows, each.cols}) {
      layout = Mixed(layout, static_cast<uint64_t>(number));
    }
    bytes = Mixed(bytes, each.sum);
  }
  return fmt::format("{:016x}{:016x}", layout, bytes);
}

bool Damaged(const std::vector<StoredTensor>& tensors, std::string_view checksum) {
  std::vector<TensorSum> sums;
  for (const StoredTensor& tensor : tensors) {
    sums.push_back({tensor.name, tensor.type, tensor.rows, tensor.cols});
  }
  constexpr size_t kOfLayout = kChecksumDigits / 2;
  if (checksum.substr(0, kOfLayout) != std::string_view(ModelChecksum(sums)).substr(0, kOfLayout)) {
    return false;
  }
  for (size_t i = 0; i < sums.size(); ++i) {
    Checksum sum;
    sum.Add(tensors[i].data, tensors[i].bytes);
    sums[i].sum = sum.value();
  }
  return ModelChecksum(sums) != checksum;
}

}  // namespace espalier
