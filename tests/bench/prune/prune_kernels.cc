// What each stage of weight pruning takes over a whole model's matrices, beside a memcpy of the
// same bytes: `make bench-prune` runs it first. No model is run: moments are of made-up inputs, on
// whose values no time here depends but for a few turns of a search.
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "engine/model/files/model_file.h"
#include "engine/pruning/second_moments.h"
#include "engine/pruning/weights/block_obs.h"
#include "engine/pruning/weights/column_moments.h"
#include "engine/pruning/weights/factor.h"
#include "engine/pruning/weights/mask.h"
#include "engine/pruning/weights/mean_compensation.h"
#include "engine/pruning/weights/sparsegpt.h"
#include "kernels/cpu/cpu_backend.h"
#include "tools/figures.h"
#include "tools/machine.h"
#include "tools/statistics.h"

namespace espalier {
namespace {

constexpr int kTurns = 5;             // of which medians are taken
constexpr int kTokens = 2048;         // SwiftPrune's calibration
constexpr int kHessianTokens = 4096;  // SparseGPT's

using Clock = std::chrono::steady_clock;

double Seconds(const std::function<void()>& work) {
  const Clock::time_point begin = Clock::now();
  work();
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

struct BenchMatrix {
  const StoredTensor* tensor = nullptr;
  float* values = nullptr;
  std::string input;  // q, k, v share theirs; so do gate and up
};

struct Inputs {
  int columns = 0;
  std::vector<float> rows;  // [kTokens, columns]
  std::vector<float> squares;
};

void Fail(const absl::Status& status) {
  fmt::print(stderr, "prune_kernels: {}\n", status.ToString());
  std::exit(1);
}

int Run(const std::string& path, int threads) {
  const absl::StatusOr<std::unique_ptr<ModelFile>> file = ModelFile::Open(path);
  if (!file.ok()) Fail(file.status());
  const auto backend = CreateCpuBackend({.threads = threads > 0 ? threads : UsableCores()}).value();

  std::vector<BenchMatrix> matrices;
  int64_t weights = 0;
  for (const StoredTensor& tensor : (*file)->tensors()) {
    if (!tensor.name.starts_with("blk.") || tensor.rows == 1) continue;
    const std::string kind = tensor.name.substr(tensor.name.find('.', 4) + 1);
    const std::string input = kind.starts_with("attn_output") ? "o"
                              : kind.starts_with("attn_")     ? "qkv"
                              : kind.starts_with("ffn_down")  ? "down"
                                                              : "mlp";
    matrices.push_back({&tensor, nullptr, input});
    weights += int64_t{tensor.rows} * tensor.cols;
  }
  std::vector<float> original(weights), buffer(weights);
  int64_t at = 0;
  std::map<std::string, Inputs> inputs;
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  for (BenchMatrix& matrix : matrices) {
    matrix.values = buffer.data() + at;
    for (int r = 0; r < matrix.tensor->rows; ++r) {
      matrix.tensor->ReadRow(r, original.data() + at + int64_t{r} * matrix.tensor->cols);
    }
    at += int64_t{matrix.tensor->rows} * matrix.tensor->cols;
    Inputs& in = inputs[matrix.input];
    if (in.columns > 0) continue;
    in.columns = matrix.tensor->cols;
    std::vector<float> scale(in.columns);
    for (float& each : scale) each = std::exp(normal(random));
    for (int t = 0; t < kTokens; ++t) {
      for (int j = 0; j < in.columns; ++j) in.rows.push_back(scale[j] * (normal(random) + 0.2f));
    }
  }
  const int layers = (*file)->config().layers;
  std::map<std::string, ColumnMoments> moments, blocks;
  std::map<std::string, std::vector<float>> hessians, factors;
  for (auto& [name, in] : inputs) {
    const ConstMatrix rows(in.rows.data(), kTokens, in.columns);
    moments.emplace(name, ColumnMoments(in.columns, false)).first->second.Add(rows, backend.get());
    blocks.emplace(name, ColumnMoments(in.columns, true)).first->second.Add(rows, backend.get());
    in.squares = moments.at(name).Squares();
    SecondMoments whole(in.columns, 0, backend.get());
    if (const absl::Status status = whole.Add(rows, {}); !status.ok()) Fail(status);
    hessians[name] = whole.Mean();
  }

  const auto each_matrix = [&](const std::function<void(const BenchMatrix&, Matrix)>& fn) {
    for (const BenchMatrix& matrix : matrices) {
      fn(matrix, Matrix(matrix.values, matrix.tensor->rows, matrix.tensor->cols));
    }
  };
  const auto mask = [&](const MaskOptions& options, Metric metric) {
    return [&, options, metric] {
      each_matrix([&](const BenchMatrix& matrix, Matrix view) {
        const ColumnWeights columns(metric, inputs.at(matrix.input).squares, view, backend.get());
        MaskWeights(options, columns, view, backend.get());
      });
    };
  };
  // Split like the masks: by rows of the same matrices over the same workers.
  std::vector<float> copy(weights);
  const auto memory_copy = [&] {
    each_matrix([&](const BenchMatrix& matrix, Matrix view) {
      float* const to = copy.data() + (matrix.values - buffer.data());
      constexpr int kRows = 32;
      backend->ParallelFor((view.rows + kRows - 1) / kRows, [&](int task) {
        const int begin = task * kRows, rows = std::min(kRows, view.rows - begin);
        std::memcpy(to + int64_t{begin} * view.cols, view.row(begin),
                    sizeof(float) * rows * view.cols);
      });
    });
  };
  const Pattern p24 = *ParsePattern("2:4"), p48 = *ParsePattern("4:8"), half = *ParsePattern("0.5");
  const auto sparsegpt = [&](const Pattern& pattern) {
    return [&, pattern] {
      for (int layer = 0; layer < layers; ++layer) {
        for (auto& [name, hessian] : hessians) {
          factors[name] = hessian;
          const absl::Status status = ToInverseFactor(inputs.at(name).columns, kSparseGptDamping,
                                                      backend.get(), &factors[name]);
          if (!status.ok()) Fail(status);
        }
        const std::string prefix = fmt::format("blk.{}.", layer);
        each_matrix([&](const BenchMatrix& matrix, Matrix view) {
          if (!matrix.tensor->name.starts_with(prefix)) return;
          const absl::Status status =
              SparseGpt(pattern, factors.at(matrix.input), view, backend.get());
          if (!status.ok()) Fail(status);
        });
      }
    };
  };
  const auto quality = [&](const Pattern& pattern) {
    return [&, pattern] {
      for (int layer = 0; layer < layers; ++layer) {
        std::map<std::string, BlockObs> obs;
        for (const auto& [name, each] : blocks) {
          obs.emplace(name, BlockObs::Create(each, /*centred=*/true, backend.get()).value());
        }
        const std::string prefix = fmt::format("blk.{}.", layer);
        each_matrix([&](const BenchMatrix& matrix, Matrix view) {
          if (!matrix.tensor->name.starts_with(prefix)) return;
          obs.at(matrix.input).Prune(pattern, view, backend.get());
        });
      }
    };
  };
  const auto compensate = [&] {
    each_matrix([&](const BenchMatrix& matrix, Matrix view) {
      const MeanCompensation compensation(moments.at(matrix.input), view, backend.get());
      compensation.Apply(view, backend.get());
    });
  };
  // Of all layers' inputs.
  const auto statistics = [&](bool in_blocks, int tokens) {
    return [&, in_blocks, tokens] {
      for (int layer = 0; layer < layers; ++layer) {
        for (const auto& [name, in] : inputs) {
          ColumnMoments sums(in.columns, in_blocks);
          for (int done = 0; done < tokens; done += kTokens) {
            sums.Add(ConstMatrix(in.rows.data(), kTokens, in.columns), backend.get());
          }
        }
      }
    };
  };
  const auto hessian = [&] {
    for (int layer = 0; layer < layers; ++layer) {
      for (const auto& [name, in] : inputs) {
        SecondMoments sums(in.columns, 0, backend.get());
        for (int done = 0; done < kHessianTokens; done += kTokens) {
          const absl::Status status =
              sums.Add(ConstMatrix(in.rows.data(), kTokens, in.columns), {});
          if (!status.ok()) Fail(status);
        }
        sums.Mean();
      }
    }
  };

  struct Stage {
    std::string name;
    std::function<void()> work;
    int turns = kTurns;
    std::vector<double> seconds = {};
  };
  const MaskOptions exact{.pattern = half}, ewma{.pattern = half, .selection = Selection::kEwma};
  MaskOptions loose = ewma;
  loose.strict = false;
  std::vector<Stage> stages = {
      {"memcpy", memory_copy},
      {"2:4 score + mask", mask({.pattern = p24}, Metric::kWanda)},
      {"4:8 score + mask", mask({.pattern = p48}, Metric::kWanda)},
      {"50 % exact", mask(exact, Metric::kWanda)},
      {"50 % EWMA", mask(loose, Metric::kWanda)},
      {"50 % EWMA, strict", mask(ewma, Metric::kWanda)},
      {"mean compensation", compensate},
      {fmt::format("x, x^2 of {} tokens", kTokens), statistics(false, kTokens)},
      {fmt::format("blocks of x x^T, {} tokens", kTokens), statistics(true, kTokens)},
      {"2:4 --quality, moments given", quality(p24)},
      {fmt::format("x x^T of {} tokens", kHessianTokens), hessian, 3},
      {"2:4 SparseGPT, Hessian given", sparsegpt(p24), 3},
  };
  CpuWatch watch;
  // In turns, so that a slow minute of the machine is everyone's.
  for (int turn = 0; turn < kTurns; ++turn) {
    for (Stage& stage : stages) {
      if (turn >= stage.turns) continue;
      std::ranges::copy(original, buffer.begin());
      stage.seconds.push_back(Seconds(stage.work));
    }
  }
  const double memcpy_s = Median(stages[0].seconds);
  nlohmann::ordered_json figures;
  fmt::print("{} weights of {} matrices in fp32, {} threads; medians of up to {} turns\n", weights,
             matrices.size(), threads > 0 ? threads : UsableCores(), kTurns);
  fmt::print("{:32}{:>10}{:>12}\n", "stage", "ms", "x memcpy");
  std::map<std::string, double> ms;
  for (const Stage& stage : stages) {
    const double seconds = Median(stage.seconds);
    ms[stage.name] = 1e3 * seconds;
    fmt::print("{:32}{:10.1f}{:12.2f}\n", stage.name, 1e3 * seconds, seconds / memcpy_s);
    std::string key;
    for (const char c : stage.name) {
      if (std::isalnum(static_cast<unsigned char>(c)) != 0) {
        key += static_cast<char>(std::tolower(c));
      } else if (!key.empty() && key.back() != '_') {
        key += '_';
      }
    }
    figures["ms_" + key] = 1e3 * seconds;
  }
  const double gpt = ms["2:4 SparseGPT, Hessian given"];
  const double gpt_statistics = ms[fmt::format("x x^T of {} tokens", kHessianTokens)];
  figures["mask24_vs_memcpy"] = ms["2:4 score + mask"] / ms["memcpy"];
  figures["mask48_vs_memcpy"] = ms["4:8 score + mask"] / ms["memcpy"];
  figures["exact50_vs_memcpy"] = ms["50 % exact"] / ms["memcpy"];
  figures["ewma50_vs_memcpy"] = ms["50 % EWMA"] / ms["memcpy"];
  figures["sparsegpt_vs_mask24"] = gpt / ms["2:4 score + mask"];
  figures["sparsegpt_vs_swift_without_forward"] =
      (gpt + gpt_statistics) / (ms["2:4 score + mask"] + ms["mean compensation"] +
                                ms[fmt::format("x, x^2 of {} tokens", kTokens)]);
  if (const auto others = watch.OthersShare(); others && *others > 0.05) {
    fmt::print("others took {:.0f} % of these cores: ratios stand, times are too long\n",
               100 * *others);
    figures["others_share"] = *others;
  }
  const absl::Status status =
      WriteFigures(std::string(ESPALIER_FIGURES) + "/bench-prune-kernels.json", figures);
  if (!status.ok()) Fail(status);
  return 0;
}

}  // namespace
}  // namespace espalier

int main(int argc, char** argv) {
  if (argc < 2 || argc > 3) {
    fmt::print(stderr, "usage: prune_kernels MODEL [THREADS]\n");
    return 2;
  }
  return espalier::Run(argv[1], argc > 2 ? std::atoi(argv[2]) : 0);
}
