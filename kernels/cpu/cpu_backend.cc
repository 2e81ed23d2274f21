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

void RequireShape(const char* what, const ConstMatrix& m, int rows, int cols) {
  Require(m.rows == rows && m.cols == cols && m.stride >= m.cols,
          "{}: expected [{}, {}], got [{}, {}] with stride {}", what, rows, cols, m.rows, m.cols,
          m.stride);
}

void RequireTarget(const MatMulArgs& args, const MatMulTarget& target) {
  const Weight& weight = *target.weight;
  const Weight& first = *args.targets[0].weight;
  Require(IsFloat(weight.type) == IsFloat(first.type) && weight.layout == first.layout,
          "MatMul: targets of one call must share their layout, and be floats or integers");
  const bool output_rows = weight.layout == WeightLayout::kOutputRows;
  const int count = target.selection.count();
  Require(count <= weight.rows, "MatMul: {} of {} rows selected", count, weight.rows);
  RequireShape("MatMul x", args.x, args.x.rows, output_rows ? weight.cols : count);
  RequireShape("MatMul out", target.out, args.x.rows, output_rows ? count : weight.cols);
  Require(target.bias.empty() || static_cast<int>(target.bias.size()) == target.out.cols,
          "MatMul: bias of {} for {} outputs", target.bias.size(), target.out.cols);
}

// Only a list of kOutputRows is gathered; of kInputRows it is x that goes where the rows lie.
bool Gathers(const MatMulTarget& target) {
  return target.weight->layout == WeightLayout::kOutputRows && !target.selection.all();
}

// Null if they must be gathered.
const uint8_t* StripsInPlace(const MatMulTarget& target, int first) {
  const Weight& weight = *target.weight;
  return Gathers(target) ? nullptr : weight.blocks + first / kStripOutputs * StripBytes(weight);
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
      gather_scratch_(pool_.threads()),
      channels_scratch_(pool_.threads()),
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
  return pool_.threads() * (sizeof(MatMulScratch) + sizeof(ChannelsTile) + gather_scratch_bytes_ +
                            attention_scratch_floats_ * sizeof(float)) +
         rows(quantized_) + rows(quantized_channels_) +
         held(placed_, groups_kept_, places_, angles_.positions, angles_.cosines, angles_.sines,
              angles_.spans, next_positions_, logit_partials_);
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
  const Weight& first = *args.targets[0].weight;
  const auto run = [&](std::span<const MatMulTarget> targets, const PlacedInput& input) {
    const bool integers = !IsFloat(first.type);
    RunTasks(args.output, targets, input, integers ? Quantize(input) : QuantizedRows{});
  };
  if (first.layout == WeightLayout::kOutputRows) {
    run(args.targets, {.x = args.x, .groups = GroupsOf(args.x.cols)});
    return;
  }
  for (const MatMulTarget& target : args.targets) run({&target, 1}, Place(args, target));
}

