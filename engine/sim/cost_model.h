// How long a step takes, without running it: fitted to real steps by `espalier bench --fit`.
//
//   seconds(step) = max over rungs r with rows of fixed[r]
//                   + sum over rows (decode[r] or prefill[r]) + attended * (row, past token) pairs
//
// `fixed` is mostly reading weights, which rows of all rungs share: the widest pays. What rows of
// different rungs cost one another beyond that is not in it; the fit tells how far it is off.
#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "engine/scheduling/batch.h"

namespace espalier {

// Seconds.
struct RungCost {
  double fixed = 0;    // of a step with any row
  double decode = 0;   // of a decode row
  double prefill = 0;  // of a prefill row

  bool operator==(const RungCost&) const = default;
};

// What a step is made of, as far as its time depends on it.
struct StepContents {
  struct Rows {
    int decode = 0;
    int prefill = 0;
  };
  std::vector<Rows> rungs;  // [rungs]
  // For each row, tokens up to itself.
  double attended = 0;

  void Take(const Batch& batch, int ladder_size);
};

struct CostModel {
  std::vector<RungCost> rungs;
  double attended = 0;

  double Seconds(const StepContents& shape) const;
  bool operator==(const CostModel&) const = default;
};

struct TimedStep {
  StepContents shape;
  double seconds = 0;
};

struct CostFit {
  CostModel model;
  double r_squared = 0;     // over all steps
  double worst_error = 0;   // |predicted / measured - 1|, of the means of steps of like shape
  double median_error = 0;  // of single steps
};

// Least squares of relative errors, rung by rung over the steps that are of one rung alone; what
// attention costs is rung 0's. Steps of several rungs are only judged by. Each of `rungs` rungs
// needs steps of at least three kinds; false if one has not.
bool FitCosts(std::span<const TimedStep> steps, int rungs, CostFit* fit);

// As text, a line a rung, microseconds:
//   espalier-costs 1
//   # comment
//   attended 0.0123
//   rung 0 fixed=5000 decode=1100 prefill=430
std::string FormatCosts(const CostModel& model, std::string_view comment);
// False, with the line and what is wrong with it in *error.
bool ParseCosts(std::string_view text, CostModel* model, std::string* error);

}  // namespace espalier
