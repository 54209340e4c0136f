"""Figures of tables of any size: labelled, small, the same bytes again."""

import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pyarrow as pa
import pytest
from IPython.core.formatters import DisplayFormatter
from matplotlib.figure import Figure
from matplotlib.image import imread

from mlsae.analyze import load
from mlsae.analyze.results.figures import registry as figures
from mlsae.analyze.results.figures.style import save
from mlsae.base.errors import InputError

Make = Callable[..., dict[str, Any]]


@pytest.mark.parametrize(
    ("num_latents", "layers", "dead", "measured"),
    [
        (1, (0,), 0.0, False),
        (16, (0, 1, 2), 0.1, True),
        (5000, (0, 3, 11), 0.1, True),
        (10, (0, 1), 1.0, True),
    ],
)
def test_every_figure_can_be_drawn_and_is_labelled(
    make: Make, num_latents: int, layers: tuple[int, ...], dead: float, measured: bool
) -> None:
    parts = make(num_latents, layers, dead=dead, measured=measured)
    expected = [*figures.FIGURES, "prompt_0"]
    if not measured:
        expected.remove("cross_entropy")
    assert list(figures.names(parts)) == expected
    for name in expected:
        figure = figures.draw(name, parts)
        figure.draw_without_rendering()
        _check_labels(figure)


@dataclass(frozen=True)
class Large:
    """Figures of 131,072 latents at 16 layers, written, and how that went."""

    parts: dict[str, Any]
    directory: Path
    told: list[int]
    seconds: float


