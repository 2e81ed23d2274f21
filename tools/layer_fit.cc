#include "tools/layer_fit.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <functional>
#include <map>
#include <numeric>
#include <optional>
#include <set>
#include <utility>

#include "engine/machine_memory.h"
#include "engine/model/decoder.h"
#include "engine/model/down_norms.h"
#include "engine/pruning/importance.h"
#include "engine/pruning/refit.h"
#include "engine/pruning/second_moments.h"
#include "tools/channel_fit.h"

namespace espalier {
namespace {

using Stream = std::vector<float>;  // [windows * tokens of each, hidden]

// What met `o`, column by column.
struct HeadSums {
  std::vector<double> first, squares;  // [heads * head_dim]
  int64_t rows = 0;

  void Add(ConstMatrix attended) {
    first.resize(attended.cols);
    squares.resize(attended.cols);
    rows += attended.rows;
    for (int r = 0; r < attended.rows; ++r) {
      const float* const x = attended.row(r);
      for (int j = 0; j < attended.cols; ++j) {
        first[j] += x[j];
        squares[j] += double{x[j]} * x[j];
      }
    }
  }
};

// Heads by the sum of their columns' scores.
std::vector<int32_t> RankHeads(const std::string& by, std::span<const float> o, int heads,
                               const HeadSums& sums) {
  const Importance importance = PublishedMeasure(by).value_or(Importance::kPpsp);
  const auto columns = static_cast<int>(sums.first.size());
  std::vector<float> energy, mean;
  for (int j = 0; j < columns; ++j) {
    energy.push_back(static_cast<float>(sums.squares[j] / static_cast<double>(sums.rows)));
    mean.push_back(static_cast<float>(sums.first[j] / static_cast<double>(sums.rows)));
  }
  const std::vector<float> scores =
      Scores(importance, energy, mean, DownNorms(importance, o, columns));
  return RankByScore(HeadScores(columns / heads, scores));
}

class LayerFit {
 public:
  LayerFit(const LayerFitOptions& options, const Ladder& planned, const ModelFile& file,
           std::span<const std::vector<int32_t>> windows, ModelExecutor* executor, Backend* backend,
           const std::function<bool(int64_t, int64_t)>& progress)
      : options_(options),
        planned_(planned),
        file_(file),
        config_(file.config()),
        windows_(windows),
        executor_(executor),
        backend_(backend),
        progress_(progress),
        rungs_(options.compensation == Compensation::kNone ? 1 : planned.size()),
        counts_(KeptCounts(planned)),
        fitted_(Fitted()) {
    const size_t pages = (windows.front().size() + kPageTokens - 1) / kPageTokens;
    tables_.resize(config_.layers);
    for (std::vector<int32_t>& table : tables_) {
      for (size_t i = 0; i < pages; ++i) table.push_back(static_cast<int32_t>(i));
    }
    streams_.resize(rungs_);
    std::set<int> left;  // the dense stream
    for (int layer = 0; layer < config_.layers; ++layer) {
      ++total_;
      if (rungs_ == 1) continue;
      const std::vector<int> narrowed = Narrowed(layer);
      left.insert(narrowed.begin(), narrowed.end());
      total_ += static_cast<int64_t>(counts_[layer].size());
      if (layer + 1 < config_.layers) total_ += static_cast<int64_t>(left.size());
    }
  }

  absl::StatusOr<PruningData> Run() {
    using Clock = std::chrono::steady_clock;
    if (absl::Status status = CheckMemory(); !status.ok()) return status;
    dense_.resize(Tokens() * config_.hidden);
    data_.layers.resize(config_.layers);
    Resume();
    Clock::time_point saved = Clock::now();
    for (int layer = 0; layer < config_.layers; ++layer) {
      absl::Status status = FitLayer(layer, &data_.layers[layer]);
      const bool due = Clock::now() - saved > kCheckpointEvery && layer >= found_;
      if (!options_.checkpoint.empty() && (absl::IsCancelled(status) || (status.ok() && due))) {
        const int done = std::max(found_, status.ok() ? layer + 1 : layer);
        status.Update(Save(done));
        saved = Clock::now();
      }
      if (!status.ok()) return status;
    }
    return std::move(data_);
  }

 private:
  static constexpr std::chrono::minutes kCheckpointEvery{1};
  // Of the median row's energy. Of SmolLM2-135M's rows after layer 11 the ordinary have up to 5 of
  // it, sinks 10,000.
  static constexpr double kSinkEnergy = 100;

  size_t Tokens() const { return windows_.size() * windows_.front().size(); }

