// Times the CPU kernels on the shapes of SmolLM2-135M beside what the machine itself can do, prints
// a table and writes the figures as flat JSON.
//
//   kernel_bench [--isa portable|avx2|avxvnni|avx512|amx] [--threads N] [--out FILE]
//
// Each figure is the best of a few passes, by the wall clock; products pass over thirty layers'
// weights, so that these come from memory as they do when a model runs.
#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <numeric>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "fmt/format.h"
#include "kernels/cpu/cpu_backend.h"
#include "tools/machine.h"

namespace espalier {
namespace {

constexpr int kLayers = 30, kHidden = 576, kChannels = 1536, kKvWidth = 192, kVocabulary = 49152;
constexpr int kHeads = 9, kKvHeads = 3, kHeadDim = 64;

std::map<std::string, double> figures;

template <typename Fn>
double BestSeconds(int passes, const Fn& fn) {
  double best = HUGE_VAL;
  for (int i = 0; i < passes; ++i) {
    const auto start = std::chrono::steady_clock::now();
    fn();
    best = std::min(
        best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return best;
}

std::string ReadLine(const std::string& command) {
  std::string line;
  if (FILE* pipe = popen(command.c_str(), "r")) {
    std::array<char, 256> buffer;
    if (std::fgets(buffer.data(), buffer.size(), pipe) != nullptr) line = buffer.data();
    pclose(pipe);
  }
  while (!line.empty() && line.back() == '\n') line.pop_back();
  return line;
}

void Ceilings(Isa isa, int threads) {
  const MachineCeilings ceilings = MeasureCeilings(isa, threads, 0, [](int, int) {}).all;
  figures["ceiling.read_gb_s"] = ceilings.read_bytes_per_s / 1e9;
  figures["ceiling.int8_gop_s"] = ceilings.int8_ops_per_s / 1e9;
}

// All workers meet in each job, so this is the whole way: publish, see, join, leave, be seen.
void ForkJoin(Backend* backend, int threads) {
  constexpr int kJobs = 200;
  const double seconds = BestSeconds(20, [&] {
    for (int job = 0; job < kJobs; ++job) {
      std::atomic<int> present = 0;
      backend->ParallelFor(threads, [&](int) {
        present.fetch_add(1);
        while (present.load() < threads) std::this_thread::yield();
      });
    }
  });
  figures["fork_join_us"] = seconds / kJobs * 1e6;
  fmt::print("fork, meeting of {} workers and join: {:.2f} us\n\n", threads,
             figures["fork_join_us"]);
}

struct Product {
  const char* name;
  WeightLayout layout;
  int copies;                // layers
  std::vector<int> outputs;  // of each target
  int depth;
};

void Products(Backend* backend, WeightType type) {
  const Product products[] = {
      {"qkv", WeightLayout::kOutputRows, kLayers, {kHidden, kKvWidth, kKvWidth}, kHidden},
      {"o", WeightLayout::kInputRows, kLayers, {kHidden}, kHidden},
      {"gate_up", WeightLayout::kOutputRows, kLayers, {kChannels, kChannels}, kHidden},
      {"down", WeightLayout::kInputRows, kLayers, {kHidden}, kChannels},
      {"head", WeightLayout::kOutputRows, 1, {kVocabulary}, kHidden},
  };
  const std::vector<int> row_counts = {1, 8, 32, 128, 512};
  const char* type_name = type == WeightType::kInt4   ? "int4"
                          : type == WeightType::kInt8 ? "int8"
                          : type == WeightType::kBf16 ? "bf16"
                                                      : "fp32";
  fmt::print("{:<13}", std::string(type_name) + " rows");
  for (int rows : row_counts) fmt::print("{:>18}", rows);
  fmt::print("\n");
  std::map<int, double> pass_seconds;
  for (const Product& product : products) {
    const bool output_rows = product.layout == WeightLayout::kOutputRows;
    std::vector<Weight> weights;
    for (int i = 0; i < product.copies; ++i) {
      for (int n : product.outputs) {
        const int rows = output_rows ? n : product.depth, cols = output_rows ? product.depth : n;
        auto weight =
            backend->UploadWeight(type, product.layout, rows, cols, {[&](int output, float* to) {
                                    for (int k = 0; k < product.depth; ++k)
                                      to[k] = static_cast<float>((output * 31 + k * 17) % 101 - 50);
                                  }});
        if (!weight.ok()) {
          fmt::print(stderr, "kernel_bench: {}\n", weight.status().ToString());
          std::exit(1);
        }
        weights.push_back(*std::move(weight));
      }
    }
    double bytes = 0;
    for (const Weight& weight : weights) bytes += static_cast<double>(weight.bytes);
    int outputs = 0;
    for (int n : product.outputs) outputs += n;
    fmt::print("{:<13}", product.name);
    for (int rows : row_counts) {
      const std::vector<float> x(size_t{1} * rows * product.depth, 0.3f);
      std::vector<float> out(size_t{1} * rows * outputs);
      const double seconds = BestSeconds(rows > 32 ? 2 : 5, [&] {
        for (int copy = 0; copy < product.copies; ++copy) {
          std::vector<MatMulTarget> targets;
          float* to = out.data();
          for (size_t i = 0; i < product.outputs.size(); ++i) {
            const Weight& weight = weights[copy * product.outputs.size() + i];
            targets.push_back({.weight = &weight, .out = Matrix(to, rows, product.outputs[i])});
            to += int64_t{rows} * product.outputs[i];
          }
          backend->MatMul({.x = ConstMatrix(x.data(), rows, product.depth), .targets = targets});
        }
      });
      pass_seconds[rows] += seconds;
      const double operations = 2.0 * rows * outputs * product.depth * product.copies;
      const std::string key = fmt::format("{}.{}.rows{}", type_name, product.name, rows);
      figures[key + ".gop_s"] = operations / seconds / 1e9;
      figures[key + ".gb_s"] = bytes / seconds / 1e9;
      fmt::print("{:>7.0f} G {:>4.1f} GB/s", operations / seconds / 1e9, bytes / seconds / 1e9);
      std::fflush(stdout);
    }
    fmt::print("\n");
  }
  fmt::print("{:<13}", "all, tok/s");
  for (int rows : row_counts) {
    figures[fmt::format("{}.model.rows{}.tok_s", type_name, rows)] = rows / pass_seconds[rows];
    fmt::print("{:>18.0f}", rows / pass_seconds[rows]);
  }
  fmt::print("\n\n");
}

void Attention(Backend* backend, KvType type, bool int4) {
  const std::string_view name = int4 ? "int4" : KvTypeName(type);
  const int page_tokens = int4 ? kInt4PageTokens : kPageTokens;
  constexpr int kWidth = kHeads * kHeadDim;
  for (const auto& [sequences, rows, context] :
       {std::array{1, 1, 192}, {1, 1, 4096}, {32, 1, 192}, {1, 128, 128}, {1, 512, 2048}}) {
    const int pages = context / page_tokens;
    absl::StatusOr<KvPool> pool = backend->CreateKvPool(
        {.type = type, .pages = pages * sequences, .kv_heads = kKvHeads, .head_dim = kHeadDim});
    if (!pool.ok()) continue;
    std::fill_n(pool->data, pool->shape.page_bytes() * pool->shape.pages, std::byte{0x11});
    std::vector<std::vector<int32_t>> tables(sequences);
    std::vector<std::span<const int32_t>> views;
    std::vector<AttentionSpan> spans;
    for (int s = 0; s < sequences; ++s) {
      for (int p = 0; p < pages; ++p) tables[s].push_back(s * pages + p);
      views.push_back(tables[s]);
      spans.push_back(
          {.first_row = s * rows, .rows = rows, .start = context - rows, .int4_kv = int4});
    }
    std::vector<int32_t> heads_kept(kHeads);
    std::iota(heads_kept.begin(), heads_kept.end(), 0);
    const int all_rows = sequences * rows;
    const std::vector<float> q(size_t{1} * all_rows * kWidth, 0.1f);
    std::vector<float> out(q.size());
    const double seconds =
        BestSeconds(5,
                    [&] {
                      for (int i = 0; i < 5; ++i) {
                        backend->Attention({.spans = spans,
                                            .page_tables = views,
                                            .q = ConstMatrix(q.data(), all_rows, kWidth),
                                            .heads_kept = heads_kept,
                                            .heads = kHeads,
                                            .scale = 0.125f,
                                            .pool = &*pool,
                                            .out = Matrix(out.data(), all_rows, kWidth)});
                      }
                    }) /
        5;
    const std::string key =
        fmt::format("attention.{}.sequences{}.rows{}.context{}", name, sequences, rows, context);
    figures[key + ".us"] = seconds * 1e6;
    fmt::print(
        "attention, {:>4} pages: {:>2} x {:>3} rows, context {:>4}: {:>8.1f} us, {:.1f} GB/s\n",
        name, sequences, rows, context, seconds * 1e6,
        static_cast<double>(pool->shape.page_bytes()) * pages * sequences / seconds / 1e9);
  }
}

int Run(int argc, char** argv) {
  CpuBackendOptions options{.threads = UsableCores()};
  std::string out = ESPALIER_FIGURES "/kernel_bench.json";
  for (int i = 1; i < argc; i += 2) {
    const std::string_view name = argv[i];
    if (i + 1 == argc || (name != "--isa" && name != "--threads" && name != "--out")) {
      fmt::print(stderr, "kernel_bench: unknown option or missing value: {}\n", name);
      return 2;
    }
    if (name == "--out") out = argv[i + 1];
    if (name == "--threads") {
      options.threads = std::atoi(argv[i + 1]);
      if (options.threads < 1) {
        fmt::print(stderr, "kernel_bench: --threads: expected 1 or more, got {}\n", argv[i + 1]);
        return 2;
      }
    }
    if (name == "--isa") {
      const absl::StatusOr<Isa> isa = ParseIsa(argv[i + 1]);
      if (!isa.ok()) {
        fmt::print(stderr, "kernel_bench: {}\n", isa.status().ToString());
        return 2;
      }
      options.isa = *isa;
    }
  }
  absl::StatusOr<std::unique_ptr<Backend>> backend = CreateCpuBackend(options);
  if (!backend.ok()) {
    fmt::print(stderr, "kernel_bench: {}\n", backend.status().ToString());
    return 2;
  }
  const std::string commit = ReadLine("git -C " ESPALIER_SOURCE_DIR " describe --always --dirty");
  fmt::print("{}\n{}\ncommit {}\n", (*backend)->Describe(), MachineName(), commit);
  const Isa isa = options.isa.value_or(SupportedIsas().back());
  Ceilings(isa, options.threads);
  fmt::print("machine: {:.1f} GB/s read, {:.0f} GOP/s int8\n", figures["ceiling.read_gb_s"],
             figures["ceiling.int8_gop_s"]);
  ForkJoin(backend->get(), options.threads);
  Products(backend->get(), WeightType::kInt4);
  Products(backend->get(), WeightType::kInt8);
  Products(backend->get(), WeightType::kBf16);
  Products(backend->get(), WeightType::kF32);
  Attention(backend->get(), KvType::kInt8, /*int4=*/true);
  Attention(backend->get(), KvType::kInt8, /*int4=*/false);
  Attention(backend->get(), KvType::kF16, /*int4=*/false);

  std::filesystem::create_directories(std::filesystem::path(out).parent_path());
  std::ofstream file(out);
  file << fmt::format("{{\n  \"machine\": \"{}\",\n  \"commit\": \"{}\",\n  \"isa\": \"{}\",\n",
                      MachineName(), commit, IsaName(isa));
  file << fmt::format("  \"threads\": {}", options.threads);
  for (const auto& [key, value] : figures) file << fmt::format(",\n  \"{}\": {:.6g}", key, value);
  file << "\n}\n";
  file.close();
  if (!file) {
    fmt::print(stderr, "kernel_bench: cannot write {}\n", out);
    return 1;
  }
  fmt::print("figures: {}\n", out);
  return 0;
}

}  // namespace
}  // namespace espalier

int main(int argc, char** argv) { return espalier::Run(argc, argv); }
