#!/usr/bin/env python3
"""Renders the same templates here and with python3-jinja2 and compares.

usage: differential_test.py RENDER_JSON [--count N] [--seed S]

The environment is the one transformers uses. Written templates exercise every construct in the
style of public chat templates; random ones come from a grammar with a fixed seed. Where jinja2
raises, ours must raise; ours may refuse at load, and by the words in REFUSALS at rendering, what
jinja2 renders, but never render another text. Exit code 77: jinja2 is not there.
"""
import argparse
import json
import random
import subprocess
import sys

try:
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment
except ImportError:
    print("SKIPPED: python3-jinja2 is not installed")
    sys.exit(77)

from written_templates import CONTEXTS, TEMPLATES

# What ours declines although Python has an answer.
REFUSALS = ("has no text form here", "64 bits", "not supported", "no finite real number",
            "nested over")


def raise_exception(message):
    raise jinja2.exceptions.TemplateError(message)


def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                      sort_keys=sort_keys)


class Generation(jinja2.ext.Extension):
    """{% generation %} as transformers has it: a call block that prints its body."""
    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        call = self.call_method("_print")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _print(self, caller):
        return caller()


def environment():
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"])
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    return env


def jinja2_answer(env, template, context):
    try:
        text = env.from_string(template).render(**context)
        text.encode()  # lone surrogates are no text
        return {"text": text}
    except Exception as error:  # whatever Python raises counts as "refuses"
        return {"error": f"{type(error).__name__}: {error}"}


