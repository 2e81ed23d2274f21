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
  Require((weight.type == WeightType::kF32) == (first.type == WeightType::kF32) &&
              weight.layout == first.layout,
          "MatMul: targets of one call must share their layout, and be fp32 or integers");
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
      attention_scratch_(pool_.threads()) {
  GrowScratch(sizeof(MatMulScratch), &matmul_scratch_);
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
  return pool_.threads() * (sizeof(MatMulScratch) + gather_scratch_bytes_ +
                            attention_scratch_floats_ * sizeof(float)) +
         held(quantized_values_, quantized_scales_, quantized_sums_, quantized_counts_, placed_,
              groups_kept_, places_, angles_.positions, angles_.cosines, angles_.sines,
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
  if (first.layout == WeightLayout::kOutputRows) {
    RunTasks(args, args.targets, {.x = args.x, .groups = GroupsOf(args.x.cols)});
    return;
  }
  for (const MatMulTarget& target : args.targets) RunTasks(args, {&target, 1}, Place(args, target));
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

QuantizedRows CpuBackend::Quantize(const PlacedInput& input) {
  const int groups = input.groups;
  const size_t all = static_cast<size_t>(input.x.rows) * groups;
  // An odd number of cache lines: rows that start 1,536 bytes apart share half the sets of an L1.
  constexpr int64_t kLine = 64;
  const int64_t stride = ((int64_t{groups} * kGroup + kLine - 1) / kLine | 1) * kLine;
  GrowTo(&quantized_values_, input.x.rows * stride);
  GrowTo(&quantized_scales_, all);
  GrowTo(&quantized_sums_, all);
  GrowTo(&quantized_counts_, all);
  const QuantizedRows q{.values = quantized_values_.data(),
                        .stride = stride,
                        .scales = quantized_scales_.data(),
                        .sums = quantized_sums_.data(),
                        .counts = quantized_counts_.data(),
                        .groups = groups};
  ForRows(input.x.rows, input.x.cols, [&](int r) {
    const int64_t at = static_cast<int64_t>(r) * groups;
    kernels_.quantize_row(input.x.row(r), input.x.cols, q.values + r * stride, q.scales + at,
                          q.sums + at, q.counts + at);
  });
  return q;
}

void CpuBackend::RunTasks(const MatMulArgs& args, std::span<const MatMulTarget> targets,
                          const PlacedInput& input) {
  const bool integers = targets[0].weight->type != WeightType::kF32;
  const QuantizedRows quantized = integers ? Quantize(input) : QuantizedRows{};
  // Few strips: narrower tasks, then with fewer rows, so that every worker has some of them and the
  // last to end is not much later than the rest.
  const int wanted = 4 * pool_.threads();
  const auto tasks_of = [](const MatMulTarget& target, int outputs) {
    return (target.out.cols + outputs - 1) / outputs;
  };
  int task_outputs = kTaskOutputs, tasks_wide = 0;
  for (;; task_outputs /= 2) {
    tasks_wide = 0;
    for (const MatMulTarget& target : targets) tasks_wide += tasks_of(target, task_outputs);
    if (tasks_wide >= wanted || task_outputs == kStripOutputs * 2) break;
  }
  constexpr int kLeastRows = 32;
  const int rows = input.x.rows;
  int task_rows = std::min(rows, kMaxTaskRows);
  const auto splits = [&] { return (rows + task_rows - 1) / task_rows; };
  while (task_rows > kLeastRows && tasks_wide * splits() < wanted) {
    task_rows = std::max(kLeastRows, task_rows / 2);
  }
  const int splits_per_task = splits();
  GrowTo(&task_ends_, targets.size());
  int tasks = 0;
  int64_t gathered_bytes = 0;
  for (size_t i = 0; i < targets.size(); ++i) {
    task_ends_[i] = tasks += tasks_of(targets[i], task_outputs) * splits_per_task;
    if (Gathers(targets[i])) {
      gathered_bytes = std::max(gathered_bytes, kTaskStrips * StripBytes(*targets[i].weight));
    }
  }
  if (gathered_bytes > gather_scratch_bytes_) {
    GrowScratch(gathered_bytes, &gather_scratch_);
    gather_scratch_bytes_ = gathered_bytes;
  }
  pool_.Run(tasks, [&](int worker, int task) {
    size_t which = 0;
    while (task >= task_ends_[which]) ++which;
    const MatMulTarget& target = targets[which];
    const Weight& weight = *target.weight;
    if (which > 0) task -= task_ends_[which - 1];
    const int output = task / splits_per_task * task_outputs;
    const int row = task % splits_per_task * task_rows;
    const int outputs = std::min(task_outputs, target.out.cols - output);
    const uint8_t* strips = weight.blocks + output / kStripOutputs * StripBytes(weight);
    if (Gathers(target)) {
      auto* gathered = static_cast<uint8_t*>(gather_scratch_[worker].get());
      for (int n = 0; n < outputs; n += kStripOutputs) {
        GatherStrip(weight, target.selection, output + n,
                    gathered + n / kStripOutputs * StripBytes(weight));
      }
      strips = gathered;
    }
    MatMulTask part{
        .bits = BitsOf(weight.type),
        .strips = strips,
        .strip_bytes = StripBytes(weight),
        .groups_kept = input.groups_kept,
        .groups = input.groups,
        .depth = input.x.cols,
        .outputs = outputs,
        .rows = std::min(task_rows, rows - row),
        .x = input.x.row(row),
        .x_stride = input.x.stride,
        .q = quantized,
        .out = target.out.row(row) + output,
        .out_stride = target.out.stride,
        .bias = target.bias.empty() ? nullptr : target.bias.data() + output,
        .add = args.output == MatMulArgs::Output::kAdd,
    };
    if (integers) {
      const int64_t at = static_cast<int64_t>(row) * quantized.groups;
      part.q.values += row * quantized.stride;
      part.q.scales += at;
      part.q.sums += at;
      part.q.counts += at;
    }
    kernels_.matmul(part, static_cast<MatMulScratch*>(matmul_scratch_[worker].get()));
  });
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