// Where columns of x meet rows that do not lie one after the other, x is spread out: its columns go
// to their rows' places among the groups that any of them lies in, and zeros between them.
CpuBackend::PlacedInput CpuBackend::Place(const MatMulArgs& args, const MatMulTarget& target) {
  const Weight& weight = *target.weight;
  if (target.selection.all() && weight.places == nullptr) {
    return {.x = args.x, .groups = weight.groups};
  }
  PlaceRows(weight, target.selection, &groups_kept_, &places_);
  const int groups = static_cast<int>(groups_kept_.size());
  const int64_t cols = int64_t{groups} * kGroup;
  GrowTo(&placed_, args.x.rows * cols);
  ForRows(args.x.rows, static_cast<int>(cols), [&](int r) {
    float* to = placed_.data() + r * cols;
    std::fill_n(to, cols, 0.0f);
    for (int i = 0; i < args.x.cols; ++i) to[places_[i]] = args.x.row(r)[i];
  });
  return {.x = ConstMatrix(placed_.data(), args.x.rows, static_cast<int>(cols)),
          .groups = groups,
          .groups_kept = groups_kept_.data()};
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

QuantizedRows CpuBackend::Quantize(const PlacedInput& input) {
  const QuantizedRows q = Reserve(input.x.rows, input.groups, &quantized_);
  ForRows(input.x.rows, input.x.cols, [&](int r) {
    const QuantizedRows row = FromRow(q, r);
    kernels_.quantize_row(input.x.row(r), input.x.cols, row.values, row.scales, row.sums,
                          row.counts);
  });
  return q;
}

void CpuBackend::GrowGatherScratch(std::span<const MatMulTarget> targets) {
  int64_t bytes = 0;
  for (const MatMulTarget& target : targets) {
    if (Gathers(target)) bytes = std::max(bytes, kTaskStrips * StripBytes(*target.weight));
  }
  if (bytes <= gather_scratch_bytes_) return;
  GrowScratch(bytes, &gather_scratch_);
  gather_scratch_bytes_ = bytes;
}

const uint8_t* CpuBackend::TaskStrips(const MatMulTarget& target, int first, int count,
                                      int worker) {
  if (!Gathers(target)) return StripsInPlace(target, first);
  const Weight& weight = *target.weight;
  auto* gathered = static_cast<uint8_t*>(gather_scratch_[worker].get());
  for (int n = 0; n < count; n += kStripOutputs) {
    GatherStrip(weight, target.selection, first + n,
                gathered + n / kStripOutputs * StripBytes(weight));
  }
  return gathered;
}

int CpuBackend::RowsOfTask(int rows, int tasks_wide) const {
  constexpr int kLeastRows = 32;
  int most = std::min(rows, kMaxTaskRows);
  const auto splits = [&] { return (rows + most - 1) / most; };
  while (most > kLeastRows && tasks_wide * splits() < wanted_tasks()) {
    most = std::max(kLeastRows, most / 2);
  }
  return (rows + splits() - 1) / splits();
}

void CpuBackend::RunTasks(MatMulArgs::Output output, std::span<const MatMulTarget> targets,
                          const PlacedInput& input, const QuantizedRows& quantized) {
  // Few strips: narrower tasks, then with fewer rows, so that every worker has some of them and the
  // last to end is not much later than the rest.
  const auto tasks_of = [](const MatMulTarget& target, int outputs) {
    return (target.out.cols + outputs - 1) / outputs;
  };
  int task_outputs = kTaskOutputs, tasks_wide = 0;
  for (;; task_outputs /= 2) {
    tasks_wide = 0;
    for (const MatMulTarget& target : targets) tasks_wide += tasks_of(target, task_outputs);
    if (tasks_wide >= wanted_tasks() || task_outputs == kStripOutputs * 2) break;
  }
  const int rows = input.x.rows, task_rows = RowsOfTask(rows, tasks_wide);
  const int splits = (rows + task_rows - 1) / task_rows;
  GrowTo(&task_ends_, targets.size());
  int tasks = 0;
  for (size_t i = 0; i < targets.size(); ++i) {
    task_ends_[i] = tasks += tasks_of(targets[i], task_outputs) * splits;
  }
  GrowGatherScratch(targets);
  struct Place {
    const MatMulTarget* target;
    int first, row;
  };
  const auto place_of = [&](int task) -> Place {
    size_t which = 0;
    while (task >= task_ends_[which]) ++which;
    if (which > 0) task -= task_ends_[which - 1];
    return {&targets[which], task / splits * task_outputs, task % splits * task_rows};
  };
  pool_.Run(tasks, [&](int worker, int task) {
    const auto [place, first, row] = place_of(task);
    const MatMulTarget& target = *place;
    const Weight& weight = *target.weight;
    const Place next = place_of(std::min(task + 1, tasks - 1));
    const int outputs = std::min(task_outputs, target.out.cols - first);
    kernels_.matmul({.bits = BitsOf(weight.type),
                     .strips = TaskStrips(target, first, outputs, worker),
                     .strip_bytes = StripBytes(weight),
                     .next_strips = StripsInPlace(*next.target, next.first),
                     .next_strip_bytes = StripBytes(*next.target->weight),
                     .groups_kept = input.groups_kept,
                     .groups = input.groups,
                     .depth = input.x.cols,
                     .outputs = outputs,
                     .rows = std::min(task_rows, rows - row),
                     .x = input.x.row(row),
                     .x_stride = input.x.stride,
                     .q = FromRow(quantized, row),
                     .out = target.out.row(row) + first,
                     .out_stride = target.out.stride,
                     .bias = target.bias.empty() ? nullptr : target.bias.data() + first,
                     .add = output == MatMulArgs::Output::kAdd},
                    static_cast<MatMulScratch*>(matmul_scratch_[worker].get()));
  });
}

// The channels of a task are made and quantised while they are in the worker's cache: as fp32 in
// memory they would be written and read twice. They have the bits of the ops
// they stand for.
void CpuBackend::GatedMlp(const GatedMlpArgs& args) {
  const int channels = args.selection.count();
  const MatMulTarget wide[] = {
      {.weight = &args.gate, .selection = args.selection, .out = args.gate_room},
      {.weight = &args.up, .selection = args.selection, .out = args.up_room}};
  const MatMulTarget narrow = {.weight = &args.down, .selection = args.selection, .out = args.out};
  const MatMulArgs widen = {.x = args.x, .targets = wide};
  const MatMulArgs add = {
      .x = args.gate_room, .targets = {&narrow, 1}, .output = MatMulArgs::Output::kAdd};
  const bool placed = args.down.places != nullptr || !args.selection.all();
  if (IsFloat(args.gate.type) || IsFloat(args.down.type) || placed) {
    MatMul(widen);
    SwiGlu({.gate = args.gate_room, .up = args.up_room, .out = args.gate_room});
    MatMul(add);
    return;
  }
  if (args.x.rows == 0) return;
  for (const MatMulTarget& target : wide) RequireTarget(widen, target);
  RequireTarget(add, narrow);
  const PlacedInput input = {.x = args.x, .groups = GroupsOf(args.x.cols)};
  const QuantizedRows quantized = Quantize(input);
  const QuantizedRows made = Reserve(args.x.rows, GroupsOf(channels), &quantized_channels_);
  const int rows = args.x.rows;
  // Whole groups to a task, so that it can quantise them.
  static_assert(kTaskOutputs % kGroup == 0);
  const auto pieces_of = [&](int outputs) { return (channels + outputs - 1) / outputs; };
  const int task_outputs = pieces_of(kTaskOutputs) < wanted_tasks() ? kGroup : kTaskOutputs;
  const int pieces = pieces_of(task_outputs);
  const int task_rows = RowsOfTask(rows, pieces), splits = (rows + task_rows - 1) / task_rows;
  const int tasks = pieces * splits;
  const auto first_of = [&](int task) { return task / splits * task_outputs; };
  pool_.Run(tasks, [&](int worker, int task) {
    const int first = first_of(task), row = task % splits * task_rows;
    const int outputs = std::min(task_outputs, channels - first);
    auto* tile = static_cast<ChannelsTile*>(channels_scratch_[worker].get());
    for (const MatMulTarget& target : wide) {
      const bool gate = &target == wide;
      const MatMulTarget& next = wide[gate ? 1 : 0];
      const int next_first = gate ? first : first_of(std::min(task + 1, tasks - 1));
      kernels_.matmul({.bits = BitsOf(target.weight->type),
                       .strips = StripsInPlace(target, first),
                       .strip_bytes = StripBytes(*target.weight),
                       .next_strips = StripsInPlace(next, next_first),
                       .next_strip_bytes = StripBytes(*next.weight),
                       .groups = input.groups,
                       .depth = input.x.cols,
                       .outputs = outputs,
                       .rows = std::min(task_rows, rows - row),
                       .q = FromRow(quantized, row),
                       .out = gate ? tile->gate : tile->up,
                       .out_stride = kTaskOutputs},
                      static_cast<MatMulScratch*>(matmul_scratch_[worker].get()));
    }
    for (int r = 0; r < std::min(task_rows, rows - row); ++r) {
      float* gate = tile->gate + r * kTaskOutputs;
      kernels_.swiglu(gate, tile->up + r * kTaskOutputs, outputs, gate);
      const QuantizedRows to = FromRow(made, row + r);
      const int group = first / kGroup;
      kernels_.quantize_row(gate, outputs, to.values + first, to.scales + group, to.sums + group,
                            to.counts + group);
    }
  });
  RunTasks(add.output, add.targets, {.x = args.gate_room, .groups = made.groups}, made);
}

void CpuBackend::LogitStats(const LogitStatsArgs& args) {
  // Blocks of fixed size, merged in order: who computed which does not matter. 16 KiB stay in L1
  // between the pass for the maximum and the one for the sum.
  constexpr int kBlock = 4096;
  const int rows = args.logits.rows, cols = args.logits.cols;
  Require(static_cast<int>(args.out.size()) == rows, "LogitStats: {} results for {} rows",
          args.out.size(), rows);
  const int blocks = (cols + kBlock - 1) / kBlock;
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
