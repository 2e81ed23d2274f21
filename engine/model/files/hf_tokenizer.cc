#include "engine/model/files/hf_tokenizer.h"

#include <fmt/format.h>

#include <algorithm>
#include <optional>
#include <utility>

#include "engine/model/files/file_error.h"
#include "engine/model/files/mapped_file.h"

namespace espalier {
namespace {

constexpr std::string_view kQwen2Regex =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

bool IsByteLevel(const Json& step, bool use_regex) {
  const Json& regex = At(step, "use_regex");
  return At(step, "type") == "ByteLevel" && At(step, "add_prefix_space") == false &&
         (regex.is_null() ? use_regex : regex == use_regex);
}

bool IsDigits(const Json& step) {
  return At(step, "type") == "Digits" && At(step, "individual_digits") == true;
}

bool IsQwen2Split(const Json& step) {
  return At(step, "type") == "Split" && At(At(step, "pattern"), "Regex") == kQwen2Regex &&
         At(step, "behavior") == "Isolated" && At(step, "invert") == false;
}

// The pre-tokenizer that tokenizer.json spells out, told by its structure.
std::optional<PreTokenizer> Recognise(const Json& tokenizer) {
  const Json& normalizer = At(tokenizer, "normalizer");
  const Json& pre = At(tokenizer, "pre_tokenizer");
  if (normalizer.is_null() && IsByteLevel(pre, true)) return PreTokenizer::kGpt2;
  const Json& steps = At(pre, "pretokenizers");
  if (At(pre, "type") != "Sequence" || !steps.is_array() || steps.size() != 2) return {};
  if (normalizer.is_null() && IsDigits(steps[0]) && IsByteLevel(steps[1], true)) {
    return PreTokenizer::kSmolLm;
  }
  if (At(normalizer, "type") == "NFC" && IsQwen2Split(steps[0]) && IsByteLevel(steps[1], false)) {
    return PreTokenizer::kQwen2;
  }
  return {};
}

class Reader {
 public:
  Reader(const std::string& folder, const Json& config, int size)
      : folder_(folder), config_(config), size_(size) {}

  absl::StatusOr<Vocabulary> Read() {
    Load("tokenizer.json", &tokenizer_, /*required=*/true);
    Load("tokenizer_config.json", &tokenizer_config_, false);
    Load("generation_config.json", &generation_config_, false);
    if (status_.ok()) CheckPipeline();
    if (status_.ok()) ReadTokens();
    if (status_.ok()) ReadAddedTokens();
    if (status_.ok()) ReadMerges();
    if (status_.ok()) ReadSpecialRoles();
    if (status_.ok()) ReadChatTemplate();
    if (!status_.ok()) return status_;
    return std::move(vocabulary_);
  }

 private:
  std::string Path(std::string_view file) const { return fmt::format("{}/{}", folder_, file); }

  JsonKeys Keys(std::string_view file, const Json& object, std::string prefix = "") {
    return {Path(file), std::move(prefix), object, &status_};
  }

  void Load(std::string_view file, Json* json, bool required) {
    absl::StatusOr<Json> read = ReadJsonObject(Path(file));
    if (read.ok()) {
      *json = *std::move(read);
    } else if (required || !absl::IsNotFound(read.status())) {
      status_.Update(read.status());
    }
  }

  // All that may change what text becomes: recognised, or refused by name.
  void CheckPipeline() {
    JsonKeys root = Keys("tokenizer.json", tokenizer_);
    if (const auto pre_tokenizer = Recognise(tokenizer_)) {
      vocabulary_.pre_tokenizer = *pre_tokenizer;
    } else if (const Json& normalizer = At(tokenizer_, "normalizer");
               !normalizer.is_null() && At(normalizer, "type") != "NFC") {
      root.Unsupported("normalizer", "none, or NFC with Qwen2's pre-tokenizer");
    } else {
      root.Unsupported("pre_tokenizer", "those of GPT-2, SmolLM and (with NFC) Qwen2");
    }
    const Json& post = At(tokenizer_, "post_processor");
    if (!post.is_null() && At(post, "type") != "ByteLevel") {
      root.Unsupported("post_processor", "ByteLevel");
    }
    const Json& model = At(tokenizer_, "model");
    JsonKeys keys = Keys("tokenizer.json", model, "model.");
    if (keys.Has("type") && At(model, "type") != "BPE") keys.Unsupported("type", "BPE");
    for (const std::string_view key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
      if (keys.Has(key) && At(model, key) != "") keys.Unsupported(key, "none");
    }
    for (const std::string_view key : {"byte_fallback", "ignore_merges"}) {
      if (keys.Has(key) && At(model, key) != false) keys.Unsupported(key, "false");
    }
    for (const std::string_view key : {"unk_token", "dropout"}) {
      if (keys.Has(key)) keys.Unsupported(key, "null");
    }
  }

  void ReadTokens() {
    const Json& model = At(tokenizer_, "model");
    JsonKeys keys = Keys("tokenizer.json", model, "model.");
    const Json& vocab = At(model, "vocab");
    if (!vocab.is_object()) return keys.Expected("vocab", "an object");
    vocabulary_.tokens.assign(size_, {.kind = TokenKind::kUnused});
    JsonKeys ids = Keys("tokenizer.json", vocab, "model.vocab.");
    for (const auto& [text, unused] : vocab.items()) {
      const int64_t id = ids.Integer(text, 0, size_ - 1);
      if (!status_.ok()) return;
      if (vocabulary_.tokens[id].kind != TokenKind::kUnused) {
        return ids.Expected(text, "an id of its own");
      }
      vocabulary_.tokens[id] = {.text = text, .kind = TokenKind::kNormal};
    }
  }

