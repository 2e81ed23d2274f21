// NVML by functions of ours, and this machine's if it has one.
#include "kernels/nvml.h"

#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace espalier {
namespace {

using ::testing::HasSubstr;

struct Library {
  int init = 0, handle = 0, memory = 0;  // what calls answer
  unsigned long long total = 1000, free = 400;
  int started = 0, ended = 0;
} library;

const NvmlFunctions kFunctions{
    .init = [] { return ++library.started, library.init; },
    .shutdown = [] { return ++library.ended, 0; },
    .handle_by_index =
        [](unsigned index, void** device) {
          *device = &library;
          return index == 0 ? library.handle : 2;
        },
    .memory =
        [](void* device, NvmlFunctions::Memory* memory) {
          const auto* const of = static_cast<Library*>(device);
          *memory = {.total = of->total, .free = of->free, .used = of->total - of->free};
          return of->memory;
        }};

class NvmlTest : public ::testing::Test {
 protected:
  void SetUp() override { library = {}; }
};

TEST_F(NvmlTest, TellsWhatTheDeviceHas) {
  {
    const auto nvml = Nvml::Open(kFunctions);
    ASSERT_TRUE(nvml.ok()) << nvml.status();
    const auto memory = (*nvml)->Read();
    ASSERT_TRUE(memory.has_value());
    EXPECT_EQ(memory->total, 1000u);
    EXPECT_EQ(memory->free, 400u);
    library.free = 100;
    EXPECT_EQ((*nvml)->Read()->free, 100u);
    library.free = 1001;
    EXPECT_EQ((*nvml)->Read(), std::nullopt) << "nonsense";
    library.free = 100, library.memory = 15;  // the device is lost
    EXPECT_EQ((*nvml)->Read(), std::nullopt);
    library.memory = 0;
    EXPECT_TRUE((*nvml)->Read().has_value()) << "and is back";
  }
  EXPECT_EQ(library.started, 1);
  EXPECT_EQ(library.ended, 1);
}

TEST_F(NvmlTest, IsAbsentWithoutADevice) {
  library.handle = 6;
  const auto none = Nvml::Open(kFunctions);
  EXPECT_EQ(none.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(none.status().message()), HasSubstr("finds no device: error 6"));
  EXPECT_EQ(library.ended, 1);
  library.init = 9;
  EXPECT_THAT(std::string(Nvml::Open(kFunctions).status().message()),
              HasSubstr("does not start: error 9"));
  EXPECT_EQ(library.ended, 1) << "what did not start is not ended";
}

TEST_F(NvmlTest, IsAbsentWithoutALibraryOrWithAnother) {
  const absl::Status none = Nvml::Open("libof-no-such-name.so.7").status();
  EXPECT_EQ(none.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(none.message()), HasSubstr("libof-no-such-name.so.7"));
  const absl::Status other = Nvml::Open("libm.so.6").status();
  EXPECT_EQ(other.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(other.message()), HasSubstr("libm.so.6 has no nvml"));
}

TEST(Nvml, OfThisMachineIsThereOrSaysWhyNot) {
  const auto nvml = Nvml::Open();
  if (!nvml.ok()) GTEST_SKIP() << nvml.status();
  const auto memory = (*nvml)->Read();
  ASSERT_TRUE(memory.has_value());
  EXPECT_GT(memory->total, 0u);
  EXPECT_LE(memory->free, memory->total);
}

}  // namespace
}  // namespace espalier
