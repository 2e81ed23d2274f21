#include "tools/progress.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace espalier {
namespace {

using testing::HasSubstr;
using testing::Not;

TEST(RenderProgress, ShowsShareCountAndTimeLeft) {
  EXPECT_EQ(RenderProgress("scoring", 8, 32, 10, 60),
            "scoring [######.....................]  25 % 8/32, 30 s left");
}

TEST(RenderProgress, AtTheEndTellsNoTimeLeft) {
  EXPECT_EQ(RenderProgress("scoring", 4, 4, 10, 50),
            "scoring [#############################] 100 % 4/4");
}

TEST(RenderProgress, GuessesNoTimeFromTooLittle) {
  EXPECT_THAT(RenderProgress("x", 1, 100, 60, 80), Not(HasSubstr("left")));
  EXPECT_THAT(RenderProgress("x", 50, 100, 0.1, 80), Not(HasSubstr("left")));
}

TEST(RenderProgress, LongRunsCountMinutes) {
  EXPECT_THAT(RenderProgress("x", 10, 100, 60, 80), HasSubstr("9 min left"));
}

TEST(RenderProgress, NeverWrapsTheLine) {
  for (int width = 40; width < 120; ++width) {
    for (const char* label :
         {"x", "a label that is longer than most terminals are wide, and more"}) {
      EXPECT_LT(RenderProgress(label, 123456, 1000000, 100, width).size(), size_t(width));
    }
  }
}

TEST(RenderProgress, SurvivesNonsense) {
  EXPECT_THAT(RenderProgress("x", 0, 0, 0, 80), HasSubstr("0 % 0/0"));
  EXPECT_THAT(RenderProgress("x", 9, 3, 0, 80), HasSubstr("100 %"));
  EXPECT_THAT(RenderProgress("x", -1, 3, 0, 0), HasSubstr("0 %"));
}

TEST(Progress, IsSilentWhenNotVisible) {
  testing::internal::CaptureStderr();
  {
    Progress bar("loading", false);
    bar.Update(1, 2);
    bar.Update(2, 2);
  }
  EXPECT_EQ(testing::internal::GetCapturedStderr(), "");
}

TEST(Progress, DrawsAndWipesItsLine) {
  testing::internal::CaptureStderr();
  {
    Progress bar("loading", true);
    bar.Update(1, 2);
    bar.Update(1, 2);  // within 50 ms: not drawn again
  }
  const std::string drawn = testing::internal::GetCapturedStderr();
  EXPECT_THAT(drawn, HasSubstr("loading"));
  EXPECT_EQ(drawn.find("loading"), drawn.rfind("loading"));
  EXPECT_TRUE(drawn.ends_with("\r\x1b[K"));
}

}  // namespace
}  // namespace espalier
