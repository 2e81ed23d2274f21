#include "tools/weight_pruning.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <optional>
#include <utility>

#include "engine/machine_memory.h"
#include "engine/model/activations.h"
#include "engine/model/decoder.h"
#include "engine/model/model_executor.h"
#include "engine/pruning/second_moments.h"
#include "engine/pruning/weights/block_obs.h"
#include "engine/pruning/weights/column_moments.h"
#include "engine/pruning/weights/factor.h"
#include "engine/pruning/weights/loops.h"
#include "engine/pruning/weights/mean_compensation.h"
#include "engine/pruning/weights/sparsegpt.h"

namespace espalier {
namespace {

using Clock = std::chrono::steady_clock;
using Site = WeightPruningReport::Site;

constexpr size_t kKinds = kPrunedKinds.size();

// Adds the time of its scope.
class Timed {
 public:
  explicit Timed(double* seconds) : seconds_(seconds) {}
  ~Timed() { *seconds_ += std::chrono::duration<double>(Clock::now() - begin_).count(); }
  Timed(const Timed&) = delete;
  Timed& operator=(const Timed&) = delete;

 private:
  double* seconds_;
  Clock::time_point begin_ = Clock::now();
};

using enum MatrixInput;
constexpr std::array<MatrixInput, kKinds> kInputOf = {kQkv,    kQkv,    kQkv, kO,
                                                      kGateUp, kGateUp, kDown};
constexpr size_t kInputs = kMatrixInputNames.size();

std::string NameOf(int layer, size_t kind) {
  return fmt::format("blk.{}.{}.weight", layer, kPrunedKinds[kind]);
}

// One layer of a model as a model of its own, with an embedding that nobody asks: matrices as the
// file has them, or of the values given.
class LayerFile final : public ModelFile {
 public:
  LayerFile(const ModelFile& file, int layer, std::span<const std::vector<float>> values)
      : nothing_(file.config().hidden) {
    path_ = file.path();
    config_ = file.config();
    config_.layers = 1;
    config_.vocabulary = 1;
    config_.tied_embeddings = true;
    const std::string prefix = fmt::format("blk.{}.", layer);
    for (StoredTensor tensor : file.tensors()) {
      if (!tensor.name.starts_with(prefix)) continue;
      tensor.name = "blk.0." + tensor.name.substr(prefix.size());
      for (size_t kind = 0; kind < kKinds && !values.empty(); ++kind) {
        if (tensor.name != NameOf(0, kind)) continue;
        tensor.type = BlockType::kF32;
        tensor.data = reinterpret_cast<const std::byte*>(values[kind].data());
        tensor.bytes = values[kind].size() * sizeof(float);
      }
      tensors_.push_back(std::move(tensor));
    }
    for (const char* name : {"token_embd.weight", "output_norm.weight"}) {
      tensors_.push_back({.name = name,
                          .rows = 1,
                          .cols = config_.hidden,
                          .data = reinterpret_cast<const std::byte*>(nothing_.data()),
                          .bytes = nothing_.size() * sizeof(float)});
    }
    std::ranges::sort(tensors_, {}, &StoredTensor::name);
  }

 private:
  std::vector<float> nothing_;
};

class WeightPruning {
 public:
  WeightPruning(const WeightPruningOptions& options, const ModelFile& file,
                std::span<const std::vector<int32_t>> windows, ModelRewriter* rewriter,
                Backend* backend)
      : options_(options),
        file_(file),
        config_(file.config()),
        windows_(windows),
        rewriter_(rewriter),
        backend_(backend),
        looks_at_inputs_(options.method != WeightMethod::kScores || options.compensate_mean ||
                         options.metric != Metric::kMagnitude),
        values_(kKinds) {
    if (windows.empty()) return;
    const size_t pages = (windows.front().size() + kPageTokens - 1) / kPageTokens;
    tables_.resize(sequential() ? windows.size() : 1, std::vector<std::vector<int32_t>>(1));
    for (std::vector<std::vector<int32_t>>& table : tables_) {
      for (size_t i = 0; i < pages; ++i) table.front().push_back(pages_++);
    }
  }

  absl::StatusOr<WeightPruningReport> Run(const std::function<bool(int, int)>& progress) {
    const Timed timed(&report_.total_s);
    absl::Status status = runs() ? Embed() : absl::OkStatus();
    if (options_.moments != nullptr) report_.tokens = options_.moments->tokens();
    for (int layer = 0; layer < config_.layers && status.ok(); ++layer) {
      status = Layer(layer);
      if (status.ok() && !progress(layer + 1, config_.layers)) {
        status = absl::CancelledError("interrupted; no model was written");
      }
    }
    if (!status.ok()) return status;
    return report_;
  }

