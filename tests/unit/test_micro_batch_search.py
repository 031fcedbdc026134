"""The search of the fastest micro-batch, on made-up machines."""

import math

import pytest
import torch

from sparselt_dist import micro_batch_search
from sparselt_dist.config_loading import load_config, make_plan
from sparselt_dist.errors import ConfigError
from sparselt_dist.micro_batch_search import divisors, fastest, report, search


def test_candidates_are_the_divisors_of_a_ranks_share() -> None:
    assert divisors(24) == [1, 2, 3, 4, 6, 8, 12, 24] and divisors(1) == [1]


def test_the_search_ends_two_past_the_best() -> None:
    rates = {1: 10.0, 2: 18.0, 4: 30.0, 8: 31.0, 16: 28.0, 32: 25.0, 64: 99.0}
    tried = search(divisors(64), lambda size: size / rates[size])
    assert [candidate.micro_batch_size for candidate in tried] == [1, 2, 4, 8, 16, 32]
    assert fastest(tried) == 8
    lines = report(tried, 8).splitlines()
    assert "taken" in lines[4] and "31.0 sequences/s" in lines[4] and len(lines) == 7


def test_one_slower_candidate_does_not_end_it() -> None:
    rates = {1: 10.0, 2: 9.0, 4: 30.0, 8: 40.0}
    assert fastest(search(divisors(8), lambda size: size / rates[size])) == 8


def test_what_does_not_fit_ends_it() -> None:
    tried = search(divisors(64), lambda size: size / 10 if size < 16 else math.inf)
    assert tried[-1].micro_batch_size == 16 and tried[-1].rate == 0.0
    assert "16 does not fit" in report(tried, fastest(tried))
    with pytest.raises(ConfigError, match="not even 1 sequence fits"):
        fastest(search(divisors(8), lambda size: math.inf))


def test_all_ranks_read_a_candidate_before_one_judges_that_it_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    trial, read = object.__new__(micro_batch_search._Trial), []
    trial._device = torch.device("cpu")
    monkeypatch.setattr(trial, "_batch", read.append)  # in which all ranks meet
    monkeypatch.setattr(trial, "_would_not_fit", lambda size: True)
    monkeypatch.setattr(micro_batch_search.distributed, "reduce_min", lambda values: values)
    assert trial.agreed_seconds(4) == math.inf and read == [4]


def test_zero_3_is_refused() -> None:
    config = load_config(["quickstart"], ["train.micro_batch_size=fastest", "train.zero_stage=3"])
    with pytest.raises(ConfigError, match="a number or auto with ZeRO stage 3"):
        make_plan(config, 2)
    assert make_plan(load_config(["quickstart"], ["train.micro_batch_size=fastest"]), 2).micro_batch_size == 16
