// `espalier prune` as a process: what it leaves when it is interrupted or killed, what damage to
// what it wrote is seen, and how much memory it takes of a model that is larger.
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "tests/support/model_writer.h"

namespace espalier {
namespace {

namespace fs = std::filesystem;
using testing::HasSubstr;

constexpr int kLayers = 40, kHidden = 256, kChannels = 1024;
// 4 MiB a layer, 166 MB in all.
constexpr int64_t kWeights = int64_t{kLayers} * kHidden * (3 * kHidden + 3 * kChannels);

std::string ReadAll(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

GgufTensorPart Tensor(const std::string& name, int rows, int cols) {
  GgufTensorPart tensor{.name = name + ".weight", .dims = {static_cast<uint64_t>(cols)}};
  if (rows > 1) tensor.dims.push_back(rows);
  static uint32_t state = 1;
  for (int i = 0; i < rows * cols; ++i) {
    state = state * 1664525 + 1013904223;
    const float value =
        rows == 1 ? 1.0f : (static_cast<float>(state >> 8) / (1 << 24) - 0.5f) * 0.1f;
    tensor.data.append(reinterpret_cast<const char*>(&value), sizeof(value));
  }
  return tensor;
}

GgufParts LargeGguf() {
  GgufParts parts = TinyGguf();
  parts.Set("llama.block_count", GgufPart::U32(kLayers));
  parts.Set("llama.embedding_length", GgufPart::U32(kHidden));
  parts.Set("llama.feed_forward_length", GgufPart::U32(kChannels));
  parts.Set("llama.attention.head_count", GgufPart::U32(8));
  parts.Set("llama.attention.head_count_kv", GgufPart::U32(4));
  parts.Set("llama.rope.dimension_count", GgufPart::U32(32));
  parts.tensors = {Tensor("token_embd", 260, kHidden), Tensor("output_norm", 1, kHidden)};
  for (int layer = 0; layer < kLayers; ++layer) {
    const std::string blk = "blk." + std::to_string(layer) + ".";
    for (const char* norm : {"attn_norm", "ffn_norm"}) {
      parts.tensors.push_back(Tensor(blk + norm, 1, kHidden));
    }
    parts.tensors.push_back(Tensor(blk + "attn_q", kHidden, kHidden));
    parts.tensors.push_back(Tensor(blk + "attn_k", kHidden / 2, kHidden));
    parts.tensors.push_back(Tensor(blk + "attn_v", kHidden / 2, kHidden));
    parts.tensors.push_back(Tensor(blk + "attn_output", kHidden, kHidden));
    parts.tensors.push_back(Tensor(blk + "ffn_gate", kChannels, kHidden));
    parts.tensors.push_back(Tensor(blk + "ffn_up", kChannels, kHidden));
    parts.tensors.push_back(Tensor(blk + "ffn_down", kHidden, kChannels));
  }
  return parts;
}

class PruneTest : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    folder_ = new TemporaryFolder();
    folder_->Write("large.gguf", LargeGguf().Bytes());
    std::string text;
    for (int i = 0; i < 4000; ++i) text += static_cast<char>('a' + i * i % 26);
    folder_->Write("text.txt", text);
  }
  static void TearDownTestSuite() {
    delete folder_;
    folder_ = nullptr;
  }

