// Fuzzes chat templates: the input is the template and, after a zero byte, what the user says.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "engine/model/chat/chat_template.h"
#include "tests/fuzz/fuzz_check.h"

namespace espalier {
namespace {

// U+E000, for private use: in what the user says and nowhere else, unless the template spells it.
constexpr std::string_view kMark = "\xEE\x80\x80";

bool MaySpellTheMark(std::string_view source) {
  return source.find_first_of("\\\xEE") != std::string_view::npos;
}

void CheckRendering(const ChatTemplate& chat, const std::vector<ChatMessage>& messages,
                    bool may_spell_the_mark) {
  const auto text = chat.Render(messages, true);
  const auto segments = chat.RenderSegments(messages, true);
  Require(text.status() == segments.status(), "a rendering can be repeated");
  if (!text.ok()) return;
  std::string joined;
  for (const ChatSegment& segment : *segments) {
    joined += segment.text;
    Require(
        segment.from_caller || may_spell_the_mark || segment.text.find(kMark) == std::string::npos,
        "what the caller wrote stays the caller's");
  }
  Require(joined == *text, "the segments are the text");
}

}  // namespace
}  // namespace espalier

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace espalier;  // NOLINT: the entry point cannot lie in it
  const std::string_view input(reinterpret_cast<const char*>(data), size);
  const std::string_view source = input.substr(0, input.find('\0'));
  const std::string_view said = input.substr(std::min(source.size() + 1, size));
  const auto chat = ChatTemplate::Compile(source, "<s>", "</s>");
  if (!chat.ok()) {
    RequireOneLine(chat.status());
    return 0;
  }
  const std::string mark(kMark);
  CheckRendering(**chat,
                 {{"system", mark + " Be brief.\n"},
                  {"user", mark + std::string(said)},
                  {"assistant", mark + "<think>\nhm\n</think>\n\nHello!"},
                  {mark + "stranger", "\xC3\xA9"}},
                 MaySpellTheMark(source));
  return 0;
}
