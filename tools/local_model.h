// A model loaded into this process: what `bench` and a local `score` or `tokenize` run on.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/model/files/model_file.h"
#include "engine/model/model_executor.h"
#include "engine/model/text/tokenizer.h"
#include "kernels/backend.h"
#include "kernels/cpu/cpu_backend.h"

namespace CLI {
class App;
}

namespace espalier {

struct LocalModelOptions {
  std::string model;  // path; empty: none
  std::string weights = "auto";
  std::string kv = "auto";
  std::string isa = "auto";
  int threads = 0;
};

// --model, --weights, --kv, --isa, --threads.
void AddLocalModelOptions(CLI::App& sub, LocalModelOptions* options);

struct LocalModel {
  std::unique_ptr<ModelFile> file;
  std::unique_ptr<Backend> backend;
  std::unique_ptr<ModelExecutor> executor;
  KvType kv = KvType::kInt8;
  Isa isa = Isa::kPortable;
  int threads = 1;
};

// Loads, with a progress bar, with pages for `kv_tokens` tokens and a workspace for steps of
// `step_rows` rows.
absl::StatusOr<LocalModel> LoadLocalModel(const LocalModelOptions& options, int64_t kv_tokens,
                                          int step_rows);

// What a sequence of `tokens` tokens takes of kv_tokens: whole pages.
int64_t PagedTokens(int64_t tokens);

// The tokens of a text as a server takes it: after the BOS token if the model wants one. `special`:
// strings of special tokens become their tokens.
absl::StatusOr<std::vector<int32_t>> EncodeText(const Tokenizer& tokenizer, std::string_view text,
                                                bool special);

}  // namespace espalier
