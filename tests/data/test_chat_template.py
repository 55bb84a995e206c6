"""A chat template gives what transformers gives, and cannot harm."""

import time

import pytest
import transformers

from diq_jax import errors
from diq_jax.data import chat_template

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": 'Why <b>\u00e9 "it" isn\'t?\n'},
    {"role": "assistant", "content": "So."},
]


def render(template, messages=MESSAGES, generate=True, **variables):
    made = chat_template.ChatTemplate(template, variables, "2024-07-26", "model.path")
    return made.render(messages, generate)


@pytest.mark.parametrize("generate", [False, True])
@pytest.mark.parametrize(
    "template",
    [
        "{{ bos_token }}{% for m in messages %}\n  {{ m['content'] | trim }}\n{% endfor %}\n",
        "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}{{ add_generation_prompt }}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% if loop.last %}{% break %}"
        "{% endif %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}{{ dict(a=1) }}",
        "{%- for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor -%} x",
        "{{ tools is none }}{{ tools is defined }}{{ documents }}{{ date_string is defined }}",
        "{% for m in messages[::-1] %}{{ m.get('content').split()[-1] }}{{ m.x is string }}"
        "{% endfor %}",
    ],
)
def test_as_transformers_renders_it(template, generate):
    reference = transformers.utils.chat_template_utils.render_jinja_template
    expected, _ = reference(
        [MESSAGES], chat_template=template, add_generation_prompt=generate, bos_token="<s>"
    )
    assert render(template, generate=generate, bos_token="<s>") == expected[0]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no system message') }}", "TemplateError: no system message"),
        ("{% if %}", "TemplateSyntaxError: Expected an expression"),
        ("{{ messages[0].content + 1 }}", "TypeError: can only concatenate str"),
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{{ a.b.c }}", "UndefinedError: 'a' is undefined"),
        ("{{ messages.__class__.__mro__ }}", "SecurityError: access to attribute '__class__'"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError: maximum recursion"),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "OverflowError: Range too big"),
        ("{{ 'a' * 10 ** 10 }}", "needs more than 1,024 MiB"),
        ("{% set n = namespace(s='a') %}{% for i in range(40) %}{% set n.s = n.s + n.s %}"
         "{% endfor %}", "needs more than 1,024 MiB"),
        ("{{ 'a' * 10 ** 8 }}", "writes 100,000,000 characters"),
        ("{{ raise_exception('a' * 10 ** 6) }}", "TemplateError: a+"),
    ],
)  # fmt: skip
def test_whatever_it_raises_is_one_short_sentence(template, message):
    expected = rf"^model\.path has a chat template that fails: .*{message}"
    with pytest.raises(errors.UserError, match=expected) as caught:
        render(template)
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


def test_half_of_a_surrogate_pair_is_refused():
    with pytest.raises(errors.UserError, match="half of a surrogate pair"):
        render("{{ '\\ud800' }}")


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 7 ** (messages | length * 10 ** 8) }}",  # one operation of the interpreter
    ],
)
def test_an_endless_template_is_ended(template, monkeypatch):
    monkeypatch.setattr(chat_template, "MOST_SECONDS", 0.5)
    start = time.process_time()
    with pytest.raises(errors.UserError, match=r"fails: it runs for more than .* s on one conv"):
        render(template)
    assert time.process_time() - start < 5


def test_it_goes_on_after_a_failure():
    source = "{{ raise_exception('empty') if messages[0].content == '' else messages[0].content }}"
    made = chat_template.ChatTemplate(source, {}, "2024-07-26", "model.path")
    for _ in range(2):
        assert made.render([{"role": "user", "content": "yes"}], True) == "yes"
        with pytest.raises(errors.UserError, match="TemplateError: empty"):
            made.render([{"role": "user", "content": ""}], True)
