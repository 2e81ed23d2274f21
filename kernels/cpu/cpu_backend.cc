#include "kernels/cpu/cpu_backend.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "fmt/format.h"
#include "kernels/cpu/cpu_backend_impl.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/require.h"
#include "kernels/cpu/weight_blocks.h"

namespace espalier {
namespace {

int DivideUp(int value, int by) { return (value + by - 1) / by; }

void RequireShape(const char* what, const ConstMatrix& m, int rows, int cols) {
  Require(m.rows == rows && m.cols == cols && m.stride >= m.cols,
          "{}: expected [{}, {}], got [{}, {}] with stride {}", what, rows, cols, m.rows, m.cols,
          m.stride);
}

// How many weight rows take part.
int ChannelsOf(const MatMulTarget& target) {
  return target.channels == MatMulTarget::kAll ? target.weight->rows : target.channels;
}

void RequireTarget(const MatMulArgs& args, const MatMulTarget& target) {
  const Weight& weight = *target.weight;
  const Weight& first = *args.targets[0].weight;
  Require(IsFloat(weight.type) == IsFloat(first.type) && weight.layout == first.layout,
          "MatMul: targets of one call must share their layout, and be floats or integers");
  Require(weight.blocks != nullptr || weight.bytes == 0, "MatMul: a weight that was released");
  const bool output_rows = weight.layout == WeightLayout::kOutputRows;
  const int channels = ChannelsOf(target), rows = target.out.rows;
  Require(channels >= 0 && channels <= weight.rows, "MatMul: {} of {} weight rows", channels,
          weight.rows);
  Require(target.first_row >= 0 && rows >= 0 && target.first_row <= args.x.rows - rows,
          "MatMul: rows {} + {} of {}", target.first_row, rows, args.x.rows);
  RequireShape("MatMul out", target.out, rows, output_rows ? channels : weight.cols);
  const int depth = output_rows ? weight.cols : channels;
  const bool part = !output_rows && depth < args.x.cols;
  Require(args.x.cols == depth || (part && (IsFloat(weight.type) || depth % kGroup == 0)),
          "MatMul: {} values to sum of {} in x", depth, args.x.cols);
  Require(args.x.stride >= args.x.cols, "MatMul x: {} columns with stride {}", args.x.cols,
          args.x.stride);
  Require(target.bias.empty() || static_cast<int>(target.bias.size()) == target.out.cols,
          "MatMul: bias of {} for {} outputs", target.bias.size(), target.out.cols);
}

const uint8_t* StripsFrom(const Weight& weight, int first) {
  return weight.blocks + first / kStripOutputs * StripBytes(weight);
}

QuantizedRows FromRow(QuantizedRows q, int row) {
  const int64_t at = static_cast<int64_t>(row) * q.groups;
  q.values += row * q.stride;
  q.scales += at;
  q.sums += at;
  q.counts += at;
  return q;
}

}  // namespace

void GrowScratch(int64_t bytes, std::vector<std::shared_ptr<void>>* by_worker) {
  for (std::shared_ptr<void>& scratch : *by_worker) {
    scratch = AllocateAligned(bytes);
    Require(scratch != nullptr, "no memory for {} bytes of scratch", bytes);
  }
}

absl::StatusOr<std::unique_ptr<Backend>> CreateCpuBackend(const CpuBackendOptions& options) {
  const std::vector<Isa> supported = SupportedIsas();
  if (options.isa &&
      std::find(supported.begin(), supported.end(), *options.isa) == supported.end()) {
    return absl::InvalidArgumentError(
        fmt::format("instruction set: this machine cannot run {}; its best is {}",
                    IsaName(*options.isa), IsaName(supported.back())));
  }
  if (options.threads < 0) {
    return absl::InvalidArgumentError(
        fmt::format("threads: expected 0 (all usable cores) or more, got {}", options.threads));
  }
  return std::unique_ptr<Backend>(
      new CpuBackend(options.isa.value_or(supported.back()), options.isa.has_value(),
                     options.threads > 0 ? options.threads : UsableCores()));
}

CpuBackend::CpuBackend(Isa isa, bool isa_forced, int threads)
    : isa_(isa),
      isa_forced_(isa_forced),
      kernels_(KernelsOf(isa)),
      pool_(threads),
      matmul_scratch_(pool_.threads()),
      channels_scratch_(pool_.threads()),
      gather_scratch_(pool_.threads()),
      attention_scratch_(pool_.threads()) {
  GrowScratch(sizeof(MatMulScratch), &matmul_scratch_);
  GrowScratch(sizeof(ChannelsTile), &channels_scratch_);
}

std::string CpuBackend::Describe() const {
  return fmt::format("CPU, {} thread{} of {} usable, {} kernels: {}", pool_.threads(),
                     pool_.threads() == 1 ? "" : "s", UsableCores(), IsaName(isa_),
                     isa_forced_ ? "as asked" : "the best this machine runs");
}

uint64_t CpuBackend::workspace_bytes() const {
  const auto held = [](const auto&... vectors) {
    return ((vectors.capacity() * sizeof(vectors[0])) + ...);
  };
  const auto rows = [&](const QuantizedBuffer& buffer) {
    return held(buffer.values, buffer.scales, buffer.sums, buffer.counts);
  };
  return pool_.threads() * (sizeof(MatMulScratch) + sizeof(ChannelsTile) +
                            (attention_scratch_floats_ + gather_scratch_floats_) * sizeof(float)) +
         rows(quantized_) + rows(quantized_channels_) +
         held(angles_.positions, angles_.cosines, angles_.sines, angles_.spans, next_positions_,
              logit_partials_);
}

void CpuBackend::ParallelFor(int count, const std::function<void(int)>& fn) {
  pool_.Run(count, [&fn](int, int index) { fn(index); });
}

void CpuBackend::Embed(const EmbedArgs& args) {
  const Weight& table = args.table;
  Require(table.layout == WeightLayout::kOutputRows, "Embed: the table must be kOutputRows");
  RequireShape("Embed out", args.out, static_cast<int>(args.tokens.size()), table.cols);
  ForRows(args.out.rows, table.cols, [&](int i) {
    const int64_t token = args.tokens[i];
    Require(token >= 0 && token < table.rows, "Embed: token {} of {}", token, table.rows);
    UnpackOutput(BitsOf(table.type), table.blocks + token / kStripOutputs * StripBytes(table),
                 static_cast<int>(token % kStripOutputs), table.cols, args.out.row(i));
  });
}

void CpuBackend::RmsNorm(const RmsNormArgs& args) {
  RequireShape("RmsNorm out", args.out, args.x.rows, args.x.cols);
  Require(static_cast<int>(args.weight.size()) == args.x.cols,
          "RmsNorm: weight of {} for {} values", args.weight.size(), args.x.cols);
  ForRows(args.x.rows, args.x.cols, [&](int r) {
    kernels_.rms_norm_row(args.x.row(r), args.weight.data(), args.eps, args.x.cols,
                          args.out.row(r));
  });
}

void CpuBackend::SwiGlu(const SwiGluArgs& args) {
  RequireShape("SwiGlu up", args.up, args.gate.rows, args.gate.cols);
  RequireShape("SwiGlu out", args.out, args.gate.rows, args.gate.cols);
  ForRows(args.gate.rows, 4 * args.gate.cols, [&](int r) {
    kernels_.swiglu(args.gate.row(r), args.up.row(r), args.gate.cols, args.out.row(r));
  });
}

void CpuBackend::MatMul(const MatMulArgs& args) {
  if (args.targets.empty() || args.x.rows == 0) return;
  for (const MatMulTarget& target : args.targets) RequireTarget(args, target);
  RunTasks(args, IsFloat(args.targets[0].weight->type) ? QuantizedRows{} : Quantize(args.x));
}

QuantizedRows CpuBackend::Reserve(int rows, int groups, QuantizedBuffer* buffer) {
  const size_t all = static_cast<size_t>(rows) * groups;
  // An odd number of cache lines: rows that start 1,536 bytes apart share half the sets of an L1.
  constexpr int64_t kLine = 64;
  const int64_t stride = ((int64_t{groups} * kGroup + kLine - 1) / kLine | 1) * kLine;
  GrowTo(&buffer->values, rows * stride + kLine - 1);
  GrowTo(&buffer->scales, all);
  GrowTo(&buffer->sums, all);
  GrowTo(&buffer->counts, all);
  const auto begin = reinterpret_cast<uintptr_t>(buffer->values.data());
  return {.values = buffer->values.data() + (-begin & (kLine - 1)),
          .stride = stride,
          .scales = buffer->scales.data(),
          .sums = buffer->sums.data(),
          .counts = buffer->counts.data(),
          .groups = groups};
}

QuantizedRows CpuBackend::Quantize(const ConstMatrix& x) {
  const QuantizedRows q = Reserve(x.rows, GroupsOf(x.cols), &quantized_);
  ForRows(x.rows, x.cols, [&](int r) {
    const QuantizedRows row = FromRow(q, r);
    kernels_.quantize_row(x.row(r), x.cols, row.values, row.scales, row.sums, row.counts);
  });
  return q;
}

int CpuBackend::RowsOfTask(int rows, int tasks_wide) const {
  constexpr int kLeastRows = 32;
  int most = std::min(rows, kMaxTaskRows);
  while (most > kLeastRows && tasks_wide * DivideUp(rows, most) < wanted_tasks()) {
    most = std::max(kLeastRows, most / 2);
  }
  return most;
}

CpuBackend::TaskBlock CpuBackend::TaskBlock::Of(int rows, int most) {
  const int splits = DivideUp(rows, most);
  return {.splits = splits, .rows = rows, .part_rows = DivideUp(rows, splits)};
}

int CpuBackend::ShareOf(int outputs, int task_outputs, int unit) const {
  const int longest = DivideUp(DivideUp(outputs, task_outputs), pool_.threads()) * task_outputs;
  const int share = DivideUp(DivideUp(outputs, pool_.threads()), unit) * unit;
  return share < longest ? share : outputs;
}

int CpuBackend::AddTasks(TaskBlock block, int task_outputs, int unit) {
  // Of rows in many parts there are tasks enough.
  block.share = block.splits > 1 ? block.outputs : ShareOf(block.outputs, task_outputs, unit);
  const int pieces = block.outputs / block.share * DivideUp(block.share, task_outputs) +
                     DivideUp(block.outputs % block.share, task_outputs);
  block.end = (task_blocks_.empty() ? 0 : task_blocks_.back().end) + pieces * block.splits;
  task_blocks_.push_back(block);
  return block.end;
}

CpuBackend::TaskPlace CpuBackend::PlaceOf(int task, int task_outputs) const {
  const TaskBlock* block = task_blocks_.data();
  int begin = 0;
  for (; task >= block->end; ++block) begin = block->end;
  const int part = (task - begin) % block->splits * block->part_rows;
  const int piece = (task - begin) / block->splits;
  const int pieces = DivideUp(block->share, task_outputs);
  const int share = piece / pieces * block->share;
  const int first = share + piece % pieces * task_outputs;
  const int end = std::min(block->outputs, share + block->share);
  return {.block = block,
          .first = block->first + first,
          .outputs = std::min(task_outputs, end - first),
          .row = part,
          .rows = std::min(block->part_rows, block->rows - part)};
}

void CpuBackend::RunTasks(const MatMulArgs& args, const QuantizedRows& quantized) {
  // Few strips: narrower tasks, then with fewer rows, so that every worker has some of them and the
  // last to end is not much later than the rest.
  int task_outputs = kTaskOutputs, tasks_wide = 0, rows = 0;
  for (const MatMulTarget& target : args.targets) rows = std::max(rows, target.out.rows);
  if (rows == 0) return;
  for (;; task_outputs /= 2) {
    tasks_wide = 0;
    for (const MatMulTarget& target : args.targets) {
      tasks_wide += DivideUp(target.out.cols, task_outputs);
    }
    if (tasks_wide >= wanted_tasks() || task_outputs == kStripOutputs * 2) break;
  }
  const int most = RowsOfTask(rows, tasks_wide);
  task_blocks_.clear();
  int tasks = 0;
  for (const MatMulTarget& target : args.targets) {
    if (target.out.rows == 0 || target.out.cols == 0) continue;
    TaskBlock block = TaskBlock::Of(target.out.rows, most);
    block.target = &target;
    block.outputs = target.out.cols;
    tasks = AddTasks(block, task_outputs, kStripOutputs);
  }
  pool_.Run(tasks, [&](int worker, int task) {
    const TaskPlace place = PlaceOf(task, task_outputs);
    const TaskPlace next = PlaceOf(std::min(task + 1, tasks - 1), task_outputs);
    const MatMulTarget& target = *place.block->target;
    const Weight& weight = *target.weight;
    const Weight& next_weight = *next.block->target->weight;
    const int depth = weight.layout == WeightLayout::kOutputRows ? weight.cols : ChannelsOf(target);
    kernels_.matmul({.bits = BitsOf(weight.type),
                     .strips = StripsFrom(weight, place.first),
                     .strip_bytes = StripBytes(weight),
                     .next_strips = StripsFrom(next_weight, next.first),
                     .next_strip_bytes = StripBytes(next_weight),
                     .groups = GroupsOf(depth),
                     .depth = depth,
                     .outputs = place.outputs,
                     .rows = place.rows,
                     .x = args.x.row(target.first_row + place.row),
                     .x_stride = args.x.stride,
                     .q = FromRow(quantized, target.first_row + place.row),
                     .out = target.out.row(place.row) + place.first,
                     .out_stride = target.out.stride,
                     .bias = target.bias.empty() ? nullptr : target.bias.data() + place.first,
                     .add = args.output == MatMulArgs::Output::kAdd},
                    static_cast<MatMulScratch*>(matmul_scratch_[worker].get()));
  });
}

void CpuBackend::GatedMlp(const GatedMlpArgs& args) {
  int channels = 0, rows = 0;
  bool floats = IsFloat(args.gate.type);
  row_places_.clear();
  gated_.clear();
  narrow_.clear();
  for (const MlpStep& step : args.steps) {
    Require(step.places.empty() || static_cast<int>(step.places.size()) == step.channels,
            "GatedMlp: {} places for {} channels", step.places.size(), step.channels);
    row_places_.resize(rows + step.rows, step.places.empty() ? nullptr : step.places.data());
    if (step.rows == 0 || step.channels == 0) {
      rows += step.rows;
      continue;
    }
    channels = std::max(channels, step.channels);
    floats = floats || IsFloat(step.down->type);
    const auto part = [&](const Matrix& m, int cols) {
      Require(rows + step.rows <= m.rows && cols <= m.cols,
              "GatedMlp: rows {} + {} and {} columns in [{}, {}]", rows, step.rows, cols, m.rows,
              m.cols);
      return Matrix(m.row(rows), step.rows, cols, m.stride);
    };
    for (const auto& [weight, room] :
         {std::pair(&args.gate, &args.gate_room), std::pair(&args.up, &args.up_room)}) {
      gated_.push_back({.weight = weight,
                        .out = part(*room, step.channels),
                        .first_row = rows,
                        .channels = step.channels});
    }
    narrow_.push_back({.weight = step.down,
                       .out = part(args.out, args.out.cols),
                       .first_row = rows,
                       .channels = step.channels,
                       .bias = step.bias});
    rows += step.rows;
  }
  Require(rows == args.x.rows, "GatedMlp: steps of {} rows, {} in x", rows, args.x.rows);
  if (narrow_.empty()) return;
  const MatMulArgs widen = {.x = args.x, .targets = gated_};
  const MatMulArgs add = {.x = Matrix(args.gate_room.data, rows, channels, args.gate_room.stride),
                          .targets = narrow_,
                          .output = MatMulArgs::Output::kAdd};
  if (floats) {
    MatMul(widen);
    for (size_t i = 0; i < gated_.size(); i += 2) {
      const Matrix &made = gated_[i].out, &spare = gated_[i + 1].out;
      SwiGlu({.gate = made, .up = spare, .out = made});
      const int32_t* const places = row_places_[gated_[i].first_row];
      if (places == nullptr && !args.keep_hidden) continue;
      ForRows(made.rows, made.cols, [&](int r) {
        std::copy_n(made.row(r), made.cols, spare.row(r));
        if (places == nullptr) return;
        for (int c = 0; c < made.cols; ++c) made.row(r)[places[c]] = spare.row(r)[c];
      });
    }
    MatMul(add);
    return;
  }
  for (const MatMulTarget& target : gated_) RequireTarget(widen, target);
  for (const MatMulTarget& target : narrow_) RequireTarget(add, target);
  const QuantizedRows made = Reserve(rows, GroupsOf(channels), &quantized_channels_);
  MakeChannels(args, channels, made);
  RunTasks(add, made);
}

// The channels of a task are made and quantised while they are in the worker's cache: as fp32 in
// memory they would be written and read twice. They have the bits of the ops they stand for.
void CpuBackend::MakeChannels(const GatedMlpArgs& args, int channels, const QuantizedRows& made) {
  const QuantizedRows quantized = Quantize(args.x);
  // Whole groups to a task, so that it can quantise them.
  static_assert(kTaskOutputs % kGroup == 0);
  const int task_outputs =
      DivideUp(channels, kTaskOutputs) < wanted_tasks() ? kGroup : kTaskOutputs;
  const int most = RowsOfTask(args.x.rows, DivideUp(channels, task_outputs));
  // The staircase: the rows of a task end where nobody after them keeps its channels.
  task_blocks_.clear();
  int tasks = 0;
  for (int first = 0, next = 0; first < channels; first = next) {
    int rows = 0, end = 0;
    for (const MlpStep& step : args.steps) {
      end += step.rows;
      if (step.channels <= first) continue;
      rows = end;
      next = DivideUp(step.channels, kGroup) * kGroup;
    }
    TaskBlock block = TaskBlock::Of(rows, most);
    block.first = first;
    block.outputs = std::min(next, channels) - first;
    tasks = AddTasks(block, task_outputs, kGroup);
  }
  const Weight* const weights[] = {&args.gate, &args.up};
  const int groups = GroupsOf(args.x.cols);
  pool_.Run(tasks, [&](int worker, int task) {
    const TaskPlace place = PlaceOf(task, task_outputs);
    const TaskPlace next = PlaceOf(std::min(task + 1, tasks - 1), task_outputs);
    const int outputs = place.outputs;
    auto* tile = static_cast<ChannelsTile*>(channels_scratch_[worker].get());
    for (const bool up : {false, true}) {
      const Weight& next_weight = *weights[!up];
      kernels_.matmul({.bits = BitsOf(weights[up]->type),
                       .strips = StripsFrom(*weights[up], place.first),
                       .strip_bytes = StripBytes(*weights[up]),
                       .next_strips = StripsFrom(next_weight, up ? next.first : place.first),
                       .next_strip_bytes = StripBytes(next_weight),
                       .groups = groups,
                       .depth = args.x.cols,
                       .outputs = outputs,
                       .rows = place.rows,
                       .q = FromRow(quantized, place.row),
                       .out = up ? tile->up : tile->gate,
                       .out_stride = kTaskOutputs},
                      static_cast<MatMulScratch*>(matmul_scratch_[worker].get()));
    }
    for (int r = 0; r < place.rows; ++r) {
      float* gate = tile->gate + r * kTaskOutputs;
      kernels_.swiglu(gate, tile->up + r * kTaskOutputs, outputs, gate);
      if (args.keep_hidden) {
        std::copy_n(gate, outputs, args.up_room.row(place.row + r) + place.first);
      }
      if (const int32_t* const places = row_places_[place.row + r]; places != nullptr) {
        float* const row = args.gate_room.row(place.row + r);
        for (int c = 0; c < outputs; ++c) row[places[place.first + c]] = gate[c];
        continue;
      }
      const QuantizedRows to = FromRow(made, place.row + r);
      const int group = place.first / kGroup;
      kernels_.quantize_row(gate, outputs, to.values + place.first, to.scales + group,
                            to.sums + group, to.counts + group);
    }
  });
  if (std::ranges::all_of(row_places_, [](const int32_t* p) { return p == nullptr; })) return;
  ForRows(args.x.rows, channels, [&](int r) {
    if (row_places_[r] == nullptr) return;
    const QuantizedRows to = FromRow(made, r);
    kernels_.quantize_row(args.gate_room.row(r), channels, to.values, to.scales, to.sums,
                          to.counts);
  });
}

void CpuBackend::LogitStats(const LogitStatsArgs& args) {
  // Blocks of fixed size, merged in order: who computed which does not matter. 16 KiB stay in L1
  // between the pass for the maximum and the one for the sum.
  constexpr int kBlock = 4096;
  const int rows = args.logits.rows, cols = args.logits.cols;
  Require(static_cast<int>(args.out.size()) == rows, "LogitStats: {} results for {} rows",
          args.out.size(), rows);
  const int blocks = DivideUp(cols, kBlock);
  const size_t all = static_cast<size_t>(rows) * blocks;
  Require(all <= std::numeric_limits<int>::max(), "LogitStats: {} blocks", all);
  GrowTo(&logit_partials_, all);
  pool_.Run(static_cast<int>(all), [&](int, int index) {
    const int begin = index % blocks * kBlock;
    logit_partials_[index] = kernels_.logit_block(args.logits.row(index / blocks) + begin,
                                                  std::min(kBlock, cols - begin));
  });
  for (int r = 0; r < rows; ++r) {
    const LogitPartial* partials = logit_partials_.data() + static_cast<size_t>(r) * blocks;
    LogitStatsArgs::Stats stats{.max = -std::numeric_limits<float>::infinity()};
    for (int b = 0; b < blocks; ++b) {
      if (b == 0 || partials[b].max > stats.max) {
        stats.max = partials[b].max;
        stats.argmax = b * kBlock + partials[b].argmax;
      }
    }
    float sum = 0;
    for (int b = 0; b < blocks; ++b) sum += partials[b].sum * std::exp(partials[b].max - stats.max);
    stats.log_sum_exp = stats.max + std::log(sum);
    args.out[r] = stats;
  }
}

}  // namespace espalier
