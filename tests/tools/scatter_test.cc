#include "tools/scatter.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace espalier {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

TEST(Scatter, DrawsEachPointWhereItsAxesSay) {
  const ScatterPoint points[] = {{.x = 1, .y = 0, .label = "dense"},
                                 {.x = 0.5, .y = 0.3, .error = 0.1, .told = 0.25, .label = "<1>"}};
  const std::string svg = ScatterSvg(points, "t & t", "time", "loss");
  // Axes end at 1.2 and 0.45; the plot is 550 wide and 325 high.
  EXPECT_THAT(svg, HasSubstr("<circle cx=\"528.3\" cy=\"365.0\" r=\"4\" fill=\"#1f77b4\"/>"));
  EXPECT_THAT(svg, HasSubstr("<circle cx=\"299.2\" cy=\"148.3\" r=\"4\" fill=\"#1f77b4\"/>"));
  EXPECT_THAT(svg, HasSubstr("<circle cx=\"299.2\" cy=\"184.4\" r=\"4\" fill=\"none\""));
  EXPECT_THAT(svg, HasSubstr("t &amp; t"));
  EXPECT_THAT(svg, HasSubstr("&lt;1>"));
  EXPECT_THAT(svg, Not(HasSubstr("<1>")));
}

TEST(Scatter, BearsNothingToDraw) {
  const ScatterPoint nothing[] = {{}};
  for (const auto points :
       {std::span<const ScatterPoint>(nothing), std::span<const ScatterPoint>()}) {
    const std::string svg = ScatterSvg(points, "", "", "");
    EXPECT_THAT(svg, Not(HasSubstr("nan")));
    EXPECT_THAT(svg, Not(HasSubstr("inf")));
  }
}

}  // namespace
}  // namespace espalier
