"""LoRA: the adapted forward pass is the merged one, PEFT reads what we write and the other way."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny
import transformers
from reference import peft, torch

from diq_jax import errors, trees
from diq_jax.models import config, decoder, export, hf, layers, lora

# PEFT asks transformers for a property that transformers 5 renames.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

CFG = config.decoder_config(tiny.HF_CONFIG, "test")
TARGETS = "(q|v|down)_proj"
TOKENS = np.array([[5, 9, 2, 40, 63, 7], [1, 1, 30, 8, 22, 50]], np.int32)


@pytest.fixture(scope="module")
def params():
    # Ten times the usual spread, so that an adapter's effect stands clear of rounding.
    params = decoder.init(jax.random.key(0), CFG, jnp.float32)
    return trees.map_named(lambda name, x: 10 * x if "kernel" in name else x, params)


@pytest.fixture
def adapter():
    key = jax.random.key(1)
    return lora.init(key, CFG, TARGETS, rank=3, alpha=6.0, zero_b=False, field="test")


@jax.jit
def logits(params, adapter=None):
    positions = np.broadcast_to(np.arange(6), TOKENS.shape)
    hidden = decoder.apply(params, CFG, TOKENS, positions, np.ones_like(TOKENS), adapter)
    return decoder.logits(params, CFG, hidden)


def torch_base(params):
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**tiny.HF_CONFIG))
    state = {name: torch.from_numpy(array.copy()) for name, array in hf.decoder_tensors(params)}
    model.load_state_dict({**state, "lm_head.weight": state["model.embed_tokens.weight"]})
    return model.eval()


def torch_logits(model):
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS).long()).logits.numpy()


def test_adapter_equals_merged_weights(params, adapter):
    merged = jax.tree.map(lambda x: x, params)
    for group, module in (("attn", "q_proj"), ("attn", "v_proj"), ("mlp", "down_proj")):
        leaves = adapter["layers"][group][module]
        change = (leaves["a"] @ leaves["b"]) * leaves["scale"][:, None, None]
        node = merged["layers"][group][module]
        merged["layers"][group][module] = node | {"kernel": node["kernel"] + change}
    assert np.abs(logits(params, adapter) - logits(params)).max() > 0.1
    np.testing.assert_allclose(logits(params, adapter), logits(merged), atol=2e-5)


def test_zero_b_changes_nothing(params):
    adapter = lora.init(jax.random.key(1), CFG, TARGETS, 3, 6.0, zero_b=True, field="test")
    np.testing.assert_array_equal(logits(params, adapter), logits(params))


def test_peft_reads_what_we_save(params, adapter, tmp_path):
    lora.save_peft(tmp_path, adapter, CFG, alpha=6.0, dropout=0.1, base="tiny")
    wrapped = peft.PeftModel.from_pretrained(torch_base(params), tmp_path)
    np.testing.assert_allclose(torch_logits(wrapped), logits(params, adapter), atol=1e-4)
    back = lora.load_peft(tmp_path, CFG, "test")
    jax.tree.map(np.testing.assert_array_equal, back, adapter)


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"init_lora_weights": "gaussian"}])
def test_we_read_what_peft_saves(params, tmp_path, settings):
    wrapped = save_with_peft(torch_base(params), tmp_path, **settings)
    adapter = lora.load_peft(tmp_path, CFG, "test")
    np.testing.assert_allclose(logits(params, adapter), torch_logits(wrapped), atol=1e-4)


def save_with_peft(base, folder, **settings):
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(
        base,
        peft.LoraConfig(
            task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["k_proj", "up_proj"],
            **settings,
        ),
    ).eval()  # fmt: skip
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    wrapped.save_pretrained(folder, save_embedding_layers=False)
    return wrapped


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "not a plain LoRA adapter.*use_dora=True"),
        ({"rank_pattern": {"up_proj": 2}}, "not a plain LoRA adapter.*rank_pattern"),
        ({"modules_to_save": ["norm"]}, "not a plain LoRA adapter.*modules_to_save"),
        ({"bias": "lora_only"}, "not a plain LoRA adapter.*bias='lora_only'"),
    ],
)
def test_variants_are_refused(params, tmp_path, settings, message):
    save_with_peft(torch_base(params), tmp_path, **settings)
    with pytest.raises(errors.UserError, match=message):
        lora.load_peft(tmp_path, CFG, "influence.lora.path")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 16}, "adapter of another model.*q_proj.lora_A.*shape"),
        ({"num_hidden_layers": 3}, "adapter of another model.*layers.2.*has None"),
        ({"num_hidden_layers": 1}, "does not fit this model.*layers.1"),
    ],
)
def test_adapters_of_other_models_are_refused(adapter, tmp_path, change, message):
    lora.save_peft(tmp_path, adapter, CFG, alpha=6.0, dropout=0.0, base="tiny")
    other = config.decoder_config({**tiny.HF_CONFIG, **change}, "test")
    with pytest.raises(errors.UserError, match=f"^influence.lora.path: .*{message}"):
        lora.load_peft(tmp_path, other, "influence.lora.path")


def test_broken_folders_are_refused(adapter, tmp_path):
    def refused(message):
        with pytest.raises(errors.UserError, match=message):
            lora.load_peft(tmp_path, CFG, "test")

    refused("has no adapter_config.json")
    lora.save_peft(tmp_path, adapter, CFG, alpha=6.0, dropout=0.0, base="tiny")
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    for changed, message in (
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"r": None}, "r must be a whole number"),
        ({"r": 1.5}, "r must be a whole number"),
        ({"r": True}, "r must be a whole number"),
        ({"r": 0}, "r=0"),
        ({"r": 10**12}, "r=1000000000000"),
        ({"lora_alpha": "8"}, "lora_alpha must be a number"),
        ({"lora_alpha": -1.0}, "lora_alpha=-1.0"),
        ({"use_rslora": "yes"}, "use_rslora must be true or false"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True"),
        ({"a_later_variant": {"x": 1}}, "not a plain LoRA adapter.*a_later_variant={'x': 1}"),
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**settings, **changed}))
        refused(message)
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    refused("is not a whole safetensors file")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((3, 32), np.nan, np.float32), "NaN or infinite"),
        (np.full((3, 32), 1e300), "NaN or infinite"),  # float64: infinite in float32
        (np.ones((3, 32), np.int8), "is stored as int8"),
    ],
)
def test_weights_of_an_adapter_are_plain_and_finite(adapter, tmp_path, array, message):
    lora.save_peft(tmp_path, adapter, CFG, alpha=6.0, dropout=0.0, base="tiny")
    file = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    name = next(name for name in tensors if "lora_A" in name)
    safetensors.numpy.save_file(tensors | {name: array}, file)
    with pytest.raises(errors.UserError, match=f"^test: .*lora_A.*{message}"):
        lora.load_peft(tmp_path, CFG, "test")


def test_factors_that_are_not_finite_are_not_written(adapter, tmp_path):
    bad = jax.tree.map(lambda leaf: leaf / 0.0, adapter)
    with pytest.raises(errors.UserError, match=r"layers/.* is not finite"):
        lora.save_peft(tmp_path / "new", bad, CFG, alpha=6.0, dropout=0.0, base="tiny")
    assert not (tmp_path / "new").exists()


def test_targets_without_a_match_are_refused():
    with pytest.raises(errors.UserError, match=r"^finetune.targets: 'q_prj' matches none"):
        lora.init(jax.random.key(0), CFG, "q_prj", 2, 4.0, True, "finetune.targets")


def test_only_factors_are_trained(adapter):
    names = [name for name in trees.named_leaves(adapter) if lora.is_factor(name)]
    assert len(names) == 6 and not any(name.endswith("scale") for name in names)


def test_dropout_keeps_the_mean_and_depends_on_the_key():
    # 4096 rows of ones through an adapter that sums its input: mean 8, standard error
    # sqrt(8 * 0.25 / 0.75 / 4096) = 0.026.
    ones = {"a": jnp.ones((1, 8, 1)), "b": jnp.ones((1, 1, 1)), "scale": jnp.ones((1,))}
    tree = {"layers": {"attn": {"q_proj": ones}}}

    def adapted(seed):
        keys = jax.random.split(jax.random.key(seed), 4096)
        leaves = lora.with_dropout(tree, keys, 0.25)["layers"]["attn"]["q_proj"]
        first_layer = jax.tree.map(lambda x: x[0], leaves)
        x = jnp.ones((4096, 1, 8))
        return np.asarray(layers.linear({"kernel": jnp.zeros((8, 1))}, x, first_layer))

    first = adapted(0)
    assert abs(first.mean() - 8) < 0.1
    np.testing.assert_array_equal(first, adapted(0))
    assert (first != adapted(1)).mean() > 0.5
    kept = np.round(first[:, 0, 0] * 0.75)
    np.testing.assert_allclose(kept.mean() / 8, 0.75, atol=0.01)


def test_dropout_differs_between_layers_linears_and_rows(adapter):
    dropped = lora.with_dropout(adapter, jax.random.split(jax.random.key(0), 5), 0.1)
    keys = [
        np.asarray(jax.random.key_data(leaves["dropout_keys"])).reshape(-1, 2)
        for leaves in (dropped["layers"]["attn"]["q_proj"], dropped["layers"]["mlp"]["down_proj"])
    ]
    assert len(np.unique(np.concatenate(keys), axis=0)) == 2 * CFG.num_layers * 5


@pytest.mark.parametrize(
    "family, targets",
    [
        *(("experts", targets) for targets in ("experts", "router", "(q|down)_proj")),
        ("delta", "delta"), ("delta", "(q|k|v|o)_proj"),
    ],
)  # fmt: skip
def test_an_adapter_of_layers_apart_is_merged_saved_and_read(family, targets, tmp_path):
    cfg = tiny.decoder_config(**tiny.APART[family])
    params = decoder.init(jax.random.key(0), cfg, jnp.float32)
    params = trees.map_named(lambda name, x: 10 * x if "kernel" in name else x, params)
    own = lora.init(jax.random.key(1), cfg, targets, 3, 6.0, zero_b=False, field="test")

    @jax.jit
    def hidden(params, adapter):
        positions = np.broadcast_to(np.arange(6), TOKENS.shape)
        return decoder.apply(params, cfg, TOKENS % 50, positions, np.ones_like(TOKENS), adapter)

    adapted = hidden(params, own)
    assert np.abs(adapted - hidden(params, None)).max() > 0.1
    np.testing.assert_allclose(hidden(export.merge_adapter(params, own), None), adapted, atol=2e-5)
    lora.save_peft(tmp_path, own, cfg, alpha=6.0, dropout=0.0, base="tiny")
    jax.tree.map(np.testing.assert_array_equal, lora.load_peft(tmp_path, cfg, "test"), own)
    dropped = lora.with_dropout(own, jax.random.split(jax.random.key(0), 2), 0.5)
    assert np.abs(hidden(params, dropped) - adapted).max() > 0.01