  // What is not there would be written to all the same, until the process is killed for it.
  absl::Status CheckMemory() const {
    const size_t streams = rungs_ == 1 ? 1 : 1 + fitted_.size();
    const uint64_t bytes = sizeof(float) * Tokens() * config_.hidden * streams;
    const uint64_t available = ReadMachineMemory().available;
    if (bytes <= available) return absl::OkStatus();
    return absl::ResourceExhaustedError(fmt::format(
        "{} residual streams of {} tokens take {} MiB, {} are available: --tokens, --widths",
        streams, Tokens(), bytes >> 20, available >> 20));
  }

  // What a checkpoint is of: other windows, options or profiles are another calibration.
  std::string StampOf() const {
    std::string of =
        fmt::format("sinks {} {} {} {} ", options_.rank, static_cast<int>(options_.compensation),
                    options_.step_rows, executor_->weight_types());
    for (int rung = 0; rung < planned_.size(); ++rung) {
      for (int layer = 0; layer < config_.layers; ++layer) {
        of += fmt::format("{},{} ", Kept(layer, rung), KeptHeads(layer, rung));
      }
    }
    for (const std::vector<int32_t>& window : windows_) {
      of.append(reinterpret_cast<const char*>(window.data()), window.size() * sizeof(int32_t));
    }
    return fmt::format("{:016x}", std::hash<std::string>()(of));
  }

  absl::Status Save(int done) const {
    PruningData found;  // of a layer in hand nothing
    found.layers.assign(data_.layers.begin(), data_.layers.begin() + done);
    return WritePruningFile(options_.checkpoint, file_, found,
                            fmt::format("{} {}", StampOf(), done));
  }

  // A checkpoint that is not there, or of something else, is none.
  void Resume() {
    if (options_.checkpoint.empty()) return;
    const absl::StatusOr<std::unique_ptr<PruningFile>> file =
        PruningFile::Open(options_.checkpoint, file_);
    if (!file.ok()) return;
    const std::string& told = (*file)->unfinished();
    const std::string stamp = StampOf() + " ";
    int done = 0;
    if (!told.starts_with(stamp) ||
        std::from_chars(told.data() + stamp.size(), told.data() + told.size(), done).ec !=
            std::errc() ||
        done < 0 || done > config_.layers) {
      return;
    }
    for (int layer = 0; layer < done; ++layer) {
      PruningData::Layer& found = data_.layers[layer];
      const std::map<int, int>& counts = counts_[layer];
      if (NarrowsHeads(layer)) {
        const std::span<const int32_t> heads = (*file)->Ranking(layer, SiteKind::kHeads);
        found.heads.assign(heads.begin(), heads.end());
      }
      if (counts.empty()) continue;
      const std::span<const int32_t> ranking = (*file)->Ranking(layer, SiteKind::kChannels);
      found.ranking.assign(ranking.begin(), ranking.end());
      if (rungs_ == 1) continue;
      for (const auto& [kept, rung] : counts) {
        const Refit refit = (*file)->RefitOf(layer, kept);
        found.refits[kept] = {.down = {refit.down.begin(), refit.down.end()},
                              .bias = {refit.bias.begin(), refit.bias.end()}};
        --total_;
      }
    }
    found_ = done;
    if (options_.resumed && done > 0) options_.resumed(done);
  }

  using Observe = std::function<void(ConstMatrix hidden)>;
  using Take = std::function<absl::Status(int64_t first_row, Matrix left)>;
  using Missed = std::function<absl::Status(int64_t first_row, ConstMatrix missed)>;

  int Kept(int layer, int rung) const {
    return planned_.rung(rung).prefill.kept(layer, SiteKind::kChannels);
  }
  int KeptHeads(int layer, int rung) const {
    return planned_.rung(rung).prefill.kept(layer, SiteKind::kHeads);
  }
  // Whether a rung keeps some of the layer's heads, but not all.
  bool NarrowsHeads(int layer) const {
    for (int rung = 1; rung < planned_.size(); ++rung) {
      const int kept = KeptHeads(layer, rung);
      if (kept > 0 && kept < config_.heads) return true;
    }
    return false;
  }

  // Rungs that `down` is fitted to, at any layer.
  std::set<int> Fitted() const {
    std::set<int> rungs;
    if (rungs_ == 1) return rungs;
    for (const std::map<int, int>& counts : counts_) {
      for (const auto& [kept, rung] : counts) rungs.insert(rung);
    }
    return rungs;
  }

