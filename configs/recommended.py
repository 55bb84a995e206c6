"""The selection that we would begin with, on top of another config.

Run:     diq run --config=recommended:quickstart --workdir=runs/recommended, or
         diq run --config=recommended:huatuo_llama31_8b --workdir=runs/recommended ..
Cost:    beside the base config's: a LoRA training on the targets, two forward passes over the pool
Result:  minus as many random rows, split 0 and split 1 of the lab, with 240,000 parameters: choice
         loss -0.28 and -0.13 at 1 %, -0.29 and -0.14 at 5 %; test loss -0.22 and -0.14 at 1 %,
         -0.19 and -0.08 at 5 %; with 690,000: choice loss -0.09 and -0.39 at 1 %, -0.26 and -0.31
         at 5 %; test loss -0.34 and -0.11 at 1 %, -0.30 and -0.13 at 5 %; loss on other reasoning
         +0.04 to +0.06 at 1 %

selection.method=color takes the rows whose loss falls most by training on the targets. Of 14
methods and directions it is the one that lowered both the choice loss and the loss of the right
answer, against random rows, at each budget on each split of the pool, with both sizes of the model
(docs/results.md, The selection lab; their accuracy is at chance). With the larger one gist and
round_robin did so too. Length needs no control and difficulty no band: neither helped there. Where
the loss of the right answer alone counts, selection.method=influence with
influence.direction=gauss_newton lowered it further on both splits, and did not lower the choice
loss.
"""

from diq_jax import config_files


def get_config(base="quickstart"):
    c = config_files.load(base)
    with c.unlocked():
        c.selection.method = "color"
        c.influence.tuned.color = True
    return c
