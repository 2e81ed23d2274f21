#include "engine/model/text/merges.h"

#include <algorithm>
#include <cstddef>

namespace espalier {
namespace {

uint64_t PairKey(int32_t left, int32_t right) {
  return static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right);
}

}  // namespace

Merges::Merges() : slots_(16) { byte_tokens_.fill(-1); }

size_t Merges::SlotOf(uint64_t pair) const {
  const size_t mask = slots_.size() - 1;
  size_t slot = (pair * 0x9E3779B97F4A7C15u >> 32) & mask;  // 2^64 / golden ratio
  while (slots_[slot].rank >= 0 && slots_[slot].pair != pair) slot = (slot + 1) & mask;
  return slot;
}

int32_t Merges::RankOf(int32_t left, int32_t right) const {
  return slots_[SlotOf(PairKey(left, right))].rank;
}

void Merges::Grow() {
  std::vector<Slot> old(slots_.size() * 2);
  old.swap(slots_);
  for (const Slot& slot : old) {
    if (slot.rank >= 0) slots_[SlotOf(slot.pair)] = slot;
  }
}

bool Merges::Add(const Rule& rule) {
  if (rules_.size() * 2 >= slots_.size()) Grow();
  const uint64_t pair = PairKey(rule.left, rule.right);
  Slot& slot = slots_[SlotOf(pair)];
  if (slot.rank >= 0) return false;
  slot = {pair, static_cast<int32_t>(rules_.size())};
  rules_.push_back(rule);
  return true;
}

void Merges::Encode(std::string_view piece, Scratch& scratch, std::vector<int32_t>& tokens) const {
  auto& symbols = scratch.symbols;
  auto& candidates = scratch.candidates;
  symbols.clear();
  for (const char c : piece) {
    const int32_t token = byte_tokens_[static_cast<uint8_t>(c)];
    const auto index = static_cast<int32_t>(symbols.size());
    if (token >= 0) symbols.push_back({token, index - 1, index + 1});
  }
  const auto count = static_cast<int32_t>(symbols.size());
  const auto consider = [&](int32_t left) {
    const int32_t right = symbols[left].next;
    if (right == count) return;
    const int32_t rank = RankOf(symbols[left].token, symbols[right].token);
    if (rank >= 0) candidates.push(static_cast<uint64_t>(rank) << 32 | static_cast<uint32_t>(left));
  };
  for (int32_t i = 0; i < count; ++i) consider(i);
  while (!candidates.empty()) {
    const Rule& rule = rules_[candidates.top() >> 32];
    const auto left = static_cast<int32_t>(candidates.top() & 0xFFFFFFFFu);
    candidates.pop();
    const int32_t right = symbols[left].next;
    // A candidate is stale once either of its symbols went into another merge.
    if (right == count || symbols[left].token != rule.left || symbols[right].token != rule.right) {
      continue;
    }
    symbols[left].token = rule.merged;
    symbols[left].next = symbols[right].next;
    symbols[right].token = kGone;
    if (symbols[left].next < count) symbols[symbols[left].next].previous = left;
    consider(left);
    if (symbols[left].previous >= 0) consider(symbols[left].previous);
  }
  for (int32_t i = 0; i < count; i = symbols[i].next) tokens.push_back(symbols[i].token);
}

}  // namespace espalier