  // Of those, the ones that do not keep all of the layer.
  std::vector<int> Narrowed(int layer) const {
    std::vector<int> rungs;
    for (const int rung : fitted_) {
      if (Kept(layer, rung) < config_.channels || KeptHeads(layer, rung) < config_.heads) {
        rungs.push_back(rung);
      }
    }
    return rungs;
  }

  // The planned ladder with all other layers whole, so that only this one has panels, by what is
  // found so far.
  absl::Status SetOnlyAt(int layer) {
    Ladder ladder = Ladder::DenseOnly(config_.sites());
    for (int rung = 1; rung < planned_.size(); ++rung) {
      KeepProfile keep = KeepProfile::Dense(config_.sites());
      for (const SiteKind kind : {SiteKind::kHeads, SiteKind::kChannels}) {
        keep.Keep(layer, kind, planned_.rung(rung).prefill.kept(layer, kind));
      }
      ladder.Append({.prefill = keep, .decode = keep});
    }
    return executor_->SetLadder(std::move(ladder), PruningDataSelector(config_.sites(), &data_));
  }

  // Runs a layer over all windows from a stream and gives what it leaves to `take`, piece by piece;
  // `observe` is called before with what met `down`.
  absl::Status Sweep(int layer, int rung, const Stream& from, const Observe& observe,
                     const Take& take) {
    const int hidden = config_.hidden;
    executor_->set_channel_observer(observe ? [&](int, ConstMatrix rows) { observe(rows); }
                                            : std::function<void(int, ConstMatrix)>());
    Batch batch;
    absl::Status status;
    int64_t row = 0;
    for (const std::vector<int32_t>& window : windows_) {
      const int length = static_cast<int>(window.size());
      for (int start = 0, rows; start < length && status.ok(); start += rows) {
        rows = std::min(options_.step_rows, length - start);
        batch.Clear();
        batch.tokens.assign(window.begin() + start, window.begin() + start + rows);
        batch.spans.push_back(
            {.id = 1, .rows = rows, .start = start, .rung = rung, .page_tables = tables_});
        batch.prefill_rows = rows;
        left_.assign(from.begin() + row * hidden, from.begin() + (row + rows) * hidden);
        const Matrix left(left_.data(), rows, hidden);
        start_ = start;
        status = executor_->ExecuteLayer(batch, layer, left);
        if (status.ok()) status = take(row, left);
        row += rows;
      }
      if (!status.ok()) break;
    }
    executor_->set_channel_observer({});
    if (status.ok() && !progress_(++done_, total_)) {
      status = absl::CancelledError("interrupted; no ladder was written");
    }
    return status;
  }

  absl::Status Advance(int layer, int rung, Stream* stream) {
    return Sweep(layer, rung, *stream, {}, [&](int64_t row, Matrix left) {
      std::copy_n(left.data, int64_t{left.rows} * left.cols, stream->begin() + row * left.cols);
      return absl::OkStatus();
    });
  }

  // Rows of the piece in hand without position 0.
  ConstMatrix WithoutFirst(ConstMatrix rows) const {
    const int skipped = start_ == 0 ? 1 : 0;
    return {rows.data + skipped * rows.stride, rows.rows - skipped, rows.cols, rows.stride};
  }

  // Finds the attention sinks among the rows of the piece in hand, by what came to the layer in the
  // dense model and what it leaves them: position 0 and its like. A text that begins with a token
  // three times over has three. One layer makes them large, another small again.
  std::vector<int> FindSinks(ConstMatrix came, ConstMatrix left) const {
    const auto energy = [](ConstMatrix of, int row) {
      return std::inner_product(of.row(row), of.row(row) + of.cols, of.row(row), 0.0);
    };
    std::vector<double> energies;
    for (int r = 0; r < left.rows; ++r) energies.push_back(energy(left, r));
    std::vector<double> sorted = energies;
    std::ranges::nth_element(sorted, sorted.begin() + left.rows / 2);
    const double most = kSinkEnergy * sorted[left.rows / 2];
    std::vector<int> sinks;
    for (int r = 0; r < left.rows; ++r) {
      const bool like_first = std::max(energies[r], energy(came, r)) > most;
      if (like_first || start_ + r == 0) sinks.push_back(r);
    }
    return sinks;
  }

  // Keeps the first columns of what met `down`, until the layer has left its rows.
  void Hold(ConstMatrix hidden, int columns) {
    held_.clear();
    for (int r = 0; r < hidden.rows; ++r) {
      held_.insert(held_.end(), hidden.row(r), hidden.row(r) + columns);
    }
  }
  ConstMatrix Held(int rows) const {
    return {held_.data(), rows, static_cast<int>(held_.size()) / rows};
  }

