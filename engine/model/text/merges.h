// The merges of byte-pair encoding: pieces of text to tokens.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <queue>
#include <span>
#include <string_view>
#include <vector>

namespace espalier {

class Merges {
 public:
  struct Rule {
    int32_t left;
    int32_t right;
    int32_t merged;
  };

  // Memory of one thread's work, to be used again from piece to piece.
  class Scratch {
    friend class Merges;
    struct Symbol {
      int32_t token;  // kGone: merged into the one before
      int32_t previous;
      int32_t next;
    };
    using Candidate = uint64_t;  // rank << 32 | index of the left symbol
    std::vector<Symbol> symbols;
    std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> candidates;
  };

  // No byte has a token and there are no rules.
  Merges();

  void SetByteToken(uint8_t byte, int32_t token) { byte_tokens_[byte] = token; }

  // Adds the rule of the next rank. False if its pair has one already.
  bool Add(const Rule& rule);

  // Appends the tokens of `piece`, in O(n log n): again and again the rule of lowest rank, leftmost
  // first. Bytes without a token are dropped first; their neighbours merge across the gap.
  void Encode(std::string_view piece, Scratch& scratch, std::vector<int32_t>& tokens) const;

 private:
  static constexpr int32_t kGone = -1;

  struct Slot {
    uint64_t pair;
    int32_t rank = -1;  // -1: free
  };

  size_t SlotOf(uint64_t pair) const;
  int32_t RankOf(int32_t left, int32_t right) const;  // -1: never merged
  void Grow();

  std::array<int32_t, 256> byte_tokens_;  // -1: none
  std::vector<Rule> rules_;               // by rank
  std::vector<Slot> slots_;               // open addressing, a power of two, at most half full
};

}  // namespace espalier
