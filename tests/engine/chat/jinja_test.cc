#include "engine/model/chat/jinja.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <tuple>
#include <vector>

#include <nlohmann/json.hpp>

#include "engine/model/chat/failure.h"
#include "tests/engine/chat/json_value.h"

namespace espalier::jinja {
namespace {

using ::testing::HasSubstr;
using ::testing::StartsWith;

absl::StatusOr<Text> RenderText(std::string_view source, std::string_view context = "{}") {
  const auto compiled = Template::Compile(source);
  if (!compiled.ok()) return compiled.status();
  return compiled->Render(FromJson(nlohmann::ordered_json::parse(context), true));
}

// The text, or the error between angle brackets.
std::string Render(std::string_view source, std::string_view context = "{}") {
  const absl::StatusOr<Text> text = RenderText(source, context);
  return text.ok() ? std::string(text->bytes())
                   : fmt::format("<{}>", std::string(text.status().message()));
}

std::string CompileError(std::string_view source) {
  const auto compiled = Template::Compile(source);
  EXPECT_FALSE(compiled.ok()) << source;
  EXPECT_EQ(compiled.status().code(), absl::StatusCode::kInvalidArgument);
  return std::string(compiled.status().message());
}

// The text with the caller's stretches between « and ».
std::string RenderMarked(std::string_view source, std::string_view context) {
  const absl::StatusOr<Text> text = RenderText(source, context);
  if (!text.ok()) return std::string(text.status().message());
  std::string marked;
  for (const Text::Run& run : text->Runs()) {
    const std::string part(text->bytes().substr(run.begin, run.end - run.begin));
    marked += run.from_caller ? "«" + part + "»" : part;
  }
  return marked;
}

struct Case {
  std::string_view source;
  std::string_view expected;
};

class RendersAsPythonTest : public testing::TestWithParam<Case> {};

TEST_P(RendersAsPythonTest, Text) {
  constexpr std::string_view kContext =
      R"({"s": "Hé", "xs": [3, 1], "d": {"a": 1, "items": 2}, "ms": [{"role": "user"}, {}]})";
  EXPECT_EQ(Render(GetParam().source, kContext), GetParam().expected) << GetParam().source;
}

INSTANTIATE_TEST_SUITE_P(Whitespace, RendersAsPythonTest,
                         testing::Values(Case{"a\n", "a"}, Case{"a\n\n", "a\n"},
                                         Case{"a\r\nb\rc", "a\nb\nc"},
                                         Case{"  {% if 1 %}\nx\n  {% endif %}\ny", "x\ny"},
                                         Case{"  {%+ if 1 +%}\nx{% endif %}", "  \nx"},
                                         Case{"a {{- 1 -}} b", "a1b"},
                                         Case{"a\n {#- c -#} \nb", "ab"}, Case{"{# c #}\nx", "x"},
                                         Case{"  {{ 1 }}\n", "  1"},
                                         Case{"{% raw %}\n{{ x }}{% endraw %}\n!", "\n{{ x }}!"},
                                         Case{"a {% if 1 %} b {% endif %} c", "a  b  c"}));

INSTANTIATE_TEST_SUITE_P(
    Statements, RendersAsPythonTest,
    testing::Values(
        Case{"{% if 0 %}a{% elif xs %}b{% else %}c{% endif %}", "b"},
        Case{"{% for x in xs %}{{ loop.index }}:{{ x }}{{ ',' if not loop.last }}{% endfor %}",
             "1:3,2:1"},
        Case{"{% for x in xs if x > 1 %}{{ loop.length }}{{ x }}{% else %}no{% endfor %}", "13"},
        Case{"{% for x in [] %}{% else %}no{% endfor %}", "no"},
        Case{"{% for a, b in [[1, 2], (3, 4)] %}{{ a + b }} {% endfor %}", "3 7 "},
        Case{"{% for x in range(9) %}{% if x == 1 %}{% continue %}{% endif %}{{ x }}"
             "{% if x == 3 %}{% break %}{% endif %}{% endfor %}",
             "023"},
        Case{"{% for x in 'aé' %}[{{ loop.previtem }}{{ x }}{{ loop.nextitem }}]{% endfor %}",
             "[aé][aé]"},
        Case{"{% for k in d %}{{ k }}{% endfor %}", "aitems"},
        Case{"{% set x = 1 %}{% for i in xs %}{% set x = i %}{% endfor %}{{ x }}", "1"},
        Case{"{% set n = namespace(x=1) %}{% for i in xs %}{% set n.x = i %}{% endfor %}{{ n.x }}",
             "1"},
        Case{"{% set n = namespace() %}{% set n.y = n.z is defined %}{{ n.y }}", "False"},
        Case{"{% set x %}<{{ s }}>{% endset %}{{ x * 2 }}", "<Hé><Hé>"},
        Case{"{% macro m(a, b='!') %}{{ a }}{{ b }}{% endmacro %}{{ m(1) ~ m(b=2, a=3) }}", "1!32"},
        Case{"{% macro m(n) %}{{ n }}{% if n %}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(3) }}",
             "3210"},
        Case{"{% generation %}{{ 1 }}{% endgeneration %}", "1"}));

INSTANTIATE_TEST_SUITE_P(
    Expressions, RendersAsPythonTest,
    testing::Values(
        Case{"{{ 1 + 2 * 3 - 4 // 3 }} {{ -7 // 2 }} {{ -7 % 3 }} {{ 7 / 2 }} {{ 2 ** 3 }}",
             "6 -4 2 3.5 8"},
        Case{"{{ 1e16 }} {{ 1.0 }} {{ 1e-5 }} {{ 0.1 + 0.2 }}",
             "1e+16 1.0 1e-05 0.30000000000000004"},
        Case{"{{ 1 < 2 < 3 and not 1 in [2] or x }} {{ 'b' not in 'abc' }}", "True False"},
        Case{"{{ none }} {{ true }} {{ [1.0, 'a', none] }} {{ {'k': (1,)} }} {{ [\"it's\"] }}",
             "None True [1.0, 'a', None] {'k': (1,)} [\"it's\"]"},
        Case{"{{ 'abcd'[1:3] }}{{ 'abcd'[::-1] }}{{ xs[::-1] }}{{ 'é€x'[1] }}{{ xs[-1] }}",
             "bcdcba[1, 3]€1"},
        Case{R"({{ "\n\t\"\x41\u00e9\\" ~ 'it\'s' 'x' }})", "\n\t\"Aé\\it'sx"},
        Case{"{{ d.a }}{{ d['a'] }}{{ d['items'] }}{{ d.items is defined }}", "112True"},
        Case{"{{ undefined_thing }}{{ xs[7] }}{{ d.q is undefined }}{{ ms[1].role | d('-') }}",
             "True-"},
        Case{"{{ 'a' if xs else 'b' }}{{ 'a' if none }}", "a"},
        Case{"{{ {'a': 1, 'b': [none, 'é']} | tojson }}", R"({"a": 1, "b": [null, "é"]})"},
        Case{"{{ [1, {'a': []}] | tojson(indent=1) }}", "[\n 1,\n {\n  \"a\": []\n }\n]"},
        Case{"{{ ms | selectattr('role', 'equalto', 'user') | list | length }}", "1"},
        Case{"{{ ms | map(attribute='role', default='?') | join(',') }}", "user,?"},
        Case{"{{ 'x</think>y'.split('</think>')[-1] }}{{ ' é '.strip() }}{{ 'aa'.lstrip('a') }}",
             "yé"},
        Case{"{{ 'straße' | upper }} {{ 'two words' | title }} {{ 'ABC' | capitalize }}",
             "STRASSE Two Words Abc"},
        Case{"{{ s is string and 1 is number and d is mapping and xs is iterable and "
             "none is none and s is not undefined }}",
             "True"}));

