"""Tiny model folders on disk, as a user would have them: weights, config and tokenizer."""

import json
import pathlib

import numpy as np
import safetensors.numpy
import tokenizers
import transformers

CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tokenizer(chat: bool = True) -> transformers.PreTrainedTokenizerFast:
    """One token a byte, and the specials."""
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    vocab = {symbol: i for i, symbol in enumerate(sorted(alphabet))}
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|user|>", "<|assistant|>", "<|system|>"],
    )
    if chat:
        made.chat_template = CHAT
    return made


def save(folder: pathlib.Path, settings: transformers.PretrainedConfig, shapes: dict) -> None:
    """Writes config.json and random weights, as transformers does: vectors of scales are 1."""
    rng = np.random.default_rng(0)
    weights = {
        name: np.ones(shape, np.float32)
        if name.lower().endswith("norm.weight")
        else rng.normal(0, settings.initializer_range, shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    settings.save_pretrained(folder)
    safetensors.numpy.save_file(weights, folder / "model.safetensors", {"format": "pt"})


def decoder(folder: pathlib.Path, chat: bool = True) -> pathlib.Path:
    """A Llama of two layers, 16 wide."""
    tok = tokenizer(chat)
    settings = transformers.LlamaConfig(
        vocab_size=len(tok), hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512,
        tie_word_embeddings=True, initializer_range=0.2,
        architectures=["LlamaForCausalLM"], dtype="float32",
    )  # fmt: skip
    layer = {
        "input_layernorm": (16,), "post_attention_layernorm": (16,),
        "self_attn.q_proj": (16, 16), "self_attn.k_proj": (8, 16), "self_attn.v_proj": (8, 16),
        "self_attn.o_proj": (16, 16),
        "mlp.gate_proj": (24, 16), "mlp.up_proj": (24, 16), "mlp.down_proj": (16, 24),
    }  # fmt: skip
    shapes = {"model.embed_tokens.weight": (len(tok), 16), "model.norm.weight": (16,)}
    for i in range(2):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    save(folder, settings, shapes)
    tok.save_pretrained(folder)
    return folder


def encoder(folder: pathlib.Path) -> pathlib.Path:
    """A BERT of two layers, 16 wide, over letters and digits."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz0123456789"]
    words += [f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz0123456789"]
    settings = transformers.BertConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=256,
        architectures=["BertModel"], dtype="float32",
    )  # fmt: skip
    rows = {"word_embeddings": len(words), "position_embeddings": 256, "token_type_embeddings": 2}
    linears = {
        "attention.self.query": (16, 16), "attention.self.key": (16, 16),
        "attention.self.value": (16, 16), "attention.output.dense": (16, 16),
        "intermediate.dense": (24, 16), "output.dense": (16, 24),
    }  # fmt: skip
    shapes = {f"embeddings.{name}.weight": (count, 16) for name, count in rows.items()}
    layers = [f"encoder.layer.{i}" for i in range(2)]
    shapes |= {f"{at}.{name}.weight": shape for at in layers for name, shape in linears.items()}
    shapes |= {f"{at}.{name}.bias": shape[:1] for at in layers for name, shape in linears.items()}
    norms = [
        "embeddings",
        *(f"{at}.{part}" for at in layers for part in ("attention.output", "output")),
    ]
    shapes |= {f"{at}.LayerNorm.{part}": (16,) for at in norms for part in ("weight", "bias")}
    shapes |= {"pooler.dense.weight": (16, 16), "pooler.dense.bias": (16,)}
    save(folder, settings, shapes)
    core = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]")
    )
    core.normalizer = tokenizers.normalizers.BertNormalizer()
    core.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]",
        sep_token="[SEP]", mask_token="[MASK]",
    ).save_pretrained(folder)  # fmt: skip
    return folder


def pool_rows(count: int) -> list[dict]:
    return [
        {
            "id": f"ex-{i:03d}",
            "source": "even" if i % 2 == 0 else "odd",
            "question": f"what is {i} plus {i % 7}",
            "reasoning": "we add " * (1 + i % 5),
            "answer": f"it is {i + i % 7}",
            "difficulty_knowledge": 1 + i % 5,
            "difficulty_reasoning": 1 + i % 4,
            "difficulty_overall": 1 + (i * 7) % 5,
        }
        for i in range(count)
    ]


def preference_rows(count: int) -> list[dict]:
    return [
        {
            "id": f"pair-{i:02d}",
            "question": f"what is {i} plus {i % 3}",
            "chosen": {"reasoning": "we add " * (1 + i % 3), "answer": f"it is {i + i % 3}"},
            "rejected": f"it is {7 * i + 1}",
        }
        for i in range(count)
    ]


def choice_rows(count: int, prefix: str) -> list[dict]:
    return [
        {
            "id": f"{prefix}-{i}",
            "task": "sums" if i % 2 else "products",
            "question": f"{prefix} {i} and {i + 1}",
            "options": {"A": str(2 * i + 1), "B": str(i), "C": "none of these"},
            "answer_idx": "ABC"[i % 3],
        }
        for i in range(count)
    ]


def write(path: pathlib.Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
