#include "engine/pruning/probe.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>
#include <set>
#include <utility>

#include "engine/pruning/importance.h"

namespace espalier {
namespace {

// The `count` keys of the largest sums; of two alike the lower.
std::set<int> Largest(const std::map<int, double>& sums, int count) {
  std::vector<std::pair<double, int>> order;
  for (const auto& [key, sum] : sums) order.emplace_back(-sum, key);
  std::ranges::sort(order);
  std::set<int> keys;
  for (int i = 0; i < count && i < static_cast<int>(order.size()); ++i)
    keys.insert(order[i].second);
  return keys;
}

int ShareOf(double share, size_t of) {
  return static_cast<int>(std::ceil(share * static_cast<double>(of) - 1e-9));
}

std::vector<int> TopNormRows(const ProbeOptions& options, std::span<const float> norms,
                             std::span<const ProbeRow> rows) {
  constexpr int kTiny = 10;
  std::map<int, double> by_position, by_sequence;
  for (size_t r = 0; r < rows.size(); ++r) {
    by_position[rows[r].position] += double{norms[r]} * norms[r];
  }
  const int tokens = std::max(ShareOf(options.token_share, by_position.size()), 2);
  std::set<int> positions = Largest(by_position, tokens);
  const int first = by_position.begin()->first;
  if (tokens <= kTiny && !positions.contains(first)) {
    positions.erase(positions.begin());
    positions.insert(first);
  }
  for (size_t r = 0; r < rows.size(); ++r) {
    if (!positions.contains(rows[r].position)) continue;
    by_sequence[rows[r].sequence] += double{norms[r]} * norms[r];
  }
  const std::set<int> sequences =
      Largest(by_sequence, std::max(ShareOf(options.sequence_share, by_sequence.size()), 1));
  std::vector<int> chosen;
  for (size_t r = 0; r < rows.size(); ++r) {
    if (positions.contains(rows[r].position) && sequences.contains(rows[r].sequence)) {
      chosen.push_back(static_cast<int>(r));
    }
  }
  return chosen;
}

}  // namespace

std::vector<int> ChooseProbeRows(const ProbeOptions& options, std::span<const float> norms,
                                 std::span<const ProbeRow> rows) {
  if (rows.empty()) return {};
  std::vector<int> candidates(rows.size());
  std::iota(candidates.begin(), candidates.end(), 0);
  if (options.rows == ProbeOptions::Rows::kAll) return candidates;
  if (options.rows == ProbeOptions::Rows::kTopNorm) candidates = TopNormRows(options, norms, rows);
  const double most = std::floor(options.budget * static_cast<double>(rows.size()) + 1e-9);
  const size_t count = std::clamp<size_t>(static_cast<size_t>(most), 1, candidates.size());
  std::vector<int> chosen(count);
  for (size_t i = 0; i < count; ++i) {
    chosen[i] = candidates[(2 * i + 1) * candidates.size() / (2 * count)];
  }
  return chosen;
}

std::vector<float> FusedEnergy(const ProbeOptions& options, const History& history, int layer,
                               ConstMatrix hidden, std::span<const ProbeRow> rows) {
  // Rows by bucket, each bucket's in their order.
  std::vector<std::pair<int, int>> order;  // bucket, row
  for (int r = 0; r < hidden.rows; ++r) order.emplace_back(history.BucketOf(rows[r].position), r);
  std::ranges::sort(order);
  std::vector<float> fused(hidden.cols), squares;
  std::vector<int> at;  // positions of a bucket
  for (size_t begin = 0, end = 0; begin < order.size(); begin = end) {
    const int bucket = order[begin].first;
    squares.assign(hidden.cols, 0);
    at.clear();
    for (; end < order.size() && order[end].first == bucket; ++end) {
      at.push_back(rows[order[end].second].position);
      const float* const h = hidden.row(order[end].second);
      for (int c = 0; c < hidden.cols; ++c) squares[c] += h[c] * h[c];
    }
    std::ranges::sort(at);
    const auto same = std::ranges::unique(at);
    const auto positions = static_cast<float>(at.size() - same.size());
    const auto count = static_cast<float>(end - begin);
    if (!options.fuse) {
      for (int c = 0; c < hidden.cols; ++c) fused[c] += positions * (squares[c] / count);
      continue;
    }
    const std::span<const float> past = history.Energy(layer, bucket);
    for (int c = 0; c < hidden.cols; ++c) {
      const float p = squares[c] / count, v = past[c];
      const float g = p / (p + v + 1e-6f);
      fused[c] += positions * (g * p + (1 - g) * v);
    }
  }
  return fused;
}

Probe::Probe(const ProbeOptions& options, ProbeSites channels)
    : Probe(options, std::move(channels), {}, 1) {}

Probe::Probe(const ProbeOptions& options, ProbeSites channels, ProbeSites heads, int head_dim)
    : options_(options), sites_{{{std::move(heads), head_dim}, {std::move(channels), 1}}} {
  for (Watched& of : sites_) of.prompts.resize(of.norms.size());
}

Look Probe::Next(int prefill_rows, int decode_rows, int prompt_rows) {
  ++counts_.age;
  if (by_prompts()) {
    if (prompt_rows > 0) {
      for (Watched& of : sites_) {
        if (prompts_ranked_) std::ranges::fill(of.prompts, std::vector<float>());
      }
      prompts_ranked_ = false;
      return Look::kNone;
    }
    const auto unread = [](const Watched& of) {
      return std::ranges::all_of(of.prompts, &std::vector<float>::empty);
    };
    if (prompts_ranked_ || decode_rows == 0 || std::ranges::all_of(sites_, unread)) {
      return Look::kNone;
    }
    prompts_ranked_ = true;
    return Look::kBack;
  }
  if (prefill_rows > 0 && prefill_rows >= options_.least_rows) return Look::kAhead;
  if (prefill_rows > 0 || decode_rows == 0) return Look::kNone;
  ++decode_steps_;
  back_due_ = back_due_ || (options_.refresh > 0 && decode_steps_ % options_.refresh == 0);
  // Where both are due, the next step looks back, at what this one shows. None is shown to who does
  // not learn.
  if (learns() && options_.whole > 0 && decode_steps_ % options_.whole == 0) return Look::kWhole;
  return std::exchange(back_due_, false) ? Look::kBack : Look::kNone;
}

std::vector<int32_t> Probe::Rank(int layer, SiteKind kind, ConstMatrix hidden,
                                 std::span<const ProbeRow> rows, std::span<const int> counts) {
  counts_.rows += hidden.rows;
  return RankByEnergy(layer, kind, FusedEnergy(options_, history(kind), layer, hidden, rows),
                      counts);
}

std::vector<int32_t> Probe::RankByHistory(int layer, SiteKind kind, std::span<const ProbeRow> rows,
                                          std::span<const int> counts) {
  const Watched& of = sites(kind);
  std::vector<float> energy(of.history.columns());
  if (by_prompts()) {
    if (!of.prompts[layer].empty()) energy = of.prompts[layer];
    rows = {};
  }
  for (const ProbeRow& row : rows) {
    const std::span<const float> past = of.history.Energy(layer, of.history.BucketOf(row.position));
    for (size_t c = 0; c < energy.size(); ++c) energy[c] += past[c];
  }
  return RankByEnergy(layer, kind, energy, counts);
}

std::vector<int32_t> Probe::RankByEnergy(int layer, SiteKind kind, std::span<const float> energy,
                                         std::span<const int> counts) {
  const Watched& of = sites(kind);
  int known = 0;
  for (size_t at = 0; at < energy.size(); at += of.width) {
    const std::span<const float> one = energy.subspan(at, of.width);
    known += std::ranges::any_of(one, [](float e) { return e != 0; }) ? 1 : 0;
  }
  if (known == 0 || (!counts.empty() && known < counts.back())) return {};
  ++counts_.rankings;
  counts_.age = 0;
  std::vector<float> scores = Scores(Importance::kPpsp, energy, {}, of.norms[layer]);
  if (kind == SiteKind::kHeads) return RankInBands(HeadScores(of.width, scores), counts);
  ScoreGroups(options_.group, scores);
  return RankInBands(scores, counts);
}

void Probe::Update(int layer, SiteKind kind, ConstMatrix hidden, std::span<const ProbeRow> rows,
                   std::span<const int32_t> kept) {
  Watched& of = sites(kind);
  std::vector<int32_t> columns;
  if (of.width > 1) {
    for (const int32_t head : kept) {
      for (int d = 0; d < of.width; ++d) columns.push_back(head * of.width + d);
    }
    kept = columns;
  }
  if (by_prompts()) {
    std::vector<float>& sums = of.prompts[layer];
    sums.resize(of.history.columns());
    for (int r = 0; r < hidden.rows; ++r) {
      if (rows[r].position == 0) continue;
      const float* const h = hidden.row(r);
      for (size_t i = 0; i < kept.size(); ++i) sums[kept[i]] += h[i] * h[i];
    }
    return;
  }
  if (!learns()) return;
  const int most = options_.learn_rows;
  const int every = most == 0 ? 1 : std::max(1, (hidden.rows + most - 1) / most);
  std::vector<int> positions;
  for (size_t r = 0; r < rows.size(); r += every) positions.push_back(rows[r].position);
  of.history.Update(layer,
                    ConstMatrix(hidden.data, static_cast<int>(positions.size()), hidden.cols,
                                hidden.stride * every),
                    positions, kept, options_.keep);
}

}  // namespace espalier
