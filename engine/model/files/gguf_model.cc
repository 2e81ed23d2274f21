#include "engine/model/files/gguf_model.h"

#include <fmt/format.h>

#include <algorithm>
#include <filesystem>
#include <iterator>
#include <utility>

#include "engine/model/files/architecture.h"
#include "engine/model/files/checksum.h"
#include "engine/model/files/file_error.h"
#include "engine/model/files/gguf.h"

namespace espalier {
namespace {

// Names of tokenizer.ggml.pre. "default" and a missing key are left out on purpose: they stand for
// "not known when converted", and a guess would cut text in the wrong places without a sound.
constexpr std::pair<std::string_view, PreTokenizer> kPreTokenizers[] = {
    {"gpt-2", PreTokenizer::kGpt2},
    {"smollm", PreTokenizer::kSmolLm},
    {"qwen2", PreTokenizer::kQwen2},
};

// tokenizer.ggml.token_type.
constexpr int64_t kNormal = 1;
constexpr int64_t kUnknown = 2;
constexpr int64_t kControl = 3;
constexpr int64_t kUserDefined = 4;
constexpr int64_t kUnused = 5;

std::string KeyNamed(std::string_view key) { return fmt::format("key {}", Quoted(key)); }

void ReadTokens(const std::string& path, GgufKeys& keys, Vocabulary& vocabulary) {
  const std::string_view kTypes = "tokenizer.ggml.token_type";
  const std::vector<std::string_view> texts = keys.Strings("tokenizer.ggml.tokens", kMaxVocabulary);
  const std::vector<int64_t> types = keys.Integers(kTypes, kMaxVocabulary);
  if (!keys.status().ok()) return;
  if (types.size() != texts.size()) {
    keys.Fail(Mismatch(path, KeyNamed(kTypes),
                       fmt::format("{} elements, one a token", texts.size()),
                       fmt::format("{}", types.size())));
    return;
  }
  vocabulary.tokens.reserve(texts.size());
  for (size_t i = 0; i < texts.size(); ++i) {
    VocabularyToken token = {.text = std::string(texts[i])};
    switch (types[i]) {
      case kNormal:
        token.kind = TokenKind::kNormal;
        break;
      case kUnknown:
      case kControl:
        token.kind = TokenKind::kControl;
        break;
      case kUserDefined:
        token.kind = TokenKind::kAdded;
        break;
      case kUnused:
        token.kind = TokenKind::kUnused;
        break;
      default:  // 6, a byte, is of tokenizers that spell bytes as <0x0A>
        keys.Fail(Mismatch(path, fmt::format("{}, token {}", KeyNamed(kTypes), i), "1 to 5",
                           fmt::format("{}", types[i])));
        return;
    }
    vocabulary.tokens.push_back(std::move(token));
  }
}

void ReadMerges(const std::string& path, GgufKeys& keys, Vocabulary& vocabulary) {
  const std::string_view kMerges = "tokenizer.ggml.merges";
  for (const std::string_view merge : keys.Strings(kMerges, kMaxVocabulary)) {
    const size_t space = merge.find(' ');
    if (space == std::string_view::npos || merge.find(' ', space + 1) != std::string_view::npos) {
      keys.Fail(Mismatch(path,
                         fmt::format("{}, merge {}", KeyNamed(kMerges), vocabulary.merges.size()),
                         "two tokens and a space between", Quoted(merge)));
      return;
    }
    vocabulary.merges.emplace_back(merge.substr(0, space), merge.substr(space + 1));
  }
}

Vocabulary ReadVocabulary(const std::string& path, GgufKeys& keys) {
  Vocabulary vocabulary;
  const std::string_view model = keys.String("tokenizer.ggml.model");
  if (keys.status().ok() && model != "gpt2") {
    keys.Fail(Unsupported(path, KeyNamed("tokenizer.ggml.model"),
                          fmt::format("tokenizer {}", Quoted(model)), "gpt2 (byte-level BPE)"));
    return vocabulary;
  }
  const std::string_view pre = keys.String("tokenizer.ggml.pre", "(none)");
  const auto* known =
      std::ranges::find(kPreTokenizers, pre, &std::pair<std::string_view, PreTokenizer>::first);
  if (known == std::end(kPreTokenizers)) {
    keys.Fail(Unsupported(path, KeyNamed("tokenizer.ggml.pre"),
                          fmt::format("pre-tokenizer {}", Quoted(pre)), "gpt-2, smollm and qwen2"));
    return vocabulary;
  }
  vocabulary.pre_tokenizer = known->second;
  ReadTokens(path, keys, vocabulary);
  ReadMerges(path, keys, vocabulary);

  const int64_t last = static_cast<int64_t>(vocabulary.tokens.size()) - 1;
  const auto token = [&](std::string_view name) {
    const std::string key = fmt::format("tokenizer.ggml.{}_token_id", name);
    return keys.Has(key) ? static_cast<int32_t>(keys.Integer(key, 0, last, -1)) : -1;
  };
  vocabulary.bos = token("bos");
  vocabulary.eos = token("eos");
  // What the file says ends a text, a turn or a message; no guessing by a token's name.
  for (const int32_t id : {vocabulary.eos, token("eot"), token("eom")}) {
    if (id >= 0 && !std::ranges::count(vocabulary.end_tokens, id)) {
      vocabulary.end_tokens.push_back(id);
    }
  }
  vocabulary.add_bos = keys.Bool("tokenizer.ggml.add_bos_token", false);
  vocabulary.chat_template = keys.String("tokenizer.chat_template", "");
  return vocabulary;
}

// The vocabulary stays 0 if the file leaves it to the number of tokens.
ModelConfig ReadConfig(const std::string& path, GgufKeys& keys, const Gguf& gguf) {
  const std::string_view name = keys.String("general.architecture");
  if (!keys.status().ok()) return {};
  absl::StatusOr<ModelConfig> known =
      ConfigOfArchitecture(path, KeyNamed("general.architecture"), name);
  if (!known.ok()) {
    keys.Fail(known.status());
    return {};
  }
  ModelConfig config = *std::move(known);
  const auto key = [&](std::string_view suffix) { return fmt::format("{}.{}", name, suffix); };
  const auto integer = [&](std::string_view suffix, int64_t high,
                           std::optional<int64_t> fallback = {}) {
    return static_cast<int>(keys.Integer(key(suffix), 1, high, fallback));
  };
  config.name = keys.String("general.name", std::filesystem::path(path).stem().string());
  config.layers = integer("block_count", kMaxLayers);
  config.hidden = integer("embedding_length", kMaxWidth);
  config.channels = integer("feed_forward_length", kMaxWidth);
  config.heads = integer("attention.head_count", kMaxWidth);
  config.kv_heads = integer("attention.head_count_kv", kMaxWidth, config.heads);
  if (!keys.status().ok()) return config;
  config.head_dim = integer("attention.key_length", kMaxHeadDim, config.hidden / config.heads);
  config.context = integer("context_length", kMaxContext);
  config.vocabulary = integer("vocab_size", kMaxVocabulary, 0);
  config.rms_eps = static_cast<float>(keys.Positive(key("attention.layer_norm_rms_epsilon"), 1));
  config.rope_theta = static_cast<float>(keys.Positive(key("rope.freq_base"), 1e12, 10000));
  config.tied_embeddings =
      !std::ranges::binary_search(gguf.tensors, "output.weight", {}, &StoredTensor::name);
  // What may be said twice must be said alike.
  for (const std::string_view suffix : {"attention.value_length", "rope.dimension_count"}) {
    if (!keys.Has(key(suffix))) continue;
    keys.Integer(key(suffix), config.head_dim, config.head_dim);
  }
  const std::string window = key("attention.sliding_window");  // 0: none
  if (const int64_t tokens = keys.Integer(window, 0, INT32_MAX, 0);
      tokens > 0 && tokens < config.context) {
    keys.Fail(Unsupported(path, KeyNamed(window), fmt::format("a window of {} tokens", tokens),
                          fmt::format("none or the context's {}", config.context)));
  }
  const std::string_view scaling = keys.String(key("rope.scaling.type"), "none");
  if (scaling != "none") {
    keys.Fail(Unsupported(path, KeyNamed(key("rope.scaling.type")),
                          fmt::format("scaling {}", Quoted(scaling)), "none"));
  }
  if (keys.Has(key("rope.scale_linear"))) {  // its older form
    const double factor = keys.Positive(key("rope.scale_linear"), 1e6);
    if (keys.status().ok() && factor != 1) {
      keys.Fail(Unsupported(path, KeyNamed(key("rope.scale_linear")),
                            fmt::format("a factor of {}", factor), "1"));
    }
  }
  return config;
}

class GgufModel final : public ModelFile {
 public:
  explicit GgufModel(MappedFile file) : file_(std::move(file)) {}

  absl::Status Read(const std::string& path) {
    path_ = path;
    absl::StatusOr<Gguf> gguf = ParseGguf(path, file_.bytes());
    if (!gguf.ok()) return gguf.status();
    GgufKeys keys(path, *gguf);
    config_ = ReadConfig(path, keys, *gguf);
    // Before the tokenizer: whoever brings another architecture wants to hear of that first.
    if (!keys.status().ok()) return keys.status();
    vocabulary_ = ReadVocabulary(path, keys);
    if (config_.vocabulary == 0) {
      config_.vocabulary =
          static_cast<int>(std::min<size_t>(vocabulary_.tokens.size(), kMaxVocabulary));
    }
    tensors_ = std::move(gguf->tensors);
    checksum_ = keys.String(kChecksumKey, "");
    return keys.status();
  }

  std::vector<const MappedFile*> files() const override { return {&file_}; }

 private:
  MappedFile file_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<ModelFile>> OpenGguf(const std::string& path, MappedFile file) {
  auto model = std::make_unique<GgufModel>(std::move(file));
  if (absl::Status status = model->Read(path); !status.ok()) return status;
  return model;
}

}  // namespace espalier
