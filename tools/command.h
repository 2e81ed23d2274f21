// The frame every subcommand hangs in: how options are read, help is laid out and errors exit.
#pragma once

#include <functional>

#include "absl/status/status.h"

namespace CLI {
class App;
class Option;
}  // namespace CLI

namespace espalier {

// What a subcommand does once all options are read.
using Action = std::function<absl::Status()>;

// Each adds one subcommand to `root` and, when that subcommand is chosen, sets *action.
void AddChat(CLI::App& root, Action* action);
void AddGenerate(CLI::App& root, Action* action);
void AddScore(CLI::App& root, Action* action);
void AddTokenize(CLI::App& root, Action* action);
void AddLoad(CLI::App& root, Action* action);
void AddHealth(CLI::App& root, Action* action);
void AddBudget(CLI::App& root, Action* action);
void AddDecisions(CLI::App& root, Action* action);
void AddReload(CLI::App& root, Action* action);
void AddBench(CLI::App& root, Action* action);
void AddCalibrate(CLI::App& root, Action* action);
void AddPrune(CLI::App& root, Action* action);
void AddSimulate(CLI::App& root, Action* action);
void AddTrain(CLI::App& root, Action* action);
void AddEval(CLI::App& root, Action* action);
void AddReplay(CLI::App& root, Action* action);

// Whether a subcommand that has both --model and --address works on the model: it does if a model
// is given, but an --address on the command line wins over a model that the environment names.
bool IsLocal(const CLI::Option* model, const CLI::Option* address);

// The whole command. Exit codes: 0; 1 if it failed at run time; 2 for an unknown option or a bad
// value; 130 after Ctrl-C. Either failure is one line on stderr.
//
// An option is taken from the command line, else from ESPALIER_<OPTION>, else from the section of
// the subcommand in the file given by --config, else it is its default.
int RunCommand(int argc, const char* const* argv);

}  // namespace espalier
