r"""DIQ with Qwen3-32B on sixteen TPU v6e chips, four hosts of four.

Run:     diq run --config=v6e16_qwen3_32b --workdir=gs://BUCKET/v6e16 \
             --config.difficulty.source=LABELS.jsonl
Plan:    diq plan --config=v6e16_qwen3_32b --shape=qwen3_32b --topology=v6e:4x4 \
             --mesh=2x8 --programs=exact,lora_step
             program    GiB of 32  est ms  of that link  tokens/s a chip  collectives
             exact      15.43      257     44            1,993            1,039
             lora_step  9.76       365     65            1,404            1,562
         4 rows of 1,024 tokens on each half; the compiler's estimates, not a measured speed.
Cost:    not measured
Result:  not measured
"""

from diq_jax import config


def get_config():
    c = config.default()
    c.model.path = "Qwen/Qwen3-32B"
    c.model.dtype = "bfloat16"
    c.model.max_tokens = 4096
    c.data.pool = "hub:FreedomIntelligence/medical-o1-reasoning-SFT:en"
    c.data.columns = "huatuo"
    c.data.template = "think"
    c.data.targets = c.data.tests = "benchmark:all"
    c.data.targets_per_task = 20
    c.difficulty.encoder = "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract"
    c.influence.batch_tokens = 4096
    c.finetune.batch_size = 16
    c.finetune.accumulation_steps = 4
    c.finetune.remat = True
    c.evaluate.batch_tokens = 8192
    c.parallel.model = 8
    c.parallel.distributed = True
    return c
