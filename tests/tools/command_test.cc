#include "tools/command.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "tests/support/run_command.h"

namespace espalier {
namespace {

using testing::AllOf;
using testing::ContainsRegex;
using testing::HasSubstr;

using Arguments = std::vector<std::string>;

// The variables that name the tests' data are spelt like options of ours; the command must not see
// them in these tests.
[[maybe_unused]] const bool kCleared = [] {
  for (const char* name : {"ESPALIER_MODEL", "ESPALIER_TEXT"}) unsetenv(name);
  return true;
}();

bool OneLine(const std::string& text) {
  return std::count(text.begin(), text.end(), '\n') == 1 && text.ends_with('\n');
}

// Nothing listens on port 1.
constexpr char kNobody[] = "--address=127.0.0.1:1";

class Variable {
 public:
  Variable(const char* name, const char* value) : name_(name) { setenv(name, value, 1); }
  ~Variable() { unsetenv(name_); }

 private:
  const char* name_;
};

TEST(Command, HelpListsSubcommandsAndExitCodes) {
  const Outcome help = RunWith({"--help"});
  EXPECT_EQ(help.code, 0);
  EXPECT_EQ(help.err, "");
  for (const char* text :
       {"chat", "generate", "score", "tokenize", "load", "reload", "health", "bench", "calibrate",
        "prune", "eval", "simulate", "train", "ESPALIER_TOP_K", "--config", "130"}) {
    EXPECT_THAT(help.out, HasSubstr(text));
  }
}

TEST(Command, VersionIsPrinted) {
  const Outcome version = RunWith({"--version"});
  EXPECT_EQ(version.code, 0);
  EXPECT_THAT(version.out, ContainsRegex("^[0-9]+\\.[0-9]+\\.[0-9]+"));
}

class HelpOf : public testing::TestWithParam<const char*> {};

TEST_P(HelpOf, TellsUnitsRangesAndDefaults) {
  const Outcome help = RunWith({GetParam(), "--help"});
  EXPECT_EQ(help.code, 0);
  EXPECT_EQ(help.err, "");
  EXPECT_THAT(help.out, ContainsRegex("default "));
  EXPECT_THAT(help.out, ContainsRegex("SECONDS|TOKENS"));
  EXPECT_THAT(help.out, ContainsRegex("\\[-?[0-9]+ to [0-9]+; default "));
  size_t start = 0;
  for (size_t end; (end = help.out.find('\n', start)) != std::string::npos; start = end + 1) {
    EXPECT_LE(end - start, 100u) << help.out.substr(start, end - start);
  }
}

INSTANTIATE_TEST_SUITE_P(EverySubcommand, HelpOf,
                         testing::Values("chat", "generate", "score", "tokenize", "load", "health",
                                         "bench", "calibrate", "prune", "eval", "simulate",
                                         "train"));

TEST(Command, UnknownOptionIsNamedInOneLine) {
  const Outcome outcome = RunWith({"generate", "hello", "--no-such-option"});
  EXPECT_EQ(outcome.code, 2);
  EXPECT_TRUE(OneLine(outcome.err)) << outcome.err;
  EXPECT_THAT(outcome.err, HasSubstr("--no-such-option"));
}

TEST(Command, UnknownOrMissingSubcommandIsAnError) {
  EXPECT_EQ(RunWith({"prance"}).code, 2);
  EXPECT_THAT(RunWith({"prance"}).err, HasSubstr("prance"));
  EXPECT_EQ(RunWith({}).code, 2);
  EXPECT_TRUE(OneLine(RunWith({}).err));
}

TEST(Command, BadValuesAreNamedInOneLine) {
  const std::vector<std::pair<Arguments, const char*>> cases = {
      {{"generate", "x", "--temperature", "101"}, "--temperature"},
      {{"generate", "x", "--temperature", "warm"}, "--temperature"},
      {{"generate", "x", "--top-p", "0"}, "--top-p"},
      {{"generate", "x", "--top-k=-1"}, "--top-k"},
      {{"generate", "x", "--logit-bias", "7"}, "--logit-bias"},
      {{"generate", "x", "--logit-bias", "7=101"}, "--logit-bias"},
      {{"generate", "x", "--logprobs", "21"}, "--logprobs"},
      {{"generate", "x", "--temperature", "nan"}, "--temperature"},
      {{"generate", "x", "--temperature", "inf"}, "--temperature"},
      {{"generate", "x", "--top-p", "1.01"}, "--top-p"},
      {{"generate", "x", "--top-p", "1e-60"}, "--top-p"},
      {{"generate", "x", "--min-p", "nan"}, "--min-p"},
      {{"generate", "x", "--repetition-penalty", "0"}, "--repetition-penalty"},
      {{"generate", "x", "--presence-penalty", "-2.5"}, "--presence-penalty"},
      {{"generate", "x", "--logit-bias", "7=nan"}, "--logit-bias"},
      {{"generate", "x", "--seed", "-1"}, "--seed"},
      {{"generate", "x", "--seed", "18446744073709551616"}, "--seed"},
      {{"load", "--seed=-1"}, "--seed"},
      {{"bench", "--model", "m", "--seed", "1.5"}, "--seed"},
      {{"generate", "x", "--stop", ""}, "--stop"},
      {{"generate", "x", "--stop="}, "--stop"},
      {{"generate", "x", "--min-tokens", "6", "--max-tokens", "5"}, "--min-tokens"},
      {{"chat", "--once", "x", "--min-tokens", "6", "--max-tokens", "5"}, "--min-tokens"},
      {{"generate", "x", "--max-tokens", "0"}, "--max-tokens"},
      {{"generate", "x", "--max-quality-loss", "nan"}, "--max-quality-loss"},
      {{"generate", "x", "--deadline", "nan"}, "--deadline"},
      {{"load", "--rate", "nan"}, "--rate"},
      {{"score", "x", "--reference-ppl", "nan"}, "--reference-ppl"},
      {{"score", "x", "--json", "--json=perhaps"}, "--json"},
      {{"score", "x", "--weights", "int3"}, "--weights"},
      {{"score", "x", "--window", "1"}, "--window"},
      {{"score", "x", "--tolerance", "0.1"}, "--tolerance"},  // of nothing
      {{"load", "--rate", "5", "--concurrency", "5"}, "--rate"},
      {{"health", "--watch", "--wait"}, "--wa"},
      {{"bench", "--model", "m", "--batch", "1,0"}, "--batch"},
      {{"bench"}, "--model"},
      {{"tokenize", "x", "--system", "y"}, "--system"},
  };
  for (const auto& [arguments, name] : cases) {
    const Outcome outcome = RunWith(arguments);
    EXPECT_EQ(outcome.code, 2) << name;
    EXPECT_TRUE(OneLine(outcome.err)) << outcome.err;
    EXPECT_THAT(outcome.err, HasSubstr(name));
  }
}

TEST(Command, RepeatedOptionsAreBounded) {
  const std::string long_stop(257, 's');
  EXPECT_THAT(RunWith({"generate", "x", "--stop", long_stop}).err, HasSubstr("--stop"));
  for (const auto& [name, value, most] : std::vector<std::tuple<const char*, const char*, int>>{
           {"--stop", "s", 16}, {"--stop-id", "7", 64}, {"--logit-bias", "7=1", 1024}}) {
    Arguments arguments = {"generate", "x", kNobody};
    for (int i = 0; i < most; ++i) arguments.insert(arguments.end(), {name, value});
    EXPECT_EQ(RunWith(arguments).code, 1) << name << ", and nobody to ask";
    arguments.insert(arguments.end(), {name, value});
    const Outcome outcome = RunWith(arguments);
    EXPECT_EQ(outcome.code, 2) << name;
    EXPECT_TRUE(OneLine(outcome.err)) << outcome.err;
    EXPECT_THAT(outcome.err, HasSubstr(name));
  }
}

TEST(Command, AFlagTakesATruthValueBehindABlank) {
  // Taken for the text, "true" would be one argument too many.
  for (const char* value : {"true", "false"}) {
    EXPECT_EQ(RunWith({"generate", "--quiet", value, "x", kNobody}).code, 1) << value;
  }
  EXPECT_EQ(RunWith({"generate", "--quiet", "truth", "x", kNobody}).code, 2);
  EXPECT_EQ(RunWith({"generate", "--quiet", "truth", kNobody}).code, 1) << "it is the text";
  EXPECT_EQ(RunWith({"generate", kNobody, "--quiet", "--", "true"}).code, 1);
}

TEST(Command, AFailureAtRunTimeIsOneLine) {
  for (const auto& arguments :
       std::vector<Arguments>{{"generate", "hello", kNobody},
                              {"chat", "--once", "hello", kNobody},
                              {"health", kNobody},
                              {"load", kNobody},
                              {"tokenize", "hello", kNobody},
                              {"score", "hello", kNobody},
                              {"generate", "--file", "no/such/file"},
                              {"tokenize", "hello", "--model", "no/such/model.gguf"},
                              {"score", "hello", "--model", "no/such/model.gguf"},
                              {"bench", "--model", "no/such/model.gguf"}}) {
    const Outcome outcome = RunWith(arguments);
    EXPECT_EQ(outcome.code, 1) << arguments[0];
    EXPECT_THAT(outcome.err, testing::StartsWith("espalier: "));
    EXPECT_TRUE(OneLine(outcome.err)) << outcome.err;
  }
}

TEST(Command, OptionsComeFromTheEnvironment) {
  const Variable temperature("ESPALIER_TEMPERATURE", "500");
  const Outcome outcome = RunWith({"generate", "x", kNobody});
  EXPECT_EQ(outcome.code, 2);
  EXPECT_THAT(outcome.err, AllOf(HasSubstr("--temperature"), HasSubstr("500")));
  EXPECT_EQ(RunWith({"generate", "x", kNobody, "--temperature", "1"}).code, 1);
}

class ConfigFile : public testing::Test {
 protected:
  void Write(const std::string& text) { std::ofstream(path_) << text; }
  Outcome Generate() { return RunWith({"generate", "x", kNobody, "--config", path_.c_str()}); }

