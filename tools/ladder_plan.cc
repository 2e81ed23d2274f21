#include "tools/ladder_plan.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <functional>
#include <iterator>
#include <map>
#include <numeric>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "kernels/weight.h"
#include "policy/blocks/block_orders.h"
#include "policy/kept_counts.h"

namespace espalier {
namespace {

constexpr int kChannelMultiple = 64;  // the published code's; also what a task of the kernels takes

// Of a layer's channels, that others' staying whole, or a slope, may make it leave out; not
// measured.
constexpr double kMostOfALayer = 0.85;

int Sum(const std::vector<int>& counts) { return std::accumulate(counts.begin(), counts.end(), 0); }

// Channels kept by each layer if `ratio` of all leaves; layers keep no fewer than those before.
std::vector<int> KeptByLayer(const LayerWidths& widths, const ModelConfig& config, double ratio) {
  const int multiple =
      config.channels % kChannelMultiple == 0 ? kChannelMultiple : int{kQuantGroup};
  const int groups = config.channels / multiple;
  const int narrowed = config.layers - widths.dense_layers;
  const int uniform = KeptChannels(
      config.channels, NarrowedLayerRatio(config.layers, widths.dense_layers, ratio), multiple);
  const int to_leave = narrowed * (groups - uniform / multiple);  // in groups, of all layers
  std::vector<int> kept(config.layers, config.channels);
  if (to_leave == 0) return kept;
  const int most = static_cast<int>(kMostOfALayer * groups);
  int last = std::min(widths.last_dense_layers, narrowed - 1);
  while (last > 0 && to_leave > most * (narrowed - last)) --last;
  const int sloped = narrowed - last;
  const double mean = static_cast<double>(to_leave) / sloped;
  const double slope = mean < most ? std::min(widths.slope, most / mean - 1) : 0;
  std::vector<int> leaves;
  double sum = 0;
  for (int i = 0; i < sloped; ++i) {
    const double depth = sloped == 1 ? 0.5 : i / (sloped - 1.0);
    const long before = std::lround(sum);
    sum += mean * (1 + slope * (1 - 2 * depth));
    leaves.push_back(static_cast<int>(std::lround(sum) - before));
  }
  // Rounding takes turns where the slope is less than a group a layer.
  std::ranges::sort(leaves, std::greater());
  for (int i = 0; i < sloped; ++i) kept[widths.dense_layers + i] -= leaves[i] * multiple;
  return kept;
}

// By share left out, of all that a plan's layers may have: a greater share keeps no more anywhere.
using KeptByShare = std::map<double, std::vector<int>>;

KeptByShare KeptCountsOf(const LayerWidths& widths, const ModelConfig& config,
                         std::span<const RungPlan> plans) {
  KeptByShare kept = {{0, std::vector<int>(config.layers, config.channels)}};
  for (const double share : widths.left_out) kept[share];
  for (const RungPlan& plan : plans) {
    if (widths.left_out.empty() || plan.ratio > widths.left_out.back()) kept[plan.ratio];
  }
  for (auto milder = kept.begin(), harder = std::next(milder); harder != kept.end();
       milder = harder++) {
    harder->second = KeptByLayer(widths, config, harder->first);
    for (int layer = 0; layer < config.layers; ++layer) {
      harder->second[layer] = std::min(harder->second[layer], milder->second[layer]);
    }
  }
  return kept;
}

// The milder's counts, but for as many layers as come nearest to the ratio, which have the
// harder's: the first, whose fits then see what they were made of. Next to none the last: layers
// behind that stay whole have no fits, and make up for nothing.
std::vector<int> Between(KeptByShare::const_iterator milder, KeptByShare::const_iterator harder,
                         double ratio) {
  const double span = harder->first - milder->first;
  const double part = span == 0 ? 1 : (ratio - milder->first) / span;
  double to_leave = part * (Sum(milder->second) - Sum(harder->second));
  std::vector<int> kept = milder->second;
  const size_t layers = kept.size();
  for (size_t i = 0; i < layers; ++i) {
    const size_t layer = milder->first == 0 ? layers - 1 - i : i;
    const int more = kept[layer] - harder->second[layer];
    if (to_leave < more / 2.0) break;
    kept[layer] -= more;
    to_leave -= more;
  }
  return kept;
}

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
  const KeptByShare kept = KeptCountsOf(widths, config, plans);
  const auto kept_heads = [&](double ratio) {
    return KeptHeads(config.heads, NarrowedLayerRatio(config.layers, widths.dense_layers, ratio));
  };
  Ladder ladder = Ladder::DenseOnly(config.sites());
  for (const RungPlan& plan : plans) {
    const auto harder = kept.lower_bound(plan.ratio);
    const auto milder = harder == kept.begin() ? harder : std::prev(harder);
    const std::vector<int> counts = Between(milder, harder, plan.ratio);
    KeepProfile keep = KeepProfile::Dense(config.sites());
    for (int layer = widths.dense_layers; layer < config.layers; ++layer) {
      keep.Keep(layer, SiteKind::kChannels, counts[layer]);
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
