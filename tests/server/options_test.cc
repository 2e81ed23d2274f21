#include "server/options.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <string>
#include <vector>

namespace espalier {
namespace {

using std::chrono::milliseconds;
using ::testing::HasSubstr;

// An environment of our own making: what the caller of the test has set does not reach it.
class OptionsTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::vector<std::string> names;
    for (char** entry = environ; *entry; ++entry) {
      const std::string variable = *entry;
      if (variable.starts_with("ESPALIER_"))
        names.push_back(variable.substr(0, variable.find('=')));
    }
    for (const std::string& name : names) {
      saved_[name] = std::getenv(name.c_str());
      unsetenv(name.c_str());
    }
  }

  void TearDown() override {
    for (const std::string& name : set_) unsetenv(name.c_str());
    for (const auto& [name, value] : saved_) setenv(name.c_str(), value.c_str(), 1);
  }

  void SetEnvironment(const std::string& name, const std::string& value) {
    setenv(name.c_str(), value.c_str(), 1);
    set_.push_back(name);
  }

  std::string WriteFile(const std::string& text) {
    const std::string path = ::testing::TempDir() + "/options_test.conf";
    std::ofstream(path) << text;
    return path;
  }

  absl::StatusOr<std::optional<ServerOptions>> Parse(const std::vector<std::string>& flags) {
    std::vector<const char*> argv{"espalier-server"};
    for (const std::string& flag : flags) argv.push_back(flag.c_str());
    return ParseServerOptions(static_cast<int>(argv.size()), argv.data());
  }

  // For command lines that must be right.
  ServerOptions Read(std::vector<std::string> flags) {
    flags.push_back("--model=m.gguf");
    const auto options = Parse(flags);
    EXPECT_TRUE(options.ok()) << options.status().message();
    return options.ok() && *options ? **options : ServerOptions();
  }

  // The one line of a command line that must be refused.
  std::string Refusal(std::vector<std::string> flags) {
    flags.push_back("--model=m.gguf");
    const auto options = Parse(flags);
    EXPECT_FALSE(options.ok());
    const std::string line(options.status().message());
    EXPECT_EQ(line.find('\n'), std::string::npos) << line;
    return line;
  }

 private:
  std::map<std::string, std::string> saved_;
  std::vector<std::string> set_;
};

