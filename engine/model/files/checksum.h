// Whether a model's tensors are still what was written: of files that carry a checksum, as those of
// ModelRewriter do, ModelFile::Open compares it. Programs that make another model of one may copy
// the checksum with the rest of its keys, so it also says of which names, types and shapes it is:
// of others it says nothing.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "engine/model/files/model_file.h"

namespace espalier {

// A GGUF's key, or a safetensors file's in __metadata__: ModelChecksum's digits.
inline constexpr std::string_view kChecksumKey = "espalier.checksum";
inline constexpr size_t kChecksumDigits = 32;

// Of bytes that come in pieces, of which all but the last are multiples of 64 bytes. FNV-1a over
// words, in eight lanes that do not wait for each other: 20 GB/s. Any one word that differs is
// seen.
class Checksum {
 public:
  void Add(const void* bytes, size_t size);
  uint64_t value() const;

 private:
  static constexpr int kLanes = 8;
  uint64_t size_ = 0;
  std::array<uint64_t, kLanes> lanes_ = {1, 2, 3, 4, 5, 6, 7, 8};
};

// A tensor as a file has it, and the sum of its bytes.
struct TensorSum {
  std::string_view name;
  BlockType type;
  int rows, cols;
  uint64_t sum = 0;
};

// Of all tensors, in order of names; kChecksumDigits hexadecimal digits, half of them of what
// tensors there are, half of their bytes.
std::string ModelChecksum(std::span<const TensorSum> sums);

// Whether tensors, sorted by name and read whole, are those that a checksum is of, with other
// bytes.
bool Damaged(const std::vector<StoredTensor>& tensors, std::string_view checksum);

}  // namespace espalier
