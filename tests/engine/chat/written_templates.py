"""Templates of our own that use what the public chat templates use, and contexts to render over.

Each is written after the manner of one family of models; none is a model's template.
"""


def message(role, content, **more):
    return {"role": role, "content": content, **more}


TOOL = {"type": "function", "function": {
    "name": "weather", "description": "Weather \"now\" at <place> & around",
    "parameters": {"type": "object", "required": ["place"], "properties": {
        "place": {"type": "string", "description": "a t\u00f6wn"},
        "days": {"type": "integer", "enum": [1, 3, 7]},
        "tags": {"type": "array", "items": {"type": "string"}}}}}}
CALL = {"type": "function", "id": "call12345", "function": {
    "name": "weather", "arguments": {"place": "Z\u00fcrich", "days": 3, "x": None, "y": 1.5, "z": []}}}

TALK = [message("system", " Be brief.\n"), message("user", "  Hi\u3000"),
        message("assistant", "<think>\nhm\n</think>\n\nHello!\n"), message("user", "and <|im_end|>?")]
CONTEXTS = {
    "empty": {"messages": []},
    "user": {"messages": [message("user", "Hi")], "add_generation_prompt": True,
             "bos_token": "<s>", "eos_token": "</s>"},
    "talk": {"messages": TALK, "add_generation_prompt": True, "bos_token": "<s>",
             "eos_token": "</s>", "enable_thinking": False},
    "closed": {"messages": TALK[1:3], "add_generation_prompt": False, "bos_token": "<s>",
               "eos_token": "</s>", "date_string": "1 Jan 2025"},
    "wrong": {"messages": [message("assistant", "x"), message("assistant", "y")],
              "bos_token": "<s>", "eos_token": "</s>"},
    "tools": {"messages": TALK[:2] + [
        message("assistant", "", tool_calls=[CALL, CALL]), message("tool", "{\"c\": 21}"),
        message("tool", "[1, 2]", tool_call_id="call12345"), message("assistant", "21 degrees"),
        message("user", [{"type": "text", "text": "thanks"}, {"type": "image"}])],
        "tools": [TOOL, TOOL], "add_generation_prompt": True, "bos_token": "<s>",
        "eos_token": "</s>"},
}
CHATS = ["empty", "user", "talk", "closed", "wrong"]
EVERY = list(CONTEXTS)

LLAMA_2 = """{% if messages[0]['role'] == 'system' %}
  {% set rest = messages[1:] %}{% set lead = '<<SYS>>\\n' + messages[0]['content'].strip() + '\\n<</SYS>>\\n\\n' %}
{% else %}{% set rest = messages %}{% set lead = '' %}{% endif %}
{% for m in rest %}
{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('user and assistant take turns, ' ~ loop.index) }}{% endif %}
{% set text = lead ~ m.content if loop.first else m.content %}
{% if m.role == 'user' %}{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}{% elif m.role == 'assistant' %}{{ ' ' ~ text | trim ~ ' ' ~ eos_token }}{% endif %}
{% endfor %}"""

