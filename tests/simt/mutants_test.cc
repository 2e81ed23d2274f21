// That the checker finds the mistakes it is there for, whatever the order of threads, and results
// show those it is not there for.
#include "tests/simt/mutants.h"

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/simt/sparse24_on_simt.h"

namespace espalier::simt {
namespace {

using testing::IsEmpty;

constexpr uint32_t kSeeds = 4;

// Two blocks an output, the second not full; a last word of one group.
constexpr int kOutputs = 3, kGroups = 301, kDepth = kGroups * kSparseGroup;

struct Outcome {
  std::vector<Fault> faults;
  std::vector<uint16_t> kept, places, values;
  unsigned long long pack_refused, unpack_refused;

  bool SameResults(const Outcome& other) const {
    return kept == other.kept && places == other.places && values == other.values &&
           pack_refused == other.pack_refused && unpack_refused == other.unpack_refused;
  }
};

// Packs, unpacks, and then has some groups refused in both.
Outcome OutcomeOf(decltype(&cuda::PackSparse24) pack, decltype(&cuda::UnpackSparse24) unpack,
                  uint32_t seed) {
  std::vector<uint16_t> values = RandomSparse24(kOutputs, kDepth, 5);
  // What is hardly drawn: a group of zeros, and zeros with a sign.
  const std::vector<uint16_t> rare = {0, 0, 0, 0, 0x8000, 1, 0x8000, 2};
  std::ranges::copy(rare, values.begin() + 10 * kSparseGroup);
  const PackedOnSimt packed = PackOnSimt(pack, values, kOutputs, kDepth, seed);
  Sparse24 sparse = CompressSparse24(values, kOutputs, kDepth).value();
  const UnpackedOnSimt unpacked = UnpackOnSimt(unpack, sparse, seed);
  // Of different warps and blocks.
  for (const int group : {100, 201, 299, kGroups + 77, 2 * kGroups + 290}) {
    std::fill_n(values.begin() + group * kSparseGroup, kSparseGroup, 1);
    sparse.places[group / kGroups * ((kGroups + 3) / 4) + group % kGroups / 4] = 0;
  }
  const PackedOnSimt pack_refused = PackOnSimt(pack, values, kOutputs, kDepth, seed);
  const UnpackedOnSimt unpack_refused = UnpackOnSimt(unpack, sparse, seed);
  Outcome outcome = {.faults = packed.faults,
                     .kept = packed.sparse.kept,
                     .places = packed.sparse.places,
                     .values = unpacked.values,
                     .pack_refused = pack_refused.refused,
                     .unpack_refused = unpack_refused.refused};
  for (const auto* more : {&unpacked.faults, &pack_refused.faults, &unpack_refused.faults}) {
    outcome.faults.insert(outcome.faults.end(), more->begin(), more->end());
  }
  return outcome;
}

TEST(Mutants, WithoutAMistakeNothingIsFound) {
  for (uint32_t seed = 0; seed < kSeeds; ++seed) {
    const Outcome outcome = OutcomeOf(&cuda::PackSparse24, &cuda::UnpackSparse24, seed);
    EXPECT_THAT(outcome.faults, IsEmpty()) << outcome.faults[0].text;
    EXPECT_EQ(outcome.pack_refused, 100);
    EXPECT_EQ(outcome.unpack_refused, 100);
  }
}

class MutantTest : public testing::TestWithParam<Mutant> {};

TEST_P(MutantTest, IsFoundInEveryOrder) {
  const Outcome right = OutcomeOf(&cuda::PackSparse24, &cuda::UnpackSparse24, 0);
  for (uint32_t seed = 0; seed < kSeeds; ++seed) {
    const Outcome outcome = OutcomeOf(GetParam().pack, GetParam().unpack, seed);
    if (GetParam().found_by.empty()) {
      EXPECT_FALSE(outcome.SameResults(right)) << "seed " << seed;
      EXPECT_THAT(outcome.faults, IsEmpty()) << outcome.faults[0].text;
      continue;
    }
    const auto expected = [](const Fault& fault) {
      return std::ranges::find(GetParam().found_by, fault.kind) != GetParam().found_by.end();
    };
    std::string texts;
    for (const Fault& fault : outcome.faults) texts += "\n" + fault.text;
    EXPECT_TRUE(std::ranges::any_of(outcome.faults, expected)) << "seed " << seed << texts;
  }
}

INSTANTIATE_TEST_SUITE_P(All, MutantTest, testing::ValuesIn(kMutants),
                         [](const auto& info) { return std::string(info.param.name); });

// Why there is a checker: results are right, in the order most would run threads in and in some
// others.
TEST(Mutants, ResultsAloneMissSome) {
  const Outcome right = OutcomeOf(&cuda::PackSparse24, &cuda::UnpackSparse24, 0);
  const auto checked = [](const Mutant& mutant) { return !mutant.found_by.empty(); };
  const auto missed = [&](uint32_t seeds) {
    return std::ranges::count_if(kMutants, [&](const Mutant& mutant) {
      if (!checked(mutant)) return false;
      for (uint32_t seed = 0; seed < seeds; ++seed) {
        if (!OutcomeOf(mutant.pack, mutant.unpack, seed).SameResults(right)) return false;
      }
      return true;
    });
  };
  const auto in_order = missed(1), in_any = missed(kSeeds);
  printf("results alone miss %td of %td in the threads' own order, %td in %u orders\n", in_order,
         std::ranges::count_if(kMutants, checked), in_any, kSeeds);
  EXPECT_GT(in_any, 0);
}

}  // namespace
}  // namespace espalier::simt
