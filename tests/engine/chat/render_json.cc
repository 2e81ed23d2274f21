// Renders templates for differential_test.py: one JSON object a line in and out.
// In: {"template": ..., "context": {...}}. Out: {"text": ...} or {"error": ..., "at": "compile"}.
#include <iostream>
#include <string>

#include <nlohmann/json.hpp>

#include "engine/model/chat/jinja.h"
#include "tests/engine/chat/json_value.h"

int main() {
  using espalier::jinja::FromJson;
  using espalier::jinja::Template;
  using Json = nlohmann::ordered_json;

  for (std::string line; std::getline(std::cin, line);) {
    const Json request = Json::parse(line);
    Json answer;
    const auto compiled = Template::Compile(request["template"].get_ref<const std::string&>());
    if (!compiled.ok()) {
      answer = {{"error", std::string(compiled.status().message())}, {"at", "compile"}};
    } else if (const auto text = compiled->Render(FromJson(request["context"], true)); text.ok()) {
      answer = {{"text", std::string(text->bytes())}};
    } else {
      answer = {{"error", std::string(text.status().message())}, {"at", "render"}};
    }
    std::cout << answer.dump(-1, ' ', true, Json::error_handler_t::replace) << '\n';
  }
}
