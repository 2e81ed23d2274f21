#include "engine/model/text/tokenizer.h"

#include <fmt/format.h>

#include <algorithm>
#include <unordered_map>
#include <utility>

#include "absl/status/status.h"
#include "engine/model/text/byte_alphabet.h"
#include "engine/model/text/characters.h"
#include "engine/model/text/merges.h"
#include "engine/model/text/pre_tokenizer.h"
#include "engine/model/text/special_tokens.h"

namespace espalier {
namespace {

// Well above any known model: 2^18 tokens, of at most some hundred bytes.
constexpr size_t kMaxTokens = size_t{1} << 24;
constexpr size_t kMaxTokenBytes = 1024;
// Keeps every offset below 2^31, after NFC too, which at most triples a text.
constexpr size_t kMaxTextBytes = size_t{1} << 29;

using TokenOfText = std::unordered_map<std::string_view, int32_t>;

// For messages: one line, and not the whole of a hostile string.
std::string Quoted(std::string_view text) {
  constexpr size_t kShown = 48;
  const bool cut = text.size() > kShown;
  return fmt::format("{:?}{}", text.substr(0, kShown), cut ? "..." : "");
}

absl::Status Invalid(std::string_view message) {
  return absl::InvalidArgumentError(fmt::format("vocabulary: {}", message));
}

absl::Status CheckIds(const Vocabulary& vocabulary) {
  const auto size = static_cast<int64_t>(vocabulary.tokens.size());
  const auto check = [size](std::string_view what, int32_t id, bool may_lack) {
    if ((may_lack && id == -1) || (id >= 0 && id < size)) return absl::OkStatus();
    return Invalid(fmt::format("{} is token {}, expected 0..{}", what, id, size - 1));
  };
  if (auto status = check("bos", vocabulary.bos, true); !status.ok()) return status;
  if (auto status = check("eos", vocabulary.eos, true); !status.ok()) return status;
  for (const int32_t id : vocabulary.end_tokens) {
    if (auto status = check("an end token", id, false); !status.ok()) return status;
  }
  const auto& ends = vocabulary.end_tokens;
  if (vocabulary.eos >= 0 && std::find(ends.begin(), ends.end(), vocabulary.eos) == ends.end()) {
    return Invalid(fmt::format("eos {} is not among the end tokens", vocabulary.eos));
  }
  if (vocabulary.add_bos && vocabulary.bos < 0) return Invalid("add_bos is set without a bos");
  return absl::OkStatus();
}

}  // namespace

struct Tokenizer::Impl {
  explicit Impl(Vocabulary v) : vocabulary(std::move(v)) {}

  absl::Status ReadTokens();
  absl::Status ReadMerges();
  void EncodeText(std::string_view text, Merges::Scratch& scratch,
                  std::vector<int32_t>& tokens) const;

