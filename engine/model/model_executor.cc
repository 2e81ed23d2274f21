#include "engine/model/model_executor.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <functional>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "engine/machine_memory.h"
#include "engine/model/activations.h"
#include "engine/model/decoder.h"
#include "engine/model/phase_timer.h"
#include "engine/model/sampler.h"
#include "engine/scheduling/invariant.h"
#include "fmt/format.h"

namespace espalier {
namespace {

// What kv_bytes = 0 stands for: 32 sequences of 1,024 tokens, or one of the whole context.
constexpr int kDefaultKvTokens = 32 * 1024;

// A step waits for so much of what comes back, and a layer.
constexpr double kReturnSeconds = 0.005;

// Rows sampled at the same time; each lane has its own scratch.
constexpr int kSamplerLanes = 8;

absl::StatusOr<KvPoolShape> ChoosePool(const ModelConfig& config, const ModelOptions& options) {
  KvPoolShape shape{.type = options.kv.value_or(DefaultKvType(options.weights, config.qkv_bias)),
                    .pages = 0,
                    .kv_heads = config.kv_heads,
                    .head_dim = config.head_dim};
  const uint64_t page_bytes = shape.page_bytes();
  const uint64_t layer_pages_bytes = page_bytes * config.layers;  // 16 tokens in every layer
  uint64_t bytes = options.kv_bytes;
  if (bytes == 0) {
    const uint64_t tokens = std::max(kDefaultKvTokens, config.context);
    bytes = (tokens + kPageTokens - 1) / kPageTokens * layer_pages_bytes;
    bytes = std::min(bytes, ReadMachineMemory().available / 2);
  }
  const uint64_t pages = bytes / page_bytes;
  if (pages < static_cast<uint64_t>(config.layers)) {
    return absl::InvalidArgumentError(
        fmt::format("KV memory of {} bytes holds no sequence: {} tokens in {} layers take {}",
                    bytes, kPageTokens, config.layers, layer_pages_bytes));
  }
  shape.pages = static_cast<int>(std::min<uint64_t>(pages, INT32_MAX));
  return shape;
}

// Activations, logits and samplers; what the backend needs beside them is its own account.
uint64_t WorkspaceBytes(const ModelConfig& config, const ModelOptions& options) {
  return Activations::BytesFor(config, options.max_batch_tokens) +
         uint64_t(options.max_logit_rows) * config.vocabulary * sizeof(float) +
         kSamplerLanes * Sampler::BytesFor(config.vocabulary);
}

// A workspace that is not there would be written to all the same: memory is granted before it is
// found.
absl::Status CheckWorkspace(const ModelConfig& config, const ModelOptions& options) {
  const uint64_t bytes = WorkspaceBytes(config, options);
  const uint64_t available = ReadMachineMemory().available;
  if (bytes <= available) return absl::OkStatus();
  return absl::ResourceExhaustedError(
      fmt::format("a workspace for steps of {} rows takes {} bytes, {} are available",
                  options.max_batch_tokens, bytes, available));
}

}  // namespace

struct ModelExecutor::Impl {
  Impl(std::unique_ptr<Decoder> decoder, Backend* device, const ModelOptions& model_options,
       KvPool kv_pool)
      : model(std::move(decoder)),
        backend(device),
        options(model_options),
        pool(std::move(kv_pool)),
        ladder(Ladder::DenseOnly(model->config().sites())),
        activations(model->config(), options.max_batch_tokens),
        logits(static_cast<size_t>(options.max_logit_rows) * model->config().vocabulary),
        stats(options.max_logit_rows),
        samplers(kSamplerLanes, Sampler(model->config().vocabulary)) {
    counted.reserve(options.max_batch_tokens);
    first.reserve(options.max_batch_tokens);
  }

  void MakePlan(const Batch& batch);
  // Draws or scores all that batch.logits asks for, by the plan's residual rows.
  void Sample(const Batch& batch, StepResult* result);
  void SampleChunk(const Batch& batch, size_t begin, size_t end, StepResult* result);

