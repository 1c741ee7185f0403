"""Small chat templates of our own, one for each way in which the templates of well-known models differ."""

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# An answer behind the last question gets a block of reasoning, empty if there is none; earlier ones lose theirs.
LAST_TURN_DIFFERS = """
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
    {%- set content = m.content %}
    {%- set reasoning = m.reasoning_content or '' %}
    {%- if m.role == 'assistant' and '</think>' in content %}
        {%- set reasoning = content.split('</think>')[0].split('<think>')[-1] %}
        {%- set content = content.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {{- '<|im_start|>' + m.role + '\n' }}
    {%- if m.role == 'assistant' and loop.index0 > ns.last %}
        {{- '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' }}
    {%- endif %}
    {{- content }}
    {%- for call in m.tool_calls or [] %}
        {{- '<tool_call>\n' + call.function | tojson + '\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""

# Everything up to </think> is cut out of every answer.
REASONING_CUT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}"
    "{% elif m.role == 'assistant' %}<|Assistant|>{{ m.content.split('</think>')[-1] }}<|im_end|>"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|Assistant|>{% endif %}"
)

# The prompt opens a block of reasoning that finished answers do not have.
PROMPT_OPENS_THINK = REASONING_CUT.replace("%}<|Assistant|>{% endif %}", "%}<|Assistant|><think>\n{% endif %}")

# The prompt opens a block of reasoning that every answer has.
PROMPT_SHARES_THINK = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n"
    "{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)

# Contents are walked part by part; of a string nothing is written.
PARTS_ONLY = (
    "{% for m in messages %}<|im_start|>{{ m.role }}: {% for part in m.content %}{% if part is mapping %}"
    "{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
)

# A text ends in the tokenizer's end token, once.
END_AT_THE_END = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}<|endoftext|>{% endif %}"
)

# The last answer ends in one token, earlier ones in another.
LAST_END_DIFFERS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}<|channel|>{{ m.content }}"
    "{% if loop.last %}<|endoftext|>{% else %}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)

# So it is here, behind the template's own words. Results are JSON text, whose quote stands before their end.
LAST_END_DIFFERS_AND_QUOTES = "<|im_start|>system<|channel|>You are kind.<|im_end|>" + LAST_END_DIFFERS.replace(
    "{{ m.content }}", "{{ m.content | tojson if m.role == 'tool' else m.content }}"
)

# An answer's end is written with the next question, so the last answer has none.
END_WITH_THE_NEXT = (
    "{% for m in messages %}{% if m.role == 'user' %}{% if not loop.first and messages[loop.index0 - 1].role == "
    "'assistant' %}<|im_end|>{% endif %}<|User|>{{ m.content }}{% elif m.role == 'assistant' %}<|Assistant|>"
    "{{ m.content }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|>{% endif %}"
)

# Earlier answers end, but not one behind which nothing stands. A system message stands before all questions.
LAST_HAS_NO_END = "<|im_start|>system\nBe kind.<|im_end|>\n" + CHATML.replace(
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}",
    "{% if add_generation_prompt or not loop.last %}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}",
)

# Turns have headers and no ends; the text has one.
TEXT_ENDS = (
    "{% for m in messages %}{{ {'user': '<|User|>', 'assistant': '<|Assistant|>'}[m.role] or '' }}{{ m.content }}"
    "{% endfor %}{% if add_generation_prompt %}<|Assistant|>{% else %}<|im_end|>{% endif %}"
)

# A prompt, in words or in tokens, stands behind every text, asked for or not.
ALWAYS_ASKS = CHATML.replace("{% if add_generation_prompt %}", "{{ '").replace(
    "assistant\n{% endif %}", "assistant\n' }}"
)
ALWAYS_ASKS_IN_WORDS = (
    "{% for m in messages %}{{ {'user': '### User:\n', 'assistant': '### Answer:\n'}[m.role] or '' }}{{ m.content }}"
    "{{ '\n<|im_end|>\n' if m.role == 'assistant' else '\n' }}{% endfor %}{{ '### Answer:\n' }}"
)
ALWAYS_ASKS_IN_TOKENS = (
    "{% for m in messages %}{{ {'user': '<|User|>', 'assistant': '<|Assistant|>'}[m.role] or '' }}{{ m.content }}"
    "<|im_end|>{% endfor %}<|Assistant|>"
)

BEGINS_TO_ASK = (
    "{% for m in messages %}<|im_start|>"
    "{{ {'user': '<|User|>', 'assistant': '<|Assistant|><|channel|>'}[m.role] or '' }}"
    "{{ m.content }}<|im_end|>{% endfor %}<|im_start|><|Assistant|>{% if add_generation_prompt %}<|channel|>{% endif %}"
)

# The template's own words stand behind every conversation, in front of the prompt.
INSTRUCTION_AT_THE_END = (
    "{% for m in messages %}<|im_start|>{{ '<|Assistant|>' if m.role == 'assistant' else '<|User|>' }}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}\n{% else %}<|im_end|>{% endfor %}{% endfor %}"
    "<|im_start|><|User|>Write an action.<|im_end|>{% if add_generation_prompt %}<|im_start|><|Assistant|>{% endif %}"
)

# The prompt goes on with words, or with an empty channel of thoughts, that no finished answer has.
PROMPT_GOES_ON = CHATML.replace("assistant\n{% endif %}", "assistant\nMy reasoning:\n{% endif %}")
PROMPT_HAS_CHANNEL = CHATML.replace("assistant\n{% endif %}", "assistant\n<|channel>thought\n<channel|>{% endif %}")

# Roles must alternate, there is none for the system, and contents are trimmed.
ALTERNATING = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}<|im_start|>"
    "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)

# Its author marks what the assistant writes.
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Tools in the system message; arguments of calls as JSON, one tag for each argument, or as text that the data give.
TOOLS = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for call in m.tool_calls or [] %}CALL<|im_end|>"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS_AS_JSON = TOOLS.replace("CALL<|im_end|>", "<tool_call>{{ call.function | tojson }}</tool_call>")
TOOLS_AS_TAGS = TOOLS.replace(
    "CALL<|im_end|>",
    "<function={{ call.function.name }}>{% for key, value in call.function.arguments.items() %}<parameter={{ key }}>\n"
    "{{ value if value is string else value | tojson }}\n</parameter>{% endfor %}</function>",
)
TOOLS_AS_TEXT = TOOLS.replace(
    "CALL<|im_end|>", "{{ '<tool_call>' + call.function.name + '\n' + call.function.arguments + '</tool_call>' }}"
)

# Calls are written by a message without content only.
CALLS_WITHOUT_CONTENT = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|Assistant|>{% if m.content is none %}"
    "{% for call in m.tool_calls %}{{ call.function | tojson }}{% endfor %}{% else %}{{ m.content }}{% endif %}"
    "<|im_end|>{% else %}<|User|>{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|>{% endif %}"
)

# Beside its calls a message's content, empty or not, is an answer of its own.
CALLS_BESIDE_AN_ANSWER = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% if m.tool_calls %}<|Assistant|>"
    "{% for call in m.tool_calls %}{{ call.function | tojson }}{% endfor %}<|im_end|>{% endif %}"
    "{% if m.content is not none %}<|Assistant|>{{ m.content }}<|im_end|>{% endif %}"
    "{% else %}<|User|>{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|Assistant|>{% endif %}"
)

# A call has its number once its result is known.
CALLS_ARE_NUMBERED = (
    "{% set ns = namespace(known=false) %}{% for m in messages %}{% if m.role == 'tool' %}{% set ns.known = true %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}[{{ call.function.name }}({{ call.function.arguments | tojson }}"
    "{% if ns.known %}, 1{% endif %})]{% endfor %}{% if not loop.last %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_end|>\n<|im_start|>assistant\n{% endif %}"
)

# The system header holds the day.
CLOCK = "<|im_start|>system\nToday Date: {{ strftime_now('%d %b %Y') }}<|im_end|>\n" + CHATML

# Without special tokens of any kind.
PLAIN = (
    "{% for m in messages %}{% if m.role == 'user' %}### User: {{ m.content }}\n\n{% elif m.role == 'assistant' %}"
    "### Assistant: {{ m.content }}\n\n{% else %}{{ m.content }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### Assistant:{% endif %}"
)