class Grammar:
    """Random templates over the names that random contexts define."""

    NAMES = ["s", "n", "f", "xs", "ys", "d", "deep", "flag", "nothing", "missing", "uni", "x", "y"]
    SPACES = ["", "", "", " ", "\n", "  \n ", "\n\n", "\t", "text ", " a\n", "\u00a0", "\u3000\n"]

    PREFIX = "{% set ns = namespace(v=1) %}{% macro m(a, b='B') %}[{{ a }}|{{ b }}]{% endmacro %}"

    def __init__(self, seed):
        self.random = random.Random(seed)

    def pick(self, *options):
        return self.random.choice(options)

    def context(self):
        pick = self.pick
        return {
            "s": pick("", "Hello World", "  padded\n", "a,b,,c", "it's", 'say "hi"', "x\ty\\z"),
            "uni": pick("h\u00e9llo w\u00f6rld", "\u4f60\u597d \U0001f44b", "\u00a0nbsp\u3000",
                        "\u0395\u03a3\u03a3", "stra\u00dfe", "\u200b\u2028\u00ad"),
            "n": pick(0, 1, 2, 3, 7, -1, -5, 100),
            "f": pick(0.5, 1.0, -2.25, 1e16, 1e-5, 3.14159, 1e22, 123456789.123),
            "xs": pick([], [1, 2, 3], [3, 1, 2, 2], [True, None, "a"], [0, 0.0, ""]),
            "ys": [{"role": r, "content": c, "k": i}
                   for i, (r, c) in enumerate(pick(
                       [], [("user", "hi")], [("system", "s "), ("user", " u"), ("assistant", "")],
                       [("user", "\u00fc"), ("tool", "<|im_end|>"), ("user", "{{ x }}")]))],
            "d": pick({}, {"a": 1, "b": [1, 2]}, {"items": "i", "z": None, "y": 1.5, "t": True}),
            "deep": {"a": {"b": {"c": pick(1, "leaf", [])}}, "l": [[1, 2], [3]]},
            "flag": pick(True, False),
            "nothing": None,
        }

    def string(self):
        return self.pick("'a'", '"b c"', "''", "'\\n'", "'it\\'s'", '"\\""', "'\\u00e9\\x41'",
                         "' x '", "'a' 'b'", "'<|im_start|>'", "','", "'\\\\'", "'\\d'", "'l'")

    def atom(self):
        kind = self.random.random()
        if kind < 0.55:
            return self.pick(*self.NAMES)
        if kind < 0.75:
            return self.string()
        return self.pick("0", "1", "2", "-1", "3.5", "1e3", "10_0", "true", "False", "none", "[]",
                         "{}", "[1, 'a']", "{'a': 1, 2: 'b'}", "(1, 2)", "()", "(1,)", "(range(3)|list)",
                         "ns.v", "loop.index", "loop.last")

    def expression(self, depth=3):
        if depth == 0 or self.random.random() < 0.2:
            return self.atom()
        sub = lambda: self.expression(depth - 1)
        name = lambda: self.pick(*self.NAMES)
        return self.pick(
            lambda: f"{sub()} {self.binary()} {sub()}",
            lambda: f"{sub()} {self.binary()} {sub()} {self.binary()} {sub()}",
            lambda: f"({sub()})",
            lambda: f"not {sub()}",
            lambda: f"-{sub()}",
            lambda: f"{sub()}|{self.filter()}",
            lambda: f"{name()}|{self.filter()}",
            lambda: f"{name()}|{self.filter()}|{self.filter()}",
            lambda: f"{name()} is {self.test()}",
            lambda: f"{sub()} is not {self.test()}",
            lambda: f"({sub()} if {sub()} else {sub()})",
            lambda: f"{sub()} if {sub()}",
            lambda: f"{name()}[{self.subscript()}]",
            lambda: f"{name()}.{self.pick('a', 'b', 'role', 'content', 'items', 'k', 'count')}",
            lambda: f"{name()}.{self.method()}",
            lambda: f"deep.a.b.c", lambda: f"deep['l'][0][{self.subscript()}]",
            lambda: f"[{sub()}, {sub()}]",
            lambda: f"{{'k': {sub()}, {self.string()}: {sub()}}}",
            lambda: f"range({self.pick('n', '5', '1, 4', '5, 0, -2')})|list",
            lambda: f"m({sub()})", lambda: f"m({sub()}, b={sub()})",
        )()

    def binary(self):
        return self.pick("+", "-", "*", "/", "//", "%", "**", "~", "~", "+", "==", "!=", "<", "<=",
                         ">", ">=", "and", "or", "and", "or", "in", "not in")

    def subscript(self):
        return self.pick("0", "1", "-1", "9", "'a'", "'items'", "'role'", "1:", ":1", "::-1", ":-1",
                         "1:3", "-2:", "::2", "n", "s", "n:", ":n", "::n", "2::-1", "none:1")

    def filter(self):
        return self.pick(
            "trim", "upper", "lower", "length", "count", "string", "list", "first", "last", "int",
            "float", "tojson", "tojson(indent=2)", "default('D')", "d('D', true)", "join",
            "join(', ')", "join('-', attribute='role')", "title", "capitalize", "reverse|list",
            "replace('l', 'L')", "replace('', '.')", "replace('a', 'bb', 1)", "items|list", "indent",
            "indent(2, true)", "indent('> ', blank=true)", "map('upper')|list", "trim('a ')",
            "map(attribute='role')|list", "map(attribute='a.b', default='?')|join",
            "selectattr('role')|list", "selectattr('role', 'equalto', 'user')|list|length",
            "rejectattr('k', '>', 0)|map(attribute='content')|join('|')", "select|list",
            "select('defined')|list", "reject('none')|list", "select('odd')|list", "int(7)",
            "tojson(sort_keys=true)", "tojson(separators=(',', ':'))", "tojson(ensure_ascii=true)",
            "map('length')|list", "map('default', 'q')|join", "float(1.5)", "map('first')|list")

    def test(self):
        return self.pick("defined", "undefined", "none", "string", "mapping", "sequence", "number",
                         "iterable", "boolean", "true", "false", "integer", "float", "odd", "even",
                         "divisibleby 2", "divisibleby(3)", "eq 1", "equalto('a')", "in [1, 'a']",
                         "lt 2", "ge(1)", "ne none")

    def method(self):
        return self.pick(
            "strip()", "lstrip()", "rstrip()", "strip('a ')", "split()", "split(',')", "split(' ', 1)",
            "rsplit(none, 1)", "split(none, 1)", "startswith('H')", "endswith(('d', 'c'))", "upper()",
            "lower()", "replace('a', 'b')", "title()", "capitalize()", "items()|list", "keys()|list",
            "values()|list", "get('a')", "get('q', 'def')", "join(['p', 'q'])", "rsplit(',', 1)[0]",
            "split('l')[-1]", "removeprefix('He')", "removesuffix('c')", "split(maxsplit=1)")

    def tag(self, mark, body):
        begin = self.pick("", "", "-", "-") if mark == "{" else self.pick("", "", "", "-", "+")
        end = self.pick("", "", "-") if mark == "{" else self.pick("", "", "", "-", "+")
        close = {"{": "}", "%": "%", "#": "#"}[mark]
        return f"{{{mark}{begin} {body} {end}{close}}}"

    def statement(self, depth, in_loop):
        block = lambda loop=in_loop: self.body(depth - 1, loop)
        tag = lambda body: self.tag("%", body)
        options = [lambda: self.tag("{", self.expression())] * 4 + [
            lambda: self.tag("#", "a comment"),
            lambda: tag(f"set {self.pick('x', 'y')} = {self.expression()}"),
            lambda: tag(f"set ns.v = {self.expression()}"),
        ]
        if depth > 0:
            options += [
                lambda: tag(f"if ({self.expression(2)})") + block() + tag("endif"),
                lambda: tag(f"if ({self.expression(2)})") + block() +
                tag(f"elif ({self.expression(1)})") + block() + tag("else") + block() + tag("endif"),
                lambda: tag(f"for x in {self.expression(1)}") + block(True) + tag("endfor"),
                lambda: tag(f"for x in {self.pick('xs', 'ys', 's', 'd')} if {self.expression(1)}") +
                block(True) + tag("else") + block() + tag("endfor"),
                lambda: tag(f"for k, v in d.items()") + block(True) + tag("endfor"),
                lambda: tag(f"for y in {self.pick('xs', 'ys', 'missing')}") + self.tag(
                    "{", "loop." + self.pick("index", "index0", "first", "last", "length",
                                             "revindex", "previtem", "nextitem", "cycle('p', 'q')",
                                             "depth")) + block(True) + tag("endfor"),
                lambda: tag("set x") + self.body(depth - 1, False) + tag("endset"),
                lambda: tag("generation") + self.body(depth - 1, False) + tag("endgeneration"),
                lambda: self.pick("{% raw %}", "{%- raw -%}\n") + " {{ x }} {% y %}\n" + tag("endraw"),
            ]
        if in_loop:
            options += [lambda: tag(f"if ({self.expression(1)})") + tag(self.pick("break", "continue"))
                        + tag("endif")]
        return self.pick(*options)()

    def body(self, depth, in_loop):
        parts = []
        for _ in range(self.random.randint(1, 3)):
            parts += [self.pick(*self.SPACES), self.statement(depth, in_loop),
                      self.pick(*self.SPACES)]
        return "".join(parts)

    def template(self):
        return self.PREFIX + self.body(self.random.randint(0, 2), False)

    def small(self):
        """Mostly one expression: the larger ones rarely survive their first error."""
        return self.PREFIX + "{{ " + self.expression(self.random.randint(1, 3)) + " }}"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("render_json")
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=20240607)
    parser.add_argument("--show", type=int, default=10)
    options = parser.parse_args()

    cases = [(t, CONTEXTS[c]) for t, names in TEMPLATES for c in names]
    written = len(cases)
    grammar = Grammar(options.seed)
    for i in range(options.count):
        cases.append((grammar.small() if i % 3 else grammar.template(), grammar.context()))

    requests = "".join(json.dumps({"template": t, "context": c}) + "\n" for t, c in cases)
    ours = subprocess.run([options.render_json], input=requests, capture_output=True, text=True,
                          check=True, encoding="utf-8").stdout.splitlines()
    if len(ours) != len(cases):
        print(f"FAILED: {len(cases)} templates, {len(ours)} answers")
        return 1

    env = environment()
    equal = raised = refused = 0
    failures = []
    for i, ((template, context), line) in enumerate(zip(cases, ours)):
        ours_answer, theirs = json.loads(line), jinja2_answer(env, template, context)
        if "text" in theirs and ours_answer.get("text") == theirs["text"]:
            equal += 1
        elif "error" in theirs and "error" in ours_answer:
            raised += 1
        elif i >= written and "error" in ours_answer and (
                ours_answer["at"] == "compile" or any(r in ours_answer["error"] for r in REFUSALS)):
            refused += 1
        elif "text" in theirs and " object at 0x" in theirs["text"]:
            refused += 1  # an address in memory is no text to agree on
        else:
            failures.append((template, context, theirs, ours_answer))
    print(f"{len(cases)} templates ({written} written): {equal} equal texts, {raised} errors on both "
          f"sides, {refused} refused by ours alone, {len(failures)} different")
    for template, context, theirs, ours_answer in failures[:options.show]:
        print(f"\ntemplate {template!r}\ncontext  {context!r}\njinja2   {theirs!r}\nours     "
              f"{ours_answer!r}")
    return 1 if failures or equal < len(cases) // 3 else 0


if __name__ == "__main__":
    sys.exit(main())
