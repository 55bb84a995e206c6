"""Loading onto several devices: each part of the weights is read once, and nothing more."""

import os

import forks
import jax
import jax.numpy as jnp
import pytest
import tiny

from diq_jax.models import config as model_config
from diq_jax.models import decoder, hf

# 80 layers, as a 70B model has them, over 2 x 4 devices and split over both axes.
LOADING = """
import sys
import jax, numpy as np, tiny
from diq_jax import trees
from diq_jax.models import checkpoint, hf, load
folder = sys.argv[1]
whole = load._read(folder, "bfloat16", tiny.placement(data=1), "model.path").params
sizes, pieces = [], []
read = checkpoint.Checkpoint.read
def counted(self, name, part=()):
    sizes.append(read(self, name, part).nbytes)
    return read(self, name, part)
checkpoint.Checkpoint.read = counted
made = jax.make_array_from_single_device_arrays
def assembled(shape, where, arrays):
    pieces.append(max(x.nbytes for x in arrays))
    return made(shape, where, arrays)
jax.make_array_from_single_device_arrays = assembled
place = tiny.placement(data=2, model=4, fsdp="on")
split = load._read(folder, "bfloat16", place, "model.path").params
for (name, x), y in zip(trees.named_leaves(whole).items(), jax.tree.leaves(split), strict=True):
    assert (np.asarray(x) == np.asarray(y)).all(), name
    if "norm" not in name:
        assert len(y.sharding.device_set) == 8 and not y.is_fully_replicated, name
total = sum(x.nbytes for x in jax.tree.leaves(split))
largest = max(x.nbytes for x in jax.tree.leaves(split))
assert sum(sizes) == total, (sum(sizes), total)
assert max(pieces) * 8 == largest, (max(pieces), largest)
print("equal")
"""


@pytest.mark.parametrize("shards", [10**9, 10**5], ids=["one_file", "shards"])
def test_a_host_reads_what_its_devices_need_once(tmp_path, shards):
    """No host holds more than one device's part of one leaf: here an eighth."""
    settings = dict(tiny.HF_CONFIG, num_hidden_layers=80, num_key_value_heads=4)
    settings["tie_word_embeddings"] = False
    cfg = model_config.decoder_config(settings, "model.path")
    params = decoder.init(jax.random.key(0), cfg, jnp.bfloat16)
    hf.save_decoder(tmp_path / "m", params, settings, shards)
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    program = ["-c", LOADING, str(tmp_path / "m")]
    ended = forks.run(program, os.environ | {"XLA_FLAGS": flags})
    assert ended.stdout.strip() == "equal", ended.stderr[-2000:]
