#include "tests/fuzz/fuzz_check.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "engine/model/chat/chat_template.h"
#include "engine/model/text/tokenizer.h"
#include "engine/model_config.h"

namespace espalier {

void Require(bool holds, std::string_view what) {
  if (holds) return;
  fmt::print(stderr, "fuzz: does not hold: {}\n", what);
  std::abort();
}

void RequireOneLine(const absl::Status& status) {
  const std::string message(status.message());
  Require(!message.empty(), "a fault has words");
  Require(message.find('\n') == std::string::npos, "a fault is one line: " + message);
  Require(message.size() < 1024, "a fault is a short line: " + message);
}

void ReadRows(const StoredTensor& tensor) {
  std::vector<float> row(tensor.cols);
  for (int r = 0; r < tensor.rows; ++r) tensor.ReadRow(r, row.data());
}

void RequireRefusedOrUsable(const absl::StatusOr<std::unique_ptr<ModelFile>>& file) {
  if (!file.ok()) return RequireOneLine(file.status());
  for (const StoredTensor& tensor : (*file)->tensors()) ReadRows(tensor);

  const ModelConfig& config = (*file)->config();
  Require(config.rms_eps > 0, "the norm's epsilon is above 0");
  Require(std::ranges::all_of(InverseFrequencies(config), [](float f) { return std::isfinite(f); }),
          "rotary frequencies are finite");

  const Vocabulary& vocabulary = (*file)->vocabulary();
  const auto tokenizer = Tokenizer::Create(vocabulary);
  if (!tokenizer.ok()) return RequireOneLine(tokenizer.status());
  const auto text = [&](int32_t token) { return (*tokenizer)->TokenBytes(token); };
  const auto chat =
      ChatTemplate::Compile(vocabulary.chat_template, text(vocabulary.bos), text(vocabulary.eos));
  if (!chat.ok()) RequireOneLine(chat.status());
}

}  // namespace espalier
