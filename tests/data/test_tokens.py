"""Our tokens are those of the rendered conversation, tokenised as a whole, for ten tokenizers."""

import functools
import string

import hypothesis
import pytest
import tiny
import tokenizers
import transformers
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from diq_jax import errors
from diq_jax.data import chat, example
from diq_jax.data import encoded as encoded_lib
from diq_jax.models import tokenizer as tokenizer_lib

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]"]
CORPUS = [
    "The patient is given 12.5 mg of the drug, and isn't better after 3 days.",
    "Which vitamin prevents scurvy?\n\nIt is vitamin C, found in citrus fruit.\n",
    "Reasoning:\n\n1. The bone of the upper arm\n2. is called the humerus.",
    "<think>\nwe think\n</think>\n\nThe answer is B.  naïve café",
    "assistant user Question: Answer:",
] * 3
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ZEPHYR = (  # no special token in its headers
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
LLAMA2 = (  # no generation prompt, and a space before and after what the assistant says
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content"
    " + ' [/INST]' }}{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
HEADERLESS = CHATML.partition("{% if add")[0]  # forgets the generation prompt
PARTS = CHATML.replace("m.content", "m.content[0]['text']")
TEMPLATES = {
    "chatml": CHATML, "zephyr": ZEPHYR, "llama2": LLAMA2, "headerless": HEADERLESS, "parts": PARTS,
}  # fmt: skip


def byte_level(*splits, nfc=False, ignore_merges=False):
    core = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if nfc:
        core.normalizer = normalizers.NFC()
    cuts = [pre_tokenizers.Split(tokenizers.Regex(split), "isolated") for split in splits]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([*cuts, to_bytes])
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=500,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return core


def sentencepiece(model, trainer, normalizer, pre_tokenizer):
    core = tokenizers.Tokenizer(model)
    core.pre_tokenizer = pre_tokenizers.Metaspace()  # no piece goes over a space
    core.train_from_iterator([line for text in CORPUS for line in text.splitlines()], trainer)
    core.normalizer, core.pre_tokenizer = normalizer, pre_tokenizer
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return core


def spelled_in_bytes():
    """BPE that spells what it does not know, and its trainer."""
    trainer = trainers.BpeTrainer(
        vocab_size=600, show_progress=False,
        special_tokens=[*SPECIAL, *(f"<0x{i:02X}>" for i in range(256))],
    )  # fmt: skip
    return models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True), trainer


def unigram():
    trainer = trainers.UnigramTrainer(
        vocab_size=250, unk_token="<unk>", special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=list(string.printable),
    )  # fmt: skip
    return models.Unigram(), trainer


def wordpiece():
    core = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
    core.normalizer = normalizers.BertNormalizer(lowercase=False)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    core.train_from_iterator(
        CORPUS,
        trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False),
    )
    return core


def words_with_spaces(scheme):
    return pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)


def legacy():
    return normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


CORES = {
    "gpt2": lambda: byte_level(tokenizer_lib.GPT2),
    "llama3": lambda: byte_level(tokenizer_lib.LLAMA3, ignore_merges=True),
    "qwen2": lambda: byte_level(tokenizer_lib.LLAMA3.replace("{1,3}", ""), nfc=True),
    "tekken": lambda: byte_level(tokenizer_lib.TEKKEN, ignore_merges=True),
    "llama2": lambda: sentencepiece(*spelled_in_bytes(), legacy(), None),
    "mistral": lambda: sentencepiece(*spelled_in_bytes(), None, words_with_spaces("first")),
    "gemma": lambda: sentencepiece(
        *spelled_in_bytes(),
        normalizers.Replace(" ", "▁"),
        pre_tokenizers.Split(" ", "merged_with_previous"),
    ),
    "t5": lambda: sentencepiece(*unigram(), None, pre_tokenizers.Metaspace()),
    "bert": wordpiece,
}


@functools.cache
def make_tokenizer(kind):
    if kind == "smollm2":
        return tokenizer_lib.load_tokenizer(tiny.SMOLLM, "model.path")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=CORES[kind](), unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        additional_special_tokens=SPECIAL[3:],
    )  # fmt: skip