  WeightPruningReport& report() { return report_; }

 private:
  // Whether text goes through the layers.
  bool runs() const { return looks_at_inputs_ && options_.moments == nullptr; }
  bool sequential() const {
    return options_.calibrated_on == CalibratedOn::kPrunedMatrices && runs();
  }

  absl::Status Embed() {
    if (windows_.empty()) return absl::InvalidArgumentError("no text to calibrate with");
    const int64_t tokens = static_cast<int64_t>(windows_.size() * windows_.front().size());
    uint64_t bytes = sizeof(float) * tokens * config_.hidden;
    if (sequential()) {
      bytes += Activations::BytesFor(config_, 1) * tokens + PageShape().page_bytes() * pages_;
    }
    if (const uint64_t available = ReadMachineMemory().available; bytes > available) {
      return absl::ResourceExhaustedError(fmt::format(
          "activations of {} tokens take {} MiB, {} are available: --tokens{}", tokens, bytes >> 20,
          available >> 20, sequential() ? ", or --activations pruned, which takes steps" : ""));
    }
    const absl::StatusOr<const StoredTensor*> table =
        file_.Find("token_embd.weight", config_.vocabulary, config_.hidden);
    if (!table.ok()) return table.status();
    stream_.resize(tokens * config_.hidden);
    float* to = stream_.data();
    for (const std::vector<int32_t>& window : windows_) {
      for (const int32_t token : window) {
        (*table)->ReadRow(token, to);
        const int64_t at = BestWeightLoops().first_not_finite(to, config_.hidden);
        if (at < config_.hidden) return NotFinite((*table)->name, token, at, to[at]);
        to += config_.hidden;
      }
    }
    report_.tokens = tokens;
    return absl::OkStatus();
  }

  absl::Status Layer(int layer) {
    report_.layers.emplace_back();
    moments_.clear();
    hessians_.clear();
    // Before text runs through it, which would not say where a weight is no number.
    absl::Status status = Read(layer);
    if (!status.ok()) return status;
    for (size_t input = 0; input < kInputs && options_.moments != nullptr; ++input) {
      moments_.push_back(options_.moments->of(layer, static_cast<MatrixInput>(input)));
    }
    if (runs()) {
      for (size_t input = 0; input < kInputs; ++input) {
        const int columns = ColumnsOf(config_, static_cast<MatrixInput>(input));
        moments_.emplace_back(columns, options_.method == WeightMethod::kBlockObs);
        if (options_.method == WeightMethod::kSparseGpt) {
          hessians_.emplace_back(columns, 0, backend_);
        }
      }
      if (sequential()) {
        status = PruneOnTheWay(layer);
        return status.ok() ? WriteOut() : status;
      }
      const bool onward = options_.calibrated_on == CalibratedOn::kDense;
      status = Sweep(layer, {}, /*watched=*/true, onward);
    }
    for (size_t input = 0; input < kInputs && status.ok(); ++input) {
      status = Prune(static_cast<MatrixInput>(input));
    }
    if (status.ok()) status = WriteOut();
    const bool last = layer + 1 == config_.layers;
    if (status.ok() && runs() && options_.calibrated_on == CalibratedOn::kPrunedLayers && !last) {
      status = Sweep(layer, values_, /*watched=*/false, /*onward=*/true);
    }
    return status;
  }

  absl::StatusOr<std::unique_ptr<ModelExecutor>> Load(int layer, int step_rows,
                                                      std::span<const std::vector<float>> values) {
    const Timed timed(&report_.layers.back().load);
    const LayerFile one(file_, layer, values);
    return ModelExecutor::Load(one, backend_,
                               {.weights = options_.weights,
                                .kv = PageShape().type,
                                .kv_bytes = PageShape().page_bytes() * pages_,
                                .max_batch_tokens = step_rows});
  }

  KvPoolShape PageShape() const {
    return {.type = DefaultKvType(options_.weights, config_.qkv_bias),
            .pages = 1,
            .kv_heads = config_.kv_heads,
            .head_dim = config_.head_dim};
  }

