"""Chat templates that write tools: those that TRL ships, and short ones in the style of other families."""

import re
from importlib.util import find_spec
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

_TRL = Path(find_spec("trl").origin).parent / "chat_templates"
# Template of TRL -> ends of a turn that calls tools, and of another one
_OF_TRL = {
    "qwen2_5": ("<|im_end|>", "<|im_end|>"),
    "qwen3": ("<|im_end|>", "<|im_end|>"),
    "qwen3_instruct_2507": ("<|im_end|>", "<|im_end|>"),
    "qwen3_8": ("<|im_end|>", "<|im_end|>"),
    "llama3_1": ("<|eot_id|>", "<|eot_id|>"),
    "llama3_2": ("<|eot_id|>", "<|eot_id|>"),
    "lfm2_v2": ("<|im_end|>", "<|im_end|>"),
    "gptoss": ("<|call|>", "<|return|>"),
    "gemma4_v5": ("<|tool_response>", "<turn|>"),
    "glm4moe": ("<|observation|>", None),  # the next turn's header ends a turn; the encoder adds EOS to the last one
}
# As the template of Mistral 7B Instruct v0.3: ids of nine characters, and calls in one list
MISTRAL = """{{ bos_token }}
{%- if tools %}{{ '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}
{%- elif m.tool_calls %}{{ '[TOOL_CALLS] [' }}{% for c in m.tool_calls %}
{%- if c.id | length != 9 %}{{ raise_exception('Tool call IDs should be strings of length 9!') }}{% endif %}
{{- (c.function | tojson)[:-1] + ', "id": "' + c.id + '"}' }}{{ ', ' if not loop.last else ']' + eos_token }}
{%- endfor %}
{%- elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}
{%- elif m.role == 'tool' %}
{{- '[TOOL_RESULTS] {"content": ' + m.content + ', "call_id": "' + m.tool_call_id + '"}[/TOOL_RESULTS]' }}
{%- endif %}{% endfor %}"""
# As the templates of DeepSeek: arguments are a string
DEEPSEEK = """{{ bos_token }}
{%- if tools %}{{ '## Tools' }}{% for t in tools %}{{ '\\n' + t.function | tojson }}{% endfor %}{% endif %}
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '<｜User｜>' + m.content }}
{%- elif m.tool_calls %}{{ '<｜Assistant｜>' + m.content + '<｜tool▁calls▁begin｜>' }}{% for c in m.tool_calls %}
{{- '<｜tool▁call▁begin｜>' + c.function.name + '<｜tool▁sep｜>' + c.function.arguments + '<｜tool▁call▁end｜>' }}
{%- endfor %}{{ '<｜tool▁calls▁end｜><｜end▁of▁sentence｜>' }}
{%- elif m.role == 'assistant' %}{{ '<｜Assistant｜>' + m.content + '<｜end▁of▁sentence｜>' }}
{%- elif m.role == 'tool' %}{{ '<｜tool▁output▁begin｜>' + m.content + '<｜tool▁output▁end｜>' }}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"""
# As Hermes 2 Pro
HERMES = """{{ bos_token }}
{%- if tools %}{{ '<|im_start|>system\\nYou call functions.\\n<tools>' }}
{%- for t in tools %}{{ t | tojson + '\\n' }}{% endfor %}{{ '</tools><|im_end|>\\n' }}{% endif %}
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'tool' %}{{ '<tool_response>\\n' + m.content + '\\n</tool_response>' }}
{%- else %}{{ m.content }}{% for c in m.tool_calls or [] %}
{{- '\\n<tool_call>\\n{"arguments": ' + c.function.arguments | tojson }}
{{- ', "name": "' + c.function.name + '"}\\n</tool_call>' }}{% endfor %}{% endif %}
{{- '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

TOOL_TEMPLATES = {  # name -> source, and the ends of turns
    **{
        name: ((_TRL / f"{name}.jinja").read_text("utf-8"), *ends)
        for name, ends in _OF_TRL.items()
        if (_TRL / f"{name}.jinja").is_file()
    },
    "mistral": (MISTRAL, "</s>", "</s>"),
    "deepseek": (DEEPSEEK, "<｜end▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "hermes": (HERMES, "<|im_end|>", "<|im_end|>"),
}
MARKUP = re.compile(r"<\|[^|<>\s]{1,40}\|>|<[a-z_]+\|>|<\|[a-z_]+>|<｜[^｜\s]+｜>|\[/?[A-Z_]{4,}\]")


def tool_tokenizer(source):
    """Return a byte-level tokenizer with the special tokens that a template writes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["the weather in the city is fine"], trainer)
    special = dict.fromkeys(["<s>", "</s>", "<|im_start|>", "<|im_end|>", *MARKUP.findall(source)])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    written = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<arg_value>", "</arg_value>")
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in written])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=source, bos_token="<s>", eos_token="</s>")
