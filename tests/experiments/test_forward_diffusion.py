"""Noise in one step and in many: what is measured is right, and what is said follows it."""

import dataclasses
import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from genfast import schedules
from genfast.experiments import Page, forward_diffusion, run_experiment
from genfast.experiments.forward_diffusion import _STEPPED, _TIMES, _in_many, _in_one_step, _left, _say_of_ways
from tests.experiments.small import assert_whole_page, few

PICTURES = ("curves.png", "two-ways.png", "schedules.png", "forward.mp4")


def test_it_finishes_in_seconds(tmp_path, capsys):
    page = run_experiment("forward-diffusion", few(tmp_path, budget=1.0))
    assert_whole_page(page, tmp_path, PICTURES)
    assert [statement.endswith("no difference beyond chance.") for statement in page.statements[:3]] == [True] * 3


@pytest.fixture(scope="module")
def ways(tmp_path_factory):
    settings = few(tmp_path_factory.mktemp("out"), budget=1.0)
    images = settings.load().test
    made = {}
    for name in _STEPPED:
        schedule = schedules.get(name)
        made[name] = {"one": _in_one_step(schedule, images, settings), "many": _in_many(schedule, images, settings)}
    return made


def statements(ways):
    page = Page("title", "question")
    _say_of_ways(page, 40, ways)
    return page.statements


def shifted(found, attribute, by):
    """All numbers of one kind moved by so many of their standard errors."""

    def move(value):
        half = (value.high - value.low) / 2
        return dataclasses.replace(value, value=value.value + by * half / 1.96)

    moved = {t: dataclasses.replace(each, **{attribute: move(getattr(each, attribute))}) for t, each in found.items()}
    return {"one": found, "many": moved}


@pytest.mark.parametrize("attribute", ["coefficient", "variance", "kurtosis"])
def test_a_difference_is_said(ways, attribute):
    wrong = {**ways, "linear": shifted(ways["linear"]["one"], attribute, by=7.0)}
    one, many, both = statements(wrong)
    assert one.endswith("no difference beyond chance.")
    assert many.endswith(": a difference beyond chance.")
    assert "linear" in many
    # The difference of two numbers has a larger error than each.
    assert both.endswith(": a difference beyond chance.")


def test_another_schedule_is_seen(ways):
    """Steps of one schedule against the theory of the other."""
    crossed = {"linear": {"one": ways["linear"]["one"], "many": ways["cosine"]["many"]}}
    one, many, _ = statements(crossed)
    assert one.endswith("no difference beyond chance.")
    assert many.endswith(": a difference beyond chance.")


def test_what_is_left_at_the_end_is_the_divergence_from_the_prior():
    x0 = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(2, 6)
    for name, scale in (("linear", 1.0), ("cosine", 1.0), ("edm", None)):
        schedule = schedules.get(name)
        last = schedule.timesteps(10)[:1]
        a, b = (value.double() for value in schedule.coefficients(last))
        prior = Normal(torch.zeros((), dtype=torch.float64), b if scale is None else torch.ones_like(b))
        want = kl_divergence(Normal(a * x0, b.expand_as(x0)), prior).mean(1) / math.log(2)
        # 1 - b^2 of fp32 coefficients is a difference of numbers close to 1.
        torch.testing.assert_close(_left(schedule, last, x0), want, rtol=1e-3, atol=2e-8)


def test_every_time_has_noise_of_its_own(ways):
    for way in ("one", "many"):
        values = [ways[name][way][t].kurtosis.value for name in _STEPPED for t in _TIMES]
        assert len(set(values)) == len(values)


def test_the_page_does_not_speak_of_trainings(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(forward_diffusion, "run", lambda settings: Page("title", "question"))
    run_experiment("forward-diffusion", few(tmp_path, budget=60.0))
    text = (tmp_path / "README.md").read_text()
    assert "- Budget of training: nothing is trained\n" in text
    assert "one training" not in text