  std::unique_ptr<Decoder> model;
  Backend* backend;
  ModelOptions options;
  KvPool pool;
  Ladder ladder;
  std::vector<const MappedFile*> files;  // of sources that were kept
  Activations activations;
  AlignedFloats logits;                      // [max_logit_rows, vocabulary]
  std::vector<LogitStatsArgs::Stats> stats;  // [max_logit_rows]
  std::vector<Sampler> samplers;             // one a lane: scratch of a megabyte or so
  // The plan of the step in flight.
  std::vector<int> order;       // of the batch's spans
  std::vector<int> row_of;      // [batch rows]: the plan's row
  std::vector<int32_t> tokens;  // [rows]
  std::vector<AttentionSpan> spans;
  std::vector<std::span<const int32_t>> tables;  // [layers * spans]
  std::vector<PlanStep> steps;
  std::vector<int32_t> logit_rows;
  std::vector<KvPacking> packings;  // of a layer in hand
  RungSet in_memory = ~RungSet{0};  // rungs whose weights are
  bool sources_changed = false;
  const Probe* probe = nullptr;
  ProbeCounts probe_counts;  // as of the last step

  // Whether this step's inputs are summed; then observers are set for it. After MakePlan.
  bool BeginGathering(const Batch& batch);
  void EndGathering();
  // Of what is told of an input, layer by layer, the rows of rung 0 come first.
  void Gather(int layer, MatrixInput input, ConstMatrix rows);
  // Sums of one step in so many.
  template <typename Moments>
  struct Gathered {
    Moments* moments = nullptr;
    int every = 1;
    int in = 0;        // steps with rows enough, until one is taken
    bool now = false;  // of the step in flight

    void Begin(int rows) {
      now = moments != nullptr && rows >= kGatheredRows && !moments->frozen() && --in <= 0;
      if (now) in = every;
    }
  };
  Gathered<InputMoments> inputs;
  Gathered<ChannelMoments> channels;
  // Of the step in flight.
  int rows_of_rung_0 = 0;
  std::vector<int> counted, first;  // of those: not at position 0, and there
  std::array<int, kMatrixInputNames.size()> gathered_layer = {};
};

bool ModelExecutor::Impl::BeginGathering(const Batch& batch) {
  if (inputs.moments == nullptr && channels.moments == nullptr) return false;
  rows_of_rung_0 = 0;
  counted.clear();
  first.clear();
  for (size_t i = 0; i < order.size() && batch.spans[order[i]].rung == 0; ++i) {
    for (int row = 0; row < spans[i].rows; ++row, ++rows_of_rung_0) {
      (spans[i].start + row > 0 ? counted : first).push_back(rows_of_rung_0);
    }
  }
  inputs.Begin(rows_of_rung_0);
  channels.Begin(static_cast<int>(counted.size()));
  if (!inputs.now && !channels.now) return false;
  if (const size_t count = counted.size(); channels.now && count > ChannelMoments::kMostRows) {
    for (size_t i = 0; i < ChannelMoments::kMostRows; ++i) {
      counted[i] = counted[i * count / ChannelMoments::kMostRows];
    }
    counted.resize(ChannelMoments::kMostRows);
  }
  gathered_layer.fill(-1);
  // Captures of one pointer, which lie in the function: nothing is allocated.
  if (inputs.now) {
    model->set_input_observer(
        [this](int layer, MatrixInput input, ConstMatrix rows) { Gather(layer, input, rows); });
  }
  model->set_channel_observer(
      [this](int layer, ConstMatrix rows) { Gather(layer, MatrixInput::kDown, rows); },
      inputs.now ? Decoder::kEveryLayer : channels.moments->least_layer());
  return true;
}

void ModelExecutor::Impl::EndGathering() {
  model->set_input_observer({});
  model->set_channel_observer({});
}

void ModelExecutor::Impl::Gather(int layer, MatrixInput input, ConstMatrix rows) {
  int& last = gathered_layer[static_cast<size_t>(input)];
  if (std::exchange(last, layer) == layer) return;  // rows of harder rungs
  Invariant(rows.rows >= rows_of_rung_0, "{} rows of rung 0 come first, {} are told of",
            rows_of_rung_0, rows.rows);
  if (inputs.now) {
    inputs.moments->of(layer, input)
        .Add(ConstMatrix(rows.data, rows_of_rung_0, rows.cols, rows.stride), backend);
  }
  if (channels.now && input == MatrixInput::kDown && layer == channels.moments->least_layer()) {
    channels.moments->Add(layer, rows, counted, first, backend);
    channels.now = false;
  }
}

void ModelExecutor::Impl::MakePlan(const Batch& batch) {
  const int layers = model->config().layers;
  order.resize(batch.spans.size());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int a, int b) {
    const auto key = [&](int i) { return std::pair(batch.spans[i].rung, i); };
    return key(a) < key(b);
  });
  row_of.resize(batch.rows());
  tokens.clear();
  spans.clear();
  tables.clear();
  steps.clear();
  for (const int i : order) {
    const BatchSpan& span = batch.spans[i];
    const Rung& rung = ladder.rung(span.rung);
    Invariant(Has(in_memory, span.rung), "request {} runs at rung {}, whose weights are released",
              span.id, span.rung);
    spans.push_back({.first_row = static_cast<int>(tokens.size()),
                     .rows = span.rows,
                     .start = span.start,
                     .int4_kv = rung.int4_kv});
    if (steps.empty() || steps.back().rung != &rung || steps.back().decode != span.decode) {
      steps.push_back({.rung = &rung, .decode = span.decode});
    }
    steps.back().rows += span.rows;
    ++steps.back().spans;
    for (int row = span.first_row; row < span.first_row + span.rows; ++row) {
      row_of[row] = static_cast<int>(tokens.size());
      tokens.push_back(batch.tokens[row]);
    }
  }
  for (int layer = 0; layer < layers; ++layer) {
    for (const int i : order) tables.push_back(batch.spans[i].page_tables[layer]);
  }
}

