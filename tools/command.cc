#include "tools/command.h"

#include <fmt/format.h>

#include <algorithm>
#include <cctype>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <new>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <CLI/CLI.hpp>

#include "tools/interrupt.h"

namespace espalier {
namespace {

constexpr size_t kHelpWidth = 100;
constexpr size_t kHelpColumn = 30;

// "FLOAT in [0 - 100]" and "{int8,f32}" as CLI11 tells them: "0 to 100", "int8, f32".
std::string Range(std::string text) {
  const size_t bracket = text.find_first_of("[{");
  if (bracket == std::string::npos) return "";
  text = text.substr(bracket + 1, text.find_last_of("]}") - bracket - 1);
  const auto replace = [&text](std::string_view from, std::string_view to) {
    for (size_t at = 0; (at = text.find(from, at)) != std::string::npos; at += to.size()) {
      text.replace(at, from.size(), to);
    }
  };
  replace(" - ", " to ");
  replace(",", ", ");
  return text;
}

// One option: its name and unit, then what it means with range and default, wrapped.
class HelpFormatter : public CLI::Formatter {
 public:
  std::string make_option(const CLI::Option* option, bool positional) const override {
    std::string left = "  " + option->get_name(positional, !positional);
    std::string right = option->get_description();
    if (option->get_type_size() != 0) {
      const std::string type = option->get_type_name();
      const size_t colon = type.find(':');
      if (!positional) left += " " + type.substr(0, colon);
      std::string bounds = colon == std::string::npos ? "" : Range(type.substr(colon + 1));
      if (!option->get_default_str().empty()) {
        bounds += (bounds.empty() ? "" : "; ") + ("default " + option->get_default_str());
      }
      if (!bounds.empty()) right += " [" + bounds + "]";
    }
    return Columns(left, right);
  }

  std::string make_help(const CLI::App* app, std::string name,
                        CLI::AppFormatMode mode) const override {
    return CLI::detail::find_and_replace(Formatter::make_help(app, std::move(name), mode), "\n\n\n",
                                         "\n\n");
  }

  std::string make_subcommand(const CLI::App* sub) const override {
    return Columns("  " + sub->get_name(), sub->get_description());
  }

 private:
  static std::string Columns(std::string line, std::string_view right) {
    std::string text;
    if (line.size() + 2 > kHelpColumn) {
      text = line + "\n";
      line.clear();
    }
    line.resize(kHelpColumn, ' ');
    while (!right.empty()) {
      const size_t end = std::min(right.find(' '), right.size());
      if (line.size() + end > kHelpWidth) {
        line.erase(line.find_last_not_of(' ') + 1);
        text += line + "\n";
        line.assign(kHelpColumn, ' ');
      }
      line.append(right.substr(0, end)).append(" ");
      right.remove_prefix(std::min(end + 1, right.size()));
    }
    line.erase(line.find_last_not_of(' ') + 1);
    return text + line + "\n";
  }
};

// ESPALIER_TOP_K for --top-k, for every option that has a long name.
void NameEnvironment(CLI::App* sub) {
  for (CLI::Option* option : sub->get_options()) {
    if (option->get_lnames().empty() || option == sub->get_help_ptr()) continue;
    std::string name = "ESPALIER_" + option->get_lnames().front();
    for (char& c : name) c = c == '-' ? '_' : static_cast<char>(std::toupper(c));
    option->envname(name);
  }
  // A subcommand with this callback reads its environment before the file is read, so that the
  // environment wins over the file.
  sub->parse_complete_callback([] {});
}

std::string OneLine(std::string text) {
  std::replace(text.begin(), text.end(), '\n', ' ');
  return text;
}

// CLI11 reads a flag's value behind "=" alone. `--json true` becomes `--json=true`; a word that is
// no truth value stays what it was.
std::vector<std::string> JoinFlagValues(const CLI::App& root, int argc, const char* const* argv) {
  std::vector<std::string> words;
  const CLI::App* sub = nullptr;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    if (word == "--") {
      words.insert(words.end(), argv + i, argv + argc);
      break;
    }
    const auto named = [&word](const CLI::App* each) { return each->get_name() == word; };
    if (const auto found = root.get_subcommands(named); sub == nullptr && !found.empty()) {
      sub = found.front();
    }
    const CLI::Option* before =
        sub == nullptr || words.empty() ? nullptr : sub->get_option_no_throw(words.back());
    if (before != nullptr && before->get_items_expected_max() == 0 &&
        (word == "true" || word == "false")) {
      words.back() += "=" + word;
    } else {
      words.push_back(word);
    }
  }
  return words;
}

bool FromEnvironment(const CLI::Option* option) {
  const char* value = std::getenv(option->get_envname().c_str());
  return value != nullptr && option->count() > 0 && option->results().front() == value;
}

}  // namespace

bool IsLocal(const CLI::Option* model, const CLI::Option* address) {
  if (model->count() == 0) return false;
  return !(FromEnvironment(model) && address->count() > 0 && !FromEnvironment(address));
}

int RunCommand(int argc, const char* const* argv) {
  CLI::App root("Talks to an Espalier server and measures the engine on this machine.", "espalier");
  root.formatter(std::make_shared<HelpFormatter>());
  root.set_version_flag("--version", ESPALIER_VERSION, "Print the version and exit");
  root.set_config("--config", "", "Options from a file: a section per subcommand, [chat]")
      ->type_name("FILE")
      ->envname("ESPALIER_CLI_CONFIG");  // ESPALIER_CONFIG is the server's, without sections
  root.allow_config_extras(CLI::config_extras_mode::error);
  root.fallthrough();
  root.footer(
      "`espalier SUBCOMMAND --help` lists a subcommand's options. Each option may also be set in\n"
      "the environment (ESPALIER_TOP_K for --top-k) or in the file given by --config or\n"
      "ESPALIER_CLI_CONFIG; the command line wins over the environment, and the environment over "
      "the\n"
      "file.\n"
      "Exit codes: 0; 1 failed; 2 unknown option or bad value; 129, 130 or 143 interrupted.");

  Action action;
  AddChat(root, &action);
  AddGenerate(root, &action);
  AddScore(root, &action);
  AddTokenize(root, &action);
  AddLoad(root, &action);
  AddHealth(root, &action);
  AddBudget(root, &action);
  AddDecisions(root, &action);
  AddReload(root, &action);
  AddBench(root, &action);
  AddCalibrate(root, &action);
  AddPrune(root, &action);
  AddSimulate(root, &action);
  AddTrain(root, &action);
  AddEval(root, &action);
  AddReplay(root, &action);
  for (CLI::App* sub : root.get_subcommands({})) NameEnvironment(sub);

  try {
    std::vector<std::string> words = JoinFlagValues(root, argc, argv);
    std::reverse(words.begin(), words.end());  // as CLI11 wants them
    root.parse(std::move(words));
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) return root.exit(error);  // --help, --version
    fmt::print(stderr, "espalier: {}\n", OneLine(error.what()));
    return 2;
  }

  if (!action) {
    fmt::print(stderr, "espalier: a subcommand is required; --help lists them\n");
    return 2;
  }

  absl::Status status;
  try {
    status = action();
  } catch (const std::bad_alloc&) {  // what guards hold is cleaned up
    status = absl::ResourceExhaustedError("out of memory");
  }
  if (const int signal = Interrupt::raised(); signal != 0) return 128 + signal;
  if (status.ok()) return 0;
  const std::string message(status.message());
  fmt::print(stderr, "espalier: {}\n", OneLine(message));
  return 1;
}

}  // namespace espalier
