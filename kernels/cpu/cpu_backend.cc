#include "kernels/cpu/cpu_backend.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "fmt/format.h"
#include "kernels/cpu/cpu_backend_impl.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/require.h"

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
  Require(weight.type == first.type && weight.layout == first.layout,
          "MatMul: targets of one call must share type and layout");
  const bool output_rows = weight.layout == WeightLayout::kOutputRows;
  const int count = target.selection.count();
  Require(count <= weight.rows, "MatMul: {} of {} rows selected", count, weight.rows);
  RequireShape("MatMul x", args.x, args.x.rows, output_rows ? weight.cols : count);
  RequireShape("MatMul out", target.out, args.x.rows, output_rows ? count : weight.cols);
  Require(target.bias.empty() || static_cast<int>(target.bias.size()) == target.out.cols,
          "MatMul: bias of {} for {} outputs", target.bias.size(), target.out.cols);
}

}  // namespace

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
      tile_scratch_(pool_.threads()),
      attention_scratch_(pool_.threads()) {
  for (std::shared_ptr<void>& scratch : tile_scratch_) {
    scratch = AllocateAligned(sizeof(TileScratch));
    Require(scratch != nullptr, "no memory for {} bytes of scratch", sizeof(TileScratch));
  }
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
  return pool_.threads() * (sizeof(TileScratch) + attention_scratch_floats_ * sizeof(float)) +
         held(quantized_values_, quantized_scales_, quantized_offsets_, angles_.positions,
              angles_.cosines, angles_.sines, angles_.spans, next_positions_, logit_partials_);
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
    const int64_t at = token * table.row_stride;
    if (table.type == WeightType::kF32) {
      std::memcpy(args.out.row(i), static_cast<const float*>(table.values) + at,
                  table.cols * sizeof(float));
    } else {
      kernels_.dequantize_row(static_cast<const int8_t*>(table.values) + at,
                              table.scales + at / kQuantGroup, table.cols, args.out.row(i));
    }
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
  if (first.type == WeightType::kF32) {
    RunTiles(args, args.targets, {});
    return;
  }
  const QuantizedRows quantized = Quantize(args.x);
  if (first.layout == WeightLayout::kOutputRows) {
    RunTiles(args, args.targets, quantized);
    return;
  }
  for (MatMulTarget target : args.targets) {
    Weight panel;
    if (!target.selection.all()) {
      absl::StatusOr<Weight> gathered = GatherRows(*target.weight, target.selection);
      Require(gathered.ok(), "MatMul: {}", gathered.status().ToString());
      panel = *std::move(gathered);
      target.weight = &panel;
      target.selection = ChannelSelection::All(panel.rows);
    }
    RunTiles(args, {&target, 1}, quantized);
  }
}

QuantizedRows CpuBackend::Quantize(const ConstMatrix& x) {
  const int groups = (x.cols + kTileDepth - 1) / kTileDepth * kTileGroups;
  const size_t all = static_cast<size_t>(x.rows) * groups;
  GrowTo(&quantized_values_, all * kQuantGroup);
  GrowTo(&quantized_scales_, all);
  GrowTo(&quantized_offsets_, all);
  const QuantizedRows q{.values = quantized_values_.data(),
                        .scales = quantized_scales_.data(),
                        .offsets = quantized_offsets_.data(),
                        .groups = groups};
  ForRows(x.rows, x.cols, [&](int r) {
    const int64_t at = static_cast<int64_t>(r) * groups;
    kernels_.quantize_row(x.row(r), x.cols, q.values + at * kQuantGroup, q.scales + at,
                          q.offsets + at);
  });
  return q;
}

void CpuBackend::RunTiles(const MatMulArgs& args, std::span<const MatMulTarget> targets,
                          const QuantizedRows& quantized) {
  const auto tiles_of = [](const MatMulTarget& target) {
    return (target.out.cols + kTileOutputs - 1) / kTileOutputs;
  };
  int tiles = 0;
  for (const MatMulTarget& target : targets) tiles += tiles_of(target);
  // Few tiles and many rows: shorter tasks, so that every worker has some.
  const int rows = args.x.rows;
  int task_rows = std::min(rows, kMaxTaskRows);
  const auto splits = [&] { return (rows + task_rows - 1) / task_rows; };
  while (task_rows > kRowBlock && tiles * splits() < 4 * pool_.threads()) {
    task_rows = std::max(kRowBlock, task_rows / 2);
  }
  const int splits_per_tile = splits();
  GrowTo(&task_ends_, targets.size());
  int tasks = 0;
  for (size_t i = 0; i < targets.size(); ++i) {
    task_ends_[i] = tasks += tiles_of(targets[i]) * splits_per_tile;
  }
  pool_.Run(tasks, [&](int worker, int task) {
    size_t which = 0;
    while (task >= task_ends_[which]) ++which;
    const MatMulTarget& target = targets[which];
    const Weight& weight = *target.weight;
    if (which > 0) task -= task_ends_[which - 1];
    const int output = task / splits_per_tile * kTileOutputs;
    const int row = task % splits_per_tile * task_rows;
    TileTask tile{
        .int8 = weight.type == WeightType::kInt8,
        .output_rows = weight.layout == WeightLayout::kOutputRows,
        .values = weight.values,
        .scales = weight.scales,
        .row_stride = weight.row_stride,
        .scale_stride = weight.layout == WeightLayout::kOutputRows ? weight.row_stride / kGroup
                                                                   : weight.row_stride,
        .list = target.selection.list(),
        .depth = args.x.cols,
        .first_output = output,
        .outputs = std::min(kTileOutputs, target.out.cols - output),
        .rows = std::min(task_rows, rows - row),
        .x = args.x.row(row),
        .x_stride = args.x.stride,
        .q = quantized,
        .out = target.out.row(row) + output,
        .out_stride = target.out.stride,
        .bias = target.bias.empty() ? nullptr : target.bias.data() + output,
        .add = args.output == MatMulArgs::Output::kAdd,
    };
    if (tile.int8) {
      const int64_t at = static_cast<int64_t>(row) * quantized.groups;
      tile.q.values += at * kQuantGroup;
      tile.q.scales += at;
      tile.q.offsets += at;
    }
    kernels_.matmul_tile(tile, static_cast<TileScratch*>(tile_scratch_[worker].get()));
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
