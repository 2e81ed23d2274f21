// Probe Pruning's look ahead: some rows of a step go through a layer's full attention, or MLP,
// first, and what their heads or channels hold, fused with history, says which of them the step
// keeps (arXiv 2502.15618).
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "engine/pruning/history.h"
#include "kernels/tensor.h"
#include "policy/keep_profile.h"

namespace espalier {

struct ProbeOptions {
  enum class Rows : uint8_t {
    kTopNorm,  // published: positions of the largest residual norms, then sequences of them
    kSpread,   // as many as the budget allows, evenly spread over all rows
    kAll,      // every row, whatever the budget: full-batch probing, the published upper bound
    kPrompts,  // none: all rows of the prompts last read, as they were read, rank for decode
  };
  Rows rows = Rows::kTopNorm;
  double token_share = 0.5;      // of positions; at least 2
  double sequence_share = 0.05;  // of sequences; at least 1
  double budget = 1;             // most rows to probe, as a share of those narrowed
  int least_rows = 0;            // steps that narrow fewer prefill rows are not probed
  bool fuse = true;              // with history
  // Published as parallel probing: the channels' rows as they were before the layer's attention, so
  // that their probe need not wait for it.
  bool stale = false;
  double keep = 0.99;  // of history at an update; 1: frozen
  int learn_rows = 0;  // most rows of a step that update it, evenly spread; 0: all
  int refresh = 0;     // decode steps after which history ranks anew; 0: never
  int whole = 0;       // of so many decode steps one leaves nothing out; 0: none
  int group = 1;       // channels leave in whole aligned groups of so many
};

// As flags name them: off, then `Rows` in their order.
inline constexpr std::string_view kProbeNames[] = {"off", "top-norm", "spread", "all", "prompts"};

// What a step with narrowed rows does beyond their own work.
enum class Look : uint8_t {
  kNone,   // meets the rankings that are there
  kAhead,  // ranks anew by a probe of its prefill rows, fused with history
  kBack,   // ranks anew by history alone, or by prompts
  kWhole,  // keeps all for once, so that history sees what had left
};

struct ProbeCounts {
  int64_t rows = 0;      // probed, summed over layers' sites
  int64_t rankings = 0;  // renewed, of a layer's heads or channels each
  int64_t age = 0;       // steps with narrowed rows since the last was
};

// A row of a step: which sequence, and where in it.
struct ProbeRow {
  int sequence = 0;
  int position = 0;
};

// Rows to probe, ascending. `norms`: |residual| of each row, before the layer's norm, where they
// are kTopNorm; others do not read them. By kTopNorm s = max(ceil(share * positions), 2) positions
// of the largest root of summed squares over sequences, position 0 among them if s <= 10; then
// ceil(share * sequences) sequences by the same over those positions. Over budget, rows evenly
// spread over those.
std::vector<int> ChooseProbeRows(const ProbeOptions& options, std::span<const float> norms,
                                 std::span<const ProbeRow> rows);

// What a probe ranks one kind of site by, in columns of the weight behind it: of `down` for
// channels, each of which is a column, of `o` for heads, which have head_dim of them.
struct ProbeSites {
  History history{0, 0};
  std::vector<std::vector<float>> norms;  // DownNorms by kPpsp, [layers][columns]
};

// What Probe Pruning carries from step to step. Not thread-safe.
class Probe {
 public:
  // For rungs that narrow channels alone.
  Probe(const ProbeOptions& options, ProbeSites channels);
  Probe(const ProbeOptions& options, ProbeSites channels, ProbeSites heads, int head_dim);

  const ProbeOptions& options() const { return options_; }
  const History& history(SiteKind kind) const { return sites(kind).history; }
  const ProbeCounts& counts() const { return counts_; }

  // What the next step does, by its rows: those narrowed, and those whose sequences are narrowed
  // once they decode. Call once a step that has any.
  Look Next(int prefill_rows, int decode_rows, int prompt_rows = 0);

  // The layer's heads or channels by FusedEnergy of the rows probed times their norms, as
  // RankInBands. hidden [rows probed, columns]. Empty if less is known than the last of `counts`:
  // the others would be ranked by their numbers.
  std::vector<int32_t> Rank(int layer, SiteKind kind, ConstMatrix hidden,
                            std::span<const ProbeRow> rows, std::span<const int> counts);
  // The same by what history holds at the rows' positions, or, where prompts rank, by what those
  // held.
  std::vector<int32_t> RankByHistory(int layer, SiteKind kind, std::span<const ProbeRow> rows,
                                     std::span<const int> counts);

  // Whether it is told what narrowed rows held, or prompts of such sequences.
  bool learns() const { return options_.keep < 1 && !by_prompts(); }
  bool by_prompts() const { return options_.rows == ProbeOptions::Rows::kPrompts; }
  // After the step itself: hidden [rows, columns of those kept], of the heads or channels it kept.
  void Update(int layer, SiteKind kind, ConstMatrix hidden, std::span<const ProbeRow> rows,
              std::span<const int32_t> kept);

 private:
  struct Watched : ProbeSites {
    int width = 1;                            // columns of one
    std::vector<std::vector<float>> prompts;  // [layers][columns] sums of h^2, without position 0
  };

  const Watched& sites(SiteKind kind) const { return sites_[static_cast<int>(kind)]; }
  Watched& sites(SiteKind kind) { return sites_[static_cast<int>(kind)]; }
  std::vector<int32_t> RankByEnergy(int layer, SiteKind kind, std::span<const float> energy,
                                    std::span<const int> counts);

  ProbeOptions options_;
  std::array<Watched, kSiteKinds> sites_;
  ProbeCounts counts_;
  int64_t decode_steps_ = 0;
  bool back_due_ = false;
  bool prompts_ranked_ = false;  // so that the next ones replace them
};

// F [columns]: the sum over probed positions (or buckets, times their positions) of P fused with
// V: g P + (1 - g) V, g = P / (P + V + 1e-6), where P is the mean of h^2 over the sequences probed
// there. hidden [rows probed, columns].
std::vector<float> FusedEnergy(const ProbeOptions& options, const History& history, int layer,
                               ConstMatrix hidden, std::span<const ProbeRow> rows);

}  // namespace espalier