  static pid_t Start(std::vector<std::string> arguments, uint64_t data_bytes = 0) {
    arguments.insert(arguments.begin(), ESPALIER_CLI);
    std::vector<char*> argv;
    for (std::string& argument : arguments) argv.push_back(argument.data());
    argv.push_back(nullptr);
    const std::string err = folder_->Path("stderr");
    const pid_t child = fork();
    if (child != 0) return child;
    alarm(200);  // survives the exec
    const int to = open(err.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
    dup2(to, STDERR_FILENO);
    dup2(open("/dev/null", O_WRONLY), STDOUT_FILENO);
    if (data_bytes > 0) {
      const rlimit limit{data_bytes, data_bytes};
      setrlimit(RLIMIT_DATA, &limit);
    }
    execv(argv[0], argv.data());
    _exit(127);
  }

  static int Wait(pid_t child) {
    int status = 0;
    EXPECT_EQ(waitpid(child, &status, 0), child);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  }

  static std::vector<std::string> Pruning(const std::string& out) {
    return {"prune",
            "--model",
            folder_->Path("large.gguf"),
            "--out",
            folder_->Path(out),
            "--store",
            "f32",
            "--calibration",
            folder_->Path("text.txt"),
            "--window",
            "64",
            "--tokens",
            "1024",
            "--threads",
            "2"};
  }

  // Returns once it has begun to write.
  static pid_t StartAndSeeItWrite(const std::string& out) {
    const pid_t child = Start(Pruning(out));
    for (int i = 0; i < 20'000 && !fs::exists(folder_->Path(out + ".new")); ++i) usleep(1000);
    EXPECT_TRUE(fs::exists(folder_->Path(out + ".new")));
    return child;
  }

  static std::string Error() { return ReadAll(folder_->Path("stderr")); }

  static TemporaryFolder* folder_;
};

TemporaryFolder* PruneTest::folder_ = nullptr;

TEST_F(PruneTest, InterruptedLeavesNothing) {
  const std::string out = folder_->Path("out.gguf");
  folder_->Write("out.gguf", "what was there");
  for (const int signal : {SIGINT, SIGTERM}) {
    const pid_t child = StartAndSeeItWrite("out.gguf");
    kill(child, signal);
    EXPECT_EQ(Wait(child), 128 + signal) << Error();
    EXPECT_EQ(ReadAll(out), "what was there");
    EXPECT_FALSE(fs::exists(out + ".new"));
  }
}

TEST_F(PruneTest, KilledLeavesNoModel) {
  const pid_t child = StartAndSeeItWrite("killed.gguf");
  // Until all that is not pruned is in its place, the last tensor's too.
  usleep(200'000);
  kill(child, SIGKILL);
  Wait(child);
  EXPECT_FALSE(fs::exists(folder_->Path("killed.gguf")));
  const std::string half = folder_->Path("killed.gguf.new");
  ASSERT_TRUE(fs::exists(half));
  EXPECT_EQ(Wait(Start({"score", "hello", "--model", half})), 1);
  EXPECT_THAT(Error(), HasSubstr("expected GGUF"));
  // The next run takes its place.
  EXPECT_EQ(Wait(Start({"prune", "--method", "magnitude", "--model", folder_->Path("large.gguf"),
                        "--out", folder_->Path("killed.gguf")})),
            0)
      << Error();
  EXPECT_FALSE(fs::exists(half));
  fs::remove(folder_->Path("killed.gguf"));
}

// Calibrating, pruning, writing: within less than the model, of which it holds a layer.
TEST_F(PruneTest, MemoryIsALayerAndTheCalibration) {
  if (ESPALIER_SANITIZED) GTEST_SKIP() << "a sanitizer's shadow is memory too";
  constexpr uint64_t kMost = 96 << 20;
  ASSERT_GT(kWeights * sizeof(float), 3 * kMost / 2);
  EXPECT_EQ(Wait(Start(Pruning("small.gguf"), kMost)), 0) << Error();
  // The bound means something: a model loaded whole does not fit.
  EXPECT_NE(
      Wait(Start({"score", "hello", "--weights", "f32", "--model", folder_->Path("large.gguf")},
                 kMost)),
      0);
  fs::remove(folder_->Path("small.gguf"));
}

TEST_F(PruneTest, DamageIsSeenWhenItIsOpened) {
  const std::string model = folder_->Write("tiny.gguf", TinyGguf().Bytes());
  ASSERT_EQ(Wait(Start({"prune", "--method", "magnitude", "--model", model, "--out",
                        folder_->Path("m.gguf")})),
            0)
      << Error();
  const std::string whole = ReadAll(folder_->Path("m.gguf"));
  EXPECT_EQ(Wait(Start({"score", "hello", "--model", folder_->Path("m.gguf")})), 0) << Error();
  // A bit in the middle of a matrix, in the last norm, in the checksum's second half.
  const size_t sum = whole.find("espalier.checksum");
  ASSERT_NE(sum, std::string::npos);
  for (const size_t at : {whole.size() / 2, whole.size() - 40, sum + 17 + 4 + 8 + 16 + 5}) {
    std::string damaged = whole;
    damaged[at] ^= 1;
    EXPECT_EQ(Wait(Start({"score", "hello", "--model", folder_->Write("d.gguf", damaged)})), 1);
    EXPECT_THAT(Error(), HasSubstr("the file is damaged")) << at;
  }
  // Another program has made another model of it, and copied its keys: it is no longer of this one.
  std::string copied = whole;
  copied[sum + 17 + 4 + 8] ^= 1;
  copied[whole.size() / 2] ^= 1;
  EXPECT_EQ(Wait(Start({"score", "hello", "--model", folder_->Write("c.gguf", copied)})), 0)
      << Error();
  for (size_t part = 0; part < 8; ++part) {
    folder_->Write("d.gguf", whole.substr(0, whole.size() * part / 8));
    EXPECT_EQ(Wait(Start({"score", "hello", "--model", folder_->Path("d.gguf")})), 1) << part;
  }
}

}  // namespace
}  // namespace espalier
