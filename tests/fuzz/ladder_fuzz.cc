// Fuzzes a ladder's text: refused in a short line, or written back as it was read.
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "policy/ladder_file.h"
#include "tests/fuzz/fuzz_check.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace espalier;  // NOLINT: the entry point cannot lie in it
  Ladder ladder = Ladder::DenseOnly({.layers = 1, .heads = 1, .channels = 1});
  std::string error;
  if (!ParseLadder({reinterpret_cast<const char*>(data), size}, &ladder, &error)) {
    RequireOneLine(absl::InvalidArgumentError(error));
    return 0;
  }
  for (int i = 1; i < ladder.size(); ++i) {
    Require(ladder.rung(i).prefill.NestedIn(ladder.rung(i - 1).prefill), "rungs are nested");
    Require(ladder.rung(i).decode.NestedIn(ladder.rung(i - 1).decode), "rungs are nested");
  }
  const std::string text = FormatLadder(ladder, "fuzzed");
  Ladder again = Ladder::DenseOnly({.layers = 1, .heads = 1, .channels = 1});
  Require(ParseLadder(text, &again, &error), "what is written is read: " + error);
  Require(FormatLadder(again, "fuzzed") == text, "what is read is what was written");
  return 0;
}
