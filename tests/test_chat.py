"""Chat templates against transformers' rendering of them."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from pyggml_bridge.chat import ChatTemplate
from pyggml_bridge.errors import CQError
from pyggml_bridge.tokenizer import Tokenizer
from tests.byte_tokenizer import GPT2, SPECIAL, byte_keys, train

TEMPLATES = {
    "chatml": byte_keys()["tokenizer.chat_template"],
    "blocks": "{{ bos_token }}\n{% for m in messages %}\n  {% if m.role=='user' %}\n[INST] {{ m.content|trim }} [/INST]"
    "\n  {% else %}{{ m.content }}{{ eos_token }}\n  {% endif %}\n{% endfor %}",
    "json": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m | tojson }}"
    "{{ m.role|tojson(indent=2) }}{% endfor %}{% if tools is none %}no tools{% endif %}{{ strftime_now('%Y') }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_in_transformers(name):
    tokenizer = Tokenizer.from_metadata(byte_keys())
    reference = PreTrainedTokenizerFast(tokenizer_object=train(GPT2), bos_token=SPECIAL[1], eos_token=SPECIAL[2])
    messages = [
        {"role": "system", "content": "Be <brief> & 'exact'."},
        {"role": "user", "content": "  Größe? \n"},
        {"role": "assistant", "content": "日本"},
        {"role": "user", "content": "{{ 7 * 7 }}"},
    ]
    template = ChatTemplate(TEMPLATES[name], tokenizer)
    for add in (True, False):
        expected = reference.apply_chat_template(
            messages, chat_template=TEMPLATES[name], tokenize=False, add_generation_prompt=add
        )
        assert template.render(messages, add_generation_prompt=add) == expected


def test_keys_of_another_type_hold_no_template_and_no_end():
    keys = byte_keys() | {"tokenizer.chat_template": 7, "tokenizer.chat_templates": 8, "cq.eos_token_ids": 9}
    tokenizer = Tokenizer.from_metadata(keys)
    assert ChatTemplate.from_metadata(keys, tokenizer) is None and tokenizer.eos_ids == {2}


def test_template_errors_are_one_line_errors():
    tokenizer = Tokenizer.from_metadata(byte_keys())
    with pytest.raises(CQError, match=r"tokenizer\.chat_template"):
        ChatTemplate("{% for %}", tokenizer)
    refusing = ChatTemplate("{{ raise_exception('System role not supported') }}", tokenizer)
    with pytest.raises(CQError, match="System role not supported"):
        refusing.render([])
    with pytest.raises(CQError, match="unsafe"):
        ChatTemplate("{{ ''.__class__.__mro__[1].__subclasses__() }}", tokenizer).render([])
