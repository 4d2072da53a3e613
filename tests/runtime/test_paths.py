"""Places beside a folder, whatever the user called it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tl_capacity.runtime.paths import beside, named


@pytest.mark.parametrize(
    ("given", "wanted"), [("runs/a", "runs/a.parts"), (".", "there.parts"), ("", "there.parts"), ("..", "../x.parts")]
)
def test_beside(given: str, wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x" / "there").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "x" / "there")
    expected = Path(wanted) if given == "runs/a" else tmp_path / "x" / wanted
    assert beside(Path(given), "parts").resolve() == expected.resolve()
    assert named(Path(given)).name not in ("", "..")