void ModelExecutor::Impl::Sample(const Batch& batch, StepResult* result) {
  const size_t turn = options.max_logit_rows;
  for (size_t begin = 0; begin < batch.logits.size(); begin += turn) {
    const size_t end = std::min(begin + turn, batch.logits.size());
    logit_rows.clear();
    for (size_t i = begin; i < end; ++i) logit_rows.push_back(row_of[batch.logits[i].row]);
    {
      PhaseTimer timer(&result->phases.head);
      model->Logits(
          logit_rows, &activations,
          Matrix(logits.data(), static_cast<int>(end - begin), model->config().vocabulary));
    }
    PhaseTimer timer(&result->phases.sampling);
    SampleChunk(batch, begin, end, result);
  }
}

void ModelExecutor::Impl::SampleChunk(const Batch& batch, size_t begin, size_t end,
                                      StepResult* result) {
  const int rows = static_cast<int>(end - begin);
  const int vocabulary = model->config().vocabulary;
  const Matrix chunk(logits.data(), rows, vocabulary);
  backend->LogitStats({.logits = chunk, .out = std::span(stats).first(rows)});
  const int lanes = std::min(rows, kSamplerLanes);
  const auto sample = [&](int lane) {
    for (int i = lane; i < rows; i += lanes) {
      result->tokens[begin + i] = samplers[lane].Sample(batch.logits[begin + i], stats[i],
                                                        std::span<float>(chunk.row(i), vocabulary));
    }
  };
  backend->ParallelFor(lanes, std::cref(sample));  // a function of its own would be allocated
}

