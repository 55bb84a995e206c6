"""Fine-tuning steps: parity with PEFT and torch's AdamW, and what must change nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
import transformers
from reference import peft, torch

from diq_jax import config, errors, finetune_config, trees
from diq_jax.data import batches, example
from diq_jax.data import steps as steps_lib
from diq_jax.finetune import fit, sft
from diq_jax.models import config as model_config
from diq_jax.models import decoder, hf, load, lora, training
from diq_jax.run import devices

# PEFT asks transformers for a property that transformers 5 renames.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

CFG = model_config.decoder_config(tiny.HF_CONFIG, "test")
SETTINGS = finetune_config.Finetune(
    rank=3, alpha=6.0, targets="(q|k|v|down)_proj", learning_rate=1e-2, warmup_ratio=0.2,
    weight_decay=0.1, clip_norm=0.05, epochs=2, batch_size=8,
)  # fmt: skip
SUMS = jax.jit(sft.example_sums(CFG, SETTINGS))


def random_examples(count, seed=0):
    rng = np.random.default_rng(seed)
    out = []
    for i in range(count):
        length, prompt = rng.integers(12, 30), rng.integers(2, 10)
        tokens = rng.integers(0, 64, length).astype(np.int32)
        labels = np.where(np.arange(length) < prompt, example.IGNORED, tokens).astype(np.int32)
        out.append(example.Encoded(f"row-{i:03d}", tokens, labels))
    return out


@pytest.fixture(scope="module")
def params():
    # Spread out, so that a frozen head can give logits far apart and an adapter has an effect.
    params = decoder.init(jax.random.key(0), CFG, jnp.float32)
    spread = {"kernel": 5, "embedding": 25, "scale": 1}
    return trees.map_named(lambda name, x: spread[name.split("/")[-1]] * x, params)


@pytest.fixture(scope="module")
def placement():
    return devices.make_placement(config.Parallel(data=1))


KEY = sft.dropout_keys(0, 1)[0]


def init_adapter(settings, zero_b=True):
    if zero_b:
        return sft.init_adapter(CFG, settings, settings.seed)
    key = jax.random.split(jax.random.key(settings.seed))[0]
    return lora.init(key, CFG, settings.targets, settings.rank, settings.alpha, False, "test")


def plan(encoded, settings, rows_multiple=1):
    arms = {"selected": range(len(encoded))}
    return fit.plan(encoded, arms, settings, settings.seed, rows_multiple)["selected"]


def train(params, placement, settings, encoded):
    """All steps. Returns (adapter or parameters, losses)."""
    model = load.Model(params, CFG, {}, "tiny")
    fitted = fit.fit(model, encoded, settings, settings.seed, placement)
    losses = [record["loss"] for record in fitted.records]
    if fitted.frozen is None:
        return sft.merge(params, fitted.factors, None)[0], losses
    return fitted.adapter, losses


def assert_same(first, second, atol=2e-6):
    """Same adapters and losses, to float error: a few units in the last place of a loss."""
    np.testing.assert_allclose(first[1], second[1], rtol=5e-7, atol=atol)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), first[0], second[0])


def torch_llama(params):
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**tiny.HF_CONFIG))
    state = {name: torch.from_numpy(array.copy()) for name, array in hf.decoder_tensors(params)}
    model.load_state_dict({**state, "lm_head.weight": state["model.embed_tokens.weight"]})
    return model


def torch_train(model, settings, encoded) -> list[float]:
    """As many steps as epochs, each on all examples. Returns the losses."""
    trained = [p for p in model.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(
        trained, lr=1.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=settings.weight_decay
    )
    rates, losses = fit.learning_rates(settings, settings.epochs), []
    for step in range(settings.epochs):
        adamw.param_groups[0]["lr"] = float(rates[step])
        adamw.zero_grad()
        mean = sum(
            model(
                torch.from_numpy(e.input_ids)[None].long(),
                labels=torch.from_numpy(e.labels)[None].long(),
            ).loss
            for e in encoded
        ) / len(encoded)
        mean.backward()
        assert torch.nn.utils.clip_grad_norm_(trained, settings.clip_norm) > settings.clip_norm
        adamw.step()
        losses.append(float(mean.detach()))
    return losses


def test_five_steps_equal_peft_and_torch_adamw(params, placement, tmp_path):
    settings = dataclasses.replace(SETTINGS, epochs=5, batch_size=6)
    encoded = random_examples(6)
    adapter, losses = train(params, placement, settings, encoded)
    lora.save_peft(tmp_path, init_adapter(settings), CFG, settings.alpha, 0.0, "tiny")
    model = peft.PeftModel.from_pretrained(torch_llama(params), tmp_path, is_trainable=True).eval()
    np.testing.assert_allclose(losses, torch_train(model, settings, encoded), atol=1e-4)
    model.save_pretrained(tmp_path / "torch", save_embedding_layers=False)
    theirs = lora.load_peft(tmp_path / "torch", CFG, "test")
    assert losses[-1] < losses[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), adapter, theirs)


def test_five_steps_of_all_parameters_equal_torch_adamw(params, placement):
    settings = dataclasses.replace(
        SETTINGS, parameters="all", epochs=5, batch_size=6, learning_rate=1e-3
    )
    encoded = random_examples(6)
    trained, losses = train(params, placement, settings, encoded)
    model = torch_llama(params).eval()
    np.testing.assert_allclose(losses, torch_train(model, settings, encoded), atol=1e-4)
    theirs = dict(model.state_dict())
    assert losses[-1] < losses[0]
    for name, array in hf.decoder_tensors(trained):
        np.testing.assert_allclose(array, theirs[name].numpy(), atol=1e-4)


def test_a_regex_trains_what_it_names_and_nothing_else(params, placement):
    settings = dataclasses.replace(SETTINGS, parameters="mlp/.*kernel")
    trained, _ = train(params, placement, settings, random_examples(8))
    before = trees.named_leaves(params)
    for name, leaf in trees.named_leaves(trained).items():
        assert ("mlp/" in name) == bool((leaf != before[name]).any()), name
    wrong = dataclasses.replace(settings, parameters="mpl/.*kernel")
    with pytest.raises(errors.UserError, match=r"^finetune.parameters: .*matches none"):
        train(params, placement, wrong, random_examples(8))


def test_masters_stay_float32_beside_a_bfloat16_model(params, placement):
    # An update of 1e-6 vanishes in bfloat16; a thousand of them do not.
    small = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    settings = dataclasses.replace(SETTINGS, parameters="norm", learning_rate=1e-6)
    state = sft.init_weights(small, settings.parameters, training.adamw(0.1, 1.0))
    model = load.Model(small, CFG, {}, "tiny")
    assert {x.dtype for x in jax.tree.leaves(state.factors)} == {jnp.dtype(jnp.float32)}
    encoded = random_examples(4)
    once = dataclasses.replace(settings, max_steps=1)
    after = fit.fit(model, encoded, once, 0, placement)
    assert (after.factors["final_norm"]["scale"] != state.factors["final_norm"]["scale"]).any()
    merged, adapter = sft.merge(small, after.factors, None)
    assert adapter is None
    assert {x.dtype for x in jax.tree.leaves(merged)} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_array_equal(merged["final_norm"]["scale"], small["final_norm"]["scale"])


@pytest.mark.parametrize("parameters", ["lora", "all"])
def test_packed_equals_unpacked(params, parameters):
    # 11 examples of 12 to 29 tokens in rows of 32: fewer rows, the same sums.
    settings = dataclasses.replace(SETTINGS, parameters=parameters, batch_size=11, epochs=1)
    encoded = random_examples(11)
    optimizer = training.adamw()
    if parameters == "lora":
        state, frozen = sft.init_state(init_adapter(SETTINGS, zero_b=False), optimizer)
    else:
        state, frozen = sft.init_weights(params, parameters, optimizer), None
    found, rows = {}, {}
    for packing in (False, True):
        chosen = dataclasses.replace(settings, packing=packing)
        (step,) = plan(encoded, chosen, 2)
        (batch,) = steps_lib.microbatches(encoded, step)
        assert sorted(step.indices) == [*range(11)]
        sums = jax.jit(sft.example_sums(CFG, chosen))
        found[packing] = sums(params, state.factors, frozen, KEY, batch)
        rows[packing] = len(batch.batch.tokens)
    assert rows[True] < rows[False]
    assert float(found[True]["examples"]) == float(found[False]["examples"]) == 11
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(found[False]["gradient"]))
    np.testing.assert_allclose(found[True]["loss"], found[False]["loss"], rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * largest),
        found[True]["gradient"],
        found[False]["gradient"],
    )


def test_packed_steps_hold_the_same_examples_in_few_rows():
    encoded = random_examples(30)
    arms = {"selected": range(20), "random": range(10, 30)}
    settings = dataclasses.replace(SETTINGS, accumulation_steps=2)
    packed = fit.plan(encoded, arms, dataclasses.replace(settings, packing=True), 0, 4)
    for arm, steps in fit.plan(encoded, arms, settings, 0, 4).items():
        assert [set(s.indices) for s in packed[arm]] == [set(s.indices) for s in steps]
    groups = [g for steps in packed.values() for step in steps for g in step.groups]
    assert len({(g.rows, g.tokens, g.answers, g.examples) for g in groups}) == 1
    assert groups[0].rows % 4 == 0
    assert max(len(step.groups) for step in packed["selected"]) <= 2


def test_max_steps_counts_steps_whatever_the_epochs():
    encoded = random_examples(11)

    def numbers(**changes):
        settings = dataclasses.replace(SETTINGS, **changes)
        return [step.epoch for step in plan(encoded, settings)]

    assert numbers(max_steps=5) == [0, 0, 1, 1, 2]  # two steps an epoch
    assert numbers(max_steps=1) == [0]
    assert numbers() == [0, 0, 1, 1]


def test_accumulation_and_remat_change_nothing(params, placement):
    # 11 examples: the second step of an epoch has 3, of which a microbatch of 2 is half empty.
    settings = dataclasses.replace(SETTINGS, dropout=0.3)
    encoded = random_examples(11)
    whole = train(params, placement, settings, encoded)
    split = dataclasses.replace(settings, accumulation_steps=4, remat=True)
    assert_same(whole, train(params, placement, split, encoded))


def sums_of(params, encoded, rows):
    factors, frozen = trees.partition(init_adapter(SETTINGS, zero_b=False), lora.is_factor)
    batch = batches.make_batch(encoded, rows, 32, 32)
    return SUMS(
        params, factors, frozen, KEY, steps_lib.Microbatch(batch, np.arange(rows, dtype=np.int32))
    )


def test_padding_rows_add_nothing(params):
    encoded = random_examples(8)
    bare, padded = sums_of(params, encoded, 8), sums_of(params, encoded, 16)
    assert float(bare["examples"]) == float(padded["examples"]) == 8
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), bare, padded)
    assert float(sums_of(params, [], 8)["loss"]) == 0


def test_an_answer_weighs_the_same_whatever_its_length(params):
    # Not a mean over tokens: an example of 1 answer token weighs as much as one of 20.
    rng = np.random.default_rng(0)
    encoded = []
    for name, answers in (("long", 20), ("short", 1)):
        tokens = rng.integers(0, 64, 24).astype(np.int32)
        labels = np.where(np.arange(24) < 24 - answers, example.IGNORED, tokens).astype(np.int32)
        encoded.append(example.Encoded(name, tokens, labels))
    long, short, both = (
        float(sums_of(params, chosen, 8)["loss"]) for chosen in (encoded[:1], encoded[1:], encoded)
    )
    assert abs(long - short) > 0.01
    np.testing.assert_allclose(both, long + short, rtol=1e-6)


def test_overfits_eight_examples(params, placement):
    settings = dataclasses.replace(
        SETTINGS, rank=8, alpha=16.0, targets="_proj", learning_rate=2e-2, epochs=150,
        weight_decay=0.0, clip_norm=1.0,
    )  # fmt: skip
    _, losses = train(params, placement, settings, random_examples(8))
    assert losses[0] > 3 and losses[-1] < 0.05


def test_dropout_depends_on_step_and_place(params):
    encoded = random_examples(8)
    settings = dataclasses.replace(SETTINGS, dropout=0.3)
    # B != 0, so that dropout shows in the loss.
    factors, frozen = trees.partition(init_adapter(SETTINGS, zero_b=False), lora.is_factor)
    sums = jax.jit(sft.example_sums(CFG, settings))
    batch, keys = batches.make_batch(encoded, 8, 32, 32), sft.dropout_keys(0, 2)

    def loss(step, first_place):
        places = np.arange(first_place, first_place + 8, dtype=np.int32)
        return float(
            sums(params, factors, frozen, keys[step], steps_lib.Microbatch(batch, places))["loss"]
        )

    assert loss(0, 0) == loss(0, 0)
    assert len({loss(0, 0), loss(1, 0), loss(0, 8)}) == 3


def test_the_first_update_by_hand():
    # The gradient (3, 4) has norm 5, so clipping at 1 gives (0.6, 0.8); Adam's first step is the
    # sign, decay adds 0.1 p, and the rate is 0.02: p = (1, -2) -> p - 0.02 ((1, 1) + 0.1 (1, -2)).
    p, gradient = {"a": jnp.array([1.0, -2.0])}, {"a": jnp.array([3.0, 4.0])}
    for clip_norm, first_moment in ((0.0, [0.3, 0.4]), (1.0, [0.06, 0.08])):
        optimizer = training.adamw(0.1, clip_norm)
        state = training.TrainState(p, optimizer.init(p))
        after = training.apply(optimizer, state, gradient, 0.02)
        np.testing.assert_allclose(after.factors["a"], [1 - 0.022, -2 - 0.016], rtol=1e-5)
        np.testing.assert_allclose(
            optax.tree.get(after.opt_state, "mu")["a"], first_moment, rtol=1e-5
        )


def test_order_depends_on_seed_epoch_and_ids_alone():
    encoded = random_examples(11)

    def order(encoded, seed=0):
        settings = dataclasses.replace(SETTINGS, seed=seed)
        steps = plan(encoded, settings)
        return [[encoded[i].example_id for i in step.indices] for step in steps]

    steps = order(encoded)
    assert [len(step) for step in steps] == [8, 3, 8, 3]
    assert {*steps[0], *steps[1]} == {e.example_id for e in encoded}
    assert set(steps[0]) != set(steps[2])
    assert steps != order(encoded, seed=1)
    shuffled = [encoded[i] for i in np.random.default_rng(0).permutation(11)]
    assert [set(s) for s in order(shuffled)] == [set(s) for s in steps]


def test_few_shapes_serve_all_arms():
    encoded = random_examples(60)
    arms = {"selected": range(30), "random": range(20, 50)}
    settings = dataclasses.replace(SETTINGS, batch_size=4, accumulation_steps=2)
    planned = fit.plan(encoded, arms, settings, 0, rows_multiple=8)
    groups = [g for steps in planned.values() for step in steps for g in step.groups]
    assert len({(g.rows, g.tokens, g.answers) for g in groups}) <= 2
    assert all(g.rows == 8 and len(g.indices) <= 2 for g in groups)
    for group in groups:
        assert max(len(encoded[i].input_ids) for i in group.indices) <= group.tokens
        assert max(encoded[i].answer_tokens for i in group.indices) <= group.answers


@pytest.mark.parametrize(("ratio", "steps"), [(0.0, 6), (0.1, 6), (0.5, 10), (0.9, 1), (0.99, 3)])
def test_rates_warm_up_and_never_waste_a_step(ratio, steps):
    settings = dataclasses.replace(SETTINGS, warmup_ratio=ratio, learning_rate=2.0)
    rates = fit.learning_rates(settings, steps)
    warmup = min(int(np.ceil(ratio * steps)), steps - 1)
    np.testing.assert_allclose(
        rates[: warmup + 1], 2.0 * np.arange(1, warmup + 2) / (warmup + 1), rtol=1e-6
    )
    cosine = 1 + np.cos(np.pi * np.arange(steps - warmup) / (steps - warmup))
    np.testing.assert_allclose(rates[warmup:], cosine, atol=1e-6)
    assert len(rates) == steps and (rates > 0).all()


def test_rates_by_hand():
    # Linear: 1 / 2, 1, then 1 - 1 / 4 ...; held: 1 / 2, 1, 1 and a cosine over two steps.
    rates = training.learning_rates(1.0, 5, 1, "linear")
    np.testing.assert_allclose(rates, [0.5, 1, 0.75, 0.5, 0.25], rtol=1e-6)
    np.testing.assert_allclose(training.learning_rates(1.0, 4, 1, hold=1), [0.5, 1, 1, 0.5])
