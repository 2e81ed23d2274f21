#include "engine/sim/cost_model.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <map>
#include <numeric>
#include <utility>

namespace espalier {
namespace {

constexpr std::string_view kMagic = "espalier-costs 1";
constexpr size_t kMostRungsOfCosts = 64;

// Coefficients: fixed, decode, prefill, attended.
constexpr int kTerms = 4;
using Terms = std::array<double, kTerms>;

// The rung that all rows of a step are on; -1: several, or none.
int OnlyRung(const StepContents& shape) {
  int only = -1;
  for (size_t rung = 0; rung < shape.rungs.size(); ++rung) {
    if (shape.rungs[rung].decode + shape.rungs[rung].prefill == 0) continue;
    if (only >= 0) return -1;
    only = static_cast<int>(rung);
  }
  return only;
}

Terms TermsOf(const StepContents& shape, int rung) {
  return {1, static_cast<double>(shape.rungs[rung].decode),
          static_cast<double>(shape.rungs[rung].prefill), shape.attended};
}

// Least squares of sum ((terms . x - seconds) / seconds)^2 with the coefficients listed in `free`,
// the others as they are in *x. A coefficient that comes out negative is set to zero and the rest
// solved again. False if the steps do not tell the coefficients apart.
bool Solve(std::span<const std::pair<Terms, double>> steps, std::vector<int> free, Terms* x) {
  while (!free.empty()) {
    const size_t n = free.size();
    std::vector<std::vector<double>> rows(n, std::vector<double>(n + 1));
    for (const auto& [terms, seconds] : steps) {
      double rest = seconds;
      for (int term = 0; term < kTerms; ++term) {
        if (std::ranges::find(free, term) == free.end()) rest -= terms[term] * (*x)[term];
      }
      for (size_t i = 0; i < n; ++i) {
        for (size_t j = 0; j < n; ++j) {
          rows[i][j] += terms[free[i]] * terms[free[j]] / (seconds * seconds);
        }
        rows[i][n] += terms[free[i]] * rest / (seconds * seconds);
      }
    }
    for (size_t i = 0; i < n; ++i) {
      const double whole = rows[i][i];
      size_t pivot = i;
      for (size_t r = i + 1; r < n; ++r) {
        if (std::abs(rows[r][i]) > std::abs(rows[pivot][i])) pivot = r;
      }
      std::swap(rows[i], rows[pivot]);
      if (!(std::abs(rows[i][i]) > 1e-12 * std::abs(whole))) return false;
      for (size_t r = 0; r < n; ++r) {
        if (r == i) continue;
        const double factor = rows[r][i] / rows[i][i];
        for (size_t c = i; c <= n; ++c) rows[r][c] -= factor * rows[i][c];
      }
    }
    int negative = -1;
    for (size_t i = 0; i < n; ++i) {
      (*x)[free[i]] = rows[i][n] / rows[i][i];
      if ((*x)[free[i]] < 0) negative = free[i];
    }
    if (negative < 0) return true;
    (*x)[negative] = 0;
    std::erase(free, negative);
  }
  return true;
}

bool ReadNumber(std::string_view text, double* value) {
  const char* const end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, *value);
  return error == std::errc() && stop == end && std::isfinite(*value) && *value >= 0;
}

std::string_view Word(std::string_view* line) {
  line->remove_prefix(std::min(line->find_first_not_of(" \t\r"), line->size()));
  const std::string_view word = line->substr(0, line->find_first_of(" \t\r"));
  line->remove_prefix(word.size());
  return word;
}

// Of a line behind the first; empty: it is well.
std::string ReadLine(std::string_view line, CostModel* model, bool* attended) {
  const std::string_view name = Word(&line);
  if (name.empty() || name.starts_with('#')) return "";
  if (name == "attended") {
    if (std::exchange(*attended, true)) return "attended a second time";
    if (!ReadNumber(Word(&line), &model->attended)) return "attended: expected microseconds";
    model->attended *= 1e-6;
    return Word(&line).empty() ? "" : "more than attended";
  }
  if (name != "rung") return "expected attended or rung";
  if (model->rungs.size() == kMostRungsOfCosts) return "more than 64 rungs";
  if (Word(&line) != std::to_string(model->rungs.size())) {
    return "expected rung " + std::to_string(model->rungs.size());
  }
  RungCost cost;
  for (const auto& [key, value] : {std::pair{std::string_view("fixed="), &cost.fixed},
                                   {"decode=", &cost.decode},
                                   {"prefill=", &cost.prefill}}) {
    std::string_view word = Word(&line);
    if (!word.starts_with(key)) return "expected " + std::string(key) + " and microseconds";
    word.remove_prefix(key.size());
    if (!ReadNumber(word, value)) return "expected " + std::string(key) + " and microseconds";
    *value *= 1e-6;
  }
  if (!Word(&line).empty()) return "more than fixed, decode and prefill";
  model->rungs.push_back(cost);
  return "";
}

std::string Micros(double seconds) {
  std::array<char, 32> text;
  const int length = std::snprintf(text.data(), text.size(), "%.6g", 1e6 * seconds);
  return {text.data(), static_cast<size_t>(length)};
}

}  // namespace