  const Vocabulary vocabulary;
  TokenOfText normal;             // by their spelling in `vocabulary`
  std::string bytes;              // of all tokens, end to end
  std::vector<size_t> bytes_end;  // by token: the end of its bytes
  SpecialTokens added;            // kAdded
  SpecialTokens added_and_control;
  Merges merges;
};

absl::Status Tokenizer::Impl::ReadTokens() {
  normal.reserve(vocabulary.tokens.size());
  bytes_end.reserve(vocabulary.tokens.size());
  int32_t id = 0;
  for (const auto& [text, kind] : vocabulary.tokens) {
    const auto invalid = [&](std::string_view why) {
      return Invalid(fmt::format("token {} {} {}", id, Quoted(text), why));
    };
    if (text.size() > kMaxTokenBytes) {
      return invalid(fmt::format("is {} bytes long, limit {}", text.size(), kMaxTokenBytes));
    }
    if (text.empty() && kind != TokenKind::kUnused) return invalid("is empty");
    bool is_new = true;
    switch (kind) {
      case TokenKind::kNormal:
        if (!AppendSpelledBytes(text, bytes)) return invalid("is not in the byte-level alphabet");
        is_new = normal.try_emplace(text, id).second;
        break;
      case TokenKind::kControl:
      case TokenKind::kAdded:
        if (ValidUtf8Prefix(text) != text.size()) return invalid("is not UTF-8");
        bytes += text;
        is_new = added_and_control.Add(text, id);
        if (kind == TokenKind::kAdded) added.Add(text, id);
        break;
      case TokenKind::kUnused:  // a gap in the ids: never written, nothing to show if sampled
        break;
    }
    if (!is_new) return invalid("is there twice");
    bytes_end.push_back(bytes.size());
    ++id;
  }
  return absl::OkStatus();
}

absl::Status Tokenizer::Impl::ReadMerges() {
  const auto token_of = [this](const std::string& text) {
    const auto found = normal.find(text);
    return found == normal.end() ? -1 : found->second;
  };
  for (int b = 0; b < 256; ++b) {
    const auto byte = static_cast<uint8_t>(b);
    merges.SetByteToken(byte, token_of(SpellByte(byte)));
  }
  size_t rank = 0;
  for (const auto& [left, right] : vocabulary.merges) {
    const auto invalid = [&](std::string_view why) {
      return Invalid(fmt::format("merge {} ({} + {}) {}", rank, Quoted(left), Quoted(right), why));
    };
    const Merges::Rule rule{token_of(left), token_of(right), token_of(left + right)};
    if (rule.left < 0) return invalid("joins an unknown token on the left");
    if (rule.right < 0) return invalid("joins an unknown token on the right");
    if (rule.merged < 0) return invalid("makes an unknown token");
    if (!merges.Add(rule)) return invalid("is there twice");
    ++rank;
  }
  return absl::OkStatus();
}

void Tokenizer::Impl::EncodeText(std::string_view text, Merges::Scratch& scratch,
                                 std::vector<int32_t>& tokens) const {
  std::string normalised;
  if (vocabulary.pre_tokenizer == PreTokenizer::kQwen2) text = ToNfc(text, &normalised);
  PieceScanner scanner(vocabulary.pre_tokenizer, text);
  for (auto piece = scanner.Next(); !piece.empty(); piece = scanner.Next()) {
    merges.Encode(piece, scratch, tokens);
  }
}

Tokenizer::Tokenizer(std::unique_ptr<const Impl> impl) : impl_(std::move(impl)) {}
Tokenizer::~Tokenizer() = default;

absl::StatusOr<std::unique_ptr<const Tokenizer>> Tokenizer::Create(Vocabulary vocabulary) {
  if (vocabulary.tokens.empty()) return Invalid("has no tokens");
  if (vocabulary.tokens.size() > kMaxTokens || vocabulary.merges.size() > kMaxTokens) {
    return Invalid(fmt::format("{} tokens and {} merges, limit {} each", vocabulary.tokens.size(),
                               vocabulary.merges.size(), kMaxTokens));
  }
  if (auto status = CheckIds(vocabulary); !status.ok()) return status;
  auto impl = std::make_unique<Impl>(std::move(vocabulary));
  if (auto status = impl->ReadTokens(); !status.ok()) return status;
  if (auto status = impl->ReadMerges(); !status.ok()) return status;
  impl->normal = {};
  CharacterTable::Get();  // made now, so that no request waits for it
  return std::unique_ptr<const Tokenizer>(new Tokenizer(std::move(impl)));
}

absl::StatusOr<std::vector<int32_t>> Tokenizer::Encode(std::string_view text,
                                                       Special special) const {
  if (text.size() > kMaxTextBytes) {
    return absl::InvalidArgumentError(
        fmt::format("text is {} bytes long, limit {}", text.size(), kMaxTextBytes));
  }
  if (const size_t valid = ValidUtf8Prefix(text); valid < text.size()) {
    return absl::InvalidArgumentError(
        fmt::format("text is not UTF-8: ill-formed at byte offset {}", valid));
  }
  const SpecialTokens& specials =
      special == Special::kParse ? impl_->added_and_control : impl_->added;
  Merges::Scratch scratch;
  std::vector<int32_t> tokens;
  tokens.reserve(text.size() / 3);  // prose makes a token of about 4 bytes
  for (size_t at = 0; at < text.size();) {
    const SpecialTokens::Match match = specials.Find(text, at);
    impl_->EncodeText(text.substr(at, match.begin - at), scratch, tokens);
    if (match.begin < match.end) tokens.push_back(match.token);
    at = match.end;
  }
  return tokens;
}

std::vector<int> Tokenizer::PieceLengths(std::string_view text) const {
  std::vector<int> lengths;
  std::string normalised;
  const PreTokenizer kind = impl_->vocabulary.pre_tokenizer;
  if (kind == PreTokenizer::kQwen2) text = ToNfc(text, &normalised);
  PieceScanner scanner(kind, text);
  for (auto piece = scanner.Next(); !piece.empty(); piece = scanner.Next()) {
    lengths.push_back(static_cast<int>(piece.size()));
  }
  return lengths;
}

std::string_view Tokenizer::TokenBytes(int32_t token) const {
  if (token < 0 || token >= size()) return {};
  const size_t begin = token == 0 ? 0 : impl_->bytes_end[token - 1];
  return std::string_view(impl_->bytes).substr(begin, impl_->bytes_end[token] - begin);
}

bool Tokenizer::IsSpecial(int32_t token) const {
  return token >= 0 && token < size() &&
         impl_->vocabulary.tokens[token].kind == TokenKind::kControl;
}

const Vocabulary& Tokenizer::vocabulary() const { return impl_->vocabulary; }

int Tokenizer::size() const { return static_cast<int>(impl_->vocabulary.tokens.size()); }

}  // namespace espalier
