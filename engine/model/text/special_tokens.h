// Finds the strings of special and added tokens in raw text: leftmost, then longest.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace espalier {

class SpecialTokens {
 public:
  struct Match {
    size_t begin;  // text.size() if there is none
    size_t end;
    int32_t token;
  };

  // False if `text`, which must not be empty, stands for another token already.
  bool Add(std::string_view text, int32_t token);

  // The first match at or after `from`, in O(1) per byte that begins no special token.
  Match Find(std::string_view text, size_t from) const;

 private:
  static constexpr int32_t kNone = -1;

  // A trie: node 0 is the root, an edge is node << 8 | byte.
  std::unordered_map<uint64_t, uint32_t> edges_;
  std::vector<int32_t> token_at_ = {kNone};
  std::array<bool, 256> begins_{};  // bytes with an edge from the root
};

}  // namespace espalier
