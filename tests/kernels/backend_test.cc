// Every op of the CPU backend against its reference, on every instruction set this machine has.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <limits>
#include <string>

#include "gmock/gmock.h"
#include "tests/kernels/kernel_cases.h"

namespace espalier {
namespace {

using ::testing::HasSubstr;

class BackendTest : public ::testing::TestWithParam<KernelCase> {
 protected:
  Weight Gather(const Weight& weight, std::span<const int32_t> rows) {
    Weight panel;
    EXPECT_TRUE(backend_->GatherRows(weight, rows, &panel).ok());
    return panel;
  }

  // [inputs, outputs], by the products of unit vectors, which quantise to what they are.
  std::vector<float> ValuesOf(const Weight& weight) {
    const bool output_rows = weight.layout == WeightLayout::kOutputRows;
    const int inputs = output_rows ? weight.cols : weight.rows;
    const int outputs = output_rows ? weight.rows : weight.cols;
    std::vector<float> units(inputs * inputs), values(inputs * outputs);
    for (int i = 0; i < inputs; ++i) units[i * inputs + i] = 127;
    const MatMulTarget target{.weight = &weight, .out = Matrix(values.data(), inputs, outputs)};
    backend_->MatMul({.x = View(units, inputs, inputs), .targets = {&target, 1}});
    for (float& v : values) v /= 127;
    return values;
  }

