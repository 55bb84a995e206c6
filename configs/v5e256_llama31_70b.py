r"""DIQ with Llama-3.1-70B-Instruct on 256 TPU v5e chips, 64 hosts of four.

Run:     diq run --config=v5e256_llama31_70b --workdir=gs://BUCKET/v5e256 \
             --config.difficulty.source=LABELS.jsonl
Plan:    diq plan --config=v5e256_llama31_70b --shape=llama31_70b --topology=v5e:16x16 \
             --mesh=64x4 --programs=exact16,lora_step
             program    GiB of 16  est ms  of that link  tokens/s a chip  collectives
             exact16    2.81       2,509   346           408              2,657
             lora_step  5.00       3,868   628           265              3,469
         4 rows of 1,024 tokens on each four chips; the compiler's estimates, not a measured speed.
         With parallel.model=16 they are 235 and 161 tokens/s a chip (docs/pods.md says why).
Cost:    not measured
Result:  not measured
"""

from diq_jax import config


def get_config():
    c = config.default()
    c.model.path = "meta-llama/Llama-3.1-70B-Instruct"
    c.model.dtype = "bfloat16"
    c.model.max_tokens = 4096
    c.data.pool = "hub:FreedomIntelligence/medical-o1-reasoning-SFT:en"
    c.data.columns = "huatuo"
    c.data.template = "huatuo"
    c.data.targets = c.data.tests = "benchmark:all"
    c.data.targets_per_task = 20
    c.difficulty.encoder = "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract"
    c.influence.batch_tokens = 4096
    c.influence.direction_rank = 16  # a whole direction is as large as the model
    c.finetune.batch_size = 64
    c.finetune.remat = True
    c.evaluate.batch_tokens = 8192
    c.parallel.model = 4
    c.parallel.distributed = True
    return c
