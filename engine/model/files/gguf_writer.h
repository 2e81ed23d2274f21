// Writes small GGUF files of our own: metadata first, then the tensors' table, then their data.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "engine/model/files/gguf.h"
#include "engine/model/files/quant_blocks.h"

namespace espalier {

class GgufWriter {
 public:
  void Add(std::string_view key, std::string_view value);
  void Add(std::string_view key, std::span<const int32_t> values);
  void Add(std::string_view key, int64_t value);

  // [rows, cols] in the file's layout; `data` must live until Write.
  void AddTensor(std::string_view name, BlockType type, int rows, int cols,
                 std::span<const std::byte> data);

  // Through a file beside it, so that none is ever half written. Unavailable, with the path, if it
  // cannot be.
  absl::Status Write(const std::string& path) const;

 private:
  std::string metadata_, table_;
  uint64_t keys_ = 0;
  uint64_t end_ = 0;  // of the data so far
  std::vector<std::span<const std::byte>> data_;
};

}  // namespace espalier