  void ReadAddedTokens() {
    const Json& added = At(tokenizer_, "added_tokens");
    if (added.is_null()) return;
    if (!added.is_array()) {
      return Keys("tokenizer.json", tokenizer_).Expected("added_tokens", "a list");
    }
    for (size_t i = 0; i < added.size(); ++i) {
      JsonKeys keys = Keys("tokenizer.json", added[i], fmt::format("added_tokens[{}].", i));
      const int64_t id = keys.Integer("id", 0, size_ - 1);
      const std::string text = keys.String("content");
      const bool special = keys.Bool("special", false);
      for (const std::string_view key : {"lstrip", "rstrip", "single_word"}) {
        if (keys.Bool(key, false)) keys.Unsupported(key, "false");
      }
      if (!status_.ok()) return;
      vocabulary_.tokens[id] = {.text = text,
                                .kind = special ? TokenKind::kControl : TokenKind::kAdded};
    }
  }

  // "left right" or ["left", "right"].
  void ReadMerges() {
    const Json& merges = At(At(tokenizer_, "model"), "merges");
    if (!merges.is_array()) {
      return Keys("tokenizer.json", At(tokenizer_, "model"), "model.").Expected("merges", "a list");
    }
    vocabulary_.merges.reserve(merges.size());
    for (const Json& merge : merges) {
      if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string()) {
        vocabulary_.merges.emplace_back(merge[0].get<std::string>(), merge[1].get<std::string>());
        continue;
      }
      const std::string text = merge.is_string() ? merge.get<std::string>() : "";
      const size_t space = text.find(' ');
      if (space == std::string::npos || space != text.rfind(' ')) {
        status_ =
            Mismatch(Path("tokenizer.json"), fmt::format("merge {}", vocabulary_.merges.size()),
                     "two tokens, in a list or with a space between", Shown(merge));
        return;
      }
      vocabulary_.merges.emplace_back(text.substr(0, space), text.substr(space + 1));
    }
  }

  // The token that tokenizer_config.json gives as "<s>" or {"content": "<s>"}; -1 if absent.
  int32_t TokenNamed(std::string_view key) {
    const Json& value = At(tokenizer_config_, key);
    const Json& content = value.is_object() ? At(value, "content") : value;
    if (content.is_null()) return -1;
    if (content.is_string()) {
      const auto found =
          std::ranges::find(vocabulary_.tokens, content.get<std::string>(), &VocabularyToken::text);
      if (found != vocabulary_.tokens.end()) {
        return static_cast<int32_t>(found - vocabulary_.tokens.begin());
      }
    }
    Keys("tokenizer_config.json", tokenizer_config_).Expected(key, "a token of the vocabulary");
    return -1;
  }

  // One id or a list of ids.
  std::vector<int32_t> Ids(std::string_view file, const Json& object, std::string_view key) {
    const Json& value = At(object, key);
    std::vector<int32_t> ids;
    const auto is_id = [this](const Json& id) {
      return id.is_number_unsigned() && id.get<uint64_t>() < vocabulary_.tokens.size();
    };
    if (is_id(value)) {
      ids.push_back(value.get<int32_t>());
    } else if (value.is_array() && std::ranges::all_of(value, is_id)) {
      ids = value.get<std::vector<int32_t>>();
    } else if (!value.is_null()) {
      Keys(file, object).Expected(key, fmt::format("ids in 0..{}", size_ - 1));
    }
    return ids;
  }

  void ReadSpecialRoles() {
    std::vector<int32_t> bos = Ids("config.json", config_, "bos_token_id");
    std::vector<int32_t> ends = Ids("generation_config.json", generation_config_, "eos_token_id");
    if (ends.empty()) ends = Ids("config.json", config_, "eos_token_id");
    vocabulary_.bos = TokenNamed("bos_token");
    vocabulary_.eos = TokenNamed("eos_token");
    if (tokenizer_config_.is_null() && !bos.empty()) vocabulary_.bos = bos[0];
    if (vocabulary_.eos < 0 && !ends.empty()) vocabulary_.eos = ends[0];
    if (vocabulary_.eos >= 0) ends.insert(ends.begin(), vocabulary_.eos);
    for (const int32_t id : ends) {
      if (!std::ranges::count(vocabulary_.end_tokens, id)) vocabulary_.end_tokens.push_back(id);
    }
    vocabulary_.add_bos =
        Keys("tokenizer_config.json", tokenizer_config_).Bool("add_bos_token", false);
  }

  // A file of its own, or in tokenizer_config.json one template or a list of named ones.
  void ReadChatTemplate() {
    const absl::StatusOr<MappedFile> file = MappedFile::Open(Path("chat_template.jinja"));
    if (file.ok()) {
      vocabulary_.chat_template = file->bytes();
      return;
    }
    if (!absl::IsNotFound(file.status())) {
      status_ = file.status();
      return;
    }
    const Json& value = At(tokenizer_config_, "chat_template");
    if (!value.is_array()) {
      vocabulary_.chat_template =
          Keys("tokenizer_config.json", tokenizer_config_).String("chat_template", "");
      return;
    }
    for (size_t i = 0; i < value.size(); ++i) {
      JsonKeys keys = Keys("tokenizer_config.json", value[i], fmt::format("chat_template[{}].", i));
      const std::string text = keys.String("template");
      if (keys.String("name") == "default") vocabulary_.chat_template = text;
    }
  }

  const std::string& folder_;
  const Json& config_;
  int size_;
  Json tokenizer_;
  Json tokenizer_config_;
  Json generation_config_;
  absl::Status status_;
  Vocabulary vocabulary_;
};

}  // namespace

absl::StatusOr<Vocabulary> ReadHfVocabulary(const std::string& folder, const Json& config,
                                            int size) {
  return Reader(folder, config, size).Read();
}

}  // namespace espalier