  // Adds rows of one window, of which the first is at `start`, to the sums.
  absl::Status Watch(MatrixInput of, int start, ConstMatrix rows) {
    const auto input = static_cast<size_t>(of);
    const int skipped = options_.skip_first && start == 0 ? 1 : 0;
    const ConstMatrix counted(rows.row(skipped), rows.rows - skipped, rows.cols, rows.stride);
    moments_[input].Add(counted, backend_);
    return hessians_.empty() ? absl::OkStatus() : hessians_[input].Add(counted, {});
  }

  // Runs the layer over the stream in one step, which becomes what it leaves. A matrix is pruned
  // when the rows have come to it.
  absl::Status PruneOnTheWay(int layer) {
    const auto rows = static_cast<int>(report_.tokens);
    const auto length = static_cast<int>(windows_.front().size());
    absl::StatusOr<std::unique_ptr<ModelExecutor>> loaded = Load(layer, rows, {});
    if (!loaded.ok()) return loaded.status();
    ModelExecutor& executor = **loaded;
    absl::Status status;
    double visits = 0;
    executor.set_before_weights([&](int, MatrixInput input, ConstMatrix all) {
      const Timed timed(&visits);
      {
        const Timed watching(&report_.layers.back().statistics);
        for (int first = 0; first < rows; first += length) {
          status.Update(Watch(input, 0, ConstMatrix(all.row(first), length, all.cols, all.stride)));
        }
      }
      if (status.ok()) status = Prune(input);
      const Timed loading(&report_.layers.back().load);
      for (size_t kind = 0; kind < kKinds && status.ok(); ++kind) {
        if (kInputOf[kind] != input) continue;
        status = executor.ReplaceWeight(0, kPrunedKinds[kind], ValuesOf(kind));
      }
    });
    Batch batch;
    batch.tokens.assign(rows, 0);
    batch.prefill_rows = rows;
    for (size_t i = 0; i < windows_.size(); ++i) {
      batch.spans.push_back({.id = i + 1,
                             .first_row = static_cast<int>(i) * length,
                             .rows = length,
                             .page_tables = tables_[i]});
    }
    const Clock::time_point begin = Clock::now();
    status.Update(executor.ExecuteLayer(batch, 0, Matrix(stream_.data(), rows, config_.hidden),
                                        /*embedded=*/true));
    report_.layers.back().forward +=
        std::chrono::duration<double>(Clock::now() - begin).count() - visits;
    return status;
  }

  // Runs the layer over the stream, which becomes what it leaves if that goes `onward`.
  absl::Status Sweep(int layer, std::span<const std::vector<float>> values, bool watched,
                     bool onward) {
    absl::StatusOr<std::unique_ptr<ModelExecutor>> executor =
        Load(layer, options_.step_rows, values);
    if (!executor.ok()) return executor.status();
    absl::Status seen;
    double watching = 0;
    int start = 0;
    if (watched) {
      const auto watch = [&](MatrixInput input, ConstMatrix rows) {
        const Timed timed(&watching);
        seen.Update(Watch(input, start, rows));
      };
      (*executor)->set_input_observer(
          [watch](int, MatrixInput input, ConstMatrix rows) { watch(input, rows); });
      (*executor)->set_channel_observer([watch](int, ConstMatrix rows) { watch(kDown, rows); });
    }
    const Clock::time_point begin = Clock::now();
    const int hidden = config_.hidden;
    Batch batch;
    absl::Status status;
    int64_t row = 0;
    for (const std::vector<int32_t>& window : windows_) {
      const int length = static_cast<int>(window.size());
      for (int rows; start < length && status.ok(); start += rows) {
        rows = std::min(options_.step_rows, length - start);
        batch.Clear();
        batch.tokens.assign(rows, 0);
        batch.spans.push_back({.id = 1, .rows = rows, .start = start, .page_tables = tables_[0]});
        batch.prefill_rows = rows;
        float* to = stream_.data() + row * hidden;
        if (!onward) {
          left_.assign(to, to + int64_t{rows} * hidden);
          to = left_.data();
        }
        status = (*executor)->ExecuteLayer(batch, 0, Matrix(to, rows, hidden), /*embedded=*/true);
        row += rows;
      }
      start = 0;
    }
    report_.layers.back().forward +=
        std::chrono::duration<double>(Clock::now() - begin).count() - watching;
    report_.layers.back().statistics += watching;
    status.Update(seen);
    return status;
  }