TEST(JinjaTest, KeepsTheOriginOfEveryByte) {
  constexpr std::string_view kContext = R"({"c": " é<b>\n", "w": "one two"})";
  EXPECT_EQ(RenderMarked("[{{ c }}]", kContext), "[« é<b>\n»]");
  EXPECT_EQ(RenderMarked("{{ '<' + c | trim + '>' }}", kContext), "<«é<b>»>");
  EXPECT_EQ(RenderMarked("{{ ('ab' ~ w ~ 'cd')[1:-1] }}", kContext), "b«one two»c");
  EXPECT_EQ(RenderMarked("{{ (w ~ 'x')[::-1] }}", kContext), "x«owt eno»");
  EXPECT_EQ(RenderMarked("{{ w | replace(' ', '-') | upper }}", kContext), "«ONE»-«TWO»");
  EXPECT_EQ(RenderMarked("{{ 'a.b' | replace('.', w) }}", kContext), "a«one two»b");
  EXPECT_EQ(RenderMarked("{{ w.split() | join('+') }}", kContext), "«one»+«two»");
  EXPECT_EQ(RenderMarked("{{ {'k': c} | tojson }}", kContext), "{\"k\": \"« é<b>\\n»\"}");
  EXPECT_EQ(RenderMarked("{{ [w] }}", kContext), "['«one two»']");
  EXPECT_EQ(RenderMarked("{% set x %}({{ w }}){% endset %}{{ x * 2 }}", kContext),
            "(«one two»)(«one two»)");
  EXPECT_EQ(RenderMarked("{% macro m(a) %}<{{ a }}>{% endmacro %}{{ m(w) | title }}", kContext),
            "<«One Two»>");
  EXPECT_EQ(RenderMarked("{{ w | indent(1, true) }}", kContext), " «one two»");
  EXPECT_EQ(RenderMarked("{% for x in w[:2] %}{{ x }}.{% endfor %}", kContext), "«o».«n».");
}

