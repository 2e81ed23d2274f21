#include "engine/model/text/characters.h"

#include <gtest/gtest.h>

#include <string>
#include <string_view>

namespace espalier {
namespace {

TEST(CharacterTable, TellsLettersNumbersAndSpaces) {
  const auto expect_all = [](std::u32string_view characters, Category category) {
    for (const char32_t c : characters) {
      EXPECT_EQ(CharacterTable::Get().Of(c), category) << "U+" << std::hex << uint32_t{c};
    }
  };
  expect_all(U"aZ\u00e9\u00aa\u02b0\u0416\u0e01\u5b57\U00020000\u017f", Category::kLetter);
  expect_all(U"09\u00bd\u00b2\u2460\u2163\u0663\u3007", Category::kNumber);
  expect_all(U"\t\n\v\f\r \u0085\u00a0\u1680\u2000\u200a\u2028\u2029\u202f\u205f\u3000",
             Category::kSpace);
  expect_all(U"\x01\x1c\x1f!_\u0301\u180e\u200b\ufeff\U0001F333\U0010FFFF", Category::kOther);
}

TEST(FoldCase, IsSimple) {
  EXPECT_EQ(FoldCase(U'S'), U's');
  EXPECT_EQ(FoldCase(U'\u017f'), U's');
  EXPECT_EQ(FoldCase(U'\u00df'), U'\u00df');
}

TEST(ToNfc, LeavesNormalTextInPlace) {
  for (const std::string_view text : {"", "plain", "caf\u00e9 \u6c34"}) {
    std::string storage;
    EXPECT_EQ(ToNfc(text, &storage).data(), text.data());
  }
}

TEST(ToNfc, Composes) {
  const auto nfc = [](std::string_view text) {
    std::string storage;
    return std::string(ToNfc(text, &storage));
  };
  EXPECT_EQ(nfc("e\u0301"), "\u00e9");
  EXPECT_EQ(nfc("\u212b"), "\u00c5");
  EXPECT_EQ(nfc("\u1100\u1161\u11a8"), "\uac01");
  EXPECT_EQ(nfc("q\u0307\u0323"), "q\u0323\u0307");
  EXPECT_EQ(nfc("s\u0307\u0323"), "\u1e69");
  EXPECT_EQ(nfc("\u0344"), "\u0308\u0301");
  EXPECT_EQ(nfc("\u0f73"), "\u0f71\u0f72");  // a starter that decomposes to marks
  EXPECT_EQ(nfc("a\u0f72\u0f73"), "a\u0f71\u0f72\u0f72");
  EXPECT_EQ(nfc("\ufb01"), "\ufb01");  // compatibility forms stay
}

}  // namespace
}  // namespace espalier
