"""`benchmarks.speed`, `growth` and `networks`: that what they write and print agrees, never how
fast anything is."""

import csv
import json
import sys

import jax
import numpy as np
import pytest

from benchmarks import growth, methods, networks, speed
from benchmarks.shapes import Shape
from benchmarks.timing import Call, interleaved
from jaxnorm import methods as jaxnorm_methods

METHODS = ("batch", "group", "instance", "batch_group", "ghost_batch")
TINY = {
    "image": Shape("image", (3, 3, 64), 4, 4, METHODS),
    "tokens": Shape("tokens", (5, 16), 2, 2, ("token_layer",)),
}
PNG = b"\x89PNG"

# What other libraries warn of when they are imported is not ours.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def standard_promotion():
    """Other libraries convert dtypes and ranks silently."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(speed, "SHAPES", TINY)
    monkeypatch.setattr("benchmarks.timing.ROTATED_BYTES", 1)


def case(name, ours, linen, floor):
    """A case of float32 batch norm with these times for forward and step alike."""
    seconds = {"jaxnorm": ours, "flax.linen": linen, "floor": floor}
    both = {library: {"forward": rounds, "step": rounds} for library, rounds in seconds.items()}
    numbers = {"jaxnorm": 1.0, "flax.linen": 2.0}
    return speed.Case("batch", name, (4, 2, 2, 8), "float32", both, numbers, numbers, numbers)


def test_speed_writes_files_that_agree(tiny, tmp_path, monkeypatch, capsys):
    for library in ("haiku", "torch"):
        monkeypatch.setitem(sys.modules, library, None)
    assert (
        speed.main(
            ["--dtypes", "float32", "--rounds", "2", "--seconds", "0", "--output", str(tmp_path)]
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert "not installed" in printed and "haiku" in printed and "torch" in printed

    saved = json.loads((tmp_path / "speed.json").read_text())
    assert set(saved["about"]) >= {"device", "date", "command", "commit", "versions"}
    assert [case["method"] for case in saved["cases"]] == [
        *METHODS[:3],
        "token_layer",
        *METHODS[3:],
    ]
    rows = list(csv.DictReader((tmp_path / "speed.csv").read_text().splitlines()))
    for one in saved["cases"]:
        libraries = [
            row["library"]
            for row in rows
            if (row["method"], row["shape"]) == (one["method"], one["shape"])
        ]
        assert libraries == list(one["seconds"])
        assert {"jaxnorm", "floor"} <= set(libraries) and not {"haiku", "torch_last"} & set(
            libraries
        )
        assert ("flax.nnx" in libraries) == (one["method"] not in ("batch_group", "ghost_batch"))
    by_case = {(one["method"], one["shape"]): one for one in saved["cases"]}
    for row in rows:
        one = by_case[row["method"], row["shape"]]
        for kind in speed.KINDS:
            ours, theirs = one["seconds"]["jaxnorm"][kind], one["seconds"][row["library"]][kind]
            assert len(ours) == len(theirs) == 2
            assert float(row[f"{kind}_ms"]) == pytest.approx(
                np.percentile(theirs, 25) * 1e3, rel=1e-4
            )
            assert float(row[f"{kind}_ratio"]) == pytest.approx(
                np.median(np.divide(ours, theirs)), rel=1e-3
            )

    table = (tmp_path / "speed.md").read_text()
    for one in saved["cases"]:
        ms = " / ".join(
            f"{np.percentile(one['seconds']['jaxnorm'][kind], 25) * 1e3:.2f}"
            for kind in speed.KINDS
        )
        assert f"| {one['shape']} | {ms} |" in table
    assert (tmp_path / "speed.png").read_bytes().startswith(PNG)


def test_speed_prints_markdown(tiny, tmp_path, capsys):
    options = [
        "--methods",
        "token_layer",
        "--dtypes",
        "bfloat16",
        "--peers",
        "--rounds",
        "1",
        "--markdown",
    ]
    assert speed.main([*options, "--output", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    assert "### LayerNorm, tokens, bfloat16" in table and "| tokens | " in table
    assert table.split("### ", 1)[1].split("In ")[0].strip() in (tmp_path / "speed.md").read_text()


@pytest.mark.parametrize("library", ["haiku", "equinox", "torch"])
def test_speed_measures_an_installed_library(library, tiny, tmp_path):
    pytest.importorskip(library)
    options = [
        "--peers",
        library,
        "--dtypes",
        "float32",
        "--rounds",
        "1",
        "--output",
        str(tmp_path),
    ]
    assert speed.main(options) == 0
    names = {
        name
        for one in json.loads((tmp_path / "speed.json").read_text())["cases"]
        for name in one["seconds"]
    }
    assert names == {"jaxnorm", "floor"} | (
        {"torch_last", "torch_first"} if library == "torch" else {library}
    )


def test_ratios_are_medians_over_rounds_and_means_over_shapes():
    first = case("a", ours=[1.0, 2.0, 9.0], linen=[2.0, 2.0, 3.0], floor=[1.0, 1.0, 1.0])
    second = case("b", ours=[4.0, 4.0, 4.0], linen=[1.0, 1.0, 1.0], floor=[2.0, 2.0, 2.0])
    assert first.time("jaxnorm", "step") == 1.5
    assert first.compared("forward") == {"best": 1.0, "flax.linen": 1.0, "floor": 2.0}
    tables = speed.tables([first, second])
    heads, summary = tables["Summary"]
    line = dict(zip(heads, summary, strict=True))
    assert (line["/ best JAX"], line["/ floor"], line["/ torch"]) == (
        "2.00 / 2.00",
        "2.00 / 2.00",
        "–",
    )
    assert line["worst step"] == "4.00 b"
    assert tables["BatchNorm, float32"][1] == [
        *("a", "1500.00 / 1500.00", "1.00 / 1.00", "1.00 / 1.00", "–", "2.00 / 2.00"),
        *("1.00 / 2.00", "1.00 / 2.00", "1.00 / 2.00"),
    ]


@pytest.mark.parametrize(
    "options",
    [
        ["--rounds", "0"],
        ["--methods", "token_layer", "--shapes", "image"],
        ["--output", "pyproject.toml/x"],
    ],
)
def test_speed_refuses(options, tiny, capsys):
    with pytest.raises(SystemExit) as exit_info:
        speed.main(options)
    assert exit_info.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_rounds_visit_every_call_on_every_input():
    seen = {name: [] for name in "ab"}
    calls = {name: Call(seen[name].append, lambda _: None) for name in seen}
    times = interleaved(calls, rounds=4, seconds=0)
    assert {name: len(rounds) for name, rounds in times.items()} == {"a": 3, "b": 3}
    assert all(len(set(indices)) > 3 for indices in seen.values())


@pytest.mark.slow
def test_growth_writes_what_it_prints(tmp_path, capsys):
    assert growth.main(["--largest", "2e4", "--rounds", "1", "--output", str(tmp_path)]) == 0
    saved = json.loads((tmp_path / "growth.json").read_text())["ns_per_element"]
    assert {one["sweep"] for one in saved} == {"batch", "image", "channels"}
    assert {one["method"] for one in saved} == {"copy", *growth.METHODS}
    printed = capsys.readouterr().out
    assert all(f"{one['forward']:.2f}" in printed for one in saved)
    assert (tmp_path / "growth.png").read_bytes().startswith(PNG)


def test_growth_reaches_a_hundred_million_elements():
    sizes = [point.elements for point in growth.points(1.1e8)]
    assert min(sizes) < 2e4 and 1e8 < max(sizes) < 1.1e8


@pytest.mark.slow
def test_networks_start_alike_with_all_norms(tmp_path):
    options = ["--networks", "unet", "--batch", "1", "--image", "16", "--rounds", "1"]
    assert networks.main([*options, "--output", str(tmp_path)]) == 0
    saved = json.loads((tmp_path / "networks.json").read_text())["networks"]
    assert [one["norms"] for one in saved] == list(networks.NORMS)
    ours, theirs = (one["loss"] for one in saved)
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_methods_are_measured_beside_flax(tmp_path, monkeypatch, capsys):
    """Every row of the benchmark is a method that trains; files and tables agree."""
    monkeypatch.setattr(methods, "SHAPE", (4, 4, 4, 64))
    monkeypatch.setattr("benchmarks.timing.ROTATED_BYTES", 1)
    names = ["group, 32", "batch, relu", "EvoNorm B0"]
    options = ["--dtypes", "bfloat16", "--rounds", "1", "--seconds", "0"]
    assert methods.main([*options, "--methods", *names, "--output", str(tmp_path)]) == 0
    saved = json.loads((tmp_path / "methods.json").read_text())
    results = [methods.Result(**result) for result in saved["results"]]
    assert [result.name for result in results] == [methods.FLAX, *names]
    for result in results:
        flax = np.array(results[0].seconds["step"])
        assert result.ratio["step"] == np.median(np.array(result.seconds["step"]) / flax)
        assert result.kept >= 1
        assert f"| {' | '.join(methods.cells(result))} |" in (tmp_path / "methods.md").read_text()
    assert "EvoNorm B0" in capsys.readouterr().out
    assert (tmp_path / "methods.png").read_bytes().startswith(PNG)


def test_every_method_is_in_the_benchmark():
    """But for those that work on a layer in front or need labels."""
    measured = {repr(row.method).split("(")[0] for row in methods.ROWS.values()}
    others = {"cross_iteration_norm", "moving_average_norm", "domain_batch_norm"}
    rules = {
        name for name in dir(jaxnorm_methods) if isinstance(getattr(jaxnorm_methods, name), type)
    }
    rules = {name for name in rules if name.islower()}
    assert rules - others <= measured
