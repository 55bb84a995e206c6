"""A diq_jax decoder as a model of the lm-eval harness, so that every task of it runs on one.

Needs the extra `harness`. Requests that share a context are read as one row, its context once.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from diq_jax import errors, trees
from diq_jax.data import batches, chat, token_ids
from diq_jax.evaluate import harness_generation, options
from diq_jax.models import config, load, loss
from diq_jax.run import devices, progress

try:
    import lm_eval
    from lm_eval import tasks as task_lib
    from lm_eval import utils
    from lm_eval.api import instance
    from lm_eval.api import model as lm_model
except ModuleNotFoundError as e:
    if e.name != "lm_eval":
        raise
    raise errors.UserError("the harness needs lm-eval: pip install 'diq_jax[harness]'.") from None

MAX_SHAPES = 4  # batch shapes of one call: each is a compilation
Pair = tuple[Sequence[int], Sequence[int]]  # token ids of a context and of what follows it


def find_tasks(names: Sequence[str], include_path: str) -> task_lib.TaskManager:
    """Makes the harness's index of tasks, with those of a folder of the user's own, "" for none.

    Raises:
        UserError: it has none of a name.
    """
    manager = task_lib.TaskManager(include_path=include_path or None)
    for name in names:
        if not manager.match_tasks([name]):
            near = errors.nearest(name, manager.all_tasks)
            raise errors.UserError(f"--tasks: the harness has no task {name!r}.{near}")
    return manager


def run(
    model: "HarnessModel",
    names: Sequence[str],
    manager: task_lib.TaskManager,
    limit: int,
    num_fewshot: int | None,
    as_chat: bool,
) -> tuple[dict[str, Any], str]:
    """Runs tasks of the harness and returns its results and its table.

    Args:
        limit: the first so many rows of a task; 0 = all.
        num_fewshot: None = the task's own.
        as_chat: whether the chat template writes the prompts.
    """
    found = lm_eval.simple_evaluate(
        model=model,
        tasks=list(names),
        task_manager=manager,
        limit=limit or None,
        num_fewshot=num_fewshot,
        apply_chat_template=as_chat,
        torch_random_seed=None,  # or it imports torch
    )
    return found, utils.make_table(found)


class HarnessModel(lm_model.TemplateLM):
    """Answers the harness's three kinds of request.

    A context that is too long is cut from its beginning, as the harness's own models do.

    Args:
        max_tokens: of a context and what follows it, together.
        batch_tokens: tokens of one batch on each device.
        adapter: a LoRA adapter that `placement` has replicated.
        generate: what `generate_until` calls; None = tasks that generate are refused.
    """

    def __init__(
        self,
        model: load.Model,
        layout: chat.Layout,
        placement: devices.Placement,
        max_tokens: int,
        batch_tokens: int,
        adapter: trees.Tree | None = None,
        generate: harness_generation.Generate | None = None,
    ) -> None:
        super().__init__()
        tokenizer = layout.tokenizer
        eos = token_ids.eos_id(tokenizer)
        if eos is None:
            raise errors.UserError(
                f"{model.path} has no end-of-sequence token; the harness needs one."
            )
        self.model, self.layout, self.placement = model, layout, placement
        self.tokenizer = tokenizer
        self.max_length, self.batch_tokens = max_tokens, batch_tokens
        self.adapter, self._generate = adapter, generate
        self._eos, self._bos = eos, list(token_ids.first(tokenizer))

        def score(params, adapter, batch):
            return token_scores(params, model.cfg, batch, adapter)

        self._score = placement.compile(score, rows=True)

    @property
    def eot_token_id(self) -> int:
        """Returns the token that ends a text."""
        return self._eos

    @property
    def prefix_token_id(self) -> int:
        """Stands for an empty context."""
        return self._bos[0] if self._bos else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        """Returns the name under which the harness keeps requests."""
        return self.model.path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        """Tokenizes a text; one that begins with the BOS token, as templates do, gets no other."""
        ids = self.tokenizer(string, add_special_tokens=False, verbose=False)["input_ids"]
        chat.check_tokens(ids, self.layout, f"A text that begins with {string[:40]!r}")
        first = [] if add_special_tokens is False or ids[:1] == self._bos else self._bos
        return [*first, *ids]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Writes a conversation as the model's layout does."""
        return chat.write_conversation(chat_history, self.layout, add_generation_prompt)

    def loglikelihood_rolling(
        self, requests: list[instance.Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Computes the log-likelihood of each text in nats, in windows where it is too long."""
        pairs, owners = [], []
        for i, request in enumerate(requests):
            # A window's row holds its last token too.
            windows = utils.get_rolling_token_windows(
                self.tok_encode(request.args[0], add_special_tokens=False),
                self.prefix_token_id, self.max_length - 1, context_len=1,
            )  # fmt: skip
            found = [utils.make_disjoint_window(window) for window in windows]
            pairs += found
            owners += [i] * len(found)
        sums = [0.0] * len(requests)
        for i, (value, _) in zip(owners, self._scores(pairs), strict=True):
            sums[i] += value
        for request, value in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return sums

    def generate_until(
        self, requests: list[instance.Instance], disable_tqdm: bool = False
    ) -> list[str]:
        """Generates texts up to the first of each request's stop strings.

        Raises:
            UserError: there is nothing to generate with.
        """
        if self._generate is None:
            raise errors.UserError(
                "this task generates text, and no way to generate was given: choose tasks of "
                "loglikelihood, or pass generate= to HarnessModel."
            )
        kinds: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            kinds.setdefault(repr(request.args[1]), []).append(i)
        out = [""] * len(requests)
        for members in kinds.values():
            arguments = requests[members[0]].args[1]
            encoded = (self.tok_encode(requests[i].args[0]) for i in members)
            contexts = [ids or [self.prefix_token_id] for ids in encoded]
            texts = self._generate(contexts, arguments)
            for i, text in zip(members, texts, strict=True):
                out[i] = until(text, arguments.get("until") or [])
                self.cache_hook.add_partial("generate_until", requests[i].args, out[i])
        return out

    def _loglikelihood_tokens(self, requests, **_) -> list[tuple[float, bool]]:
        found = self._scores([(context, follows) for _, context, follows in requests])
        for (key, _, _), value in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", key, value)
        return found

    def _scores(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """Computes each pair's log-likelihood in nats, and whether greedy decoding gives it."""
        questions, places = share_contexts([self._cut(*pair) for pair in pairs])
        questions = options.as_read_by(questions, self.model.cfg)
        out = [(0.0, True)] * len(pairs)  # of nothing that follows
        for i, losses, greedy in self._outputs(questions):
            question = questions[i]
            ends = question.starts + question.lengths
            for place, start, end in zip(places[i], question.starts, ends, strict=True):
                value = -losses[start:end].astype(np.float64).sum()
                if not math.isfinite(value):
                    raise errors.UserError(
                        f"the model gives a likelihood that is not finite ({value}): check its "
                        "weights, the adapter and the dtype."
                    )
                out[place] = float(value), bool(greedy[start:end].all())
        return out

    def _cut(self, context, follows) -> Pair:
        room = self.max_length - len(follows)
        if room < 1:
            raise errors.UserError(
                f"an answer of {len(follows)} tokens does not fit max_tokens = {self.max_length} "
                "with a token before it."
            )
        return context[-room:], follows

    def _outputs(self, questions):
        """Yields (index of a question, losses (A,), greedy (A,)) of its row."""
        rows = [question.row for question in questions]
        groups = batches.plan(rows, self.batch_tokens, self.placement.rows_multiple, MAX_SHAPES)

        def dispatched():
            for group in groups:
                mine = [questions[i] for i in group.indices]
                batch = options.pack(mine, group.rows, group.tokens, group.answers)
                placed = self.placement.batch(batch)
                yield group, self._score(self.model.params, self.adapter, placed)

        with progress.Progress("harness", len(rows)) as bar:
            for group, outputs in devices.one_behind(dispatched()):
                losses, greedy = (np.asarray(x) for x in outputs)
                bar.update(len(group.indices), sum(len(rows[i].input_ids) for i in group.indices))
                for row, i in enumerate(group.indices):
                    yield i, losses[row], greedy[row]


def token_scores(
    params: trees.Tree,
    cfg: config.DecoderConfig,
    batch: batches.Batch,
    adapter: trees.Tree | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Computes each scored token's negative log-likelihood in nats, and if it is the likeliest.

    Returns:
        (B, A) float32, 0 at padding, and (B, A) bool.
    """
    losses, best, _ = loss.top_scores(params, cfg, batch, 1, adapter)
    return losses, best[..., 0] == batch.loss_labels


def share_contexts(pairs: Sequence[Pair]) -> tuple[list[options.Question], list[list[int]]]:
    """Groups pairs into a question for each context; returns also the pairs that are its options.

    A pair with nothing that follows is in none.
    """
    members: dict[tuple[int, ...], list[int]] = {}
    for i, (context, follows) in enumerate(pairs):
        if len(follows):
            members.setdefault(tuple(context), []).append(i)
    questions = [
        options.Question(
            example_id=f"{places[0]:09d}",
            task="",
            prompt_ids=np.array(context, np.int32),
            letters=tuple(map(str, places)),
            option_ids=tuple(np.array(pairs[i][1], np.int32) for i in places),
            answer=0,
        )
        for context, places in members.items()
    ]
    return questions, list(members.values())


def until(text: str, stops: str | Sequence[str]) -> str:
    """Returns the text before the first stop string in it."""
    for stop in [stops] if isinstance(stops, str) else stops:
        text = text.partition(stop)[0] if stop else text
    return text