  const std::string path_ = testing::TempDir() + "espalier_command_test.toml";
};

TEST_F(ConfigFile, SetsOptionsOfItsSection) {
  Write("[generate]\ntemperature = 500\n");
  const Outcome outcome = Generate();
  EXPECT_EQ(outcome.code, 2);
  EXPECT_THAT(outcome.err, HasSubstr("--temperature"));
  Write("[chat]\ntemperature = 1\n[generate]\ntop-k = 5\n");
  EXPECT_EQ(Generate().code, 1);
}

TEST_F(ConfigFile, EnvironmentWinsOverIt) {
  Write("[generate]\nfile = \"no/such/file\"\n");
  const Variable file("ESPALIER_FILE", "no/other/file");
  const Outcome outcome = RunWith({"generate", "--config", path_.c_str(), kNobody});
  EXPECT_EQ(outcome.code, 1);
  EXPECT_THAT(outcome.err, HasSubstr("no/other/file"));
}

TEST_F(ConfigFile, UnknownNameIsTold) {
  Write("[generate]\nwarmth = 3\n");
  const Outcome outcome = Generate();
  EXPECT_EQ(outcome.code, 2);
  EXPECT_THAT(outcome.err, HasSubstr("warmth"));
}

TEST_F(ConfigFile, MissingFileIsTold) {
  const Outcome outcome = RunWith({"--config", "no/such/config", "health", kNobody});
  EXPECT_EQ(outcome.code, 2);
  EXPECT_THAT(outcome.err, HasSubstr("no/such/config"));
}

TEST(IsLocal, AnAddressOnTheCommandLineWinsOverAModelOfTheEnvironment) {
  const Variable model("ESPALIER_MODEL", "no/such/model.gguf");
  EXPECT_THAT(RunWith({"tokenize", "x", kNobody}).err, HasSubstr("UNAVAILABLE"));
  EXPECT_THAT(RunWith({"tokenize", "x"}).err, HasSubstr("no/such/model.gguf"));
}

}  // namespace
}  // namespace espalier