@functools.cache
def make_layout(kind, template):
    tokenizer = make_tokenizer(kind)
    tokenizer.chat_template = TEMPLATES.get(template)
    return chat.make_layout(tokenizer, len(tokenizer), "2024-07-26", "model.path")


def ids_of(layout, text):
    return layout.tokenizer(text, add_special_tokens=False)["input_ids"]


def rendered(layout, template, question, answer):
    """(prompt, whole up to what ends the answer) by transformers, and of the plain template."""
    if template == "none":
        prompt = f"Question: {question}\n\nAnswer:"
        return prompt, f"{prompt} {answer}{layout.tokenizer.eos_token}"
    says = [question, answer]
    if template == "parts":
        says = [[{"type": "text", "text": text}] for text in says]
    messages = [
        {"role": role, "content": text}
        for role, text in zip(("user", "assistant"), says, strict=True)
    ]
    layout.tokenizer.chat_template = TEMPLATES[template]
    prompt, whole = (
        layout.tokenizer.apply_chat_template(m, tokenize=False, add_generation_prompt=generate)
        for m, generate in ((messages[:1], True), (messages, False))
    )
    if template == "headerless":
        prompt += "<|im_start|>assistant\n"
    return prompt, whole.removesuffix("\n")


def encoded(layout, question, answer):
    row = example.Example("x", question, "", answer, row={})
    [made], outcomes, _ = encoded_lib.encode_all([row], layout, "plain", 10**6, "error")
    assert outcomes == {"whole": 1}
    scored = made.labels != example.IGNORED
    [prompt] = chat.prompt_ids([row], layout)
    # What generation sees is what is not scored, and the labels are the tokens after it.
    assert made.input_ids[~scored].tolist() == prompt
    assert made.labels[scored].tolist() == made.input_ids[len(prompt) :].tolist()
    assert tuple(made.input_ids[-len(layout.end_ids) :]) == layout.end_ids
    return prompt, made.input_ids.tolist()


KINDS = [*CORES, "smollm2"]
KNOWN = "The vitamin bone is called 12.5 mg, scurvy? B. naïve isn't humerus (3)".split()
words = st.lists(
    st.sampled_from(KNOWN) | st.text("abcXYZ.,:0123", min_size=1, max_size=6),
    min_size=1,
    max_size=8,
).map(" ".join)
texts = st.text(
    st.sampled_from("ab T1.\n\t  :éﬁ\u0301▁日🩺<>|") | st.characters(exclude_categories=["Cs"]),
    min_size=1,
    max_size=20,
).filter(str.strip)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", [*TEMPLATES, "none"])
@hypothesis.settings(max_examples=12, deadline=None, derandomize=True)
@hypothesis.given(question=words, answer=words)
def test_render_whole_tokenize_whole(kind, template, question, answer):
    layout = open_layout(kind, template)
    prompt, ours = encoded(layout, question, answer)
    before, whole = rendered(layout, template, question, answer)
    assert prompt == ids_of(layout, before)
    assert ours == ids_of(layout, whole)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", [*TEMPLATES, "none"])
@hypothesis.settings(max_examples=12, deadline=None, derandomize=True)
@hypothesis.given(question=texts, answer=texts)
def test_any_text_keeps_the_prompt_of_generation(kind, template, question, answer):
    """Where no token stands across a border the whole's tokens are ours; else they spell the same
    text, as bytes do.
    """
    layout = open_layout(kind, template)
    prompt, ours = encoded(layout, question, answer)
    before, whole = rendered(layout, template, question, answer)
    ids = ids_of(layout, whole)
    assert prompt == ids_of(layout, before)
    end = list(layout.end_ids)
    # Unknown characters beside a border are one unknown token: then nothing is left between.
    between = len(ids) > len(prompt) + len(end)
    if ids[: len(prompt)] == prompt and ids[-len(end) :] == end and between:
        assert ours == ids
    elif kind in ("gpt2", "llama3", "qwen2", "tekken", "smollm2"):
        assert layout.tokenizer.decode(ours) == layout.tokenizer.decode(ids)


def open_layout(kind, template):
    try:
        return make_layout(kind, template)
    except errors.UserError as e:
        if kind == "smollm2":
            pytest.skip(str(e))
        raise