  absl::Status Read(int layer) {
    const WeightLoops& loops = BestWeightLoops();
    const std::string prefix = fmt::format("blk.{}.", layer);
    for (const StoredTensor& tensor : file_.tensors()) {
      if (tensor.rows != 1 || !tensor.name.starts_with(prefix)) continue;  // norms and biases
      std::vector<float> values(tensor.cols);
      tensor.ReadRow(0, values.data());
      const int64_t at = loops.first_not_finite(values.data(), tensor.cols);
      if (at < tensor.cols) return NotFinite(tensor.name, 0, at, values[at]);
    }
    for (size_t kind = 0; kind < kKinds; ++kind) {
      const Timed timed(&SiteOf(kind).read);
      const std::string name = NameOf(layer, kind);
      const auto tensor = std::ranges::lower_bound(file_.tensors(), name, {}, &StoredTensor::name);
      if (tensor == file_.tensors().end() || tensor->name != name) {
        return absl::NotFoundError(fmt::format("{}: tensor {} is missing", file_.path(), name));
      }
      tensors_[kind] = &*tensor;
      std::vector<float>& values = values_[kind];
      values.resize(static_cast<size_t>(tensor->rows) * tensor->cols);
      constexpr int kRows = 32;
      const int tasks = (tensor->rows + kRows - 1) / kRows;
      std::vector<int64_t> odd(tasks, -1);  // the first of each task that is not finite
      backend_->ParallelFor(tasks, [&](int task) {
        for (int r = task * kRows; r < std::min((task + 1) * kRows, tensor->rows); ++r) {
          float* const row = values.data() + int64_t{r} * tensor->cols;
          tensor->ReadRow(r, row);
          const int64_t at = loops.first_not_finite(row, tensor->cols);
          if (at < tensor->cols && odd[task] < 0) odd[task] = int64_t{r} * tensor->cols + at;
        }
      });
      const auto bad = std::ranges::find_if(odd, [](int64_t at) { return at >= 0; });
      if (bad == odd.end()) continue;
      return NotFinite(name, *bad / tensor->cols, *bad % tensor->cols, values[*bad]);
    }
    return absl::OkStatus();
  }

  absl::Status NotFinite(std::string_view name, int64_t row, int64_t column, float value) const {
    return absl::InvalidArgumentError(
        fmt::format("{}: tensor {}, row {}, column {}: expected a finite weight, got {}",
                    file_.path(), name, row, column, value));
  }

  Site& SiteOf(size_t kind) { return report_.layers.back().sites[kind]; }

  Matrix ValuesOf(size_t kind) {
    return {values_[kind].data(), tensors_[kind]->rows, tensors_[kind]->cols};
  }

  // The matrices that meet it.
  absl::Status Prune(MatrixInput of) {
    const auto first = static_cast<size_t>(std::ranges::find(kInputOf, of) - kInputOf.begin());
    const auto input = static_cast<size_t>(of);
    // Of the method: what its matrices share.
    std::vector<float> squares, factor;
    std::optional<BlockObs> blocks;
    absl::Status status;
    {
      const Timed timed(&SiteOf(first).update);
      if (looks_at_inputs_) {
        const bool around = options_.metric == Metric::kFluctuation;
        squares = around ? moments_[input].SquaresAroundMean() : moments_[input].Squares();
      }
      if (options_.method == WeightMethod::kSparseGpt) {
        factor = hessians_[input].Mean();
        status = ToInverseFactor(ColumnsOf(config_, of), kSparseGptDamping, backend_, &factor);
      } else if (options_.method == WeightMethod::kBlockObs) {
        absl::StatusOr<BlockObs> made =
            BlockObs::Create(moments_[input], options_.compensate_mean, backend_);
        status = made.status();
        if (status.ok()) blocks = *std::move(made);
      }
    }
    for (size_t kind = first; kind < kKinds && kInputOf[kind] == of; ++kind) {
      if (status.ok()) {
        status = PruneMatrix(kind, squares, factor, blocks.has_value() ? &*blocks : nullptr);
      }
      if (status.ok()) continue;
      return absl::Status(status.code(), fmt::format("{}: tensor {}: {}", file_.path(),
                                                     tensors_[kind]->name, status.ToString()));
    }
    return absl::OkStatus();
  }

