"""Makes chat_templates.json: chats rendered by transformers (5.23.0), for tests/data_pipeline/test_tokenizer.py.

    python make_chat_templates.py    # in an environment with transformers; the project itself does not need it

The template `deepseek_r1` is that of DeepSeek-R1's tokenizer_config.json (MIT).
"""

import json
from pathlib import Path

from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).parent
DEEPSEEK_R1 = json.loads((HERE / "chat_templates.json").read_text())["templates"]["deepseek_r1"]

# White space control, loop controls, tojson unescaped, tools, a generation block, variables: what templates on the hub make use of.
FEATURES = """{% for message in messages %}
    {% if loop.index > 4 %}
        {% break %}
    {% endif %}
    {% if message.role == 'skip' %}{% continue %}{% endif %}
    {{ message.role | upper }}: {% generation %}{{ message.content | trim }}{% endgeneration %}

{% endfor %}
{% if tools %}
{{ tools | tojson }}
{{ tools | tojson(indent=2) }}
{% endif %}
{{ documents is none }} {{ style | default('plain') }}
{% if add_generation_prompt %}
ASSISTANT:{% endif %}
"""

CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"place": "巴黎"}'}}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "<b>it's</b> & 天气", "parameters": {"type": "object"}}}]
CHATS = {
    "one_turn": [{"role": "user", "content": "Hello, 世界"}],
    "system_and_turns": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "  2+2?\n"},
        {"role": "assistant", "content": "<think>easy</think>4"},
        {"role": "skip", "content": "not shown"},
        {"role": "user", "content": "<|x|> & \"quotes\" 'n' all"},
    ],
    "tools": [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "Let me look.", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "sun"},
        {"role": "tool", "content": "rain"},
        {"role": "assistant", "content": "Mixed."},
    ],
}


def main():
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(HERE / "tokenizer.json"), bos_token="<｜begin▁of▁sentence｜>")
    tokenizer.eos_token = "<｜end▁of▁sentence｜>"
    templates = {"deepseek_r1": DEEPSEEK_R1, "features": FEATURES}
    cases = [
        {"template": template, "messages": chat, "tools": tools, "add_generation_prompt": prompt, "variables": variables}
        for template in templates
        for chat in CHATS.values()
        for tools in (None, TOOLS)
        for prompt in (False, True)
        for variables in ({}, {"style": "fancy"})
    ]
    for case in cases:
        case["rendered"] = tokenizer.apply_chat_template(
            case["messages"],
            chat_template=templates[case["template"]],
            tools=case["tools"],
            add_generation_prompt=case["add_generation_prompt"],
            tokenize=False,
            **case["variables"],
        )
    text = json.dumps({"templates": templates, "cases": cases}, ensure_ascii=False, indent=1)
    (HERE / "chat_templates.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
