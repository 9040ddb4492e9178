"""Computations in parts: what is there, what is missing, and that any set of parts gives the same."""

import json

import numpy as np
import pytest
import torch
from played_ranks import play

from ddpm_fast.io.parts import Parts, gaps
from ddpm_fast.io.ranks import Ranks, launched_ranks


def filled(folder, *ranges):
    """Parts in which item i has the results i and [i, i²]."""
    parts = Parts(folder / "parts", dict(seed=0, data="digits"))
    parts.open()
    for start, stop in ranges:
        items = np.arange(start, stop)
        parts.save(range(start, stop), a=items, b=np.stack([items, items**2], 1))
    return parts


# In order; with a gap that another size filled; one inside another; overlapping; beyond what is wanted.
@pytest.mark.parametrize("ranges", [[(0, 4), (4, 8), (8, 10)], [(4, 10), (0, 3), (3, 4)], [(0, 10), (2, 5)], [(0, 6), (3, 10)], [(0, 30)]])
def test_any_parts_that_cover_the_items_give_the_same(tmp_path, ranges):
    parts = filled(tmp_path, *ranges)
    assert parts.missing(10, 4) == []
    found = parts.load(10)
    assert found["a"].tolist() == list(range(10))
    assert found["b"].tolist() == [[i, i * i] for i in range(10)]
    parts.remove()
    assert not parts.folder.exists() and parts.present() == []


def test_what_is_missing_comes_in_ranges_of_the_size(tmp_path):
    parts = filled(tmp_path, (4, 6), (7, 9))
    assert parts.missing(12, 3) == [range(0, 3), range(3, 4), range(6, 7), range(9, 12)]
    assert parts.missing(5, 100) == [range(0, 4)]
    with pytest.raises(FileNotFoundError, match="has no part with item 0 of 12"):
        parts.load(12)
    assert Parts(tmp_path / "nowhere", {}).missing(3, 2) == [range(0, 2), range(2, 3)]


def test_other_files_are_no_parts(tmp_path):
    parts = filled(tmp_path, (0, 2))
    for name in (".2-4.npz.0123.tmp", "2-4.npz.bak", "x-4.npz"):
        (parts.folder / name).mkdir()
    assert parts.present() == [range(0, 2)]


def test_parts_of_other_settings_are_refused_by_name(tmp_path):
    filled(tmp_path, (0, 2))
    Parts(tmp_path / "parts", dict(data="digits", seed=0)).open()
    with pytest.raises(ValueError, match=r"unfinished parts of another run \(clip None, not True, seed 0, not 1\)"):
        Parts(tmp_path / "parts", dict(seed=1, data="digits", clip=True)).open()


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_damaged_settings_are_said_to_be(tmp_path, text):
    parts = filled(tmp_path)
    (parts.folder / "settings.json").write_text(text)
    with pytest.raises(ValueError, match=r"cannot read .*settings\.json \(.*\); remove the folder"):
        parts.open()


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"(" * len(data)])
def test_a_damaged_part_is_named(tmp_path, damage):
    parts = filled(tmp_path, (0, 4), (4, 8))
    path = parts.folder / "4-8.npz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"cannot read .*4-8\.npz \(.*\); remove it to have it computed again"):
        parts.load(8)
    path.unlink()
    assert parts.missing(8, 8) == [range(4, 8)]


def test_settings_survive_json(tmp_path):
    parts = Parts(tmp_path / "parts", dict(shape=(1, 8)))
    parts.open()
    parts.open()  # a tuple is a list when it comes back
    assert json.loads((tmp_path / "parts" / "settings.json").read_text()) == parts.settings == {"shape": [1, 8]}


def test_ranks_share_all_parts_once():
    turns = [[] for _ in range(3)]
    look = lambda size: gaps([range(2, 4)], range(20), size)  # noqa: E731
    assert play(3, lambda ranks: turns[ranks.rank].extend(ranks.share_missing(look, 2))) == [None] * 3
    assert sorted(i for turn in turns for part in turn for i in part) == [0, 1, *range(4, 20)]
    assert max(map(len, turns)) - min(map(len, turns)) <= 1
    assert play(3, lambda ranks: turns[ranks.rank].append(ranks.share_missing(look, 100))) == [None] * 3
    assert all(turn[-1] for turn in turns)  # the batch gives way, so that each has something to do


def test_one_process_waits_for_nobody():
    with launched_ranks() as ranks:
        assert ranks == Ranks() and ranks.first and ranks.device("auto") == "auto"
        ranks.wait()


@pytest.mark.parametrize("there, expected", [(0, []), (1, []), (2, [1])])
def test_each_process_has_its_own_gpu_as_the_current_one(there, expected, monkeypatch):
    """Else what asks for "cuda" without a number would go to the first GPU, for all of them."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for name, result in dict(init_process_group=None, new_group="group", get_rank=1, destroy_process_group=None).items():
        monkeypatch.setattr(torch.distributed, name, lambda *_, result=result, **__: result)
    with launched_ranks() as ranks:
        assert ranks == Ranks(1, 2, 1, "group") and chosen == expected