@pytest.fixture(scope="module")
def large(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Large:
    """Not to be changed."""
    parts, directory = make(131_072, tuple(range(16))), tmp_path_factory.mktemp("large")
    told: list[int] = []
    start = time.process_time()
    figures.draw_all(directory, parts, told.append)
    return Large(parts, directory, told, time.process_time() - start)


def test_every_figure_is_written_as_picture_and_as_text(large: Large) -> None:
    expected = [*figures.FIGURES, "prompt_0"]
    files = [f"{name}.{suffix}" for name in expected for suffix in ("png", "svg")]
    assert figures.files(large.parts) == files
    assert sorted(files) == sorted(path.name for path in large.directory.iterdir())
    assert large.told == [1] * len(expected)
    for name in expected:
        pixels = imread(large.directory / f"{name}.png")
        assert pixels.shape[1] in (660, 1350)
        assert pixels[..., :3].std() > 0.01
        _check_svg(large.directory / f"{name}.svg")


def _check_labels(figure: Figure) -> None:
    """Every axes says what it is, and nothing sticks out of the figure."""
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert min(box.x0, box.y0) > -0.01
    assert box.x1 < width + 0.01
    assert box.y1 < height + 0.01
    for axes in figure.axes:
        is_bar = axes.get_label() == "<colorbar>"
        assert axes.get_ylabel()
        assert is_bar or axes.get_xlabel()
        for child in axes.child_axes:
            assert child.get_ylabel()
        assert is_bar or axes.get_title(loc="left")


def _check_svg(path: Path) -> None:
    """Text is text, its date is nowhere, and dense meshes are a picture."""
    text = path.read_text("utf-8")
    assert "<text " in text
    assert "dc:date" not in text
    assert len(text) < 150_000


def test_131072_latents_take_seconds_and_little_room(large: Large) -> None:
    assert large.seconds < 20
    assert max(path.stat().st_size for path in large.directory.iterdir()) < 200_000
    axes = figures.draw("layer_distribution", large.parts).axes[0]
    image = np.asarray(axes.images[0].get_array())
    assert image.shape == (16, 1200)
    np.testing.assert_allclose(image.sum(axis=0), 1)


def test_a_figure_that_cannot_be_drawn_has_no_name(make: Make) -> None:
    parts = make(16, (0, 1), measured=False)
    for name in ("embedding", "unembedding"):
        at = parts["latents"].column_names.index(f"{name}_cosine")
        nulls = pa.nulls(16, pa.float64())
        parts["latents"] = parts["latents"].set_column(at, f"{name}_cosine", nulls)
    parts["summary"] |= {"layer_variance": None, "prompts": []}
    left_out = {"cross_entropy", "embedding_cosine", "layer_variance"}
    assert set(figures.FIGURES) - set(figures.names(parts)) == left_out
    for name in (*left_out, "prompt_0", "poem"):
        with pytest.raises(InputError, match=f"there is no figure '{name}': the figures are recon"):
            figures.draw(name, parts)


def test_settings_of_the_user_change_nothing(make: Make, tmp_path: Path) -> None:
    """A matplotlibrc may ask for LaTeX, which is not installed, or for a font that is not there."""
    parts = make(16, (0, 1))
    save(figures.draw("sparsity", parts), tmp_path, "before")
    theirs = {"text.usetex": True, "font.family": "no such font", "savefig.transparent": True}
    with matplotlib.rc_context({**theirs, "savefig.bbox": "tight", "axes.facecolor": "red"}):
        save(figures.draw("sparsity", parts), tmp_path, "after")
    for suffix in ("png", "svg"):
        before, after = (tmp_path / f"{name}.{suffix}" for name in ("before", "after"))
        assert before.read_bytes() == after.read_bytes()


def test_a_notebook_shows_a_figure_at_the_end_of_a_cell(make: Make, tmp_path: Path) -> None:
    """Without %matplotlib inline, by the picture that the figure itself gives."""
    figure = figures.draw("sparsity", make(16, (0, 1)))
    shown, _ = DisplayFormatter().format(figure)
    assert sorted(shown) == ["image/png", "text/plain"]
    save(figure, tmp_path, "sparsity")
    assert shown["image/png"] == (tmp_path / "sparsity.png").read_bytes()


def test_a_figure_that_fails_is_named_and_the_others_are_drawn(
    make: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail() -> Figure:
        raise ValueError("no such\nfont")

    some = dict.fromkeys(("density", "bimodality"), (fail, lambda _: True))
    monkeypatch.setattr(figures, "FIGURES", {**some, "sparsity": figures.FIGURES["sparsity"]})
    parts = make(16, (0, 1))
    parts["summary"]["prompts"] = []
    figures.draw_all(tmp_path, parts, lambda _: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sparsity.png", "sparsity.svg"]
    assert capsys.readouterr().err == (
        "warning: 2 figures (density, bimodality) could not be made (ValueError: no such font); "
        "all else is whole\n"
    )


def test_few_latents_are_named(make: Make) -> None:
    axes = figures.draw("layer_distribution", make(8, (0, 1), dead=0)).axes[0]
    names = [label.get_text() for label in axes.get_xticklabels()]
    assert sorted(names) == [str(n) for n in range(8)]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\n\x00b" + " word" * 40, "a b" + " word" * 11 + " w…"),
        ("日" * 50, "日" * 30 + "…"),
        ("x" * 60, "x" * 60),
    ],
)
@pytest.mark.filterwarnings("ignore:Glyph .* missing from font:UserWarning")
def test_a_prompt_fits_its_title_and_what_cannot_be_shown_is_a_space(
    text: str, shown: str, make: Make
) -> None:
    parts = make(30, (0, 1))
    parts["summary"]["prompts"] = [text]
    figure = figures.draw("prompt_0", parts)
    figure.draw_without_rendering()
    _check_labels(figure)
    assert figure.axes[0].get_title(loc="left").endswith(f" latents of “{shown}”")


AGAIN = """
import pickle, sys
from pathlib import Path
from mlsae.analyze.results.figures import registry
from mlsae.analyze.results.figures.style import save
parts = pickle.loads(Path(sys.argv[1]).read_bytes())
for name in sys.argv[3:]:
    save(registry.draw(name, parts), Path(sys.argv[2]), name)
"""


def test_a_figure_is_the_same_bytes_again(make: Make, tmp_path: Path) -> None:
    """Also in another process, where hashes of strings differ; with and without meshes."""
    parts, names = make(100, (0, 1, 2)), ("layer_std", "layer_distribution", "sparsity")
    (tmp_path / "parts").write_bytes(pickle.dumps(parts))
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for name in names:
        files = save(figures.draw(name, parts), tmp_path / "a", name)
        assert files == [f"{name}.png", f"{name}.svg"]
    words = [str(tmp_path / "parts"), str(tmp_path / "b"), *names]
    subprocess.run([sys.executable, "-c", AGAIN, *words], check=True)
    for path in sorted((tmp_path / "a").iterdir()):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_every_figure_has_its_place_in_an_analysis(drawn: Any, tmp_path: Path) -> None:
    analysis = load(drawn.analysis.path)
    assert analysis.figures == tuple(figures.FIGURES)
    assert analysis.summary["figures"] == [
        f"figures/{name}.{suffix}" for name in analysis.figures for suffix in ("png", "svg")
    ]
    for name in ("sparsity", "layer_cosine"):
        save(analysis.figure(name), tmp_path, name)
        for suffix in ("png", "svg"):
            drawn = analysis.path / "figures" / f"{name}.{suffix}"
            assert drawn.read_bytes() == (tmp_path / f"{name}.{suffix}").read_bytes()
    with pytest.raises(InputError, match="there is no figure 'poem'"):
        analysis.figure("poem")
