"""What was paid for is never lost: odd replies, damaged caches, two runs at once."""

import errno
import json
import os
import random

import pytest

from diq_jax import errors
from diq_jax.clients import replies

KEYS = [f"{i:064x}" for i in range(6)]


def reply(i, **changes):
    values = {"content": f'{{"level": {i}}}', "refusal": "", "finish": "stop"}
    values |= {"prompt_tokens": 10 + i, "completion_tokens": 2} | changes
    return replies.Reply(**values)


@pytest.fixture(name="path")
def _path(tmp_path):
    path = tmp_path / "out.cache.jsonl"
    with replies.Cache(path) as cache:
        for i, key in enumerate(KEYS):
            cache.put(key, reply(i))
    return path


def test_what_is_put_is_there_the_next_time(path):
    with replies.Cache(path) as cache:
        assert [cache.get(key) for key in KEYS] == [reply(i) for i in range(6)]
        # 10 + 11 + ... + 15 = 75 tokens in and 6 * 2 out.
        assert cache.usage == (6, 75, 12, 0) and cache.damaged == 0
        assert cache.get("f" * 64) is None


@pytest.mark.parametrize("damage", [b"x", b"\xff", b"\x00"])
@pytest.mark.parametrize("line", range(6))
def test_a_damaged_line_costs_itself_and_the_file_only_grows(line, damage, path):
    lines = path.read_bytes().splitlines(keepends=True)
    # Its first byte is no JSON any more, whatever stands there.
    lines[line] = damage + lines[line][1:]
    path.write_bytes(b"".join(lines))
    before = path.read_bytes()
    with replies.Cache(path) as cache:
        found = [cache.get(key) for key in KEYS]
        assert found == [None if i == line else reply(i) for i in range(6)]
        assert cache.damaged == 1 and path.read_bytes() == before
        cache.put(KEYS[line], reply(line))
    assert path.read_bytes().startswith(before)
    with replies.Cache(path) as cache:
        assert [cache.get(key) for key in KEYS] == [reply(i) for i in range(6)]


def test_a_damaged_byte_anywhere_costs_its_line_and_changes_no_reply(path):
    whole, draw = path.read_bytes(), random.Random(0)
    for _ in range(300):
        place, byte = draw.randrange(len(whole)), draw.randrange(256)
        path.write_bytes(whole[:place] + bytes([byte]) + whole[place + 1 :])
        with replies.Cache(path) as cache:
            found = [cache.get(key) for key in KEYS]
        assert all(new in (None, reply(i)) for i, new in enumerate(found))
        # A damaged end of a line joins two.
        assert found.count(None) <= (2 if whole[place : place + 1] == b"\n" else 1)


def test_a_run_killed_in_a_write_continues(tmp_path, path):
    whole = path.read_bytes()
    first = whole.index(b"\n")
    for length in (*range(0, first, 7), first - 1, first, first + 1, len(whole) - 1):
        cut = tmp_path / "cut.cache.jsonl"
        cut.write_bytes(whole[:length])
        with replies.Cache(cut) as cache:
            # A line that lacks only its end is whole.
            kept = whole[: length + 1].count(b"\n")
            assert sum(cache.get(key) is not None for key in KEYS) == kept
            for i, key in enumerate(KEYS):
                if cache.get(key) is None:
                    cache.put(key, reply(i))
        with replies.Cache(cut) as cache:
            assert [cache.get(key) for key in KEYS] == [reply(i) for i in range(6)]


@pytest.mark.parametrize(
    "text",
    [
        b"my own notes\n",
        b"no end",
        b"\n",
        b"\x00" * 50,
        b"\x89PNG\r\n\xff",
        b'{"key": "door", "content": "blue"}\n',
        b'{"id": 1}\n{"id": 2}\n',
    ],
)
def test_a_file_that_is_not_ours_is_refused_and_stays(text, tmp_path):
    path = tmp_path / "out.cache.jsonl"
    path.write_bytes(text)
    with pytest.raises(errors.UserError, match="holds no reply that was kept here"):
        replies.Cache(path)
    assert path.read_bytes() == text


def test_a_folder_of_that_name_is_one_sentence(tmp_path):
    with pytest.raises(errors.UserError, match="cannot be written: Is a directory"):
        replies.Cache(tmp_path)


