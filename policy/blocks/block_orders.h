// Removal orders of blocks as text: what `espalier train --task rap` writes and calibration reads.
//
//   espalier-blocks 1
//   # Comments and empty lines anywhere after the first.
//   model layers=30
//   order tokens=4096 a24 a11 m20 a9
//
// An order is for about so many resident tokens; aL is the attention of layer L, mL its MLP block.
// What fits a budget is a prefix of it.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "policy/blocks/block_memory.h"

namespace espalier {

struct BlockOrder {
  int64_t tokens = 0;
  std::vector<int> blocks;

  bool operator==(const BlockOrder&) const = default;
};

struct BlockOrders {
  int layers = 0;
  std::vector<BlockOrder> orders;  // of different tokens

  // The one for about so many tokens, on a log scale; orders must not be empty.
  const BlockOrder& For(int64_t tokens) const;
};

// False, with the line and what is wrong with it in *error, if the text is none. *orders is then as
// it was.
bool ParseBlockOrders(std::string_view text, BlockOrders* orders, std::string* error);

// What ParseBlockOrders reads back to the same. `comment` becomes lines behind the first.
std::string FormatBlockOrders(const BlockOrders& orders, std::string_view comment);

}  // namespace espalier
