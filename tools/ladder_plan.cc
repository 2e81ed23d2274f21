#include "tools/ladder_plan.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <iterator>
#include <string>

#include "absl/status/status.h"
#include "kernels/weight.h"
#include "policy/blocks/block_orders.h"
#include "policy/kept_counts.h"

namespace espalier {
namespace {

constexpr int kChannelMultiple = 64;  // the published code's; also what a task of the kernels takes

}  // namespace

bool ReadRung(std::string_view text, RungPlan* plan) {
  plan->int4_kv = text.ends_with(kInt4Rung);
  if (plan->int4_kv) text.remove_suffix(kInt4Rung.size());
  const char* const end = text.data() + text.size();
  const char* stop = text.data();
  const auto share = [&](double* to) {
    const auto read = std::from_chars(stop, end, *to);
    stop = read.ptr;
    return read.ec == std::errc() && *to >= 0 && *to <= 0.95;
  };
  if (!share(&plan->ratio)) return false;
  if (stop != end && *stop == 'h') {
    ++stop;
    if (!share(&plan->heads)) return false;
  }
  if (stop != end) {
    if (*stop != '+') return false;
    const auto blocks = std::from_chars(stop + 1, end, plan->blocks);
    if (blocks.ec != std::errc() || blocks.ptr != end || plan->blocks < 1) return false;
  }
  return plan->ratio > 0 || plan->heads > 0 || plan->blocks > 0 || plan->int4_kv;
}

CLI::Validator IsRung() {
  const auto check = [](std::string& text) -> std::string {
    RungPlan plan;
    return ReadRung(text, &plan)
               ? ""
               : fmt::format("expected RATIO[hHEADS][+BLOCKS], with {} behind it or not, got {}",
                             kInt4Rung, text);
  };
  return CLI::Validator(check, "");
}

absl::StatusOr<Ladder> PlanLadder(const LayerWidths& widths, const ModelConfig& config,
                                  std::span<const RungPlan> plans,
                                  std::span<const int> drop_order) {
  const auto kept = [&](double ratio) {
    return KeptChannels(config.channels,
                        NarrowedLayerRatio(config.layers, widths.dense_layers, ratio),
                        config.channels % kChannelMultiple == 0 ? kChannelMultiple : kQuantGroup);
  };
  const auto kept_heads = [&](double ratio) {
    return KeptHeads(config.heads, NarrowedLayerRatio(config.layers, widths.dense_layers, ratio));
  };
  const int narrowed = config.layers - widths.dense_layers;
  Ladder ladder = Ladder::DenseOnly(config.sites());
  for (const RungPlan& plan : plans) {
    const auto above = std::ranges::lower_bound(widths.left_out, plan.ratio);
    const double harder = above == widths.left_out.end() ? plan.ratio : *above;
    const double milder = above == widths.left_out.begin() ? 0 : *std::prev(above);
    const auto front = std::lround(narrowed * (plan.ratio - milder) / (harder - milder));
    KeepProfile keep = KeepProfile::Dense(config.sites());
    for (int layer = widths.dense_layers; layer < config.layers; ++layer) {
      const bool first = layer - widths.dense_layers < front;
      keep.Keep(layer, SiteKind::kChannels, kept(first ? harder : milder));
      keep.Keep(layer, SiteKind::kHeads, kept_heads(plan.heads));
    }
    if (plan.blocks > static_cast<int>(drop_order.size())) {
      return absl::InvalidArgumentError(fmt::format("--rungs: {} blocks to drop, of {} that may",
                                                    plan.blocks, drop_order.size()));
    }
    for (const int block : drop_order.first(plan.blocks)) {
      keep.Keep(LayerOfBlock(block), IsAttention(block) ? SiteKind::kHeads : SiteKind::kChannels,
                0);
    }
    const Rung& last = ladder.rung(ladder.size() - 1);
    if (keep == last.decode && plan.int4_kv == last.int4_kv) continue;  // nothing to tell apart
    if (!ladder.Append({.prefill = keep, .decode = keep, .price = {}, .int4_kv = plan.int4_kv})) {
      return absl::InvalidArgumentError(
          fmt::format("--rungs: {}h{}+{} leaves out fewer heads or blocks, or keeps K and V at "
                      "more bits, than a "
                      "rung of a smaller ratio",
                      plan.ratio, plan.heads, plan.blocks));
    }
  }
  if (ladder.size() == 1) {
    return absl::InvalidArgumentError("--rungs: none of them narrows this model");
  }
  return ladder;
}

}  // namespace espalier
