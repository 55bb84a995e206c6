r"""DIQ with Llama-3.1-8B-Instruct on one host of eight TPU v5e chips.

Run:     diq run --config=v5e8_llama31_8b --workdir=runs/v5e8 \
             --config.difficulty.source=LABELS.jsonl
Plan:    diq plan --config=v5e8_llama31_8b --shape=llama31_8b --topology=v5e:2x4 \
             --mesh=1x8 --programs=exact,lora_step
             program    GiB of 16  est ms  of that link  tokens/s a chip  collectives
             exact      3.83       204     40            2,509            525
             lora_step  2.63       291     65            1,757            1,015
         4 rows of 1,024 tokens; the compiler's estimates, not a measured speed.
Cost:    not measured
Result:  not measured
"""

from diq_jax import config


def get_config():
    c = config.default()
    c.model.path = "meta-llama/Llama-3.1-8B-Instruct"
    c.model.dtype = "bfloat16"
    c.model.max_tokens = 4096
    c.data.pool = "hub:FreedomIntelligence/medical-o1-reasoning-SFT:en"
    c.data.columns = "huatuo"
    c.data.template = "huatuo"
    c.data.targets = c.data.tests = "benchmark:all"
    c.data.targets_per_task = 20
    c.difficulty.encoder = "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract"
    c.influence.batch_tokens = 4096
    c.finetune.batch_size = 16
    c.finetune.accumulation_steps = 4
    c.finetune.remat = True
    c.evaluate.batch_tokens = 8192
    c.parallel.model = 8
    return c