TEST(JinjaTest, RefusesAtLoadWhatItDoesNotKnow) {
  EXPECT_EQ(CompileError("a\n{{ x | wordcount }}"), "line 2: unknown filter 'wordcount'");
  EXPECT_EQ(CompileError("\n\n{% if x is lower %}"), "line 3: unknown test 'lower'");
  EXPECT_EQ(CompileError("{{ cycler(1) }}"), "line 1: unknown function 'cycler'");
  EXPECT_EQ(CompileError("{{ x.append(1) }}"), "line 1: unknown method 'append'");
  EXPECT_EQ(CompileError("{{ 'a'.format(1) }}"), "line 1: unknown method 'format'");
  EXPECT_EQ(CompileError("{% include 'x' %}"), "line 1: unsupported tag 'include'");
  EXPECT_EQ(CompileError("{{ xs | map('nope') }}"), "line 1: unknown filter 'nope'");
  EXPECT_EQ(CompileError("{{ xs | selectattr('a', 'nope') }}"), "line 1: unknown test 'nope'");
  EXPECT_EQ(CompileError("{{ x | trim(1, 2) }}"), "line 1: filter 'trim' has too many arguments");
  EXPECT_EQ(CompileError("{{ x | tojson(inden=2) }}"),
            "line 1: filter 'tojson' has no argument 'inden'");
  EXPECT_EQ(CompileError("{{ x | replace('a') }}"),
            "line 1: filter 'replace' has too few arguments");
  EXPECT_THAT(CompileError("{% for x in y recursive %}{% endfor %}"), HasSubstr("'recursive'"));
  EXPECT_THAT(CompileError("{% for x in y %}{% macro m() %}{% endmacro %}{% endfor %}"),
              HasSubstr("macro inside a loop"));
  EXPECT_THAT(CompileError("{{ '%s' % x }}"), HasSubstr("'%' on strings"));
  EXPECT_THAT(CompileError("{{ f(*x) }}"), HasSubstr("'*' arguments"));
  EXPECT_THAT(CompileError("{{ x() () }}"), HasSubstr("neither a name nor a method"));
  EXPECT_THAT(CompileError("{{ 99999999999999999999 }}"), HasSubstr("out of range"));
}

