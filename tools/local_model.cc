#include "tools/local_model.h"

#include <fmt/format.h>

#include <algorithm>
#include <iterator>
#include <utility>
#include <vector>

#include <CLI/CLI.hpp>

#include "tools/progress.h"

namespace espalier {

void AddLocalModelOptions(CLI::App& sub, LocalModelOptions* options) {
  sub.add_option("--model", options->model,
                 "Model to load into this process: a .gguf file, or a folder with config.json, "
                 "*.safetensors and tokenizer.json")
      ->type_name("PATH")
      ->group("Model in this process");
  const auto choice = [&](const char* name, std::string& value, const char* description,
                          std::vector<std::string> values) {
    sub.add_option(name, value, description)
        ->type_name("NAME")
        ->check(CLI::IsMember(std::move(values)))
        ->capture_default_str()
        ->group("Model in this process");
  };
  choice(
      "--weights", options->weights,
      "How weights are kept; auto: int4 where the file has Q4_0 or Q4_1, else int8; int4: the "
      "layers, embedding and LM head int8; bf16: all, which is exact for a bf16 file, at half of "
      "f32's memory; f32 is the reference",
      {std::begin(kWeightPlanNames), std::end(kWeightPlanNames)});
  choice(
      "--kv", options->kv,
      "How keys and values are kept; auto: f32 with f32 weights, f16 with --weights int8 or bf16 "
      "and where keys have a bias, else int8",
      {"auto", "int8", "f16", "f32"});
  choice("--isa", options->isa, "Instruction set; auto: the best this machine has",
         {"auto", "portable", "avx2", "avxvnni", "avx512", "amx"});
  sub.add_option("--threads", options->threads,
                 "Compute threads; 0: the cores this process may use")
      ->type_name("COUNT")
      ->check(CLI::Range(0, 1024))
      ->capture_default_str()
      ->group("Model in this process");
}

int64_t PagedTokens(int64_t tokens) {
  return (tokens + kPageTokens - 1) / kPageTokens * kPageTokens;
}

absl::StatusOr<LocalModel> LoadLocalModel(const LocalModelOptions& options, int64_t kv_tokens,
                                          int step_rows) {
  LocalModel model;
  absl::StatusOr<std::unique_ptr<ModelFile>> file = ModelFile::Open(options.model);
  if (!file.ok()) return file.status();
  model.file = *std::move(file);

  const auto* const name = std::ranges::find(kWeightPlanNames, options.weights);
  if (name == std::end(kWeightPlanNames)) {
    return absl::InvalidArgumentError(fmt::format("--weights: no such type: {}", options.weights));
  }
  const auto weights = static_cast<WeightPlan>(name - std::begin(kWeightPlanNames));
  model.kv = options.kv == "int8"  ? KvType::kInt8
             : options.kv == "f16" ? KvType::kF16
             : options.kv == "f32" ? KvType::kF32
                                   : DefaultKvType(weights, model.file->config().qkv_bias);
  model.isa = SupportedIsas().back();
  if (options.isa != "auto") {
    absl::StatusOr<Isa> isa = ParseIsa(options.isa);
    if (!isa.ok()) return isa.status();
    model.isa = *isa;
  }
  model.threads = options.threads > 0 ? options.threads : UsableCores();

  absl::StatusOr<std::unique_ptr<Backend>> backend =
      CreateCpuBackend({.isa = model.isa, .threads = model.threads});
  if (!backend.ok()) return backend.status();
  model.backend = *std::move(backend);

  const ModelConfig& config = model.file->config();
  const uint64_t pages =
      static_cast<uint64_t>(PagedTokens(kv_tokens) / kPageTokens) * config.layers;
  const KvPoolShape page = {
      .type = model.kv, .pages = 1, .kv_heads = config.kv_heads, .head_dim = config.head_dim};
  Progress bar("loading " + config.name);
  absl::StatusOr<std::unique_ptr<ModelExecutor>> executor =
      ModelExecutor::Load(*model.file, model.backend.get(),
                          {.weights = weights,
                           .kv = model.kv,
                           .kv_bytes = pages * page.page_bytes(),
                           .max_batch_tokens = step_rows},
                          [&](int done, int total) {
                            bar.Update(done, total);
                            return true;
                          });
  if (!executor.ok()) return executor.status();
  model.executor = *std::move(executor);
  return model;
}

absl::StatusOr<std::vector<int32_t>> EncodeText(const Tokenizer& tokenizer, std::string_view text,
                                                bool special) {
  absl::StatusOr<std::vector<int32_t>> ids =
      tokenizer.Encode(text, special ? Tokenizer::Special::kParse : Tokenizer::Special::kAsText);
  const Vocabulary& vocabulary = tokenizer.vocabulary();
  if (ids.ok() && vocabulary.add_bos && vocabulary.bos >= 0) {
    ids->insert(ids->begin(), vocabulary.bos);
  }
  return ids;
}

}  // namespace espalier
