"""DIQ with Qwen3-8B on the Huatuo pool, retention 10 %.

Run:     python experiments/run_diq.py --config=configs/huatuo_qwen3_8b.py --workdir=runs/qwen3 \
             --config.difficulty.source=LABELS.jsonl
Cost:    not measured
Result:  not measured

Scores by gradients projected to 4096 dimensions (Johnson-Lindenstrauss, as in the paper) and kept
in a gradient store. Ours, because the paper does not say: gradients in LoRA space, a Rademacher
projection, the mean loss, the percentile of difficulty, and the benchmarks' names.
With configs/huatuo_qwen3_8b.py:exact the inner product is taken exactly, over all parameters.
"""

from diq_jax import config, errors


def get_config(engine="projected"):
    errors.check_choice("the config's argument", engine, ("projected", "exact"))
    c = config.default()
    c.model.path = "Qwen/Qwen3-8B"
    c.model.dtype = "bfloat16"
    c.model.max_tokens = 8192
    c.data.pool = "hub:FreedomIntelligence/medical-o1-reasoning-SFT:en"
    c.data.columns = "huatuo"
    c.data.template = "think"
    c.data.targets = c.data.tests = "benchmark:all"
    c.data.targets_per_task = 20
    c.difficulty.encoder = "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract"
    c.influence.batch_tokens = 16_384
    if engine == "projected":
        c.influence.engine = "projected"
        c.influence.parameters = "lora"
        c.influence.projection.kind = "rademacher"
        c.influence.projection.dim = 4096
        c.influence.remat = True
    c.evaluate.batch_tokens = 32_768
    c.finetune.batch_size = 16
    c.finetune.accumulation_steps = 4
    c.finetune.remat = True
    return c