  // Adds what is held by the piece that begins with a row of the stream, and misses `missed`, if
  // that has columns; sinks as such.
  absl::Status AddRows(int64_t first_row, int rows, ConstMatrix missed, SecondMoments* moments) {
    const ConstMatrix hidden = Held(rows);
    const auto run = [](ConstMatrix of, int begin, int end) {
      return of.cols == 0 ? of : ConstMatrix(of.row(begin), end - begin, of.cols, of.stride);
    };
    absl::Status status;
    int begin = 0;  // of rows up to the next sink
    const auto add_until = [&](int end) {
      if (begin == end) return;
      status.Update(moments->Add(run(hidden, begin, end), run(missed, begin, end)));
    };
    for (const int sink : sinks_[first_row]) {
      add_until(sink);
      const ConstMatrix misses = run(missed, sink, sink + 1);
      moments->AddSink({hidden.row(sink), static_cast<size_t>(hidden.cols)},
                       {misses.data, static_cast<size_t>(misses.cols)});
      begin = sink + 1;
    }
    add_until(rows);
    return status;
  }

  absl::Status FitLayer(int layer, PruningData::Layer* found) {
    const std::vector<int> narrowed = Narrowed(layer);
    // Rungs leave the dense model's stream at the first layer that they narrow.
    for (const int rung : narrowed) {
      if (streams_[rung].empty()) streams_[rung] = dense_;
    }
    absl::Status status;
    const bool to_find = layer >= found_;
    HeadSums attended;
    if (to_find && NarrowsHeads(layer)) {
      executor_->set_input_observer([&](int, MatrixInput input, ConstMatrix rows) {
        if (input == MatrixInput::kO) attended.Add(WithoutFirst(rows));
      });
    }
    if (counts_[layer].empty() || !to_find) {
      status = Advance(layer, 0, &dense_);
      if (status.ok()) status = TakeHeads(layer, attended, found);
      if (status.ok() && rungs_ > 1 && !narrowed.empty()) status = SetOnlyAt(layer);
    } else {
      const absl::StatusOr<std::vector<float>> down = ReadDown(file_, layer);
      if (!down.ok()) return down.status();
      status = RankDense(layer, *down, found);
      if (status.ok()) status = TakeHeads(layer, attended, found);
      if (status.ok() && rungs_ > 1) status = FitRungs(layer, *down, found);
    }
    for (const int rung : fitted_) {
      if (layer + 1 == config_.layers || !status.ok()) break;
      if (!streams_[rung].empty()) status = Advance(layer, rung, &streams_[rung]);
    }
    return status;
  }

  // Ranks heads by what met `o` in the dense model, if that was watched.
  absl::Status TakeHeads(int layer, const HeadSums& attended, PruningData::Layer* found) {
    executor_->set_input_observer({});
    if (attended.rows == 0) return absl::OkStatus();
    const absl::StatusOr<std::vector<float>> o = ReadO(file_, layer);
    if (!o.ok()) return o.status();
    found->heads = RankHeads(options_.rank, *o, config_.heads, attended);
    return absl::OkStatus();
  }

  absl::Status RankDense(int layer, std::span<const float> down, PruningData::Layer* found) {
    SecondMoments moments(config_.channels, 0, backend_);
    const absl::Status status = Sweep(
        layer, 0, dense_, [&](ConstMatrix hidden) { Hold(hidden, hidden.cols); },
        [&](int64_t row, Matrix left) {
          float* const came = dense_.data() + row * left.cols;
          sinks_[row] = FindSinks(ConstMatrix(came, left.rows, left.cols), left);
          std::copy_n(left.data, int64_t{left.rows} * left.cols, came);
          return AddRows(row, left.rows, {}, &moments);
        });
    if (!status.ok()) return status;
    const std::vector<float> mean = moments.Mean();
    found->ranking =
        RankChannels(options_.rank, {config_.hidden, config_.channels, down, mean},
                     moments.Energy(), moments.FirstMoment(), executor_->channel_group());
    return absl::OkStatus();
  }

  // Runs the layer with as many channels as a rung keeps, and takes what they held and what is then
  // missing from the dense stream.
  absl::Status SweepMissing(int layer, int kept, int rung, const Missed& take) {
    return Sweep(
        layer, rung, streams_[rung], [&](ConstMatrix hidden) { Hold(hidden, kept); },
        [&](int64_t row, Matrix left) {
          const ConstMatrix whole(dense_.data() + row * left.cols, left.rows, left.cols);
          for (int64_t i = 0; i < int64_t{left.rows} * left.cols; ++i) {
            left.data[i] = whole.data[i] - left.data[i];
          }
          return take(row, left);
        });
  }

