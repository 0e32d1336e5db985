"""Registries: a decorator, names that are taken or unknown, and packages that plug in."""

from __future__ import annotations

import sys
from importlib import metadata

import pytest

from stllms import registry
from stllms.registry import Registry


@pytest.fixture
def things():
    return Registry("thing")


def test_a_decorator_registers_and_gives_back(things):
    @things("one")
    def one():
        return 1

    assert one() == 1
    assert things.find("one") is one
    assert dict(things) == {"one": one}


def test_an_unknown_name_lists_what_there_is(things):
    things("mean")(len)
    with pytest.raises(ValueError, match=r"no thing 'meen' \(did you mean mean\?\)") as refused:
        things.find("meen")
    assert "there are mean" in str(refused.value)


def test_a_name_is_taken_by_another_thing_only(things):
    def again():
        def made():
            return None

        return made

    things("x")(again())
    second = again()
    assert things("x")(second) is second  # a cell that is run twice
    assert things["x"] is second
    with pytest.raises(ValueError, match="already thing 'x'"):
        things("x")(len)


def test_an_installed_package_plugs_in_by_its_entry_point(monkeypatch, tmp_path):
    (tmp_path / "her_package.py").write_text(
        "from stllms import registry\n\n@registry.operator('her-operator')\n"
        "def double(hidden, vector, coefficient):\n    return 2 * coefficient * vector\n"
    )
    info = tmp_path / "her_package-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: her-package\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[stllms]\nhers = her_package\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    registry.load_entry_points.cache_clear()
    try:
        assert registry.operator.find("her-operator").__name__ == "double"
        assert "her_package" in sys.modules
    finally:
        sys.modules.pop("her_package", None)
        registry.operator._known.pop("her-operator", None)
        registry.load_entry_points.cache_clear()


def test_a_broken_package_is_named(monkeypatch):
    broken = metadata.EntryPoint("hers", "no_such_module_of_hers", "stllms")
    monkeypatch.setattr(registry.metadata, "entry_points", lambda group: [broken])
    registry.load_entry_points.cache_clear()
    with pytest.raises(ImportError, match="entry point hers"):
        registry.load_entry_points()
    registry.load_entry_points.cache_clear()
