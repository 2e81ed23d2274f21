#include "kernels/sparse24.h"

#include <algorithm>
#include <array>
#include <cstddef>

#include "absl/status/status.h"
#include "fmt/format.h"

namespace espalier {
namespace {

constexpr int kGroupsOfWord = 4;

// Of bf16 and fp16 alike.
bool IsZero(uint16_t value) { return (value & 0x7fff) == 0; }

int WordsOf(int depth) { return (depth / kSparseGroup + kGroupsOfWord - 1) / kGroupsOfWord; }

}  // namespace

bool IsSparse24(std::span<const float> values) {
  for (size_t begin = 0; begin < values.size(); begin += kSparseGroup) {
    const size_t end = std::min(values.size(), begin + kSparseGroup);
    int kept = 0;
    for (size_t i = begin; i < end; ++i) kept += values[i] != 0 ? 1 : 0;
    if (kept > kSparseKept) return false;
  }
  return true;
}

absl::StatusOr<Sparse24> CompressSparse24(std::span<const uint16_t> values, int outputs,
                                          int depth) {
  if (outputs < 0 || depth < 0 || depth % kSparseGroup != 0 ||
      values.size() != static_cast<size_t>(outputs) * depth) {
    return absl::InvalidArgumentError(fmt::format(
        "2:4: expected outputs of whole groups of {}, got {} values as {} outputs of {}",
        kSparseGroup, values.size(), outputs, depth));
  }
  const int words = WordsOf(depth);
  Sparse24 sparse{.outputs = outputs, .depth = depth};
  sparse.kept.reserve(values.size() / kSparseGroup * kSparseKept);
  sparse.places.resize(static_cast<size_t>(outputs) * words);
  for (int output = 0; output < outputs; ++output) {
    for (int group = 0; group < depth / kSparseGroup; ++group) {
      const int first = group * kSparseGroup;
      const std::span of =
          values.subspan(static_cast<size_t>(output) * depth + first, kSparseGroup);
      std::array<int, kSparseGroup> places;
      int kept = 0;
      for (int i = 0; i < kSparseGroup; ++i) {
        if (!IsZero(of[i])) places[kept++] = i;
      }
      if (kept > kSparseKept) {
        return absl::InvalidArgumentError(fmt::format(
            "2:4: output {}, values {} to {}: expected at most {} that are not zero, got {}",
            output, first, first + kSparseGroup - 1, kSparseKept, kept));
      }
      if (kept == 0) places = {0, 1};
      if (kept == 1 && places[0] == kSparseGroup - 1)
        places = {kSparseGroup - 2, kSparseGroup - 1};
      else if (kept == 1)
        places[1] = kSparseGroup - 1;
      sparse.kept.push_back(of[places[0]]);
      sparse.kept.push_back(of[places[1]]);
      sparse.places[static_cast<size_t>(output) * words + group / kGroupsOfWord] |=
          static_cast<uint16_t>((places[0] | places[1] << 2) << group % kGroupsOfWord * 4);
    }
  }
  return sparse;
}

absl::StatusOr<std::vector<uint16_t>> ExpandSparse24(const Sparse24& sparse) {
  const int words = WordsOf(sparse.depth), groups = sparse.depth / kSparseGroup;
  if (sparse.kept.size() != static_cast<size_t>(sparse.outputs) * groups * kSparseKept ||
      sparse.places.size() != static_cast<size_t>(sparse.outputs) * words) {
    return absl::InvalidArgumentError(
        fmt::format("2:4: {} values and {} words of places are not {} outputs of {}",
                    sparse.kept.size(), sparse.places.size(), sparse.outputs, sparse.depth));
  }
  std::vector<uint16_t> values(static_cast<size_t>(sparse.outputs) * sparse.depth);
  size_t next = 0;
  for (int output = 0; output < sparse.outputs; ++output) {
    for (int group = 0; group < groups; ++group) {
      const uint16_t word =
          sparse.places[static_cast<size_t>(output) * words + group / kGroupsOfWord];
      const int places = word >> group % kGroupsOfWord * 4 & 15;
      const int low = places & 3, high = places >> 2;
      if (low >= high) {
        return absl::InvalidArgumentError(
            fmt::format("2:4: output {}, group {}: expected places that ascend, got {} and {}",
                        output, group, low, high));
      }
      uint16_t* const of = values.data() + static_cast<size_t>(output) * sparse.depth +
                           static_cast<size_t>(group) * kSparseGroup;
      of[low] = sparse.kept[next++];
      of[high] = sparse.kept[next++];
    }
  }
  return values;
}

}  // namespace espalier
