#include "engine/model/text/special_tokens.h"

namespace espalier {
namespace {

uint64_t Edge(uint32_t node, char byte) {
  return static_cast<uint64_t>(node) << 8 | static_cast<uint8_t>(byte);
}

}  // namespace

bool SpecialTokens::Add(std::string_view text, int32_t token) {
  uint32_t node = 0;
  begins_[static_cast<uint8_t>(text[0])] = true;
  for (const char byte : text) {
    const auto [edge, is_new] =
        edges_.try_emplace(Edge(node, byte), static_cast<uint32_t>(token_at_.size()));
    if (is_new) token_at_.push_back(kNone);
    node = edge->second;
  }
  if (token_at_[node] != kNone) return false;
  token_at_[node] = token;
  return true;
}

SpecialTokens::Match SpecialTokens::Find(std::string_view text, size_t from) const {
  for (size_t begin = from; begin < text.size(); ++begin) {
    if (!begins_[static_cast<uint8_t>(text[begin])]) continue;
    Match match{begin, begin, kNone};
    uint32_t node = 0;
    for (size_t end = begin; end < text.size(); ++end) {
      const auto edge = edges_.find(Edge(node, text[end]));
      if (edge == edges_.end()) break;
      node = edge->second;
      if (token_at_[node] != kNone) match = {begin, end + 1, token_at_[node]};
    }
    if (match.token != kNone) return match;
  }
  return {text.size(), text.size(), kNone};
}

}  // namespace espalier