  absl::Status PruneMatrix(size_t kind, std::span<const float> squares,
                           std::span<const float> factor, const BlockObs* blocks) {
    const WeightLoops& loops = BestWeightLoops();
    const Matrix weights = ValuesOf(kind);
    Site& told = SiteOf(kind);
    std::optional<MeanCompensation> compensation;
    if (options_.compensate_mean) {
      const Timed timed(&told.update);
      compensation.emplace(moments_[static_cast<size_t>(kInputOf[kind])], weights, backend_);
    }
    if (options_.method == WeightMethod::kScores) {
      const Timed timed(&told.select);
      const ColumnWeights columns(options_.metric, squares, weights, backend_);
      const Saliency saliency = MaskWeights(options_.mask, columns, weights, backend_);
      told.saliency += saliency.all;
      told.kept += saliency.kept;
    } else {
      const std::vector<float> before = values_[kind];
      {
        const Timed timed(&told.update);
        absl::Status status;
        if (blocks != nullptr) {
          blocks->Prune(options_.mask.pattern, weights, backend_);
        } else {
          status = SparseGpt(options_.mask.pattern, factor, weights, backend_);
        }
        if (!status.ok()) return status;
      }
      Compare(before, weights, squares, &told);
    }
    if (compensation.has_value()) {
      const Timed timed(&told.update);
      compensation->Apply(weights, backend_);
    }
    told.weights += static_cast<int64_t>(values_[kind].size());
    told.zeros += loops.zeros(values_[kind].data(), static_cast<int64_t>(values_[kind].size()));
    return absl::OkStatus();
  }

  // w^2 x^2 of what was there, and of what of it stays.
  static void Compare(std::span<const float> before, Matrix weights, std::span<const float> squares,
                      Site* told) {
    for (int r = 0; r < weights.rows; ++r) {
      double all = 0, kept = 0;
      for (int j = 0; j < weights.cols; ++j) {
        const float w = before[int64_t{r} * weights.cols + j];
        const double score = double{w} * w * squares[j];
        all += score;
        kept += weights.row(r)[j] != 0 ? score : 0;
      }
      told->saliency += all;
      told->kept += kept;
    }
  }

  absl::Status WriteOut() {
    for (size_t kind = 0; kind < kKinds; ++kind) {
      const Timed timed(&SiteOf(kind).write);
      const absl::Status status = rewriter_->Write(*tensors_[kind], values_[kind]);
      if (!status.ok()) return status;
    }
    return absl::OkStatus();
  }

  const WeightPruningOptions& options_;
  const ModelFile& file_;
  const ModelConfig& config_;
  std::span<const std::vector<int32_t>> windows_;
  ModelRewriter* rewriter_;
  Backend* backend_;
  bool looks_at_inputs_;
  // [windows that are in a step][1][pages of a window]: the one layer's.
  std::vector<std::vector<std::vector<int32_t>>> tables_;
  int32_t pages_ = 0;
  std::vector<float> stream_;            // [windows * tokens of each, hidden]
  std::vector<float> left_;              // of a piece, where that does not go onward
  std::vector<ColumnMoments> moments_;   // [kInputs], of the layer in hand, as are the next
  std::vector<SecondMoments> hessians_;  // [kInputs] or empty
  std::array<const StoredTensor*, kKinds> tensors_ = {};
  std::vector<std::vector<float>> values_;  // [kKinds]
  WeightPruningReport report_;
};

}  // namespace

Site& Site::operator+=(const Site& other) {
  weights += other.weights;
  zeros += other.zeros;
  saliency += other.saliency;
  kept += other.kept;
  read += other.read;
  select += other.select;
  update += other.update;
  write += other.write;
  return *this;
}

Site WeightPruningReport::Sum(size_t kind) const {
  Site sum;
  for (const Layer& layer : layers) sum += layer.sites[kind];
  return sum;
}

Site WeightPruningReport::Sum() const {
  Site sum;
  for (size_t kind = 0; kind < kKinds; ++kind) sum += Sum(kind);
  return sum;
}

bool IsPruned(const StoredTensor& tensor) {
  const std::string_view name = tensor.name;
  if (!name.starts_with("blk.") || !name.ends_with(".weight")) return false;
  const size_t dot = name.find('.', 4);
  if (dot == std::string_view::npos || dot + 7 >= name.size()) return false;
  const std::string_view kind = name.substr(dot + 1, name.size() - dot - 1 - 7);
  return std::ranges::find(kPrunedKinds, kind) != kPrunedKinds.end();
}

absl::StatusOr<WeightPruningReport> PruneWeights(const WeightPruningOptions& options,
                                                 const ModelFile& file,
                                                 std::span<const std::vector<int32_t>> windows,
                                                 ModelRewriter* rewriter, Backend* backend,
                                                 const std::function<bool(int, int)>& progress) {
  WeightPruning pruning(options, file, windows, rewriter, backend);
  absl::StatusOr<WeightPruningReport> report = pruning.Run(progress);
  if (report.ok()) report->total_s = pruning.report().total_s;
  return report;
}

}  // namespace espalier