LLAMA_3 = """{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""

LLAMA_3_TOOLS = """{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not tools_in_user_message is defined %}
    {%- set tools_in_user_message = true %}
{%- endif %}
{%- if not date_string is defined %}
    {%- set date_string = "26 July 2024" %}
{%- endif %}
{%- if not tools is defined %}{% set tools = none %}{% endif %}
{#- The system message, if any, goes into its own slot. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if builtin_tools is defined or tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{%- if builtin_tools is defined %}
    {{- "Tools: " + builtin_tools | reject('equalto', 'interpreter') | join(", ") + "\\n\\n" }}
{%- endif %}
{{- "Today: " + date_string + "\\n\\n" }}
{%- if tools is not none and not tools_in_user_message %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}<|eot_id|>
{%- if tools_in_user_message and not tools is none %}
    {%- if messages | length != 0 %}
        {%- set first_user_message = messages[0]['content']|trim %}
        {%- set messages = messages[1:] %}
    {%- else %}
        {{- raise_exception("no user message to put the tools into") }}
{%- endif %}
    {{- '<|start_header_id|>user<|end_header_id|>\\n\\n' -}}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
    {{- first_user_message + "<|eot_id|>"}}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | string | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 2 %}
            {{- raise_exception("two calls, please") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
        {{- '{"name": "' + tool_call.name + '", ' }}
        {{- '"parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}" }}
        {%- for name, value in tool_call.arguments | items %}
            {{- name + '="' ~ value ~ '"' }}
            {%- if not loop.last %}
                {{- ", " }}
            {%- endif %}
        {%- endfor %}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
"""

CHATML = """{% for message in messages %}
{{'<|im_start|>' + message['role'] + '\n' + message['content']}}
{% if (loop.last and add_generation_prompt) or not loop.last %}{{ '<|im_end|>' + '\n'}}{% endif %}
{% endfor %}
{% if add_generation_prompt and messages[-1]['role'] != 'assistant' %}{{ '<|im_start|>assistant\n' }}{% endif %}
"""

QWEN_3 = """{%- macro call_text(call) -%}
    {%- if call.function %}{%- set call = call.function %}{%- endif -%}
    <tool_call>
{"name": "{{ call.name }}", "arguments": {{ call.arguments if call.arguments is string else call.arguments | tojson }}}
</tool_call>
{%- endmacro -%}
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\\n</tools>{\\"name\\": <name>}<|im_end|>\\n" }}
{%- elif messages and messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = message.content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('\\n') %}
    {%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or (not loop.last and reasoning_content)) %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if (loop.first and content) or (not loop.first) %}{{- '\\n' }}{%- endif %}
            {{- call_text(tool_call) }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (loop.previtem.role != "tool") %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' ~ content ~ '\\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""

MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace() %}
{%- set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or message.role == "tool_results" or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("roles must alternate") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}
                        {{- '"' + key + '": "' + val + '"' }}
                    {%- else %}
                        {{- '"' + key + '": ' + val|tojson }}
                    {%- endif %}
                    {%- if not loop.last %}
                        {{- ", " }}
                    {%- endif %}
                {%- endfor %}
                {{- "}}" }}
                {%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" }}{%- endif %}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" ~ message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " ~ message["content"] ~ "[/INST]" }}
        {%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}
            {%- set out = tool_call.function|tojson %}
            {{- out[:-1] }}
            {%- if not tool_call.id is defined or tool_call.id|length != 9 %}
                {{- raise_exception("ids have nine characters") }}
            {%- endif %}
            {{- ', "id": "' + tool_call.id + '"}' }}
            {%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" + eos_token }}{%- endif %}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- elif message["role"] == "tool_results" or message["role"] == "tool" %}
        {%- if message.content is defined and message.content.content is defined %}
            {%- set content = message.content.content %}
        {%- else %}
            {%- set content = message.content %}
        {%- endif %}
        {{- '[TOOL_RESULTS] {"content": ' + content|string + ", " }}
        {{- '"call_id": "' + message.tool_call_id|default('none') + '"}[/TOOL_RESULTS]' }}
    {%- else %}
        {{- raise_exception("unknown role " + message.role) }}
    {%- endif %}
{%- endfor %}
"""

PHI_3 = """{% for message in messages %}{% if message['role'] in ['system', 'user'] and message['content'] %}{{'<|' + message['role'] + '|>\n' ~ message['content'] ~ '<|end|>\n'}}{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"""

GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '

' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '

' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("roles must alternate user/assistant/...") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '
' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}
                {{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}
                {{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end_of_turn>
' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model
'}}
{%- endif -%}
"""

SCHEMA = """{%- macro type_of(spec, depth=0) -%}
    {%- if spec.type == 'array' -%}
        list[{{ type_of(spec['items'], depth + 1) }}]
    {%- elif spec.type == 'object' -%}
        {
        {%- for name, inner in spec.properties.items() %}
            {{- '\\n' + '  ' * (depth + 1) + name + ('' if name in spec.required | default([]) else '?') }}: {{ type_of(inner, depth=depth + 1) -}}
        {%- endfor %}
        {{- '\\n' ~ '  ' * depth }}}
    {%- elif spec.enum is defined -%}
        {{ spec.enum | join(' | ') }}
    {%- else -%}
        {{ {'string': 'str', 'integer': 'int'}.get(spec.type, 'any') }}
    {%- endif -%}
{%- endmacro -%}
{%- for tool in tools or [] %}
// {{ tool.function.description | replace('"', "'") }}
def {{ tool.function.name | upper }}{{ type_of(tool.function.parameters) }}
{% else %}
no tools
{% endfor %}
{% for m in messages if m.role not in ('system', 'tool') %}
{%- if loop.index > 3 %}{% break %}{% endif %}
{%- if not m.content %}{% continue %}{% endif %}
{{ loop.cycle('odd', 'even') }} {{ loop.index }}/{{ loop.length }} {{ loop.revindex }}: {% generation %}{{ m.content | string | trim | title }}{% endgeneration %}

{% endfor %}"""

# Constructs one by one; the odd line breaks and blanks are what they are about.
CONSTRUCTS = """a {#- gone -#} b {# gone too #}
  {# a line of its own #}
  {% if true %}
    kept
  {%+ endif %}
{% raw %}
  {{ not }} {% this %}
{% endraw -%}

x{{ 1 }}
{{- 2 -}}
   {{ 3 }}  {%- if false %}{% elif 1 %} elif {% else %}{% endif -%} .
{% set a, b = 1, 'two' %}{{ a }}{{ b }}{% set (c, d) = [3, 4] %}{{ c + d }}
{% set block %}
<{{ a }}>
{% endset %}{{ block | trim }}{{ block | length }}
{% for k, v in {'x': 1, 'y': [1, 'é', "it's"]}.items() %}{{ k }}={{ v }};{% endfor %}
{% for x in [1, 2, 3] if x != 2 %}{{ loop.index }}{{ x }}{{ loop.first }}{{ loop.last }}{% else %}none{% endfor %}
{% for x in [1, 2] %}{% for y in 'ab' %}{{ loop.index }}{{ y }}{% endfor %}{{ loop.index }}{% endfor %}
{% for x in [] %}{% else %}empty{% endfor %}{% for x in nothing_at_all %}{% else %}undefined{% endfor %}
{% for x in [1, 2] %}{% break %}{% else %}jinja2 comes here{% endfor %}
{% set n = namespace(a=1, b=[]) %}{% for x in range(3) %}{% set n.a = n.a + x %}{% set a = x %}{% endfor %}{{ n.a }}{{ a }}
{{ 'abc'[::-1] }}{{ 'abcdef'[1:-1:2] }}{{ [1, 2, 3][-1] }}{{ [1, 2, 3][:2] }}{{ 'é€😀x'[1:3] }}{{ (1, 2)[5:] }}
{{ 7 // 2 }} {{ -7 // 2 }} {{ -7 % 3 }} {{ 7 / 2 }} {{ 2 ** 10 }} {{ 2 ** -1 }} {{ 1e3 }} {{ 1e16 }} {{ 0.1 + 0.2 }} {{ 10 / 5 }} {{ -2 ** 2 }}
{{ 1 < 2 < 3 }} {{ 1 == 1.0 == true }} {{ 'a' in 'cat' }} {{ 'x' not in ['x'] }} {{ not 1 in [1] }} {{ [1, 2] < [1, 3] }}
{{ none }} {{ true }} {{ [none, 1.0, 'a"b', {'k': (1,)}] }} {{ () }} {{ "\\t\\x41\\u00e9\\n" | tojson }} {{ 'con' 'cat' }}
{{ 'a' if false }}|{{ missing }}|{{ missing is defined }}|{{ missing | default('d') }}|{{ '' | d('e', true) }}
{{ {'b': 1, 'a': {'é': [1, 2.5, none, true, "q\\"\\\\"]}} | tojson(indent=2) }}{{ {'b': 1, 'a': 2} | tojson(sort_keys=true, separators=(',', ':')) }}
{{ {'items': 1, 'x': 2}.items is defined }}{{ {'items': 1}['items'] }}{{ {'x': 2}['items'] is defined }}
{{ ' a b  c '.split() }}{{ 'a,b,c'.split(',', 1) }}{{ ' x y z '.rsplit(none, 1) }}{{ 'aXbX'.replace('X', '--') }}{{ 'hello world'.title() }}
{{ 'one two-three (four' | title }}{{ 'ÉCOLE straße' | lower | upper | capitalize if false else 'x' | capitalize }}{{ 'ÉCOLE straße' | upper }}
{{ 'l1\nl2\n\nl3' | indent }}|{{ 'l1\nl2' | indent(2, true) }}|{{ ['b', 'a'] | join('+') }}|{{ 'abc' | list }}|{{ 'abc' | reverse }}
{{ '42' | int + '1.9' | int + 'x' | int(5) }}{{ '1.5' | float }}{{ 3.99 | int }}{{ true + true }}{{ 'ab' * 2 }}{{ [0] * 2 + [1] }}
{{ [{'a': {'b': 1}}, {'a': {'b': 2}}] | map(attribute='a.b') | list }}{{ ['x', 'y'] | map('upper') | join }}{{ [0, 1, '', 'a'] | select | list }}
{{ [1, 2, 3, 4] | select('even') | list }}{{ [1, 2] | reject('==', 1) | list }}{{ [{'k': 1}, {}] | selectattr('k', 'defined') | list | length }}
{{ 1 is number }}{{ true is number }}{{ 'x' is sequence }}{{ {} is mapping }}{{ 4 is divisibleby 2 }}{{ 1 is not none }}{{ 3 is odd and 4 is even }}
{% macro greet(name, mark='!', *) %}{% endmacro %}""".replace(
    "{% macro greet(name, mark='!', *) %}{% endmacro %}",
    "{% macro greet(name, mark='!') %}Hi {{ name }}{{ mark }}{% endmacro %}"
    "{{ greet('A') }}{{ greet(name='B', mark='?') }}{{ greet('C', '.') | upper }}{{ greet() }}")

# Each must be refused by both.
REFUSED = [
    "{{ messages.append(1) }}", "{% if true %}", "{% endif %}", "{{ 1 + }}", "{{ 'a' + 1 }}",
    "{{ missing.x }}", "{{ missing + 1 }}", "{{ missing() }}", "{{ 1 | nofilter }}",
    "{{ 1 is notest }}", "{% notag %}", "{{ {}.x.y }}", "{% for x in 1 %}{% endfor %}", "{{ 1 / 0 }}",
    "{{ raise_exception('no') }}", "{% set x.y = 1 %}", "{% break %}", "{{ [1][0].a.b }}", "{# open",
    "{{ 'open }}", "{% raw %}x", "{{ (1 }}", "{{ 1 ) }}", "{{ missing | tojson }}", "{{ 1 < 'a' }}",
    "{% macro m(a) %}{% endmacro %}{{ m(1, 2) }}", "{% macro m(a) %}{% endmacro %}{{ m(b=2) }}",
    "{% for a, b in [[1]] %}{% endfor %}", "{{ none.strip() }}", "{{ range(1000000) | length }}",
    "{{ 'x'.nomethod() }}", "{{ 08 }}", "{{ '\\ud800' }}", "{% set true = 1 %}", "{{ x is a is b }}",
    "{{ ! }}", "{{ a.1b }}", "{{ '\\x4' }}", "{{ [1,,2] }}", "{% if %}{% endif %}", "{% for in x %}",
]

TEMPLATES = [(t, EVERY) for t in (LLAMA_2, LLAMA_3, LLAMA_3_TOOLS, CHATML, QWEN_3, MISTRAL, PHI_3,
                                  GEMMA, SCHEMA)]
TEMPLATES += [(CONSTRUCTS.replace("\n", newline), ["talk"]) for newline in ("\n", "\r\n", "\r")]
TEMPLATES += [(line, ["empty"]) for line in CONSTRUCTS.split("\n") if line.count("{%") != 1]
TEMPLATES += [(t, ["talk"]) for t in REFUSED]