  // For every count that rungs keep; afterwards the executor has them.
  absl::Status FitRungs(int layer, std::span<const float> down, PruningData::Layer* found) {
    absl::Status status = SetOnlyAt(layer);
    std::map<int, RefittedDown> refits;    // by count
    std::map<int, SecondMoments> moments;  // the same
    for (const auto& [kept, rung] : counts_[layer]) {
      if (!status.ok()) return status;
      if (options_.compensation == Compensation::kMean) {
        status = FitMean(layer, kept, rung, &refits[kept]);
        continue;
      }
      SecondMoments& sums = moments.try_emplace(kept, kept, config_.hidden, backend_).first->second;
      status = SweepMissing(layer, kept, rung, [&](int64_t first_row, ConstMatrix missed) {
        return AddRows(first_row, missed.rows, missed, &sums);
      });
      refits[kept] = {};
    }
    if (!status.ok()) return status;
    std::vector<std::pair<const SecondMoments*, RefittedDown*>> fits;
    for (const auto& [kept, sums] : moments) fits.emplace_back(&sums, &refits[kept]);
    backend_->ParallelFor(static_cast<int>(fits.size()), [&](int i) {
      const auto& [sums, refit] = fits[i];
      *refit = FitSquares(down, found->ranking, *sums);
    });
    found->refits = std::move(refits);
    return SetOnlyAt(layer);
  }

  absl::Status FitMean(int layer, int kept, int rung, RefittedDown* refit) {
    std::vector<double> sum(config_.hidden);
    int64_t tokens = 0;
    const absl::Status status =
        SweepMissing(layer, kept, rung, [&](int64_t row, ConstMatrix missed) {
          for (int r = 0; r < missed.rows; ++r) {
            if (std::ranges::binary_search(sinks_[row], r)) continue;
            for (int n = 0; n < missed.cols; ++n) sum[n] += missed.row(r)[n];
            ++tokens;
          }
          return absl::OkStatus();
        });
    for (const double value : sum) {
      refit->bias.push_back(static_cast<float>(value / static_cast<double>(tokens)));
    }
    return status;
  }

  RefittedDown FitSquares(std::span<const float> down, std::span<const int32_t> ranking,
                          const SecondMoments& sums) const {
    const int kept = sums.channels();
    const std::vector<float> columns = TakeColumns(down, config_.channels, ranking.first(kept));
    const std::vector<float> moments = sums.Mean(), missed = sums.Missed();
    const std::vector<float> energy = sums.Energy(), mean = sums.FirstMoment();
    const std::vector<float> missed_mean = sums.MissedFirst();
    return RefitDown({.hidden = config_.hidden,
                      .kept = kept,
                      .down = columns,
                      .moments = moments,
                      .missed = missed,
                      .energy = energy,
                      .mean = mean,
                      .missed_mean = missed_mean});
  }

  const LayerFitOptions& options_;
  const Ladder& planned_;
  const ModelFile& file_;
  const ModelConfig& config_;
  std::span<const std::vector<int32_t>> windows_;
  ModelExecutor* executor_;
  Backend* backend_;
  const std::function<bool(int64_t, int64_t)>& progress_;
  int rungs_;
  const std::vector<std::map<int, int>> counts_;  // [layers]
  const std::set<int> fitted_;
  PruningData data_;
  std::vector<std::vector<int32_t>> tables_;  // [layers], of one window
  Stream dense_;
  std::vector<Stream> streams_;  // [rungs]; empty: still the dense one
  std::vector<float> left_;      // [rows of a piece, hidden]
  std::vector<float> held_;      // what met `down`, of the piece in hand
  // Of the layer in hand, by the stream's row that a piece begins with: rows of the piece.
  std::map<int64_t, std::vector<int>> sinks_;
  int start_ = 0;                 // position of the piece in hand
  int64_t done_ = 0, total_ = 0;  // sweeps
  int found_ = 0;                 // layers that a checkpoint had
};

}  // namespace

absl::StatusOr<PruningData> FitLayers(const LayerFitOptions& options, const Ladder& planned,
                                      const ModelFile& file,
                                      std::span<const std::vector<int32_t>> windows,
                                      ModelExecutor* executor, Backend* backend,
                                      const std::function<bool(int64_t, int64_t)>& progress) {
  return LayerFit(options, planned, file, windows, executor, backend, progress).Run();
}

}  // namespace espalier
