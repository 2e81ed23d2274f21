#include "policy/blocks/block_orders.h"

#include <algorithm>
#include <charconv>
#include <cmath>

namespace espalier {
namespace {

constexpr std::string_view kMagic = "espalier-blocks 1";
constexpr int kMostLayers = kMostBlocks / 2;

// The next word of *line, and behind it.
std::string_view Word(std::string_view* line) {
  line->remove_prefix(std::min(line->find_first_not_of(" \t\r"), line->size()));
  const std::string_view word = line->substr(0, line->find_first_of(" \t\r"));
  line->remove_prefix(word.size());
  return word;
}

// "name=7", with what follows the sign in [1, most].
bool ReadField(std::string_view word, std::string_view name, int64_t most, int64_t* value) {
  if (!word.starts_with(name)) return false;
  word.remove_prefix(name.size());
  const char* const end = word.data() + word.size();
  const auto [stop, error] = std::from_chars(word.data(), end, *value);
  return error == std::errc() && stop == end && *value >= 1 && *value <= most;
}

// "a7" of a model of so many layers; -1: none.
int ReadBlock(std::string_view word, int layers) {
  int layer = 0;
  if (word.size() < 2 || (word[0] != 'a' && word[0] != 'm')) return -1;
  const char* const end = word.data() + word.size();
  const auto [stop, error] = std::from_chars(word.data() + 1, end, layer);
  if (error != std::errc() || stop != end || layer < 0 || layer >= layers) return -1;
  return word[0] == 'a' ? AttentionBlock(layer) : MlpBlock(layer);
}

std::string Quoted(std::string_view word) {
  std::string quoted("'");
  return quoted.append(word.substr(0, 40)).append("'");
}

// Of a line behind the first; empty: it is well.
std::string ReadLine(std::string_view line, BlockOrders* orders) {
  const std::string_view name = Word(&line);
  if (name.empty() || name.starts_with('#')) return "";
  const std::string_view field = Word(&line);
  int64_t value = 0;
  if (name == "model") {
    if (orders->layers > 0) return "a second model";
    if (!ReadField(field, "layers=", kMostLayers, &value)) {
      return "expected layers=1 to layers=" + std::to_string(kMostLayers) + ", got " +
             Quoted(field);
    }
    orders->layers = static_cast<int>(value);
    return Word(&line).empty() ? "" : "more than layers";
  }
  if (name != "order") return "expected model or order, got " + Quoted(name);
  if (orders->layers == 0) return "an order before the model";
  if (!ReadField(field, "tokens=", int64_t{1} << 40, &value)) {
    return "expected tokens= and a positive count, got " + Quoted(field);
  }
  if (std::ranges::find(orders->orders, value, &BlockOrder::tokens) != orders->orders.end()) {
    return "a second order for as many tokens";
  }
  BlockOrder order{.tokens = value};
  BlockSet seen;
  for (std::string_view word; !(word = Word(&line)).empty();) {
    const int block = ReadBlock(word, orders->layers);
    if (block < 0) {
      return "expected a block, a0 to m" + std::to_string(orders->layers - 1) + ", got " +
             Quoted(word);
    }
    if (seen[block]) return Quoted(word) + " a second time";
    seen.set(block);
    order.blocks.push_back(block);
  }
  orders->orders.push_back(std::move(order));
  return "";
}

}  // namespace

const BlockOrder& BlockOrders::For(int64_t tokens) const {
  return *std::ranges::min_element(orders, {}, [&](const BlockOrder& order) {
    return std::abs(std::log2(static_cast<double>(order.tokens) / static_cast<double>(tokens)));
  });
}

bool ParseBlockOrders(std::string_view text, BlockOrders* orders, std::string* error) {
  BlockOrders read;
  for (int number = 1; number == 1 || !text.empty(); ++number) {
    std::string_view line = text.substr(0, text.find('\n'));
    text.remove_prefix(std::min(line.size() + 1, text.size()));
    if (line.ends_with('\r')) line.remove_suffix(1);
    const std::string wrong = number > 1       ? ReadLine(line, &read)
                              : line == kMagic ? ""
                                               : "expected '" + std::string(kMagic) + "'";
    if (wrong.empty()) continue;
    *error = "line " + std::to_string(number) + ": " + wrong;
    return false;
  }
  if (read.orders.empty()) {
    *error = "it has no order";
    return false;
  }
  *orders = std::move(read);
  return true;
}

std::string FormatBlockOrders(const BlockOrders& orders, std::string_view comment) {
  std::string text(kMagic);
  text += '\n';
  while (!comment.empty()) {
    const std::string_view line = comment.substr(0, comment.find('\n'));
    comment.remove_prefix(std::min(line.size() + 1, comment.size()));
    text.append("# ").append(line).append("\n");
  }
  text.append("model layers=").append(std::to_string(orders.layers)).append("\n");
  for (const BlockOrder& order : orders.orders) {
    text.append("order tokens=").append(std::to_string(order.tokens));
    for (const int block : order.blocks) {
      text.append(IsAttention(block) ? " a" : " m").append(std::to_string(LayerOfBlock(block)));
    }
    text += '\n';
  }
  return text;
}

}  // namespace espalier
