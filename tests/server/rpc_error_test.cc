#include "server/rpc_error.h"

#include <gtest/gtest.h>

#include <string>

#include "engine/model/text/tokenizer.h"

namespace espalier {
namespace {

// Names in a model's file may be long, and of any letters.
TEST(RpcErrorTest, ALongCauseIsCutBetweenLetters) {
  for (const int before : {0, 1, 2}) {
    std::string message(before, 'x');
    for (int i = 0; i < 1000; ++i) message += "\xE2\x82\xAC";  // a euro sign
    const std::string told =
        NotReloaded("model", absl::InvalidArgumentError(message)).status.error_message();
    EXPECT_EQ(ValidUtf8Prefix(told), told.size());
    EXPECT_LE(told.size(), std::string("model: ").size() + 1500);
    EXPECT_GT(told.size(), 1500u);
  }
}

// Load may not go to the last rung, so that is not what is told.
TEST(RpcErrorTest, OverloadedTellsTheRungThatIsServed) {
  LoadSnapshot load;
  load.stats.waiting = 5;
  load.stats.wanted_rung = 3;
  EXPECT_EQ(Overloaded(load).status.error_message(),
            "overloaded: 5 requests wait too long already, at rung 3, the hardest there may be");
}

}  // namespace
}  // namespace espalier
