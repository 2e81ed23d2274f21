// The hot path allocates nothing once it has seen its largest step.
#include "tests/kernels/kernel_cases.h"
#include "tests/support/allocations.h"

namespace espalier {
namespace {

class AllocationTest : public ::testing::TestWithParam<KernelCase> {};

INSTANTIATE_TEST_SUITE_P(Isa, AllocationTest, ::testing::ValuesIn(AllKernelCases()),
                         KernelCaseName);

TEST_P(AllocationTest, StepsAfterTheFirstAllocateNothing) {
  constexpr int kRows = 40, kHidden = 96, kHeads = 6, kKvHeads = 2, kDim = 16;
  const auto backend = MakeBackend(GetParam().isa);
  const auto upload = [&](WeightLayout layout, int rows, int cols) {
    return Upload(backend.get(), RandomWeight(GetParam().type, layout, rows, cols, 1));
  };
  const Weight table = upload(WeightLayout::kOutputRows, 300, kHidden);
  const Weight down = upload(WeightLayout::kInputRows, 200, kHidden);
  const Weight wide = upload(WeightLayout::kOutputRows, 200, kHidden);
  KvPool pool = backend->CreateKvPool({.pages = 4, .kv_heads = kKvHeads, .head_dim = kDim}).value();
  const std::vector<int32_t> tokens(kRows, 7), pages = {3, 1, 0, 2}, list = {5, 3, 0};
  const std::vector<std::span<const int32_t>> tables = {pages};
  const std::vector<float> norm(kHidden, 1.0f), frequency(kDim / 2, 0.5f);
  std::vector<float> hidden(kRows * kHidden), logits(kRows * 300), narrow(kRows * 200);
  std::vector<float> q(kRows * 3 * kDim), kv(kRows * kKvHeads * kDim), out(q.size());
  std::vector<LogitStatsArgs::Stats> stats(kRows);

  const auto step = [&](int rows, int start) {
    const Matrix x(hidden.data(), rows, kHidden);
    backend->Embed({.tokens = std::span(tokens).first(rows), .table = table, .out = x});
    backend->RmsNorm({.x = x, .weight = norm, .out = x});
    MatMulTarget target{.weight = &table, .out = Matrix(logits.data(), rows, 300)};
    backend->MatMul({.x = x, .targets = {&target, 1}});
    const Matrix gate(narrow.data(), rows, 200);
    backend->SwiGlu({.gate = gate, .up = gate, .out = gate});
    target = {.weight = &down, .out = x};
    backend->MatMul({.x = gate, .targets = {&target, 1}, .output = MatMulArgs::Output::kAdd});
    const MlpStep steps[] = {{.rows = rows - rows / 2, .channels = 200, .down = &down},
                             {.rows = rows / 2, .channels = 64, .down = &down}};
    backend->GatedMlp({.x = x,
                       .gate = wide,
                       .up = wide,
                       .steps = steps,
                       .gate_room = gate,
                       .up_room = gate,
                       .out = x});
    const AttentionSpan span{.first_row = 0, .rows = rows, .start = start};
    const Matrix queries(q.data(), rows, 3 * kDim), keys(kv.data(), rows, kKvHeads * kDim);
    backend->RopeAndStore({.spans = {&span, 1},
                           .page_tables = tables,
                           .q = queries,
                           .k = keys,
                           .v = keys,
                           .inverse_frequency = frequency,
                           .pool = &pool});
    backend->Attention({.spans = {&span, 1},
                        .page_tables = tables,
                        .q = queries,
                        .heads_kept = list,
                        .heads = kHeads,
                        .scale = 0.25f,
                        .pool = &pool,
                        .out = Matrix(out.data(), rows, 3 * kDim)});
    backend->LogitStats(
        {.logits = ConstMatrix(logits.data(), rows, 300), .out = std::span(stats).first(rows)});
  };
  const uint64_t idle = backend->workspace_bytes();
  step(kRows, 0);
  const uint64_t grown = backend->workspace_bytes();
  EXPECT_GE(grown, idle + kRows * 2 * kDim * sizeof(float)) << "the angles' tables at least";
  const int64_t before = Allocations();
  step(kRows, 5);
  step(1, kRows);
  step(7, kRows + 1);
  EXPECT_EQ(Allocations() - before, 0);
  EXPECT_EQ(backend->workspace_bytes(), grown);
}

}  // namespace
}  // namespace espalier
