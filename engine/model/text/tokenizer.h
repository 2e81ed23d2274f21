// Byte-level BPE: text to tokens and back. Const after creation; shared by all threads.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/model/text/vocabulary.h"

namespace espalier {

class Tokenizer {
 public:
  // InvalidArgument, naming the token or merge, if the vocabulary contradicts itself.
  static absl::StatusOr<std::unique_ptr<const Tokenizer>> Create(Vocabulary vocabulary);
  ~Tokenizer();

  enum class Special {
    kAsText,  // strings of special tokens are ordinary characters
    kParse,   // they become their token
  };

  // InvalidArgument, naming the byte offset, if `text` is not UTF-8. Adds no BOS.
  absl::StatusOr<std::vector<int32_t>> Encode(std::string_view text, Special special) const;

  // Byte lengths of the pre-tokenizer's pieces of `text` (normalised), for tests.
  std::vector<int> PieceLengths(std::string_view text) const;

  // The bytes of one token: text of a special token, raw bytes of a normal one. "" if out of range
  // or unused.
  std::string_view TokenBytes(int32_t token) const;
  bool IsSpecial(int32_t token) const;

  // Whole text; ill-formed bytes become U+FFFD, one per maximal subpart.
  std::string Decode(std::span<const int32_t> tokens, bool skip_special) const;

  const Vocabulary& vocabulary() const;
  int size() const;

 private:
  struct Impl;
  explicit Tokenizer(std::unique_ptr<const Impl> impl);
  std::unique_ptr<const Impl> impl_;
};

// Turns a stream of tokens into a stream of text without ever splitting a character.
class StreamingDetokenizer {
 public:
  explicit StreamingDetokenizer(const Tokenizer& tokenizer, bool skip_special = false);

  // Text that is complete after `token`; an ill-formed maximal subpart becomes one U+FFFD as soon
  // as it is known to be ill-formed. May be empty.
  std::string Push(int32_t token);
  // What is left at the end of the stream.
  std::string Flush();

 private:
  const Tokenizer* tokenizer_;
  bool skip_special_;
  std::string pending_;  // at most 3 bytes
};

// Length of the longest prefix of `bytes` that is valid UTF-8.
size_t ValidUtf8Prefix(std::string_view bytes);

}  // namespace espalier
