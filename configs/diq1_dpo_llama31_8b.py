"""DIQ with Llama-3.1-8B-Instruct on the Huatuo pool, retention 1 %, then DPO.

Run:     python experiments/run_diq.py --config=configs/diq1_dpo_llama31_8b.py \
             --workdir=runs/diq1_dpo --config.difficulty.source=LABELS.jsonl \
             --config.data.targets='tasks/*/target.jsonl' --config.data.tests='tasks/*/test.jsonl' \
             --config.finetune.dpo.data=PREFERENCES.jsonl
Cost:    not measured
Result:  not measured

The preferences are yours: id, question, chosen, rejected. beta, learning rate and epochs of DPO are
usual ones: the paper's are not known.
"""

from diq_jax import config


def get_config():
    c = config.default()
    c.model.path = "meta-llama/Llama-3.1-8B-Instruct"
    c.model.dtype = "bfloat16"
    c.model.max_tokens = 8192
    c.data.pool = "hub:FreedomIntelligence/medical-o1-reasoning-SFT:en"
    c.data.columns = "huatuo"
    c.data.template = "huatuo"
    c.data.targets_per_task = 20
    c.difficulty.encoder = "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract"
    c.influence.batch_tokens = 16_384
    c.selection.retention_ratio = 0.01
    c.evaluate.batch_tokens = 32_768
    c.finetune.batch_size = 16
    c.finetune.accumulation_steps = 4
    c.finetune.remat = True
    c.finetune.dpo.data = "preferences.jsonl"
    c.finetune.dpo.beta = 0.1
    c.finetune.dpo.learning_rate = 5e-6
    c.finetune.dpo.epochs = 1
    c.finetune.dpo.batch_size = 16
    c.finetune.dpo.accumulation_steps = 8
    return c
