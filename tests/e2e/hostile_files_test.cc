// Model files that lie, given to the programs themselves: one line on stderr, exit 1, soon and in
// little memory.
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <functional>
#include <iterator>
#include <string>
#include <string_view>
#include <vector>

#include "tests/support/model_writer.h"

namespace espalier {
namespace {

using testing::HasSubstr;

// Either program takes a few tens of MiB before it looks at a model; a lie that is believed,
// gigabytes. A sanitizer takes several times as much of both.
constexpr int64_t kMaxBytes = int64_t{ESPALIER_SANITIZED ? 1024 : 128} << 20;
constexpr double kMaxSeconds = ESPALIER_SANITIZED ? 10 : 1;

struct Outcome {
  int status = 0;  // as wait4 gives it
  std::string err;
  double cpu_seconds = 0;
  int64_t peak_bytes = 0;
};

std::string ReadAll(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

Outcome RunProgram(std::vector<std::string> arguments, const std::string& err_path) {
  std::vector<char*> argv;
  for (std::string& argument : arguments) argv.push_back(argument.data());
  argv.push_back(nullptr);
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);  // survives the exec, and ends a program that hangs or serves
    const int err = open(err_path.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
    dup2(err, STDERR_FILENO);
    dup2(open("/dev/null", O_WRONLY), STDOUT_FILENO);
    execv(argv[0], argv.data());
    _exit(127);
  }
  Outcome outcome;
  rusage usage;
  EXPECT_EQ(wait4(child, &outcome.status, 0, &usage), child);
  for (const timeval& time : {usage.ru_utime, usage.ru_stime}) {
    outcome.cpu_seconds += static_cast<double>(time.tv_sec) + 1e-6 * time.tv_usec;
  }
  outcome.peak_bytes = usage.ru_maxrss * 1024;
  outcome.err = ReadAll(err_path);
  return outcome;
}

class HostileFiles : public testing::Test {
 protected:
  // `expected`: what the line says, or "" for any.
  void ExpectRefused(std::string_view what, std::string_view bytes, std::string_view expected) {
    const std::string path = folder_.Write("model.gguf", bytes);
    const std::vector<std::vector<std::string>> programs = {
        {ESPALIER_CLI, "score", "hello", "--model", path},
        {ESPALIER_SERVER, "--port", "0", "--metrics-port", "-1", "--model", path}};
    for (const std::vector<std::string>& program : programs) {
      SCOPED_TRACE(testing::Message() << program[0] << ": " << what);
      const Outcome outcome = RunProgram(program, folder_.Path("stderr"));
      EXPECT_TRUE(WIFEXITED(outcome.status) && WEXITSTATUS(outcome.status) == 1) << outcome.status;
      EXPECT_EQ(std::ranges::count(outcome.err, '\n'), 1) << outcome.err;
      EXPECT_LT(outcome.err.size(), 1024);
      EXPECT_THAT(outcome.err, HasSubstr(path));
      EXPECT_THAT(outcome.err, HasSubstr(expected));
      EXPECT_LT(outcome.cpu_seconds, kMaxSeconds);
      EXPECT_LT(outcome.peak_bytes, kMaxBytes);
    }
  }

