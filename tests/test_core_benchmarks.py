"""The benchmarks of mask, prototypes, CAMs and share: each runs small on a CPU; no test on times."""

import importlib.util
import json
import sys

import frequency
import prototypes
import pytest
import share
import torch
from torch.testing import assert_close

from ffr import split_bands


def run(benchmark, monkeypatch, out, *options):
    """The script as from the command line; what it wrote."""
    monkeypatch.setattr(sys, "argv", [f"{benchmark.__name__}.py", *options, "--rounds", "1", "--out", str(out)])
    assert benchmark.main() == 0
    return json.loads(out.read_text(encoding="utf-8"))["rows"]


@pytest.mark.parametrize("name", ["shifts", "fft2", "rfft2", "scipy"])
@pytest.mark.parametrize("grid", [(6, 8), (7, 9), (8, 5)])
@pytest.mark.parametrize("layout", ["maps", "tokens"])
def test_every_opponent_is_the_same_filter(name, grid, layout):
    x = torch.randn(2, 3, *grid, generator=torch.Generator().manual_seed(0))
    x = x.flatten(2).transpose(1, 2).contiguous() if layout == "tokens" else x
    low, high = frequency.Opponent(name, grid, 0.3, layout, "cpu")(x)
    wanted = split_bands(x, 0.3, grid=grid)
    assert_close((low, high), tuple(wanted), rtol=0, atol=1e-5)


def test_the_benchmark_of_the_mask_shows_every_case_its_floor_and_a_plot(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(frequency.QUICK, "cpu", (((6, 7), 2),))
    rows = run(frequency, monkeypatch, tmp_path / "f.json", "--quick", "--channels", "8")
    assert len(rows) == 2 * 2 * 2  # dtypes, layouts, directions
    for row in rows:
        assert set(row["times_faster_than"]) == {"shifts", "fft2", "rfft2"} | (
            {"scipy"} if row["kind"] == "forward" else set()
        )
        assert row["times_the_floor"]["median"] > 0
        assert row["peak_inputs"]["ours"] >= 2
        assert max(row["relative_difference"].values()) <= frequency.TOLERANCE[row["dtype"]]
    assert (tmp_path / "f.png").stat().st_size > 1000
    assert "6 x 7 B2 bfloat16 maps F+B" in capsys.readouterr().out


def test_a_result_that_differs_is_no_speed(monkeypatch):
    monkeypatch.setattr(frequency.Opponent, "__call__", lambda self, x: (x, x - x))
    case = frequency.Case("float32", (6, 7), 1, "maps")
    with pytest.raises(RuntimeError, match="results differ"):
        next(frequency.measured(case, frequency.Arguments(channels=2, rounds=1)))


@pytest.mark.slow
def test_what_fails_when_compiled_ahead_is_said_and_the_rest_goes_on(capsys):
    cases = [frequency.Case(dtype, (6, 7), 1, "maps") for dtype in ("float32", "bfloat16", "none")]
    frequency.compile_ahead(cases, frequency.Arguments(channels=2))
    assert capsys.readouterr().out == "compiling ahead failed for 1 of 3 cases: 'none'\n"


def test_a_case_compiled_ahead_is_split_and_joined(monkeypatch):
    calls = []

    def split(x, mu, grid):
        calls.append((x.shape, x.dtype, mu, grid))
        return split_bands(x, mu, grid=grid)

    monkeypatch.setattr(frequency, "split_bands", split)
    case = frequency.Case("bfloat16", (6, 7), 3, "tokens")
    frequency.split_once(case, frequency.Arguments(channels=2))
    assert calls == [((3, 42, 2), torch.bfloat16, 0.4, (6, 7))]


def test_the_benchmark_of_the_prototypes_agrees_with_its_loop(tmp_path, monkeypatch):
    rows = run(prototypes, monkeypatch, tmp_path / "p.json", "--batches", "2", "--channels", "8", "--grid", "5")
    assert [(row["classes"], row["kind"]) for row in rows] == [
        (classes, kind) for classes in (20, 80) for kind in ("forward", "forward + backward")
    ]
    assert all(row["relative_difference"] < 1e-5 for row in rows)


@pytest.mark.slow
def test_the_share_of_every_part_of_the_step_is_shown(tmp_path, monkeypatch):
    rows = run(share, monkeypatch, tmp_path / "s.json")
    assert [row["part"] for row in rows] == ["mask", "prototypes", "selection", "L_r", "all four"]
    assert all(0 < row["percent_of_step"]["median"] < 100 for row in rows)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("torchcam") is None, reason="needs the extra `oracle`")
def test_the_packages_of_cams_give_our_maps(tmp_path, monkeypatch):
    import cams

    rows = run(cams, monkeypatch, tmp_path / "c.json", "--batches", "2", "--size", "64")
    assert len(rows) == 4
    assert all(row["max_difference"] < 1e-5 for row in rows)
