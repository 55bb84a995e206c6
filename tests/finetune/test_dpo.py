"""DPO: parity with the published formula in float64 torch, and what must change nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import transformers
from reference import peft, torch

from diq_jax import config, finetune_config, trees
from diq_jax.data import example, preferences
from diq_jax.finetune import dpo, fit, sft
from diq_jax.models import config as model_config
from diq_jax.models import decoder, hf, lora, training
from diq_jax.run import devices

# PEFT asks transformers for a property that transformers 5 renames.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

CFG = model_config.decoder_config(tiny.HF_CONFIG, "test")
SETTINGS = finetune_config.Dpo(beta=0.3, learning_rate=1e-2, batch_size=8)
FINETUNE = finetune_config.Finetune(batch_size=8, epochs=1, learning_rate=1e-2)


def random_pairs(count, seed=0):
    rng = np.random.default_rng(seed)

    def side(prompt, name):
        tokens = np.concatenate([prompt, rng.integers(0, 64, rng.integers(3, 15))]).astype(np.int32)
        labels = np.where(np.arange(len(tokens)) < len(prompt), example.IGNORED, tokens)
        return example.Encoded(name, tokens, labels.astype(np.int32))

    prompts = [rng.integers(0, 64, rng.integers(2, 10)) for _ in range(count)]
    return [
        preferences.PreferencePair(
            f"pair-{i:02d}", side(prompt, "chosen"), side(prompt, "rejected")
        )
        for i, prompt in enumerate(prompts)
    ]


@pytest.fixture(scope="module")
def params():
    params = decoder.init(jax.random.key(0), CFG, jnp.float32)
    spread = {"kernel": 5, "embedding": 25, "scale": 1}
    return trees.map_named(lambda name, x: spread[name.split("/")[-1]] * x, params)


def init_adapter(zero_b):
    return lora.init(jax.random.key(1), CFG, "(q|v|down)_proj", 3, 6.0, zero_b, "test")


def plan(pairs, settings=FINETUNE, rows_multiple=1):
    longer = [pair.longer for pair in pairs]
    return fit.plan(longer, {"dpo": range(len(pairs))}, settings, 0, rows_multiple)["dpo"]


def reference_of(params, pairs, adapter=None):
    """{pair: log-probabilities}, each row in a batch of its own."""

    @jax.jit
    def score(batch):
        return dpo.log_probabilities(params, CFG, batch, adapter)

    groups = [group for step in plan(pairs) for group in step.groups]
    return {
        pairs[i].example_id: values
        for group in groups
        for i, values in zip(
            group.indices,
            np.asarray(score(dpo.make_batch(pairs, group))).reshape(-1, 2),
            strict=False,
        )
    }


def test_losses_by_hand():
    # changes (1, -1) and (0.5, 0.5): margins 0.5 * 2 = 1 and 0; -log sigmoid(1) = log(1 + 1 / e).
    policy, reference = jnp.array([[-3.0, -7.0], [-2.5, -4.5]]), jnp.array([[-4.0, -6.0]] * 2)
    policy = policy.at[1].set([-3.5, -5.5])
    losses, margins = dpo.pair_losses(policy, reference, 0.5)
    np.testing.assert_allclose(margins, [1, 0], rtol=1e-6)
    np.testing.assert_allclose(losses, [np.log(1 + np.exp(-1)), np.log(2)], rtol=1e-6)


def test_at_the_reference_the_loss_is_log_two_exactly():
    policy = jnp.asarray(np.random.default_rng(0).normal(-80, 30, (50, 2)), jnp.float32)
    losses, margins = dpo.pair_losses(policy, policy, 0.1)
    np.testing.assert_array_equal(losses, np.float32(np.log(2)))
    np.testing.assert_array_equal(margins, 0)


def test_loss_and_gradient_equal_the_formula_in_float64(params, tmp_path):
    pairs = random_pairs(6)
    adapter = init_adapter(zero_b=False)
    (step,) = plan(pairs)
    (rows,) = dpo.microbatches(pairs, reference_of(params, pairs), step)
    factors, frozen = trees.partition(adapter, lora.is_factor)
    found = jax.jit(dpo.example_sums(CFG, SETTINGS, remat=False))(
        params, factors, frozen, None, rows
    )

    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**tiny.HF_CONFIG))
    state = {name: torch.from_numpy(array.copy()) for name, array in hf.decoder_tensors(params)}
    model.load_state_dict({**state, "lm_head.weight": state["model.embed_tokens.weight"]})
    lora.save_peft(tmp_path, adapter, CFG, 6.0, 0.0, "tiny")
    model = peft.PeftModel.from_pretrained(model, tmp_path, is_trainable=True).double().eval()

    def answer(side):
        tokens, labels = torch.from_numpy(side.input_ids).long(), torch.from_numpy(side.labels)
        nats = model(tokens[None]).logits[0, :-1].log_softmax(-1)
        picked = nats.gather(1, tokens[1:, None])[:, 0]
        return picked[labels[1:] != example.IGNORED].sum()

    total, right = 0.0, 0
    for pair in pairs:
        policy = [answer(side) for side in pair.sides]
        with torch.no_grad(), model.disable_adapter():
            reference = [answer(side) for side in pair.sides]
        margin = SETTINGS.beta * (policy[0] - reference[0] - (policy[1] - reference[1]))
        total = total - torch.nn.functional.logsigmoid(margin)
        right += int(margin > 0)
    total.backward()
    np.testing.assert_allclose(float(found["loss"]), float(total.detach()), rtol=1e-5)
    assert float(found["examples"]) == 6 and float(found["accuracy"]) == right
    theirs = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    largest = max(float(grad.abs().max()) for grad in theirs.values())
    for name, gradient in trees.named_leaves(found["gradient"]).items():
        _, group, linear, factor = name.split("/")
        module = f"{group.replace('attn', 'self_attn')}.{linear}.lora_{factor.upper()}"
        for layer, ours in enumerate(np.asarray(gradient)):
            where = f"{lora.PEFT_PREFIX}model.layers.{layer}.{module}.default.weight"
            grad = theirs[where].numpy().T
            np.testing.assert_allclose(ours, grad, atol=1e-5 * largest)


def train(params, pairs, settings=SETTINGS, finetune=FINETUNE):
    """All steps. Returns (factors, metrics of each step)."""
    placement = devices.make_placement(config.Parallel(data=1))
    steps = plan(pairs, finetune, placement.rows_multiple)
    optimizer = training.adamw(finetune.weight_decay, finetune.clip_norm)
    rates = fit.learning_rates(finetune, len(steps))
    state, frozen = sft.init_state(init_adapter(zero_b=True), optimizer)
    step_fn = training.make_train_step(
        dpo.example_sums(CFG, settings, finetune.remat), optimizer, placement
    )
    reference, records = reference_of(params, pairs), []
    for step, rate in zip(steps, rates, strict=True):
        rows = dpo.microbatches(pairs, reference, step)
        state, metrics = step_fn(params, frozen, state, rows, rate, None)
        records.append({name: float(x) for name, x in metrics.items()})
    return state.factors, records


def test_the_margin_rises_on_sixteen_pairs(params):
    pairs = random_pairs(16)
    finetune = dataclasses.replace(FINETUNE, epochs=8, batch_size=16, clip_norm=1.0)
    _, records = train(params, pairs, SETTINGS, finetune)
    np.testing.assert_allclose(records[0]["loss"], np.log(2), atol=1e-5)
    np.testing.assert_allclose(records[0]["margin"], 0, atol=1e-5)
    assert records[-1]["margin"] > 1 and records[-1]["accuracy"] == 1
    assert records[-1]["loss"] < records[0]["loss"]


def test_accumulation_and_remat_change_nothing(params):
    # 11 pairs: the second step has 3, of which a microbatch of 2 is half empty.
    pairs = random_pairs(11)
    split = dataclasses.replace(FINETUNE, accumulation_steps=4, remat=True)
    whole, parts = train(params, pairs), train(params, pairs, finetune=split)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), whole[0], parts[0])
    for name in ("loss", "margin", "accuracy"):
        ones, fours = ([record[name] for record in records] for _, records in (whole, parts))
        np.testing.assert_allclose(ones, fours, atol=1e-5)