ModelExecutor::ModelExecutor(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
ModelExecutor::~ModelExecutor() = default;

absl::StatusOr<std::unique_ptr<ModelExecutor>> ModelExecutor::Load(const ModelFile& file,
                                                                   Backend* backend,
                                                                   const ModelOptions& options,
                                                                   const Progress& progress) {
  ModelOptions checked = options;
  checked.max_logit_rows = std::clamp(options.max_logit_rows, 1, options.max_batch_tokens);
  if (absl::Status status = CheckWorkspace(file.config(), checked); !status.ok()) return status;
  absl::StatusOr<KvPoolShape> shape = ChoosePool(file.config(), checked);
  if (!shape.ok()) return shape.status();
  absl::StatusOr<std::unique_ptr<Decoder>> model =
      Decoder::Load(file, backend, checked.weights, progress);
  if (!model.ok()) return model.status();
  absl::StatusOr<KvPool> pool = backend->CreateKvPool(*shape);
  if (!pool.ok()) return pool.status();
  return std::unique_ptr<ModelExecutor>(new ModelExecutor(
      std::make_unique<Impl>(*std::move(model), backend, checked, *std::move(pool))));
}

absl::Status ModelExecutor::SetLadder(Ladder ladder, const ChannelSelector& selector) {
  const SiteWidths theirs = ladder.rung(0).prefill.widths(), ours = config().sites();
  if (theirs != ours) {
    return absl::InvalidArgumentError(fmt::format(
        "the ladder is of a model of {} layers, {} heads and {} channels; this one has "
        "{}, {} and {}",
        theirs.layers, theirs.heads, theirs.channels, ours.layers, ours.heads, ours.channels));
  }
  for (int rung = 0; rung < ladder.size(); ++rung) {
    const KvPoolShape& pool = impl_->pool.shape;
    if (ladder.rung(rung).int4_kv && !pool.may_be_int4()) {
      return absl::InvalidArgumentError(fmt::format(
          "rung {}: kv=int4 needs KV in int8 and heads of a multiple of 8, at most 256; here are "
          "{} and {}",
          rung, KvTypeName(pool.type), pool.head_dim));
    }
  }
  if (absl::Status status = FitWeights(~RungSet{0}, true).status(); !status.ok()) return status;
  if (absl::Status status = impl_->model->MakePanels(ladder, selector); !status.ok()) return status;
  impl_->ladder = std::move(ladder);
  return absl::OkStatus();
}

void ModelExecutor::KeepSources(WeightSources sources) {
  for (const MappedFile* file : sources.files) file->LetGo();
  impl_->files = sources.files;
  impl_->model->KeepSources(std::move(sources));
}

void ModelExecutor::set_probe(Probe* probe) {
  impl_->model->set_probe(probe);
  impl_->probe = probe;
  impl_->probe_counts = probe == nullptr ? ProbeCounts{} : probe->counts();
}

void ModelExecutor::set_channel_observer(std::function<void(int, ConstMatrix)> observer) {
  impl_->model->set_channel_observer(std::move(observer));
}

void ModelExecutor::set_key_observer(std::function<void(int, ConstMatrix)> observer) {
  impl_->model->set_key_observer(std::move(observer));
}

void ModelExecutor::set_input_observer(
    std::function<void(int, MatrixInput, ConstMatrix)> observer) {
  impl_->model->set_input_observer(std::move(observer));
}

void ModelExecutor::set_before_weights(std::function<void(int, MatrixInput, ConstMatrix)> before) {
  impl_->model->set_before_weights(std::move(before));
}

absl::Status ModelExecutor::ReplaceWeight(int layer, std::string_view part, ConstMatrix values) {
  return impl_->model->ReplaceWeight(layer, part, values, impl_->options.weights);
}

void ModelExecutor::set_input_moments(InputMoments* moments, int every) {
  impl_->inputs = {.moments = moments, .every = every};
}

void ModelExecutor::set_channel_moments(ChannelMoments* moments, int every) {
  impl_->channels = {.moments = moments, .every = every};
}

absl::Status ModelExecutor::Execute(const Batch& batch, StepResult* result) {
  Impl& impl = *impl_;
  result->tokens.resize(batch.logits.size());
  result->phases = PhaseTimes{};
  result->probe = ProbeUse{};
  if (batch.empty()) return absl::OkStatus();
  impl.MakePlan(batch);
  const bool gathers = impl.BeginGathering(batch);
  impl.model->Forward(
      {.tokens = impl.tokens, .spans = impl.spans, .tables = impl.tables, .steps = impl.steps},
      &impl.pool, &impl.activations, &result->phases);
  if (gathers) impl.EndGathering();

  if (impl.probe != nullptr) {
    const ProbeCounts now = impl.probe->counts();
    result->probe = {.ahead = impl.model->look() == Look::kAhead,
                     .whole = impl.model->look() == Look::kWhole,
                     .rows = now.rows - impl.probe_counts.rows,
                     .rankings = now.rankings - impl.probe_counts.rankings,
                     .age = now.age};
    impl.probe_counts = now;
  }

  impl.Sample(batch, result);
  return impl.backend->Synchronize();
}

void ModelExecutor::PackPages(std::span<const PagePacking> packings) {
  for (size_t begin = 0, end; begin < packings.size(); begin = end) {
    const int layer = packings[begin].layer;
    impl_->packings.clear();
    for (end = begin; end < packings.size() && packings[end].layer == layer; ++end) {
      const PagePacking& packing = packings[end];
      impl_->packings.push_back(
          {.first = packing.first, .second = packing.second, .to = packing.to});
    }
    impl_->model->PackKv(layer, impl_->packings, &impl_->pool);
  }
}

void ModelExecutor::FitPages(std::span<const std::pair<int32_t, int32_t>> moves, int pages) {
  impl_->backend->FitKvPool(moves, pages, &impl_->pool);
}

int ModelExecutor::ReleasablePages(RungSet served) const {
  if (impl_->sources_changed) return 0;
  return static_cast<int>(impl_->model->ReleasableBytes(served) / impl_->pool.shape.page_bytes());
}

absl::StatusOr<WeightsFit> ModelExecutor::FitWeights(RungSet served, bool at_once) {
  Impl& impl = *impl_;
  const bool changed = !impl.model->SourcesUnchanged();
  if (!impl.model->any_released()) {
    // Nothing leaves that could not come back.
    impl.sources_changed = changed;
    if (changed || !impl.model->may_release()) return WeightsFit{};
  }
  if (changed) {
    return absl::DataLossError(
        "the model's file, or its ladder's, has changed since it was opened: weights that left "
        "memory cannot be read again");
  }
  const auto begun = std::chrono::steady_clock::now();
  WeightsFit fit{.done = false};
  // Until it is done, only what was there and stays.
  impl.in_memory &= served;
  for (int layer = 0; !fit.done; ++layer) {
    if (absl::Status status = impl.model->FitLayer(layer, served); !status.ok()) return status;
    fit.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begun).count();
    fit.done = layer + 1 == config().layers;
    if (!at_once && fit.seconds > kReturnSeconds) break;
  }
  if (fit.done) impl.in_memory = served;
  for (const MappedFile* file : impl.files) file->LetGo();
  return fit;
}