def test_one_run_at_a_time_holds_the_file(path):
    with replies.Cache(path):
        with pytest.raises(errors.UserError, match="in use by another run"):
            replies.Cache(path)
    replies.Cache(path).__exit__()


def test_a_full_disk_is_one_sentence_and_the_next_line_is_whole(path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with replies.Cache(path) as cache:
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", full)
            with pytest.raises(errors.UserError, match="cannot be written: No space left"):
                cache.put("e" * 64, reply(3))
        cache.put("f" * 64, reply(4))
    with replies.Cache(path) as cache:
        assert cache.get("f" * 64) == reply(4) and cache.get(KEYS[5]) == reply(5)


def body(content='{"level": 2}', usage=None, **message):
    usage = {"prompt_tokens": 10, "completion_tokens": 2} if usage is None else usage
    message = {"role": "assistant", "content": content} | message
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return json.dumps({"choices": [choice], "usage": usage})


@pytest.mark.parametrize(
    "text, content, counts",
    [
        (body(), '{"level": 2}', (10, 2)),
        (body(usage="many"), '{"level": 2}', (0, 0)),
        (body(usage=[1]), '{"level": 2}', (0, 0)),
        (body(usage={"prompt_tokens": -4, "completion_tokens": 2}), '{"level": 2}', (0, 2)),
        (body(usage={"prompt_tokens": "4", "completion_tokens": None}), '{"level": 2}', (0, 0)),
        (body(usage={"prompt_tokens": 4.5, "completion_tokens": True}), '{"level": 2}', (0, 0)),
        (body(usage={"prompt_tokens": float("nan")}), '{"level": 2}', (0, 0)),
        (body(usage={"prompt_tokens": float("inf")}), '{"level": 2}', (0, 0)),
        (body(usage={"prompt_tokens": 10**300}), '{"level": 2}', (0, 0)),
        (body(usage={}), '{"level": 2}', (0, 0)),
        (body("half \ud83d of a pair"), "half � of a pair", (10, 2)),
        (body("a pair \ud83d\ude00"), "a pair 😀", (10, 2)),
        (body("[" * 5000), "[" * 5000, (10, 2)),
        (body("x" * 1_000_000), "x" * 1_000_000, (10, 2)),
        (body(None), "", (10, 2)),
    ],
    ids=range(15),
)
def test_an_odd_reply_is_read_kept_and_read_again(text, content, counts, tmp_path):
    found = replies.read_completion(text)
    assert (found.content, (found.prompt_tokens, found.completion_tokens)) == (content, counts)
    with replies.Cache(tmp_path / "c") as cache:
        cache.put(KEYS[0], found)
    with replies.Cache(tmp_path / "c") as cache:
        assert cache.get(KEYS[0]) == found and cache.damaged == 0
        assert cache.usage == (1, *counts, int(counts[0] == 0))


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "the reply is not JSON"),
        ("[" * 100_000, "nested deeper than 100 levels"),
        ('{"a":' * 200 + "1" + "}" * 200, "nested deeper than 100 levels"),
        ("[]", "the reply must hold a JSON object"),
        ("{}", "the reply has no field 'choices'"),
        ('{"choices": {}}', "choices must be a list"),
        ('{"choices": []}', "the reply has no choice"),
        ('{"choices": [3]}', "the reply's choice must hold a JSON object"),
        ('{"choices": [{"message": null}]}', "message must be an object; got None"),
        (body(["a"]), "content must be a text or null; got"),
        (body(refusal={"why": 1}), "refusal must be a text or null"),
        ('{"choices": ' + "9" * 5000 + "}", "5,000 digits"),
    ],
)
def test_what_is_no_completion_is_named(text, message):
    with pytest.raises(errors.UserError, match=message):
        replies.read_completion(text)


def test_a_line_of_an_earlier_version_with_odd_counts_is_kept(tmp_path):
    path = tmp_path / "c"
    old = {"key": KEYS[0], "content": "half \ud83d", "refusal": "", "finish": "stop"}
    path.write_text(json.dumps(old | {"prompt_tokens": "many", "completion_tokens": -1}) + "\n")
    with replies.Cache(path) as cache:
        assert cache.get(KEYS[0]).content == "half �" and cache.usage == (1, 0, 0, 1)
