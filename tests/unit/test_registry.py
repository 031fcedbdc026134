"""The objective registry: names, clashes, versions, nearest names."""

from importlib.metadata import EntryPoint
from typing import Any

import pytest

from sparselt_dist.errors import PluginError
from sparselt_dist.objectives import available, base, get_objective, register
from sparselt_dist.objectives.settings import BUILT_IN_SETTINGS, MLMConfig


class Complete:
    """An objective that does nothing."""

    name = "complete"
    api_version = base.API_VERSION
    config_cls = MLMConfig

    def needs_lm_head(self, cfg: Any) -> bool:
        return False

    def build_collator(self, cfg: Any, tokenizer: Any) -> Any:
        raise NotImplementedError

    def build_module(self, cfg: Any, backbone: Any) -> Any:
        raise NotImplementedError


class Other(Complete):
    """Another class under the same name."""


@pytest.fixture(autouse=True)
def _private_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in base.BUILT_IN:  # one first imported inside would be lost afterwards
        get_objective(name)
    monkeypatch.setattr(base, "_registered", dict(base._registered))


def _entry_point(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    point = EntryPoint(name=name, value=value, group=base.ENTRY_POINT_GROUP)
    monkeypatch.setattr(base, "_entry_points", lambda: {name: [point]})


def test_built_ins_are_available_and_have_settings() -> None:
    assert set(base.BUILT_IN) <= set(available())
    assert set(base.BUILT_IN) == set(BUILT_IN_SETTINGS)
    for name in base.BUILT_IN:
        objective = get_objective(name)
        assert objective.name == name and isinstance(objective, base.Objective)
        assert objective.config_cls is BUILT_IN_SETTINGS[name]
        assert get_objective(name) is objective


def test_register_makes_an_objective_available() -> None:
    objective = Complete()
    assert register(objective) is objective
    assert get_objective("complete") is objective
    assert "test_registry" in available()["complete"]


def test_registering_twice_is_harmless_and_another_class_a_clash() -> None:
    register(Complete())
    register(Complete())
    with pytest.raises(PluginError, match=r"'complete': registered by .*test_registry and by .*test_registry"):
        register(Other())


def test_a_built_in_name_cannot_be_taken() -> None:
    objective = Complete()
    objective.name = "mlm"
    with pytest.raises(
        PluginError, match=r"'mlm' from .*test_registry: .* built-in of sparselt_dist.objectives.mlm; rename"
    ):
        register(objective)


def test_an_incomplete_interface_is_named() -> None:
    class Incomplete:
        name = "incomplete"
        api_version = base.API_VERSION

    with pytest.raises(PluginError, match="lacks config_cls, needs_lm_head, build_collator, build_module"):
        register(Incomplete())  # type: ignore[arg-type]


def test_another_api_version_is_refused() -> None:
    objective = Complete()
    objective.api_version = 99
    with pytest.raises(PluginError, match="api_version is 99, expected 1"):
        register(objective)


def test_an_unknown_name_lists_the_choices_and_the_nearest() -> None:
    with pytest.raises(PluginError, match=r"found 'mlmm', expected one of .*mlm.*; did you mean 'mlm'\?"):
        get_objective("mlmm")


def test_an_entry_point_that_fails_names_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    _entry_point(monkeypatch, "broken", "no_such_module_at_all:X")
    assert "broken" in available()  # listing imports nothing
    with pytest.raises(
        PluginError, match=r"'broken': plug-in no_such_module_at_all:X .* failed on import: ModuleNotFound"
    ):
        get_objective("broken")


def test_an_entry_point_must_carry_the_objective_of_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    _entry_point(monkeypatch, "renamed", f"{__name__}:Complete")
    with pytest.raises(PluginError, match="calls itself 'complete'"):
        get_objective("renamed")


def test_an_entry_point_may_be_a_class(monkeypatch: pytest.MonkeyPatch) -> None:
    _entry_point(monkeypatch, "complete", f"{__name__}:Complete")
    assert isinstance(get_objective("complete"), Complete)


def test_a_name_claimed_by_two_packages_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [EntryPoint(name="twice", value=value, group=base.ENTRY_POINT_GROUP) for value in ("a:X", "b:X")]
    monkeypatch.setattr(base, "_entry_points", lambda: {"twice": points})
    assert "(a:X) and plug-in" in available()["twice"]
    with pytest.raises(PluginError, match=r"'twice' is claimed by .* and .*; uninstall one"):
        get_objective("twice")
