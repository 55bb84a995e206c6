"""The planned programs are those of a run, on shapes: each is traced and lowered for a TPU here."""

import pytest
import tiny
from jax.sharding import PartitionSpec as P

from diq_jax import config
from diq_jax.models import config as model_config
from diq_jax.models import decoder
from diq_jax.pods import measured, plan, programs


def job(rows=2, tokens=32):
    tree = config.default()
    tree.model.path, tree.influence.projection.dim = "tiny", 128
    cfg = config.resolve(tree)
    return programs.make_job(cfg, tiny.decoder_config(), tiny.placement().mesh, 0, rows, tokens)


@pytest.mark.parametrize("name", programs.PROGRAMS)
def test_a_program_lowers_for_a_tpu(name):
    made = programs.make(name, job())
    assert len(made) == (2 if name.endswith("_step") else 1)  # gradients, and the update
    for program in made:
        lowered = program.jitted.trace(*program.arguments).lower(lowering_platforms=("tpu",))
        assert "stablehlo" in lowered.as_text()


def test_measured_programs_run_here():
    """A step of training takes over its arguments' memory, and runs four times all the same."""
    tree = config.default()
    tree.model.path = "tiny"
    hf_config = {
        "model_type": "llama", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
        "hidden_act": "silu",
    }  # fmt: skip
    names = ["loss", "lora_step"]
    found = list(measured.rows(config.resolve(tree), hf_config, (1, 1), (2, 32), names))
    assert [row["program"] for row in found] == names
    for row in found:
        assert row["fits"] and row["measured_ms"] > 0 and row["gib_per_chip"] is not None
        assert row["matmul_share"] > 0
    assert "ms" in plan.table(found).split("\n")[0] and "est ms" not in plan.table(found)


def test_ideal_flops_by_hand():
    """Two rows of 32 tokens, 16 of them scored. A layer's matrices hold 16 * 16 * 2 (q, o),
    16 * 8 * 2 (k, v) and 3 * 16 * 24 numbers, 1,920; two layers 3,840; the head 16 * 50.
    """
    size = job().model.cfg, 2, 32, 16
    products = 2 * 2 * (32 * 3840 + 16 * 16 * 50)
    attention = 2 * 2 * 4 * 4 * 32 * 32 * 2  # 2 B H C T T / 2 for scores and for what is read
    assert programs.ideal_flops("loss", *size) == products + attention
    assert programs.ideal_flops("exact", *size) == 3 * (products + attention)
    assert programs.ideal_flops("factored", *size) == 2 * products + 3 * attention


@pytest.mark.parametrize(
    ("name", "billions"),
    {"llama31_8b": 8.03, "llama31_70b": 70.55, "qwen3_8b": 8.19, "qwen3_32b": 32.76,
     "gemma3_27b": 27.01, "qwen35_27b": 26.90}.items(),
)  # fmt: skip
def test_a_named_shape_has_the_parameters_that_its_model_has(name, billions):
    """Of Qwen3.5-27B's 27.78 billion 0.46 are the image encoder's and 0.42 another head's."""
    shape = model_config.decoder_config(plan.SHAPES[name], "--shape")
    assert round(decoder.size(shape) / 1e9, 2) == billions


def test_matrices_are_split_over_data_where_they_fill_a_quarter_of_a_chip():
    cfg = tiny.decoder_config()
    size = 4 * decoder.size(cfg)  # bytes of float32
    for memory, expected in ((4 * size, None), (4 * size - 1, "data")):
        placement = programs.Planned(tiny.placement().mesh, "auto", memory)
        placed = programs.place_shapes(cfg, "float32", placement)
        assert placed["layers"]["mlp"]["up_proj"]["kernel"].sharding.spec[1] == expected
        assert placed["layers"]["mlp_norm"]["scale"].sharding.spec == P(None, None)
