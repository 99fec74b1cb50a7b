"""Many tasks in one animated picture."""

import runpy
from types import SimpleNamespace

import pytest
from PIL import Image

from mtrl.errors import UsageError
from mtrl.evaluation.video import find_backend


@pytest.fixture(scope="module")
def film_grid():
    from doc_pages import ROOT

    return SimpleNamespace(**runpy.run_path(str(ROOT / "scripts/film_grid.py")))


def can_draw() -> bool:
    try:
        return bool(find_backend())
    except UsageError:
        return False


@pytest.mark.skipif(not can_draw(), reason="needs EGL or OSMesa")
def test_a_grid_of_a_policys_tasks(film_grid, policy, tmp_path, capsys):
    out = tmp_path / "grid.webp"
    assert film_grid.main([str(policy), "-o", str(out), "--size", "96"]) == 0
    assert "4 frames" in capsys.readouterr().out
    picture = Image.open(out)
    assert picture.size == (2 * 96, 96)  # two tasks in one row
    assert picture.is_animated and picture.n_frames == 4  # steps 0, 8, 16, 20
    halves = [picture.convert("L").crop((x, 20, x + 96, 96)) for x in (0, 96)]
    assert all(len(half.getcolors()) > 50 for half in halves)
    assert halves[0].tobytes() != halves[1].tobytes()


def frames(colors) -> list[Image.Image]:
    return [Image.effect_noise((64, 64), 80 + color).convert("RGB") for color in colors]


@pytest.mark.parametrize("name", ["a.webp", "a.gif"])
def test_quality_gives_way_to_the_limit(film_grid, name, tmp_path):
    shown = frames(range(5))
    good = film_grid.save(shown, 50, tmp_path / name, 10**6)
    size = (tmp_path / name).stat().st_size
    worse = film_grid.save(shown, 50, tmp_path / name, size - 1)
    assert good != worse and (tmp_path / name).stat().st_size < size
    assert Image.open(tmp_path / name).n_frames == 5
    with pytest.raises(UsageError, match=r"limit: expected 0\.0001 MB to suffice"):
        film_grid.save(shown, 50, tmp_path / "none.webp", 100)
    assert not (tmp_path / "none.webp").exists()


def test_films_of_other_lengths_and_a_last_row_that_is_not_full(film_grid):
    import io

    def gif(color, n):
        file = io.BytesIO()
        first, *rest = [Image.new("RGB", (8, 8), (color, 10 * k, 0)) for k in range(n)]
        first.save(file, "GIF", save_all=True, append_images=rest, duration=50)
        return file.getvalue()

    found, milliseconds = film_grid.grid([gif(50, 2), gif(100, 4), gif(150, 3)], columns=2)
    assert milliseconds == 50 and len(found) == 4 and found[0].size == (16, 16)
    last = found[-1]
    assert [last.getpixel(at)[0] for at in ((4, 4), (12, 4), (4, 12), (12, 12))] == [
        50,
        100,
        150,
        0,
    ]
    assert [last.getpixel(at)[1] for at in ((4, 4), (12, 4), (4, 12))] == [10, 30, 20]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-o", "a.png"], "out: expected a name ending in .webp or .gif, got a.png"),
        (["--columns", "0"], "columns: expected more than 0, got 0"),
    ],
)
def test_what_cannot_be_is_one_line(film_grid, policy, capsys, flags, message):
    assert film_grid.main([str(policy), *flags]) == 2
    assert message in capsys.readouterr().err