  TemporaryFolder folder_;
};

TEST_F(HostileFiles, CutOff) {
  const std::string bytes = ReadAll(ESPALIER_TINY_MODEL);
  ASSERT_GT(bytes.size(), 100000);
  for (size_t part = 0; part < 16; ++part) {
    ExpectRefused("cut off", std::string_view(bytes).substr(0, bytes.size() * part / 16), "");
  }
}

constexpr uint64_t kHuge = uint64_t{1} << 63;
constexpr uint32_t kBillion = 1'000'000'000;

// An array of strings that says it has 2^61 of them.
GgufPart EndlessTexts() {
  return {9, std::string("\10\0\0\0", 4) + std::string("\0\0\0\0\0\0\0\x20", 8)};
}

GgufPart EndlessText() { return {8, std::string(8, '\xff')}; }

struct Lie {
  std::string_view what;
  std::function<void(GgufParts&)> tell;
  std::string_view expected;
};

// Sets a key to a number.
std::function<void(GgufParts&)> Say(std::string_view key, uint32_t value) {
  return [=](GgufParts& parts) { parts.Set(key, GgufPart::U32(value)); };
}

std::function<void(GgufParts&)> Dims(std::vector<uint64_t> dims) {
  return [dims](GgufParts& parts) { parts.tensor("blk.0.attn_q.weight").dims = dims; };
}

std::function<void(GgufParts&)> Offset(uint64_t offset) {
  return [=](GgufParts& parts) { parts.tensor("blk.1.ffn_up.weight").offset = offset; };
}

const Lie kLies[] = {
    {"tensor count", [](GgufParts& p) { p.tensor_count = kHuge; }, "number of tensors"},
    {"key count", [](GgufParts& p) { p.key_count = kHuge; }, "number of metadata keys"},
    {"a string beyond the end", [](GgufParts& p) { p.Set("z", EndlessText()); }, "key \"z\""},
    {"an array beyond the end", [](GgufParts& p) { p.Set("z", EndlessTexts()); }, "key \"z\""},
    {"an endless name", [](GgufParts& p) { p.Set("general.name", EndlessText()); }, "expected"},
    {"an endless vocabulary", [](GgufParts& p) { p.Set("tokenizer.ggml.tokens", EndlessTexts()); },
     "tokenizer.ggml.tokens"},
    {"an offset beyond the end", Offset(uint64_t{1} << 40), "at offset 1099511627776"},
    {"an offset that wraps", Offset(UINT64_MAX - 31), "at offset 18446744073709551584"},
    {"tensors that overlap", Offset(0), "data of its own"},
    {"an offset between", Offset(8), "multiple of 32"},
    {"two tensors of a name",
     [](GgufParts& p) { p.tensor("blk.0.attn_k.weight").name = "blk.0.attn_v.weight"; },
     "it twice"},
    {"alignment 0", Say("general.alignment", 0), "general.alignment"},
    {"alignment 3", Say("general.alignment", 3), "a power of two"},
    {"alignment 2^31", Say("general.alignment", 1u << 31), "general.alignment"},
    {"dimensions whose product wraps", Dims({uint64_t{1} << 32, uint64_t{1} << 32}), "dimension 0"},
    {"dimensions whose product is huge", Dims({INT32_MAX, INT32_MAX}), "bytes at offset"},
    {"a dimension of 2^63", Dims({kHuge, 2}), "dimension 0"},
    {"a dimension of 0", Dims({16, 0}), "dimension 1"},
    {"a cube", Dims({4, 8, 8}), "a vector or a matrix"},
    {"no dimension", Dims({}), "1 to 4 dimensions"},
    {"nine dimensions", Dims({1, 1, 1, 1, 1, 1, 1, 1, 1}), "1 to 4 dimensions"},
    {"a type unknown", [](GgufParts& p) { p.tensors[0].type = 255; }, "type 255"},
    {"a billion layers", Say("llama.block_count", kBillion), "llama.block_count"},
    {"more layers than there are", Say("llama.block_count", 1024), "blk.2.attn_norm.weight"},
    {"a huge vocabulary", Say("llama.vocab_size", UINT32_MAX), "llama.vocab_size"},
    {"more vocabulary than there is", Say("llama.vocab_size", 1 << 24), "expected 16777216 tokens"},
    {"no heads", Say("llama.attention.head_count", 0), "head_count"},
    {"no KV heads", Say("llama.attention.head_count_kv", 0), "head_count_kv"},
    {"a billion heads", Say("llama.attention.head_count", kBillion), "head_count"},
    {"heads a billion wide", Say("llama.attention.key_length", kBillion), "key_length"},
    {"no width", Say("llama.embedding_length", 0), "embedding_length"},
    {"a billion wide", Say("llama.embedding_length", kBillion), "embedding_length"},
    {"a billion channels", Say("llama.feed_forward_length", kBillion), "feed_forward_length"},
    {"no context", Say("llama.context_length", 0), "context_length"},
    {"a huge context", Say("llama.context_length", UINT32_MAX), "context_length"},
    {"a token beyond the vocabulary", Say("tokenizer.ggml.eos_token_id", 260), "eos_token_id"},
};

TEST_F(HostileFiles, Lies) {
  for (const Lie& lie : kLies) {
    GgufParts parts = TinyGguf();
    lie.tell(parts);
    ExpectRefused(lie.what, parts.Bytes(), lie.expected);
  }
}

}  // namespace
}  // namespace espalier
