#include "policy/ladder_file.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace espalier {
namespace {

using ::testing::HasSubstr;

constexpr std::string_view kText =
    "espalier-ladder 1\n"
    "# made by hand\n"
    "\n"
    "model layers=4 heads=3 channels=128\n"
    "rung 0 loss=0 prefill_us=480.5 decode_us=3300 kv_bytes=11520\n"
    "rung 1 loss=0.05 prefill_us=430 decode_us=2900 kv_bytes=11520 channels=128*1,96*3\n"
    "rung 2 loss=0.3 prefill_us=400 decode_us=2300 kv_bytes=8640 heads=3,0*1,3*2 "
    "prefill.channels=128,96*3 decode.channels=96,64*3\n"
    "rung 3 loss=0.4 kv_bytes=4320 kv=int4 heads=3,0*1,3*2 channels=96,64*3\n";

Ladder Parsed(std::string_view text) {
  Ladder ladder = Ladder::DenseOnly({.layers = 1, .heads = 1, .channels = 1});
  std::string error;
  EXPECT_TRUE(ParseLadder(text, &ladder, &error)) << error;
  return ladder;
}

TEST(LadderFile, IsReadAsItSays) {
  const Ladder ladder = Parsed(kText);
  ASSERT_EQ(ladder.size(), 4);
  EXPECT_FALSE(ladder.rung(2).int4_kv);
  EXPECT_TRUE(ladder.rung(3).int4_kv);
  EXPECT_EQ(ladder.rung(0).price.prefill_us_per_token, 480.5);
  EXPECT_TRUE(ladder.rung(0).prefill.dense());
  EXPECT_EQ(ladder.rung(1).price.quality_loss_nats, 0.05);
  EXPECT_EQ(ladder.rung(1).decode, ladder.rung(1).prefill);
  EXPECT_EQ(ladder.rung(1).prefill.kept(0, SiteKind::kChannels), 128);
  EXPECT_EQ(ladder.rung(1).prefill.kept(3, SiteKind::kChannels), 96);
  const Rung& last = ladder.rung(2);
  EXPECT_EQ(last.price.kv_bytes_per_token, 8640);
  EXPECT_EQ(last.price.decode_us_per_row, 2300);
  EXPECT_FALSE(last.HoldsKv(1));
  EXPECT_TRUE(last.HoldsKv(2));
  EXPECT_EQ(last.prefill.kept(0, SiteKind::kChannels), 128);
  EXPECT_EQ(last.decode.kept(0, SiteKind::kChannels), 96);
  EXPECT_EQ(last.decode.kept(3, SiteKind::kChannels), 64);
}

TEST(LadderFile, IsWrittenAsItIsRead) {
  const Ladder ladder = Parsed(kText);
  const std::string text = FormatLadder(ladder, "one\ntwo");
  EXPECT_THAT(text, HasSubstr("espalier-ladder 1\n# one\n# two\nmodel layers=4"));
  const Ladder again = Parsed(text);
  ASSERT_EQ(again.size(), ladder.size());
  for (int i = 0; i < ladder.size(); ++i) {
    EXPECT_EQ(again.rung(i).prefill, ladder.rung(i).prefill);
    EXPECT_EQ(again.rung(i).decode, ladder.rung(i).decode);
    EXPECT_EQ(again.rung(i).int4_kv, ladder.rung(i).int4_kv);
    EXPECT_EQ(again.rung(i).price.quality_loss_nats, ladder.rung(i).price.quality_loss_nats);
  }
  EXPECT_EQ(FormatLadder(again, "one\ntwo"), text);
}

TEST(LadderFile, SaysWhichLineIsWrong) {
  const std::string model = "espalier-ladder 1\nmodel layers=4 heads=3 channels=128\n";
  const std::string dense = model + "rung 0\n";
  const struct {
    std::string text, error;
  } cases[] = {
      {"", "line 1: expected \"espalier-ladder 1\", got \"\""},
      {"espalier-ladder 2\n", "line 1: expected"},
      {"espalier-ladder 1\n", "the file has no model line"},
      {model, "the file has no rung"},
      {model + model, "line 3: expected model, rung or #, got \"espalier-ladder\""},
      {model + "model layers=1 heads=1 channels=1\n", "line 3: a second model line"},
      {"espalier-ladder 1\nmodel layers=4 heads=3\n", "line 2: a model has"},
      {"espalier-ladder 1\nmodel layers=0 heads=3 channels=1\n",
       "layers: expected a number from 1"},
      {"espalier-ladder 1\nmodel layers=99999999999 heads=3 channels=1\n", "to 1024, got"},
      {"espalier-ladder 1\nmodel depth=1\n",
       "expected layers=, heads= or channels=, got \"depth\""},
      {"espalier-ladder 1\nrung 0\n", "line 2: a rung before the model line"},
      {model + "rung 1\n", "line 3: expected rung 0, got 1"},
      {model + "rung\n", "rung: expected a number"},
      {model + "rung 0 loss=0.1\n", "rung 0 keeps everything and loses nothing"},
      {model + "rung 0 heads=3*3,2\n", "rung 0 keeps everything and loses nothing"},
      {model + "rung 0 kv=int4\n", "rung 0 keeps everything and loses nothing"},
      {dense + "rung 1 kv=int3\n", "line 4: kv: expected int4, got \"int3\""},
      {dense + "rung 1 kv=int4\nrung 2 heads=2*4\n", "rung 2 keeps more of a site, or of K and V"},
      {dense + "rung 1 loss=nan\n", "line 4: loss: expected a finite number of at least 0"},
      {dense + "rung 1 loss=-1\n", "loss: expected a finite number"},
      {dense + "rung 1 loss=1e999\n", "loss: expected a finite number"},
      {dense + "rung 1 colour=3\n", "unknown key \"colour\""},
      {dense + "rung 1 prefill.loss=3\n", "unknown key \"prefill.loss\""},
      {dense + "rung 1 heads=4*4\n", "heads: expected a number from 0 to 3, got \"4\""},
      {dense + "rung 1 heads=-1*4\n", "heads: expected a number from 0 to 3, got \"-1\""},
      {dense + "rung 1 heads=2*3\n", "heads: 3 of 4 layers"},
      {dense + "rung 1 heads=\n", "heads: 0 of 4 layers"},
      {dense + "rung 1 heads=2*5\n", "heads: more than 4 layers"},
      {dense + "rung 1 heads=2*0,2*4\n", "heads: expected a number from 1"},
      {dense + "rung 1 heads=2*2,,2\n", "heads: expected a number"},
      {dense + "rung 1 heads=2*4\nrung 2 heads=3*4\n", "line 5: rung 2 keeps more of a site"},
      {dense + "rung 1 " + std::string(1 << 16, 'x') + "\n", "x...\""},
  };
  for (const auto& [text, want] : cases) {
    Ladder ladder = Ladder::DenseOnly({.layers = 1, .heads = 1, .channels = 1});
    std::string error;
    EXPECT_FALSE(ParseLadder(text, &ladder, &error)) << text.substr(0, 200);
    EXPECT_THAT(error, HasSubstr(want));
    EXPECT_LT(error.size(), 200u);
    EXPECT_EQ(ladder.rung(0).prefill.widths().layers, 1) << "was changed";
  }
}

TEST(LadderFile, TakesNoMoreThanSoManyRungs) {
  std::string text = "espalier-ladder 1\nmodel layers=1 heads=1 channels=1\n";
  for (int i = 0; i < kMostRungs; ++i) text += "rung " + std::to_string(i) + "\n";
  EXPECT_EQ(Parsed(text).size(), kMostRungs);
  Ladder ladder = Parsed(text);
  std::string error;
  EXPECT_FALSE(ParseLadder(text + "rung 64\n", &ladder, &error));
  EXPECT_THAT(error, HasSubstr("expected a number from 0 to 63"));
}

}  // namespace
}  // namespace espalier
