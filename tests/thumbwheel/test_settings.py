from pathlib import Path

import pytest

from thumbwheel.errors import SettingsError
from thumbwheel.settings import load


def test_the_environment_overrides_one_value_of_a_section_and_the_file_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "thumbwheel.toml"
    file.write_text('data = "/somewhere"\n[learner]\nbeta = 0.3\nrank = 16\n')
    monkeypatch.setenv("THUMBWHEEL_LEARNER__BETA", "0.2")
    settings = load(file)
    assert (settings.learner.beta, settings.learner.rank) == (0.2, 16)
    assert settings.path(settings.log.path) == Path("/somewhere/log.sqlite")


def test_every_mistake_is_named(tmp_path: Path) -> None:
    file = tmp_path / "thumbwheel.toml"
    file.write_text("[learner]\nbeta = -1\nlerning_rate = 0.1\n[gateway]\nport = 70000\n")
    with pytest.raises(SettingsError) as raised:
        load(file)
    for name in ("learner.beta", "learner.lerning_rate", "gateway.port"):
        assert name in str(raised.value)


def test_broken_toml_and_an_absent_file_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "thumbwheel.toml"
    file.write_text("[learner\n")
    with pytest.raises(SettingsError, match="cannot be read"):
        load(file)
    with pytest.raises(SettingsError, match="no settings file"):
        load(tmp_path / "absent.toml")
    monkeypatch.setenv("THUMBWHEEL_CONFIG", str(tmp_path / "absent.toml"))
    with pytest.raises(SettingsError, match="no settings file"):
        load()


def test_a_budget_can_be_switched_off_only_by_saying_so(tmp_path: Path) -> None:
    file = tmp_path / "thumbwheel.toml"
    file.write_text("[learner]\nkl_budget = inf\n")
    assert load(file).learner.kl_budget == float("inf")
    file.write_text("[learner]\nkl_budget = 0\n")
    with pytest.raises(SettingsError, match="kl_budget"):
        load(file)