TEST_F(OptionsTest, DefaultsAreTheStructs) {
  const ServerOptions options = Read({});
  EXPECT_EQ(options.model, "m.gguf");
  EXPECT_EQ(options.host, "127.0.0.1");
  EXPECT_EQ(options.port, 50051);
  EXPECT_EQ(options.metrics_port, 9090);
  EXPECT_EQ(options.weights, WeightPlan::kAuto);
  EXPECT_EQ(options.kv_memory, 0u);
  EXPECT_FALSE(options.isa.has_value());
  EXPECT_EQ(options.max_message_bytes, 4u << 20);
  EXPECT_EQ(options.drain_timeout, milliseconds(30'000));
  EXPECT_EQ(options.stall_timeout, milliseconds(30'000));
  EXPECT_FALSE(options.log_prompts);
  EXPECT_TRUE(options.prefix_cache);
}

TEST_F(OptionsTest, KvTypeIsTheModelsAffairUnlessSaid) {
  EXPECT_FALSE(Read({}).kv_type.has_value());
  EXPECT_FALSE(Read({"--kv-type=auto"}).kv_type.has_value());
  EXPECT_EQ(Read({"--weights=f32", "--kv-type=f16"}).kv_type, KvType::kF16);
}

TEST_F(OptionsTest, ReadsEveryKindOfValue) {
  const ServerOptions options =
      Read({"--port", "0", "--metrics-port=-1", "--kv-memory=512MiB", "--isa=avx2", "--threads=3",
            "--reserve-output=0.25", "--drain-timeout=1.5", "--max-connection-age=5m",
            "--max-connection-age-grace=250ms", "--log-format=json", "--log-level=warning",
            "--log-prompts", "--max-message-bytes=65536", "--port-file=p", "--model-name=smol",
            "--prefix-cache=false"});
  EXPECT_EQ(options.port, 0);
  EXPECT_EQ(options.metrics_port, -1);
  EXPECT_EQ(options.kv_memory, 512ull << 20);
  EXPECT_EQ(options.isa, Isa::kAvx2);
  EXPECT_EQ(options.threads, 3);
  EXPECT_EQ(options.reserve_output, 0.25);
  EXPECT_EQ(options.drain_timeout, milliseconds(1'500));
  EXPECT_EQ(options.max_connection_age, milliseconds(300'000));
  EXPECT_EQ(options.max_connection_age_grace, milliseconds(250));
  EXPECT_EQ(options.log_format, LogFormat::kJson);
  EXPECT_EQ(options.log_level, LogLevel::kWarning);
  EXPECT_TRUE(options.log_prompts);
  EXPECT_FALSE(options.prefix_cache);
  EXPECT_EQ(options.max_message_bytes, 65536u);
  EXPECT_EQ(options.port_file, "p");
  EXPECT_EQ(options.model_name, "smol");
}

TEST_F(OptionsTest, FlagBeatsEnvironmentBeatsFileBeatsDefault) {
  const std::string file = WriteFile(
      "# what a machine is set up with\n\n"
      "max-waiting = 1\n"
      "  max_sequences=2  \n"
      "max-batch-tokens = 3\r\n");
  SetEnvironment("ESPALIER_MAX_WAITING", "10");
  SetEnvironment("ESPALIER_MAX_SEQUENCES", "20");
  const ServerOptions options =
      Read({"--config", file, "--max-waiting=100", "--max-batch-tokens=200"});
  EXPECT_EQ(options.max_waiting, 100);
  EXPECT_EQ(options.max_sequences, 20);
  EXPECT_EQ(options.max_batch_tokens, 200);
  EXPECT_EQ(options.stream_buffer_tokens, 1024);

  SetEnvironment("ESPALIER_CONFIG", file);
  SetEnvironment("ESPALIER_MAX_SEQUENCES", "3");
  EXPECT_EQ(Read({}).max_batch_tokens, 3);
}

TEST_F(OptionsTest, ModelMayComeFromAnywhere) {
  SetEnvironment("ESPALIER_MODEL", "from-environment");
  const auto options = Parse({});
  ASSERT_TRUE(options.ok() && options->has_value());
  EXPECT_EQ((*options)->model, "from-environment");
}

TEST_F(OptionsTest, MissingModelIsNamed) {
  const auto options = Parse({});
  ASSERT_FALSE(options.ok());
  EXPECT_THAT(std::string(options.status().message()), HasSubstr("--model"));
}

TEST_F(OptionsTest, UnknownFlagIsNamed) {
  EXPECT_THAT(Refusal({"--max-wating=3"}), HasSubstr("--max-wating"));
  EXPECT_THAT(Refusal({"serve"}), HasSubstr("serve"));
}

TEST_F(OptionsTest, BadFlagValueIsNamedWithTheRange) {
  for (const std::string value : {"0", "-5", "1000001", "many", "", "12x", "1e3", "99999999999"}) {
    const std::string line = Refusal({"--max-waiting=" + value});
    EXPECT_THAT(line, HasSubstr("--max-waiting")) << value;
  }
  EXPECT_EQ(Refusal({"--max-waiting=0"}),
            "--max-waiting: expected a whole number from 1 to 1000000, got \"0\"");
  EXPECT_THAT(Refusal({"--max-waiting"}), HasSubstr("--max-waiting"));
  EXPECT_THAT(Refusal({"--port=1", "--port=2"}), HasSubstr("--port"));
}

TEST_F(OptionsTest, BytesDoNotWrapAround) {
  for (const std::string value : {"17179869185GiB", "18446744073709551615", "1PiB", "-1", "1.5GiB",
                                  "GiB", "1023TiBx", "65535"}) {
    EXPECT_THAT(Refusal({"--kv-memory=" + value}), HasSubstr("--kv-memory")) << value;
  }
  EXPECT_EQ(Read({"--kv-memory=1TiB"}).kv_memory, 1ull << 40);
  EXPECT_EQ(Read({"--kv-memory=auto"}).kv_memory, 0u);
}

TEST_F(OptionsTest, ABudgetIsBytesOrAShare) {
  EXPECT_EQ(Read({"--memory-budget=1GiB"}).memory_budget, 1u << 30);
  EXPECT_EQ(Read({"--memory-budget=1GiB"}).memory_share, 0);
  EXPECT_EQ(Read({"--memory-budget=62.5%"}).memory_share, 0.625);
  EXPECT_EQ(Read({"--memory-budget=62.5%"}).memory_budget, 0u);
  for (const std::string value : {"0%", "101%", "%", "-5%", "nan%", "0.5"}) {
    EXPECT_THAT(Refusal({"--memory-budget=" + value}), HasSubstr("1% to 100%")) << value;
  }
}

TEST_F(OptionsTest, OddNumbersAreRefused) {
  for (const std::string value : {"nan", "inf", "-0.1", "1.01", "half"}) {
    EXPECT_THAT(Refusal({"--reserve-output=" + value}), HasSubstr("--reserve-output")) << value;
  }
  for (const std::string value : {"nan", "-1", "25h", "10d", "s"}) {
    EXPECT_THAT(Refusal({"--drain-timeout=" + value}), HasSubstr("--drain-timeout")) << value;
  }
  EXPECT_THAT(Refusal({"--log-prompts=maybe"}), HasSubstr("--log-prompts"));
}

TEST_F(OptionsTest, BadEnvironmentNamesTheVariable) {
  SetEnvironment("ESPALIER_WEIGHTS", "int3");
  EXPECT_EQ(Refusal({}), "ESPALIER_WEIGHTS: expected one of auto|int4|int8|bf16|f32, got \"int3\"");
}

TEST_F(OptionsTest, KubernetesServiceLinkIsNotAPort) {
  SetEnvironment("ESPALIER_PORT", "tcp://10.0.0.7:50051");
  EXPECT_EQ(Read({}).port, 50051);
  SetEnvironment("ESPALIER_PORT", "udp");
  EXPECT_THAT(Refusal({}), HasSubstr("ESPALIER_PORT"));
}

TEST_F(OptionsTest, AFlagMayHaveAValue) {
  EXPECT_TRUE(Read({"--log-prompts"}).log_prompts);
  EXPECT_TRUE(Read({"--log-prompts=true"}).log_prompts);
  EXPECT_TRUE(Read({"--log-prompts", "true"}).log_prompts);
  EXPECT_FALSE(Read({"--log-prompts", "false"}).log_prompts);
  EXPECT_FALSE(Read({"--log-prompts=false"}).log_prompts);
  EXPECT_EQ(Read({"--log-prompts", "--port=7"}).port, 7);
  EXPECT_THAT(Refusal({"--log-prompts", "perhaps"}), HasSubstr("--log-prompts"));
}

TEST_F(OptionsTest, AHostIsAnAddressOrAName) {
  for (const char* host : {"127.0.0.1", "::", "::1", "fe80::1%eth0", "localhost", "a", "x-1.my_pod",
                           "example.com.", "1.example", "10-0-0-1.pods"}) {
    EXPECT_EQ(Read({"--host", host}).host, host);
  }
  for (const char* host :
       {"", " ", "a b", "localhost:50051", "[::1]", "127.0.0.1:80", "999.0.0.1", "1.2.3", "a..b",
        ".a", "-a", "a-", "a-.b", "a.-b", "a/b", "::g", "http://a"}) {
    EXPECT_THAT(Refusal({"--host", host}),
                HasSubstr("--host: expected an IP address or host name, got"))
        << host;
  }
  EXPECT_EQ(Read({"--host", std::string(63, 'a')}).host.size(), 63u);
  EXPECT_THAT(Refusal({"--host", std::string(64, 'a')}), HasSubstr("--host"));
  EXPECT_THAT(Refusal({"--host="}), HasSubstr("--host"));
  SetEnvironment("ESPALIER_HOST", "");
  EXPECT_THAT(Refusal({}), HasSubstr("ESPALIER_HOST: expected"));
}

TEST_F(OptionsTest, BadFileNamesItsLine) {
  EXPECT_THAT(Refusal({"--config", WriteFile("\nport = x\n")}),
              HasSubstr("options_test.conf:2: port"));
  EXPECT_THAT(Refusal({"--config", WriteFile("colour = red\n")}),
              HasSubstr("options_test.conf:1: unknown option colour"));
  EXPECT_THAT(Refusal({"--config", WriteFile("port\n")}), HasSubstr("options_test.conf:1:"));
  EXPECT_THAT(Refusal({"--config", WriteFile("port = 1\nport = 2\n")}), HasSubstr("given twice"));
  EXPECT_THAT(Refusal({"--config", "/no/such/file"}), HasSubstr("/no/such/file"));
  EXPECT_THAT(Refusal({"--config", ::testing::TempDir()}), HasSubstr(::testing::TempDir()));
}

TEST_F(OptionsTest, MoreSequencesThanRowsCannotRun) {
  EXPECT_THAT(Refusal({"--max-batch-tokens=8", "--max-sequences=9"}), HasSubstr("--max-sequences"));
}

TEST_F(OptionsTest, HelpSaysRangeAndDefaultOfEveryOption) {
  ::testing::internal::CaptureStdout();
  const auto options = Parse({"--help"});
  const std::string help = ::testing::internal::GetCapturedStdout();
  ASSERT_TRUE(options.ok());
  EXPECT_FALSE(options->has_value());
  for (const char* name : {"model",
                           "model-name",
                           "weights",
                           "kv-type",
                           "kv-memory",
                           "isa",
                           "threads",
                           "host",
                           "port",
                           "port-file",
                           "metrics-port",
                           "max-message-bytes",
                           "max-connection-age",
                           "max-connection-age-grace",
                           "max-batch-tokens",
                           "max-sequences",
                           "max-waiting",
                           "reserve-output",
                           "prefix-cache",
                           "stream-buffer-tokens",
                           "drain-timeout",
                           "stall-timeout",
                           "log-level",
                           "log-format",
                           "log-prompts"}) {
    const size_t at = help.find(std::string("--") + name + " ");
    ASSERT_NE(at, std::string::npos) << name;
    EXPECT_THAT(help.substr(at, 400), HasSubstr("default: ")) << name;
  }
  EXPECT_THAT(help, HasSubstr("a whole number from 1 to 1000000; default: 256"));
  EXPECT_THAT(help, HasSubstr("default: 4MiB"));
  EXPECT_THAT(help, HasSubstr("default: 30]"));
}

TEST_F(OptionsTest, VersionIsPrinted) {
  ::testing::internal::CaptureStdout();
  const auto options = Parse({"--version"});
  EXPECT_EQ(::testing::internal::GetCapturedStdout(),
            "espalier-server " + std::string(ServerVersion()) + "\n");
  ASSERT_TRUE(options.ok());
  EXPECT_FALSE(options->has_value());
}

TEST_F(OptionsTest, ProbeNeedsALadderToPruneBy) {
  EXPECT_FALSE(Read({}).probe.has_value());
  const ServerOptions options =
      Read({"--ladder=m.ladder", "--probe=top-norm", "--probe-budget=0.5", "--history=frozen"});
  EXPECT_EQ(options.probe, ProbeOptions::Rows::kTopNorm);
  EXPECT_EQ(options.probe_budget, 0.5);
  EXPECT_TRUE(options.frozen_history);
  EXPECT_EQ(Refusal({"--probe=all"}), "--probe: needs a ladder: --ladder");
}

TEST_F(OptionsTest, MomentsAreGatheredOnlyWhereAsked) {
  EXPECT_EQ(Read({}).moments_file, "");
  EXPECT_EQ(Read({"--moments-file=m.moments"}).moments_file, "m.moments");
  EXPECT_EQ(Read({}).channel_moments_file, "");
  EXPECT_EQ(Read({"--channel-moments-file=c.moments"}).channel_moments_file, "c.moments");
}

TEST_F(OptionsTest, PolicyIsFixedAtARungOfTheLadder) {
  EXPECT_EQ(Read({}).fixed_rung, 0);
  EXPECT_EQ(Read({"--policy=fixed:0"}).ladder, "");
  const ServerOptions options = Read({"--ladder", "m.ladder", "--policy", "fixed:3"});
  EXPECT_EQ(options.ladder, "m.ladder");
  EXPECT_EQ(options.fixed_rung, 3);
  EXPECT_EQ(Refusal({"--policy=fixed:1"}), "--policy: rung 1 needs a ladder: --ladder");
  for (const char* bad : {"--policy=3", "--policy=fixed", "--policy=fixed:", "--policy=fixed:-1",
                          "--policy=fixed:64", "--policy=fixed:1x", "--policy="}) {
    EXPECT_THAT(Refusal({bad}), testing::HasSubstr("fixed:RUNG")) << bad;
  }
}

TEST_F(OptionsTest, PolicyChoosesByTargets) {
  const ServerOptions options =
      Read({"--ladder=m.ladder", "--policy=ladder", "--policy-mode=shadow", "--ttft-target=0.5",
            "--tpot-target=0.02", "--load-loss=0.4"});
  EXPECT_EQ(options.policy, ServerOptions::PolicyKind::kLadder);
  EXPECT_TRUE(options.shadow);
  EXPECT_EQ(options.ttft_target, std::chrono::milliseconds(500));
  EXPECT_EQ(options.tpot_target, std::chrono::milliseconds(20));
  EXPECT_EQ(options.load_loss, 0.4);
  EXPECT_FALSE(Read({}).shadow);
  EXPECT_EQ(Refusal({"--policy=ladder"}), "--policy: ladder needs a ladder: --ladder");
  EXPECT_EQ(Refusal({"--decision-log=d"}), "--decision-log: a fixed policy decides nothing");
  EXPECT_EQ(Refusal({"--tpot-target=0"}),
            "--tpot-target: expected a millisecond or more, got 0 ms");
}

}  // namespace
}  // namespace espalier