TEST(JinjaTest, SyntaxErrorsNameTheLine) {
  for (const std::string_view source : {"{{",
                                        "{%",
                                        "{#",
                                        "{{ 1",
                                        "{{ 'a }}",
                                        "{{ (1 }}",
                                        "{{ 1) }}",
                                        "{% if 1 %}",
                                        "{% endif %}",
                                        "{% for %}",
                                        "{% for x y %}",
                                        "{% set = 1 %}",
                                        "{% set none = 1 %}",
                                        "{% break %}",
                                        "{{ 1 + }}",
                                        "{{ a b }}",
                                        "{{ [1 2] }}",
                                        "{{ {1} }}",
                                        "{{ x. }}",
                                        "{{ x[ }}",
                                        "{{ x | }}",
                                        "{{ x is }}",
                                        "{{ f(a=1, 2) }}",
                                        "{% macro m(a=1, b) %}{% endmacro %}",
                                        "{% raw %}x",
                                        "{{ '\\uD800' }}",
                                        "{{ é }}",
                                        "{{ 1 ! 2 }}",
                                        "{% %}",
                                        "{{ }}",
                                        "{{ 0x1F }}"}) {
    EXPECT_THAT(CompileError(fmt::format("\n{}", source)), StartsWith("line 2: ")) << source;
  }
}

TEST(JinjaTest, RenderErrorsNameTheLineAndTheValue) {
  EXPECT_EQ(Render("\n{{ m.content + 'x' }}", R"({"m": {}})"),
            "<line 2: 'dict object' has no attribute 'content'>");
  EXPECT_EQ(Render("{{ 'a' + none }}"),
            "<line 1: unsupported operands for +: str object and None>");
  EXPECT_EQ(Render("{{ x.y }}"), "<line 1: 'x' is undefined>");
  EXPECT_EQ(Render("{{ x | tojson }}"), "<line 1: 'x' is undefined>");
  EXPECT_EQ(Render("{{ raise_exception('roles: ' ~ r) }}", R"({"r": "é"})"), "<roles: é>");
  EXPECT_EQ(Render("{{ 1 // 0 }}"), "<line 1: division by zero>");
  EXPECT_EQ(Render("{{ 9223372036854775807 + 1 }}"),
            "<line 1: an integer leaves the range of 64 bits>");
  EXPECT_EQ(Render("{{ -(-9223372036854775807 - 1) }}"),
            "<line 1: an integer leaves the range of 64 bits>");
  EXPECT_EQ(Render("{{ (-9223372036854775807 - 1) // -1 }}"),
            "<line 1: an integer leaves the range of 64 bits>");
  EXPECT_EQ(Render("{{ (-9223372036854775807 - 1) % -1 }}"), "0");
}

TEST(JinjaTest, ErrorsAreOneBoundedLineOfUtf8) {
  EXPECT_EQ(Render("{{ raise_exception('two\\nlines\x80') }}", "{}"), "<two lines\xEF\xBF\xBD>");
  EXPECT_EQ(CompileError("{{ [] | select('no\n such') }}"), "line 1: unknown test 'no  such'");
  const std::string name(1000, 'x');
  EXPECT_THAT(CompileError("{{ [] | select('" + name + "') }}"),
              testing::AllOf(testing::SizeIs(515), testing::EndsWith("x...")));
}

TEST(JinjaTest, StrftimeNowIsNotDefinedWithoutAClock) {
  EXPECT_EQ(Render("{{ strftime_now('%Y') if strftime_now is defined else 'fixed' }}"), "fixed");
  EXPECT_THAT(Render("{{ strftime_now('%Y') }}"), HasSubstr("needs a clock"));
}

std::string Repeat(std::string_view part, int times) {
  std::string text;
  for (int i = 0; i < times; ++i) text += part;
  return text;
}

