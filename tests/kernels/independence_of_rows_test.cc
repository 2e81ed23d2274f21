// The promise everything above the kernels rests on: a row's bits depend on that row alone.
#include "tests/kernels/kernel_cases.h"

namespace espalier {
namespace {

class RowsTest : public ::testing::TestWithParam<KernelCase> {
 protected:
  // x times a weight in calls of `step` rows.
  static std::vector<float> Multiply(Backend* backend, const Weight& weight,
                                     const std::vector<float>& x, int rows, int step) {
    const bool output_rows = weight.layout == WeightLayout::kOutputRows;
    const int depth = output_rows ? weight.cols : weight.rows;
    const int outputs = output_rows ? weight.rows : weight.cols;
    std::vector<float> out(int64_t{rows} * outputs);
    for (int r = 0; r < rows; r += step) {
      const int count = std::min(step, rows - r);
      const MatMulTarget target{.weight = &weight,
                                .out = Matrix(out.data() + int64_t{r} * outputs, count, outputs)};
      backend->MatMul(
          {.x = ConstMatrix(x.data() + int64_t{r} * depth, count, depth), .targets = {&target, 1}});
    }
    return out;
  }
};

INSTANTIATE_TEST_SUITE_P(Isa, RowsTest, ::testing::ValuesIn(AllKernelCases()), KernelCaseName);

TEST_P(RowsTest, MatMulGivesTheSameBitsHoweverRowsAndThreadsAreSplit) {
  const auto two = MakeBackend(GetParam().isa, 2);
  constexpr int kRows = 150;
  for (WeightLayout layout : {WeightLayout::kOutputRows, WeightLayout::kInputRows}) {
    const Weight weight = Upload(two.get(), RandomWeight(GetParam().type, layout, 200, 1100, 1));
    const auto x = RandomValues(int64_t{kRows} * 1100, 2);
    const auto all = Multiply(two.get(), weight, x, kRows, kRows);
    for (int step : {1, 2, 3, 33, 64, 129}) {
      EXPECT_TRUE(BitEqual(all, Multiply(two.get(), weight, x, kRows, step)))
          << step << " rows a call";
    }
    for (int threads : {1, 3, 5, 7}) {
      const auto other = MakeBackend(GetParam().isa, threads);
      for (int step : {30, kRows}) {
        EXPECT_TRUE(BitEqual(all, Multiply(other.get(), weight, x, kRows, step)))
            << threads << " threads, " << step << " rows a call";
      }
    }
  }
}

// Slices of a staircase are cut for the workers, each by itself: of 7, 4 and 7 tasks here.
TEST_P(RowsTest, GatedMlpGivesTheSameBitsHoweverThreadsAreSplit) {
  constexpr int kHidden = 64, kChannels = 1088;
  const std::pair<int, int> stairs[] = {{3, kChannels}, {4, 640}, {2, 416}};
  const auto run = [&](int threads) {
    const auto backend = MakeBackend(GetParam().isa, threads);
    const auto upload = [&](WeightLayout layout, int seed) {
      return Upload(backend.get(), RandomWeight(GetParam().type, layout, kChannels, kHidden, seed));
    };
    const Weight gate = upload(WeightLayout::kOutputRows, 1);
    const Weight up = upload(WeightLayout::kOutputRows, 2);
    const Weight down = upload(WeightLayout::kInputRows, 3);
    std::vector<MlpStep> steps;
    int rows = 0;
    for (const auto& [count, channels] : stairs) {
      steps.push_back({.rows = count, .channels = channels, .down = &down});
      rows += count;
    }
    const auto x = RandomValues(rows * kHidden, 4);
    std::vector<float> a(rows * kChannels), b(a), out(x.size());
    backend->GatedMlp({.x = View(x, rows, kHidden),
                       .gate = gate,
                       .up = up,
                       .steps = steps,
                       .gate_room = Matrix(a.data(), rows, kChannels),
                       .up_room = Matrix(b.data(), rows, kChannels),
                       .out = Matrix(out.data(), rows, kHidden)});
    return out;
  };
  const std::vector<float> alone = run(1);
  for (int threads : {2, 3, 4, 7}) EXPECT_TRUE(BitEqual(alone, run(threads))) << threads;
}

// int8 products are the same integers everywhere; only the last fp32 additions may differ.
TEST_P(RowsTest, InstructionSetsAgree) {
  const auto mine = MakeBackend(GetParam().isa), plain = MakeBackend(Isa::kPortable);
  const bool integers = !IsFloat(GetParam().type);
  for (WeightLayout layout : {WeightLayout::kOutputRows, WeightLayout::kInputRows}) {
    const auto host = RandomWeight(GetParam().type, layout, 130, 600, 1);
    const Weight here = Upload(mine.get(), host), there = Upload(plain.get(), host);
    ASSERT_EQ(here.bytes, there.bytes);
    EXPECT_EQ(std::memcmp(here.blocks, there.blocks, here.bytes), 0) << "stored weights differ";
    const auto x = RandomValues(9 * 600, 2);
    const auto got = Multiply(mine.get(), here, x, 9, 9);
    const auto want = Multiply(plain.get(), there, x, 9, 9);
    ExpectNear(got, std::vector<double>(want.begin(), want.end()), integers ? 2e-6 : 5e-6,
               static_cast<int>(got.size()) / 9, "against portable");
  }
  // Scales of one: every fp32 step is exact, so the integers show themselves.
  if (!integers) return;
  const bool int8 = GetParam().type == WeightType::kInt8;
  const float most = int8 ? 120 : 15, least = int8 ? -120 : 0;
  reference::HostWeight host = {GetParam().type, WeightLayout::kOutputRows, 64, 64,
                                RandomValues(64 * 64, 3, int8 ? 60 : 5)};
  for (size_t i = 0; i < host.values.size(); ++i) {
    const size_t in_group = i % kQuantGroup;
    host.values[i] = in_group == 0   ? most
                     : in_group == 1 ? least
                                     : std::clamp(std::round(host.values[i]), least, most);
  }
  auto x = RandomValues(4 * 64, 4, 60);
  for (size_t i = 0; i < x.size(); ++i) {
    x[i] = i % kQuantGroup == 0 ? 127.0f : std::clamp(std::round(x[i]), -127.0f, 127.0f);
  }
  const Weight weight = Upload(mine.get(), host);
  const auto got = Multiply(mine.get(), weight, x, 4, 4);
  const auto want = reference::MatMul(View(x, 4, 64), host, 64, {});
  for (size_t i = 0; i < got.size(); ++i) EXPECT_EQ(got[i], want[i]) << i;
}

TEST_P(RowsTest, RowOpsGiveTheSameBitsAlone) {
  const auto backend = MakeBackend(GetParam().isa);
  constexpr int kRows = 60, kCols = 577;
  const auto x = RandomValues(kRows * kCols, 1), up = RandomValues(kRows * kCols, 2);
  const auto weight = RandomValues(kCols, 3);
  const auto row = [](const std::vector<float>& v, int r) {
    return ConstMatrix(v.data() + r * kCols, 1, kCols);
  };
  std::vector<float> normed(x.size()), activated(x.size()), alone(kCols);
  std::vector<LogitStatsArgs::Stats> stats(kRows), one(1);
  backend->RmsNorm({View(x, kRows, kCols), weight, 1e-5f, Matrix(normed.data(), kRows, kCols)});
  backend->SwiGlu(
      {View(x, kRows, kCols), View(up, kRows, kCols), Matrix(activated.data(), kRows, kCols)});
  backend->LogitStats({View(x, kRows, kCols), stats});
  for (int r = 0; r < kRows; ++r) {
    backend->RmsNorm({row(x, r), weight, 1e-5f, Matrix(alone.data(), 1, kCols)});
    EXPECT_TRUE(BitEqual(alone, std::span(normed).subspan(r * kCols, kCols)));
    backend->SwiGlu({row(x, r), row(up, r), Matrix(alone.data(), 1, kCols)});
    EXPECT_TRUE(BitEqual(alone, std::span(activated).subspan(r * kCols, kCols)));
    backend->LogitStats({row(x, r), one});
    EXPECT_EQ(one[0].log_sum_exp, stats[r].log_sum_exp);
    EXPECT_EQ(one[0].argmax, stats[r].argmax);
  }
}

}  // namespace
}  // namespace espalier