void StepContents::Take(const Batch& batch, int ladder_size) {
  rungs.assign(ladder_size, {});
  attended = 0;
  for (const BatchSpan& span : batch.spans) {
    (span.decode ? rungs[span.rung].decode : rungs[span.rung].prefill) += span.rows;
    attended += span.rows * (span.start + 0.5 * (span.rows + 1));
  }
}

double CostModel::Seconds(const StepContents& shape) const {
  double fixed = 0, sum = attended * shape.attended;
  for (size_t rung = 0; rung < shape.rungs.size(); ++rung) {
    const StepContents::Rows& rows = shape.rungs[rung];
    if (rows.decode + rows.prefill == 0) continue;
    fixed = std::max(fixed, rungs[rung].fixed);
    sum += rungs[rung].decode * rows.decode + rungs[rung].prefill * rows.prefill;
  }
  return fixed + sum;
}

bool FitCosts(std::span<const TimedStep> steps, int rungs, CostFit* fit) {
  std::vector<std::vector<std::pair<Terms, double>>> of_rung(rungs);
  for (const TimedStep& step : steps) {
    const int rung = OnlyRung(step.shape);
    if (rung >= 0) of_rung[rung].emplace_back(TermsOf(step.shape, rung), step.seconds);
  }
  CostModel model;
  for (int rung = 0; rung < rungs; ++rung) {
    Terms x = {0, 0, 0, model.attended};
    std::vector<int> free = {0, 1, 2};
    if (rung == 0) free.push_back(3);
    if (!Solve(of_rung[rung], free, &x)) return false;
    model.attended = x[3];
    model.rungs.push_back({.fixed = x[0], .decode = x[1], .prefill = x[2]});
  }
  // Steps of a kind: as many rows of each rung; single ones differ by noise alone.
  std::map<std::vector<int>, std::pair<double, double>> kinds;  // predicted, measured
  std::vector<double> errors;
  double mean = 0, squares = 0, missed = 0;
  for (const TimedStep& step : steps) mean += step.seconds / static_cast<double>(steps.size());
  for (const TimedStep& step : steps) {
    const double predicted = model.Seconds(step.shape);
    std::vector<int> kind;
    for (const StepContents::Rows& rows : step.shape.rungs) {
      kind.push_back(rows.decode);
      kind.push_back(rows.prefill);
    }
    kinds[kind].first += predicted;
    kinds[kind].second += step.seconds;
    errors.push_back(std::abs(predicted / step.seconds - 1));
    squares += (step.seconds - mean) * (step.seconds - mean);
    missed += (step.seconds - predicted) * (step.seconds - predicted);
  }
  std::ranges::nth_element(errors, errors.begin() + errors.size() / 2);
  double worst = 0;
  for (const auto& [kind, sums] : kinds) {
    worst = std::max(worst, std::abs(sums.first / sums.second - 1));
  }
  *fit = {.model = std::move(model),
          .r_squared = squares > 0 ? 1 - missed / squares : 0,
          .worst_error = worst,
          .median_error = errors[errors.size() / 2]};
  return true;
}

std::string FormatCosts(const CostModel& model, std::string_view comment) {
  std::string text(kMagic);
  text.append("\n");
  while (!comment.empty()) {
    const std::string_view line = comment.substr(0, comment.find('\n'));
    comment.remove_prefix(std::min(line.size() + 1, comment.size()));
    text.append("# ").append(line).append("\n");
  }
  text.append("attended ").append(Micros(model.attended)).append("\n");
  for (size_t rung = 0; rung < model.rungs.size(); ++rung) {
    const RungCost& cost = model.rungs[rung];
    text.append("rung ").append(std::to_string(rung));
    text.append(" fixed=").append(Micros(cost.fixed));
    text.append(" decode=").append(Micros(cost.decode));
    text.append(" prefill=").append(Micros(cost.prefill)).append("\n");
  }
  return text;
}

bool ParseCosts(std::string_view text, CostModel* model, std::string* error) {
  CostModel read;
  bool attended = false;
  for (int number = 1; number == 1 || !text.empty(); ++number) {
    std::string_view line = text.substr(0, text.find('\n'));
    text.remove_prefix(std::min(line.size() + 1, text.size()));
    if (line.ends_with('\r')) line.remove_suffix(1);
    std::string wrong;
    if (number > 1) {
      wrong = ReadLine(line, &read, &attended);
    } else if (line != kMagic) {
      wrong = "expected 'espalier-costs 1'";
    }
    if (wrong.empty()) continue;
    *error = "line " + std::to_string(number) + ": " + wrong;
    return false;
  }
  if (read.rungs.empty()) {
    *error = "it has no rung";
    return false;
  }
  *model = std::move(read);
  return true;
}

}  // namespace espalier