  const WeightType type_ = GetParam().type;
  std::unique_ptr<Backend> backend_ = MakeBackend(GetParam().isa);
};

INSTANTIATE_TEST_SUITE_P(Isa, BackendTest, ::testing::ValuesIn(AllKernelCases()), KernelCaseName);

// Ops that know no weight type.
class OpTest : public ::testing::TestWithParam<Isa> {
 protected:
  std::unique_ptr<Backend> backend_ = MakeBackend(GetParam());
};

INSTANTIATE_TEST_SUITE_P(Isa, OpTest, ::testing::ValuesIn(SupportedIsas()), IsaCaseName);

TEST(SupportedIsasTest, TellsWhatIsRun) {
  const std::vector<Isa> isas = SupportedIsas();
  ASSERT_FALSE(isas.empty());
  EXPECT_EQ(isas.front(), Isa::kPortable);
  for (Isa isa : isas) {
    std::cout << "[ isa ran  ] " << IsaName(isa) << '\n';
    EXPECT_EQ(ParseIsa(IsaName(isa)).value(), isa);
    EXPECT_THAT(MakeBackend(isa)->Describe(), HasSubstr(std::string(IsaName(isa))));
  }
  for (Isa isa : {Isa::kAvx2, Isa::kAvxVnni, Isa::kAvx512Vnni, Isa::kAmx}) {
    if (std::find(isas.begin(), isas.end(), isa) != isas.end()) continue;
    std::cout << "[ NOT RUN  ] " << IsaName(isa) << ": not on this machine\n";
    EXPECT_EQ(CreateCpuBackend({.isa = isa}).status().code(), absl::StatusCode::kInvalidArgument);
  }
  EXPECT_THAT(std::string(ParseIsa("sse9").status().message()), HasSubstr("sse9"));
  EXPECT_EQ(CreateCpuBackend({.threads = -1}).status().code(), absl::StatusCode::kInvalidArgument);
}

struct MatMulShape {
  int weight_rows, weight_cols, rows;
};

// Edges of a tile (64), of a register (16), of a row block (32), of a task (128 rows) and of a
// packed panel (1,024 deep), one less and one more.
constexpr MatMulShape kMatMulShapes[] = {
    {1, 1, 1},    {1, 64, 3},    {15, 17, 2},    {16, 63, 4},   {17, 65, 5},    {63, 64, 1},
    {64, 64, 31}, {65, 63, 33},  {64, 65, 32},   {130, 129, 6}, {192, 576, 1},  {80, 128, 7},
    {70, 40, 0},  {33, 64, 129}, {129, 20, 260}, {1090, 70, 3}, {70, 1090, 35},
};

TEST_P(BackendTest, MatMulMatchesReference) {
  for (WeightLayout layout : {WeightLayout::kOutputRows, WeightLayout::kInputRows}) {
    const bool output_rows = layout == WeightLayout::kOutputRows;
    for (const MatMulShape& shape : kMatMulShapes) {
      const auto host = RandomWeight(type_, layout, shape.weight_rows, shape.weight_cols, 1);
      const Weight weight = Upload(backend_.get(), host);
      const auto bias = RandomValues(shape.weight_rows + shape.weight_cols, 2);
      // All rows of the weight and of x, then the first of the one and the middle of the other.
      for (const bool all : {true, false}) {
        const int part = shape.weight_rows / 2 / 32 * 32;
        const int channels = all ? shape.weight_rows : part;
        const int first_row = all ? 0 : shape.rows / 3;
        const int rows = all ? shape.rows : shape.rows / 2;
        const int x_cols = output_rows ? shape.weight_cols : shape.weight_rows;
        const int outputs = output_rows ? channels : shape.weight_cols;
        // Rows of x and of the result lie apart, so that strides are told from widths.
        const auto x_values = RandomValues(int64_t{shape.rows} * (x_cols + 3), 3);
        const ConstMatrix x(x_values.data(), shape.rows, x_cols, x_cols + 3);
        const auto start = RandomValues(int64_t{rows} * (outputs + 5), 4);
        const bool add = shape.rows % 2 == 1;
        const std::span<const float> used_bias =
            add && !output_rows ? std::span<const float>() : std::span(bias).first(outputs);
        std::vector<float> result = start;
        const MatMulTarget target{.weight = &weight,
                                  .out = Matrix(result.data(), rows, outputs, outputs + 5),
                                  .first_row = first_row,
                                  .channels = all ? MatMulTarget::kAll : channels,
                                  .bias = used_bias};
        backend_->MatMul(
            {.x = x,
             .targets = {&target, 1},
             .output = add ? MatMulArgs::Output::kAdd : MatMulArgs::Output::kOverwrite});

        std::vector<double> want =
            reference::MatMul(ConstMatrix(x.data + first_row * x.stride, rows, x_cols, x.stride),
                              host, channels, used_bias);
        std::vector<float> got;
        for (int r = 0; r < rows; ++r) {
          for (int n = 0; n < outputs + 5; ++n) {
            const size_t at = static_cast<size_t>(r) * (outputs + 5) + n;
            if (n >= outputs) {
              ASSERT_EQ(result[at], start[at]) << "wrote past the row's end";
            } else {
              got.push_back(result[at]);
              if (add) want[static_cast<size_t>(r) * outputs + n] += start[at];
            }
          }
        }
        ExpectNear(got, want, 1e-5, outputs,
                   fmt::format("{} of {} rows x {} of [{}, {}] {}", rows, shape.rows, channels,
                               shape.weight_rows, shape.weight_cols,
                               output_rows ? "output rows" : "input rows"));
      }
    }
  }
}

TEST_P(BackendTest, MatMulOfSeveralTargetsMatchesOneByOne) {
  for (WeightLayout layout : {WeightLayout::kOutputRows, WeightLayout::kInputRows}) {
    const bool output_rows = layout == WeightLayout::kOutputRows;
    constexpr int kDepth = 96;
    struct Part {
      int outputs, first_row, rows;
    };
    for (const int rows : {9, 200}) {
      const auto x = RandomValues(rows * kDepth, 1);
      std::vector<Weight> weights;
      std::vector<std::vector<float>> together, apart;
      std::vector<MatMulTarget> targets;
      for (const Part& part :
           {Part{200, 0, rows}, Part{3, 2, rows - 4}, Part{64, rows - 1, 1}, Part{8, 1, 0}}) {
        weights.push_back(Upload(backend_.get(),
                                 RandomWeight(type_, layout, output_rows ? part.outputs : kDepth,
                                              output_rows ? kDepth : part.outputs, part.outputs)));
        together.emplace_back(part.rows * part.outputs);
        apart.emplace_back(part.rows * part.outputs);
        targets.push_back({.out = Matrix(apart.back().data(), part.rows, part.outputs),
                           .first_row = part.first_row});
      }
      for (size_t i = 0; i < weights.size(); ++i) {
        targets[i].weight = &weights[i];
        backend_->MatMul({.x = View(x, rows, kDepth), .targets = {&targets[i], 1}});
        targets[i].out.data = together[i].data();
      }
      backend_->MatMul({.x = View(x, rows, kDepth), .targets = targets});
      EXPECT_EQ(together, apart);
    }
  }
}

TEST_P(BackendTest, MatMulTellsInputThatIsNotFinite) {
  for (WeightLayout layout : {WeightLayout::kOutputRows, WeightLayout::kInputRows}) {
    const Weight weight = Upload(backend_.get(), RandomWeight(type_, layout, 64, 64, 1));
    for (float bad : {NAN, INFINITY}) {
      auto x = RandomValues(3 * 64, 2);
      x[64 + 17] = bad;  // row 1
      std::vector<float> out(3 * 64);
      const MatMulTarget target{.weight = &weight, .out = Matrix(out.data(), 3, 64)};
      backend_->MatMul({.x = View(x, 3, 64), .targets = {&target, 1}});
      for (int i = 0; i < 3 * 64; ++i) EXPECT_EQ(std::isfinite(out[i]), i / 64 != 1) << i;
    }
  }
}

// Models have a few outputs far larger than the rest; they must not take the others' precision.
TEST_P(BackendTest, AFewLargeOutputsLeaveTheOthersPrecise) {
  constexpr int kDepth = 256, kOutputs = 100;
  auto host = RandomWeight(WeightType::kF32, WeightLayout::kInputRows, kDepth, kOutputs, 1);
  for (int r = 0; r < kDepth; ++r) host.values[r * kOutputs + 40] *= 1000;
  const auto x = RandomValues(kDepth, 2);
  std::vector<double> exact = reference::MatMul(View(x, 1, kDepth), host, kDepth, {});
  host.type = type_;
  const Weight weight = Upload(backend_.get(), host);
  std::vector<float> out(kOutputs);
  const MatMulTarget target{.weight = &weight, .out = Matrix(out.data(), 1, kOutputs)};
  backend_->MatMul({.x = View(x, 1, kDepth), .targets = {&target, 1}});
  out.erase(out.begin() + 40);
  exact.erase(exact.begin() + 40);
  ExpectNear(out, exact, type_ == WeightType::kInt4 ? 0.35 : 0.04, kOutputs - 1,
             "the other outputs");
}

TEST_P(BackendTest, EmbedMatchesReference) {
  for (int cols : {1, 15, 64, 65, 576}) {
    const auto host = RandomWeight(type_, WeightLayout::kOutputRows, 50, cols, 1);
    const Weight table = Upload(backend_.get(), host);
    for (int count : {0, 1, 2, 33}) {
      std::vector<int32_t> tokens(count);
      for (int i = 0; i < count; ++i) tokens[i] = (i * 31 + 49) % 50;
      std::vector<float> out(count * cols);
      backend_->Embed({.tokens = tokens, .table = table, .out = Matrix(out.data(), count, cols)});
      ExpectNear(out, reference::Embed(host, tokens), 1e-6, cols, fmt::format("{} columns", cols));
    }
  }
}

TEST_P(BackendTest, APanelOfOutputRowsHasTheirBits) {
  constexpr int kRows = 150, kDepth = 90;
  const Weight weight =
      Upload(backend_.get(), RandomWeight(type_, WeightLayout::kOutputRows, kRows, kDepth, 1));
  const auto x = RandomValues(5 * kDepth, 2);
  std::vector<float> all(5 * kRows);
  const MatMulTarget target{.weight = &weight, .out = Matrix(all.data(), 5, kRows)};
  backend_->MatMul({.x = View(x, 5, kDepth), .targets = {&target, 1}});
  for (const auto& [name, list] : RowLists(kRows)) {
    const Weight panel = Gather(weight, list);
    const int count = static_cast<int>(list.size());
    std::vector<float> got(5 * count), want;
    const MatMulTarget some{.weight = &panel, .out = Matrix(got.data(), 5, count)};
    backend_->MatMul({.x = View(x, 5, kDepth), .targets = {&some, 1}});
    for (int r = 0; r < 5; ++r) {
      for (const int32_t row : list) want.push_back(all[r * kRows + row]);
    }
    EXPECT_TRUE(BitEqual(got, want)) << name;
  }
}

TEST_P(BackendTest, APanelOfInputRowsHasTheirValues) {
  constexpr int kRows = 150, kOutputs = 90;
  const Weight weight =
      Upload(backend_.get(), RandomWeight(type_, WeightLayout::kInputRows, kRows, kOutputs, 1));
  const std::vector<float> all = ValuesOf(weight);
  for (const auto& [name, list] : RowLists(kRows)) {
    const Weight panel = Gather(weight, list);
    EXPECT_EQ(panel.type, IsFloat(type_) ? type_ : WeightType::kInt8);
    const std::vector<float> got = ValuesOf(panel);
    for (int n = 0; n < kOutputs; ++n) {
      float least = all[n], most = all[n];
      for (int k = 0; k < kRows; ++k) {
        least = std::min(least, all[k * kOutputs + n]);
        most = std::max(most, all[k * kOutputs + n]);
      }
      const float close = IsFloat(type_) ? 0 : (most - least) / 380;
      for (size_t i = 0; i < list.size(); ++i) {
        EXPECT_NEAR(got[i * kOutputs + n], all[list[i] * kOutputs + n], close)
            << name << ", row " << list[i] << ", output " << n;
      }
    }
  }
}

TEST_P(BackendTest, APanelIsGatheredIntoItsOwnMemory) {
  for (const WeightLayout layout : {WeightLayout::kOutputRows, WeightLayout::kInputRows}) {
    const Weight weight = Upload(backend_.get(), RandomWeight(type_, layout, 150, 90, 1));
    const auto lists = RowLists(150);
    Weight panel = Gather(weight, lists[0].second);
    const uint8_t* const memory = panel.blocks;
    const size_t bytes = panel.bytes;
    for (const auto& [name, list] : lists) {
      ASSERT_TRUE(backend_->GatherRows(weight, list, &panel).ok());
      EXPECT_EQ(panel.blocks, memory) << name;
      EXPECT_EQ(panel.bytes, bytes) << name;
      EXPECT_TRUE(BitEqual(ValuesOf(panel), ValuesOf(Gather(weight, list)))) << name;
    }
    const Weight held = panel;
    ASSERT_TRUE(backend_->GatherRows(weight, lists[1].second, &panel).ok());
    EXPECT_NE(panel.blocks, held.blocks);
  }
}

TEST_P(BackendTest, UploadSaysWhatIsWrong) {
  const auto zeros = [](int, float*) {};
  const auto upload = [&](int rows, int cols, const std::function<void(int, float*)>& read) {
    return backend_->UploadWeight(type_, WeightLayout::kOutputRows, rows, cols, {read}).status();
  };
  EXPECT_EQ(upload(-1, 4, zeros).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(upload(4, -1, zeros).code(), absl::StatusCode::kInvalidArgument);
  const absl::Status large = upload(INT_MAX, INT_MAX, zeros);
  EXPECT_EQ(large.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(large.message()), HasSubstr("2147483647 rows"));
  const absl::Status bad = upload(50, 20, [](int output, float* to) {
    std::fill_n(to, 20, 1.0f);
    if (output == 7 || output == 41) to[3] = NAN;
  });
  EXPECT_EQ(bad.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(bad.message()), HasSubstr("output 7"));
  EXPECT_TRUE(upload(0, 5, zeros).ok());
}

TEST_P(BackendTest, UploadSees24) {
  for (const WeightLayout layout : {WeightLayout::kOutputRows, WeightLayout::kInputRows}) {
    const auto upload = [&](int one_more) {
      const int rows = layout == WeightLayout::kOutputRows ? 50 : 40, cols = 90 - rows;
      const WeightSource source = {.read_values = [&](int output, float* to) {
        const int depth = layout == WeightLayout::kOutputRows ? cols : rows;
        for (int k = 0; k < depth; ++k) to[k] = k % 4 == 1 || k % 4 == 2 ? 1.0f + k : 0;
        if (output == one_more) to[36] = 1;
      }};
      return backend_->UploadWeight(type_, layout, rows, cols, source)->sparse24;
    };
    EXPECT_TRUE(upload(-1));
    EXPECT_FALSE(upload(33));
  }
}

// A source of groups gives what its values give, and is read as the one or the other.
TEST_P(BackendTest, GroupsAndTheirValuesMultiplyAlike) {
  constexpr int kOutputs = 70, kDepth = 96;
  const auto group_at = [](int output, int g) {
    FourBitGroup group{.scale = static_cast<uint16_t>(0x2c00 + output * 8 + g),
                       .minimum = static_cast<uint16_t>(0xb400 + g)};
    for (int i = 0; i < 16; ++i) group.u[i] = static_cast<uint8_t>(output * 31 + g * 7 + i * 53);
    group.u[2] = 0xf0;  // both ends are in use, so values tell the steps
    return group;
  };
  const auto half = [](uint16_t bits) {
    return std::ldexp(1024.0f + (bits & 1023), (bits >> 10 & 31) - 25);
  };
  WeightSource source;
  source.read_values = [&](int output, float* to) {
    for (int k = 0; k < kDepth; ++k) {
      const FourBitGroup group = group_at(output, k / 32);
      const int i = k % 32, u = i < 16 ? group.u[i] & 15 : group.u[i - 16] >> 4;
      to[k] = half(group.scale) * static_cast<float>(u) - half(group.minimum);
    }
  };
  const Weight by_values =
      backend_->UploadWeight(type_, WeightLayout::kOutputRows, kOutputs, kDepth, source).value();
  source.read_groups = [&](int output, FourBitGroup* to) {
    for (int g = 0; g < kDepth / 32; ++g) to[g] = group_at(output, g);
  };
  const Weight by_groups =
      backend_->UploadWeight(type_, WeightLayout::kOutputRows, kOutputs, kDepth, source).value();
  const auto x = RandomValues(3 * kDepth, 2);
  std::vector<float> values(3 * kOutputs), groups(3 * kOutputs);
  MatMulTarget target{.weight = &by_values, .out = Matrix(values.data(), 3, kOutputs)};
  backend_->MatMul({.x = View(x, 3, kDepth), .targets = {&target, 1}});
  target.weight = &by_groups;
  target.out = Matrix(groups.data(), 3, kOutputs);
  backend_->MatMul({.x = View(x, 3, kDepth), .targets = {&target, 1}});
  EXPECT_TRUE(BitEqual(values, groups));

  source.read_groups = [&](int output, FourBitGroup* to) {
    for (int g = 0; g < kDepth / 32; ++g) to[g] = group_at(output, g);
    if (output == 33) to[1].scale = 0x7c00;
  };
  const absl::Status bad =
      backend_->UploadWeight(type_, WeightLayout::kOutputRows, kOutputs, kDepth, source).status();
  if (type_ == WeightType::kInt4) {
    EXPECT_THAT(std::string(bad.message()), HasSubstr("output 33"));
  } else {
    EXPECT_TRUE(bad.ok()) << "other types read values";
  }
}

// The kernel may fill huge pages that cover `at` by itself ("hg"), or never ("nh").
bool HasFlag(const void* at, const char* flag) {
  std::ifstream maps("/proc/self/smaps");
  bool here = false;
  for (std::string line; std::getline(maps, line);) {
    uintptr_t begin = 0, end = 0;
    if (std::sscanf(line.c_str(), "%lx-%lx ", &begin, &end) == 2) {
      here = begin <= reinterpret_cast<uintptr_t>(at) && reinterpret_cast<uintptr_t>(at) < end;
    }
    if (here && line.starts_with("VmFlags:")) return line.find(flag) != line.npos;
  }
  return false;
}

TEST_P(BackendTest, AReleasedWeightIsGoneAndComesBackToTheBit) {
  constexpr int kRows = 200, kCols = 3 * kQuantGroup;
  bool fails = false;
  const WeightSource source{.read_values = [&](int n, float* dst) {
    for (int i = 0; i < kCols; ++i) dst[i] = std::sin(static_cast<float>(n * kCols + i));
    if (fails && n == 77) dst[5] = std::nanf("");
  }};
  Weight weight =
      backend_->UploadWeight(type_, WeightLayout::kOutputRows, kRows, kCols, source).value();
  const std::vector<uint8_t> before(weight.blocks, weight.blocks + weight.bytes);
  EXPECT_LE(weight.releasable, weight.bytes);
  backend_->ReleaseWeight(&weight);
  EXPECT_EQ(weight.blocks, nullptr);
  const auto* const memory = static_cast<const uint8_t*>(weight.storage.get());
  EXPECT_TRUE(std::all_of(memory, memory + weight.bytes, [](uint8_t byte) { return byte == 0; }));
  const bool huge = std::filesystem::exists("/sys/kernel/mm/transparent_hugepage");
  const uint8_t* const within = memory + weight.bytes / 2;
  EXPECT_EQ(HasFlag(within, " nh"), huge) << "or khugepaged brings it back, full of zeros";
  const std::vector<int32_t> rows = {1};
  Weight panel;
  EXPECT_DEATH((void)backend_->GatherRows(weight, rows, &panel), "released weight");
  fails = true;
  EXPECT_EQ(backend_->RefillWeight(source, &weight).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(weight.blocks, nullptr);
  fails = false;
  ASSERT_TRUE(backend_->RefillWeight(source, &weight).ok());
  EXPECT_EQ(weight.blocks, memory);
  EXPECT_FALSE(HasFlag(within, " nh"));
  EXPECT_TRUE(std::equal(before.begin(), before.end(), memory));
}

TEST_P(BackendTest, UploadCountsItsBytes) {
  const Weight weight =
      Upload(backend_.get(), RandomWeight(type_, WeightLayout::kOutputRows, 100, 576, 1));
  EXPECT_EQ(reinterpret_cast<uintptr_t>(weight.blocks) % 64, 0u);
  constexpr size_t kOutputs = 112;                   // whole strips
  constexpr double kBytes[] = {4, 2, 1.125, 0.625};  // integers: two fp16 for every 32
  EXPECT_EQ(weight.bytes, kOutputs * 576 * kBytes[static_cast<int>(type_)]);
}

TEST_P(OpTest, RmsNormMatchesReference) {
  for (int cols : {1, 15, 16, 17, 63, 64, 65, 576, 1001}) {
    const auto weight = RandomValues(cols, 1);
    for (int rows : {0, 1, 3, 70}) {
      auto x = RandomValues(int64_t{rows} * cols, 2, 30);
      const auto want = reference::RmsNorm(View(x, rows, cols), weight, 1e-5);
      std::vector<float> out(x.size());
      backend_->RmsNorm({.x = View(x, rows, cols),
                         .weight = weight,
                         .eps = 1e-5f,
                         .out = Matrix(out.data(), rows, cols)});
      ExpectNear(out, want, 2e-6, cols, fmt::format("[{}, {}]", rows, cols));
      backend_->RmsNorm({.x = View(x, rows, cols),
                         .weight = weight,
                         .eps = 1e-5f,
                         .out = Matrix(x.data(), rows, cols)});
      EXPECT_TRUE(BitEqual(x, out)) << "in place";
    }
  }
}

TEST_P(OpTest, SwiGluMatchesReference) {
  for (int cols : {1, 15, 16, 17, 1536}) {
    for (int rows : {0, 1, 5, 40}) {
      auto gate = RandomValues(int64_t{rows} * cols, 1, 20);
      const auto up = RandomValues(int64_t{rows} * cols, 2);
      std::vector<float> out(gate.size());
      const auto want = reference::SwiGlu(View(gate, rows, cols), View(up, rows, cols));
      backend_->SwiGlu({.gate = View(gate, rows, cols),
                        .up = View(up, rows, cols),
                        .out = Matrix(out.data(), rows, cols)});
      for (size_t i = 0; i < out.size(); ++i) {  // each value on its own: silu spans decades
        ASSERT_NEAR(out[i], want[i], std::abs(want[i]) * 5e-7 + 1e-37) << gate[i];
      }
      backend_->SwiGlu({.gate = View(gate, rows, cols),
                        .up = View(up, rows, cols),
                        .out = Matrix(gate.data(), rows, cols)});
      EXPECT_TRUE(BitEqual(gate, out)) << "in place";
    }
  }
}

// Edges of a group (32), of a task's outputs (64) and rows (128), one less and one more; stairs
// that fall, that do not, without rows and without channels.
TEST_P(BackendTest, GatedMlpGivesTheBitsOfItsOps) {
  struct Shape {
    int hidden, channels;
    std::vector<std::pair<int, int>> steps;  // rows, channels
    bool placed = false;                     // the first step's channels lie in another order
  };
  const Shape shapes[] = {
      {64, 1, {{1, 1}}},
      {8, 8, {{0, 8}}},
      {70, 31, {{3, 31}}},
      {33, 65, {{33, 65}}},
      {20, 64, {{129, 64}}},
      {64, 97, {{260, 97}}},
      {96, 200, {{7, 200}, {20, 160}, {1, 96}, {12, 32}}},
      {64, 192, {{130, 192}, {0, 160}, {129, 64}, {5, 0}}},
      {40, 160, {{3, 32}, {2, 0}, {40, 160}, {1, 96}, {2, 128}}},
      {40, 160, {{3, 0}, {2, 0}}},
      {40, 97, {{5, 97}}, true},
      {40, 200, {{70, 200}, {3, 64}, {2, 32}}, true},
  };
  for (const Shape& shape : shapes) {
    const auto upload = [&](WeightLayout layout, int seed) {
      return Upload(backend_.get(),
                    RandomWeight(type_, layout, shape.channels, shape.hidden, seed));
    };
    const Weight gate = upload(WeightLayout::kOutputRows, 1);
    const Weight up = upload(WeightLayout::kOutputRows, 2);
    const Weight downs[] = {upload(WeightLayout::kInputRows, 3),
                            upload(WeightLayout::kInputRows, 4)};
    const std::vector<int32_t> list = RowLists(shape.channels)[1].second;
    const Weight gate_panel = Gather(gate, list);
    const Weight up_panel = Gather(up, list);
    int rows = 0, most = 0;
    const auto bias = RandomValues(shape.hidden, 6);
    std::vector<MlpStep> steps;
    for (const auto& [count, channels] : shape.steps) {
      steps.push_back({.rows = count, .channels = channels, .down = &downs[steps.size() % 2]});
      if (steps.size() % 3 == 2 && channels > 0) steps.back().bias = bias;
      rows += count;
      most = std::max(most, channels);
    }
    const auto x_values = RandomValues(int64_t{rows} * (shape.hidden + 3), 4);
    const ConstMatrix x(x_values.data(), rows, shape.hidden, shape.hidden + 3);
    const auto start = RandomValues(int64_t{rows} * shape.hidden, 5);
    std::vector<float> want = start, got = start;
    std::vector<float> a(int64_t{rows} * most, NAN), b(a), hidden(a);
    int first = 0;
    for (const MlpStep& step : steps) {
      const Matrix wide(a.data(), step.rows, step.channels);
      const Matrix other(b.data(), step.rows, step.channels);
      const bool panel = shape.placed && first > 0;
      const MatMulTarget targets[] = {{.weight = panel ? &gate_panel : &gate,
                                       .out = wide,
                                       .first_row = first,
                                       .channels = step.channels},
                                      {.weight = panel ? &up_panel : &up,
                                       .out = other,
                                       .first_row = first,
                                       .channels = step.channels}};
      backend_->MatMul({.x = x, .targets = targets});
      backend_->SwiGlu({.gate = wide, .up = other, .out = wide});
      const MatMulTarget target{
          .weight = step.down,
          .out = Matrix(want.data() + int64_t{first} * shape.hidden, step.rows, shape.hidden),
          .channels = step.channels,
          .bias = step.bias};
      backend_->MatMul({.x = wide, .targets = {&target, 1}, .output = MatMulArgs::Output::kAdd});
      for (int r = 0; r < step.rows; ++r) {
        for (int c = 0; c < step.channels; ++c) {
          hidden[int64_t{first + r} * most + c] =
              wide.row(r)[shape.placed && first == 0 ? list[c] : c];
        }
      }
      first += step.rows;
    }
    if (shape.placed) steps[0].places = list;
    const std::string what = fmt::format("{} rows, {} steps, hidden {}, {} channels", rows,
                                         steps.size(), shape.hidden, shape.channels);
    const auto gated_mlp = [&](std::vector<float>* up_room, bool keep_hidden) {
      backend_->GatedMlp({.x = x,
                          .gate = shape.placed ? gate_panel : gate,
                          .up = shape.placed ? up_panel : up,
                          .steps = steps,
                          .gate_room = Matrix(a.data(), rows, most),
                          .up_room = Matrix(up_room->data(), rows, most),
                          .out = Matrix(got.data(), rows, shape.hidden),
                          .keep_hidden = keep_hidden});
    };
    gated_mlp(&b, /*keep_hidden=*/false);
    EXPECT_TRUE(BitEqual(want, got)) << what;
    EXPECT_EQ(BitEqual(want, start), most == 0 || rows == 0) << what;

    std::vector<float> kept(hidden.size(), NAN);
    got = start;
    gated_mlp(&kept, /*keep_hidden=*/true);
    EXPECT_TRUE(BitEqual(want, got)) << what;
    for (size_t i = 0; i < hidden.size(); ++i) {
      if (std::isnan(hidden[i])) kept[i] = hidden[i];  // not kept by its row: may hold anything
    }
    EXPECT_TRUE(BitEqual(hidden, kept)) << what;
  }
}

// silu(v) with up = 1 shows the kernels' exponential on every scale, ends and faults included.
TEST_P(OpTest, SwiGluHoldsFromUnderflowToOverflow) {
  std::vector<float> gate;
  for (float v = -86.5f; v < 200; v += 0.0371f) gate.push_back(v);
  const std::vector<float> up(gate.size(), 1.0f);
  std::vector<float> out(gate.size());
  const int n = static_cast<int>(gate.size());
  backend_->SwiGlu(
      {.gate = View(gate, 1, n), .up = View(up, 1, n), .out = Matrix(out.data(), 1, n)});
  for (int i = 0; i < n; ++i) {
    const double want = gate[i] / (1 + std::exp(-double{gate[i]}));
    ASSERT_NEAR(out[i], want, std::abs(want) * 4e-7) << gate[i];
  }
  gate = {-FLT_MAX, -1000, -0.0f, 0, 1000, FLT_MAX, NAN};
  backend_->SwiGlu(
      {.gate = View(gate, 1, 7), .up = View(up, 1, 7), .out = Matrix(out.data(), 1, 7)});
  EXPECT_NEAR(out[1], 0, 1e-30);
  EXPECT_EQ(out[2], 0);
  EXPECT_EQ(out[3], 0);
  EXPECT_EQ(out[4], 1000);
  EXPECT_EQ(out[5], FLT_MAX);
  EXPECT_TRUE(std::isnan(out[6]));
}

TEST_P(OpTest, LogitStatsMatchReference) {
  for (int cols : {1, 2, 15, 16, 17, 4095, 4096, 4097, 49152}) {
    for (int rows : {0, 1, 3}) {
      auto logits = RandomValues(int64_t{rows} * cols, 1, 8);
      if (rows == 3) {
        std::fill_n(logits.begin(), cols, 2.5f);       // all equal: the first wins
        logits[cols + cols / 2] = 300;                 // nearly all the mass
        logits[2 * cols] = logits[3 * cols - 1] = 99;  // a tie across blocks
      }
      std::vector<LogitStatsArgs::Stats> stats(rows);
      backend_->LogitStats({.logits = View(logits, rows, cols), .out = stats});
      for (int r = 0; r < rows; ++r) {
        const auto want =
            reference::StatsOf({&logits[int64_t{r} * cols], static_cast<size_t>(cols)});
        EXPECT_EQ(stats[r].max, want.max) << cols;
        EXPECT_EQ(stats[r].argmax, want.argmax) << cols;
        EXPECT_NEAR(stats[r].log_sum_exp, want.log_sum_exp,
                    2e-6 * std::abs(want.log_sum_exp) + 2e-6)
            << cols;
      }
    }
  }
}

TEST_P(OpTest, LogitStatsStandInfinitiesAndTellNan) {
  std::vector<float> logits(5000, -INFINITY);
  logits[4500] = 3;
  std::vector<LogitStatsArgs::Stats> stats(1);
  backend_->LogitStats({.logits = View(logits, 1, 5000), .out = stats});
  EXPECT_EQ(stats[0].argmax, 4500);
  EXPECT_NEAR(stats[0].log_sum_exp, 3, 1e-6);
  logits[17] = NAN;
  backend_->LogitStats({.logits = View(logits, 1, 5000), .out = stats});
  EXPECT_TRUE(std::isnan(stats[0].log_sum_exp));
}

TEST_P(OpTest, ParallelForRunsEachIndexOnce) {
  std::vector<int> runs(1000);
  backend_->ParallelFor(1000, [&](int i) { ++runs[i]; });
  EXPECT_EQ(runs, std::vector<int>(1000, 1));
  backend_->ParallelFor(0, [&](int) { ADD_FAILURE(); });
  EXPECT_TRUE(backend_->Synchronize().ok());
}

}  // namespace
}  // namespace espalier
