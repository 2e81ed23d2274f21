// Checks of option values that CLI11's own would let through. What --help says is what is checked.
#pragma once

#include <string>

#include <CLI/CLI.hpp>

namespace espalier {

// A number in [low, high]; NaN is in no range. `shown`: what --help says, if not "FLOAT in [low -
// high]".
CLI::Validator Within(double low, double high, std::string shown = "");
// A number in (0, high] that is not 0 as a float either.
CLI::Validator AboveZero(double high);
// A whole number of 64 bits without a sign: CLI11 wraps a negative one and cuts a large one.
CLI::Validator Unsigned64();
// Text of 1 to `most` bytes.
CLI::Validator Bytes(size_t most);

}  // namespace espalier