TEST(JinjaTest, EndsHostileTemplates) {
  const std::vector<std::string> sources = {
      // Time.
      "{% macro m(n) %}{{ m(n) }}{{ m(n) }}{% endmacro %}{{ m(1) }}",
      "{% set l = range(90000) | list %}{% for x in l %}{{ x in l }}{% endfor %}",
      "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}"
      "{{ n.x == n.x }}{{ n.x | tojson }}",
      "{% set l = range(90000) | list %}{% for a in l %}{% for b in l %}{% endfor %}{% endfor %}",
      "{% set l = [[1]] * 90000 %}{% for a in l %}{% for b in l %}{% break %}{% endfor %}"
      "{% set x = l[1:] %}{% endfor %}",
      "{% set x = 'y' * 9000000 %}{% for i in range(90000) %}{% set z = x.strip() %}{% endfor %}",
      // Memory.
      "{{ 'x' * 1000000000000 }}",
      "{{ ['x'] * 1000000000 }}",
      "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
      "{% set x = 'y' * 9000000 %}{{ x | replace('y', x) }}",
      "{{ ('a ' * 8000000).split() }}",
      "{{ ('a' * 9000000) | list }}",
      "{% for i in range(99999) %}{{ 'x' * 999 }}{% endfor %}",
      "{{ ('\\n' * 99999) | indent(999, true, true) }}",
      // The stack.
      "{% set n = namespace(x=[]) %}{% for i in range(99999) %}{% set n.x = [n.x] %}{% endfor %}",
      "{% set n = namespace(x=1) %}{% for i in range(9999) %}{% for j in [n.x] %}"
      "{% set n.x = loop %}{% endfor %}{% endfor %}",
  };
  for (const std::string& source : sources) {
    EXPECT_EQ(RenderText(source).status().code(), absl::StatusCode::kResourceExhausted)
        << source << "\n"
        << RenderText(source).status();
  }
}

TEST(JinjaTest, RefusesDeepNesting) {
  constexpr int kDeep = 50'000;
  for (const auto& [open, middle, close] : {std::tuple{"(", "1", ")"},
                                            {"[", "1", "]"},
                                            {"{1:", "1", "}"},
                                            {"not ", "1", ""},
                                            {"-", "1", ""},
                                            {"", "1", "+1"},
                                            {"", "1", "~1"},
                                            {"", "1", "|d"},
                                            {"", "x", ".y"},
                                            {"", "x", "[0]"},
                                            {"x[", "0", "]"},
                                            {"1 if 1 else ", "1", ""},
                                            {"", "1", " if 1"},
                                            {"", "1", " and 1"},
                                            {"x.get(", "1", ")"},
                                            {"", "1", " is defined == 1"},
                                            {"2**", "1", ""}}) {
    const std::string source = "{{ " + Repeat(open, kDeep) + middle + Repeat(close, kDeep) + " }}";
    EXPECT_THAT(CompileError(source), HasSubstr("over")) << open << middle << close;
  }
  EXPECT_THAT(CompileError(Repeat("{% if 1 %}", kDeep)), HasSubstr("over 200 deep"));
  EXPECT_THAT(CompileError(Repeat("{% for x in y %}", 50'000)), HasSubstr("over 200 deep"));
  EXPECT_THAT(CompileError(std::string(kMaxSource + 1, 'x')), HasSubstr("bytes"));
}

// As deep as the parser allows, and macros on top: the stack must hold it.
TEST(JinjaTest, EvaluatesTheDeepestThatItParses) {
  EXPECT_EQ(Render("{{ " + Repeat("(", 80) + "1" + Repeat("+1)", 80) + " }}"), "81");
  EXPECT_EQ(Render("{{ 1" + Repeat("+1", 350) + " }}"), "351");
  EXPECT_EQ(RenderText("{{ 1" + Repeat("|d", 1500) + " }}").status().code(),
            absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(RenderText("{% macro m(n) %}{% for x in [n] %}{{ m(x + 1) }}{% endfor %}{% endmacro %}"
                       "{{ m(1) }}")
                .status()
                .code(),
            absl::StatusCode::kResourceExhausted);
}

TEST(JinjaTest, ContextMustBeADict) {
  const auto compiled = Template::Compile("x");
  ASSERT_TRUE(compiled.ok());
  EXPECT_EQ(compiled->Render(Value::List({})).status().code(), absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace espalier::jinja