absl::Status ModelExecutor::ExecuteLayer(const Batch& batch, int layer, Matrix residual,
                                         bool embedded) {
  Impl& impl = *impl_;
  impl.MakePlan(batch);
  const StepPlan plan{
      .tokens = impl.tokens, .spans = impl.spans, .tables = impl.tables, .steps = impl.steps};
  const int hidden = config().hidden;
  const auto row_in_plan = [&](int row) {
    return impl.activations.residual.data() + int64_t{impl.row_of[row]} * hidden;
  };
  PhaseTimes phases;
  const bool embeds = layer == 0 && !embedded;
  if (embeds) impl.model->Embed(plan, &impl.activations, &phases);
  for (int row = 0; !embeds && row < batch.rows(); ++row) {
    std::copy_n(residual.row(row), hidden, row_in_plan(row));
  }
  impl.model->ForwardLayer(layer, plan, &impl.pool, &impl.activations, &phases);
  const absl::Status status = impl.backend->Synchronize();
  for (int row = 0; row < batch.rows(); ++row) {
    std::copy_n(row_in_plan(row), hidden, residual.row(row));
  }
  return status;
}

absl::Status ModelExecutor::ExecuteHead(const Batch& batch, ConstMatrix residual,
                                        StepResult* result) {
  Impl& impl = *impl_;
  impl.MakePlan(batch);
  result->tokens.resize(batch.logits.size());
  result->phases = PhaseTimes{};
  for (int row = 0; row < batch.rows(); ++row) {
    std::copy_n(residual.row(row), config().hidden,
                impl.activations.residual.data() + int64_t{impl.row_of[row]} * config().hidden);
  }
  impl.Sample(batch, result);
  return impl.backend->Synchronize();
}

const ModelConfig& ModelExecutor::config() const { return impl_->model->config(); }

KvType ModelExecutor::kv_type() const { return impl_->pool.shape.type; }

KvGeometry ModelExecutor::kv_geometry() const {
  return {.layers = config().layers,
          .pages = impl_->pool.shape.pages,
          .page_tokens = kPageTokens,
          .context = config().context};
}

const Ladder& ModelExecutor::ladder() const { return impl_->ladder; }

std::string ModelExecutor::weight_types() const { return impl_->model->weight_types(); }
int ModelExecutor::channel_group() const { return impl_->model->channel_group(); }

BlockMemory ModelExecutor::block_memory() const {
  BlockMemory memory = impl_->model->block_memory();
  memory.kv_bytes = static_cast<int64_t>(impl_->pool.shape.page_bytes()) / kPageTokens;
  return memory;
}

Ledger ModelExecutor::ledger(const SchedulerStats& stats) const {
  const uint64_t page = impl_->pool.shape.page_bytes();
  return {
      .weights = impl_->model->weight_bytes() + impl_->model->panel_bytes() -
                 impl_->model->released_bytes(),
      .weights_released = impl_->model->released_bytes(),
      .kv_used = page * stats.pages_used,
      .kv_reusable = page * stats.pages_cached,
      .kv_free = page * stats.pages_free,
      .workspace = WorkspaceBytes(config(), impl_->options) + impl_->backend->workspace_bytes()};
}

}  // namespace espalier
