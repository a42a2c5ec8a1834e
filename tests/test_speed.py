"""`benchmarks.speed`, `growth` and `networks`: that what they write and print agrees, never how
fast anything is."""

import csv
import json

import jax
import numpy as np
import pytest

from benchmarks import floors, growth, methods, networks, speed
from benchmarks.cases import GOALS, KINDS, Case, ratio
from benchmarks.measure import compile_times
from benchmarks.shapes import EDGES, Shape
from benchmarks.tables import tables
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
    samples = {library: {"cpu": [n, n, n], "wall": [n, n, n]} for library, n in numbers.items()}
    return Case("batch", name, (4, 2, 2, 8), "float32", both, numbers, numbers, samples)


@pytest.mark.slow
def test_speed_writes_files_that_agree(tiny, tmp_path, monkeypatch, capsys):
    found = [name for name in speed._installed() if name not in ("haiku", "torch")]
    monkeypatch.setattr(speed, "_installed", lambda: found)
    assert (
        speed.main(
            [
                *("--dtypes", "float32", "--rounds", "2", "--seconds", "0", "--compiles", "1"),
                *("--output", str(tmp_path)),
            ]
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
        assert {"jaxnorm", "floor", "bytes floor"} <= set(libraries) and not {
            "haiku",
            "torch_last",
        } & set(libraries)
        assert ("flax.nnx" in libraries) == (one["method"] not in ("batch_group", "ghost_batch"))
    by_case = {(one["method"], one["shape"]): one for one in saved["cases"]}
    for row in rows:
        one = by_case[row["method"], row["shape"]]
        for kind in KINDS:
            ours, theirs = one["seconds"]["jaxnorm"][kind], one["seconds"][row["library"]][kind]
            assert len(ours) == len(theirs) == 2
            assert float(row[f"{kind}_ms"]) == pytest.approx(
                np.percentile(theirs, 25) * 1e3, rel=1e-4
            )
            assert float(row[f"{kind}_ratio"]) == pytest.approx(
                np.median(np.divide(ours, theirs)), rel=1e-3
            )
            assert row[f"{kind}_low"] == "" == row[f"{kind}_high"]  # two rounds have no interval
        compiled = one["compile_seconds"].get(row["library"])
        assert (row["compile_cpu_s"] != "") == (row["library"] in ("jaxnorm", "flax.linen"))
        if compiled:
            assert float(row["compile_cpu_s"]) == pytest.approx(compiled["cpu"][0], rel=1e-3)
            assert float(row["compile_wall_s"]) == pytest.approx(compiled["wall"][0], rel=1e-3)

    table = (tmp_path / "speed.md").read_text()
    for one in saved["cases"]:
        ms = " / ".join(
            f"{np.percentile(one['seconds']['jaxnorm'][kind], 25) * 1e3:.2f}" for kind in KINDS
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
        "--compiles",
        "0",
        "--markdown",
    ]
    assert speed.main([*options, "--output", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    assert "### LayerNorm, tokens, bfloat16" in table and "| tokens | " in table
    assert table.split("### ", 1)[1].split("In ")[0].strip() in (tmp_path / "speed.md").read_text()


@pytest.mark.slow
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
        "--compiles",
        "0",
        "--output",
        str(tmp_path),
    ]
    assert speed.main(options) == 0
    names = {
        name
        for one in json.loads((tmp_path / "speed.json").read_text())["cases"]
        for name in one["seconds"]
    }
    assert names == {"jaxnorm", "floor", "bytes floor"} | (
        {"torch_last", "torch_first"} if library == "torch" else {library}
    )


def test_ratios_are_medians_over_rounds_and_means_over_shapes():
    first = case("a", ours=[1.0, 2.0, 9.0], linen=[2.0, 2.0, 3.0], floor=[1.0, 1.0, 1.0])
    second = case("b", ours=[4.0, 4.0, 4.0], linen=[1.0, 1.0, 1.0], floor=[2.0, 2.0, 2.0])
    assert first.time("jaxnorm", "step") == 1.5
    compared = {name: first.over(name, "forward") for name in ("best JAX", "Flax", "floor")}
    assert {name: found.median for name, found in compared.items()} == {
        "best JAX": 1.0,
        "Flax": 1.0,
        "floor": 2.0,
    }
    assert first.over("torch", "forward") is None
    found = tables([first, second])
    heads, summary = found["Summary"]
    line = dict(zip(heads, summary, strict=True))
    assert line["/ best JAX"] == line["/ floor"] == "2.00 / 2.00"
    assert "/ torch" not in line and "/ bytes floor" not in line
    assert line["worst step"] == "4.00 b" and line["compile / Flax"] == "0.50"
    assert found["BatchNorm, float32"][1] == [
        *("a", "1500.00 / 1500.00", "1.00 linen", "1.00 linen", "1.00 / 1.00", "2.00 / 2.00"),
        *("1.00 / 2.00", "1.00 / 2.00", "1.00 / 2.00", "0.50"),
    ]


@pytest.mark.parametrize(
    ("count", "low", "high"), [(5, None, None), (6, 1, 6), (9, 2, 8), (15, 4, 12), (25, 8, 18)]
)
def test_the_interval_is_that_of_the_sign_test(count, low, high):
    """The ranks in tables of the nonparametric 95 % interval of a median, in any order."""
    ours = np.random.default_rng(0).permutation(np.arange(1.0, count + 1))
    found = ratio(list(2 * ours), [2.0] * count)
    assert found.median == np.median(ours)
    if low is None:
        assert np.isnan([found.low, found.high]).all()
    else:
        assert (found.low, found.high) == (low, high)


def test_the_interval_holds_the_median_so_often():
    random = np.random.default_rng(0)
    found = [ratio(random.lognormal(size=9), np.ones(9)) for _ in range(2000)]
    assert np.mean([one.low <= 1 <= one.high for one in found]) == pytest.approx(0.961, abs=0.015)


def test_only_whole_intervals_above_the_goal_are_marked():
    """Nine rounds, whose interval is from the second to the eighth."""

    def marked(ratios):
        one = case("a", ours=ratios, linen=[1.0] * 9, floor=[1.0] * 9)
        line = dict(zip(*tables([one])["BatchNorm, float32"], strict=True))
        summary = dict(zip(*tables([one])["Summary"], strict=True))
        marks = [one.misses(kind) for kind in KINDS]
        assert ["▲" in line[f"/ Flax, {kind}"] for kind in KINDS] == marks
        assert summary["▲"] == " / ".join(str(int(mark)) for mark in marks)
        return marks

    assert GOALS == {"forward": 1.10, "step": 1.05}
    assert marked([1.0, 1.0, *[1.5] * 7]) == [False, False]
    assert marked([1.0, 1.08, *[1.5] * 7]) == [False, True]
    assert marked([1.0, 1.12, *[1.5] * 7]) == [True, True]
    assert marked([1.0] * 9) == [False, False]


def test_there_are_forty_edges():
    """With those that the goal names: a channel alone, few, wide groups, short rows, rank 2."""
    cases = [(name, method) for name, shape in EDGES.items() for method in shape.methods]
    assert len(cases) == len(set(cases)) == 40
    assert {shape.example[-1] for shape in EDGES.values()} >= {1, 3, 8, 1024}
    assert {shape.num_groups for shape in EDGES.values()} >= {1, 2, 8}
    assert any(len(shape.example) == 1 for shape in EDGES.values())
    assert {method for _, method in cases} >= {"batch", "group", "token_layer", "rms"}


@pytest.mark.slow
def test_edges_are_measured_beside_flax_with_their_groups(tmp_path, monkeypatch, capsys):
    shape = Shape("few", (2, 2, 8), 2, 2, ("group", "rms"), num_groups=2)  # 32 would be refused
    row = Shape("row", (8,), 4, 4, ("batch", "group", "token_layer", "rms"), num_groups=2)
    monkeypatch.setattr(speed, "EDGES", {"few": shape, "row": row})
    monkeypatch.setattr("benchmarks.timing.ROTATED_BYTES", 1)
    options = ["--edges", "--dtypes", "float16", "--rounds", "6", "--seconds", "0"]
    assert speed.main([*options, "--output", str(tmp_path)]) == 0
    saved = json.loads((tmp_path / "edges.json").read_text())["cases"]
    assert [(one["shape"], one["method"]) for one in saved] == [
        *(("row", "batch"), ("few", "group"), ("row", "group")),
        *(("row", "token_layer"), ("few", "rms"), ("row", "rms")),
    ]
    for one in saved:
        assert {"jaxnorm", "flax.linen", "flax.nnx"} <= one["seconds"].keys()
        assert not {"haiku", "equinox"} & one["seconds"].keys() and one["compile_seconds"] == {}
    found = tables([Case(**one) for one in saved])
    written = (tmp_path / "edges.md").read_text()
    for rows in found.values():
        assert all(f"| {' | '.join(line)} |" in written for line in rows)
    assert "[" in found["RMSNorm, tokens, float16"][1][2]  # six rounds have an interval
    assert "RMSNorm, tokens, float16" in capsys.readouterr().out
    assert (tmp_path / "edges.png").read_bytes().startswith(PNG)
    assert (tmp_path / "edges.csv").exists()


@pytest.mark.parametrize(
    ("method", "dims", "forward", "step"),
    [
        ("batch", (8, 56, 56, 256), 3, 8),  # 25 MB
        ("batch", (16, 4, 4, 1024), 2, 7),  # 1 MiB stays in the cache, but not with the cotangent
        ("group", (8, 28, 28, 256), 2, 7),  # 0.8 MB an example
        ("instance", (8, 14, 14, 256), 2, 5),
        ("ghost_batch", (16, 7, 7, 256), 2, 5),  # 0.2 MB a ghost batch
        ("ghost_batch", (64, 7, 7, 512), 3, 8),
        ("token_layer", (16, 197, 768), 2, 5),
    ],
)
def test_the_fewest_passes(method, dims, forward, step):
    assert floors.least_passes(method, dims, 4) == {"forward": forward, "step": step}


def test_floors_are_made_of_the_fastest_passes_of_each_round():
    times = {
        ("jax", "copy"): [2.0, 4.0],
        ("torch", "copy"): [3.0, 2.0],
        ("jax", "sum"): [1.0, 1.0],
        ("jax", "dot"): [5.0, 5.0],
        ("jax", "ternary"): [7.0, 8.0],
        ("jaxnorm", "forward"): [0.1, 0.1],
    }
    assert floors.floors(times, {"forward": 3, "step": 8}) == {
        "floor": {"forward": [3.0, 3.0], "step": [15.0, 16.0]},
        "bytes floor": {"forward": [3.0, 3.0], "step": [8.0, 8.0]},
    }


def test_compilation_is_sampled_by_turns_and_from_scratch():
    """Every sample traces the function again."""
    traced = []

    def program(name):
        return lambda x: (traced.append(name), x + 1)[1], (np.ones(3, np.float32),)

    times = compile_times({name: program(name) for name in "ab"}, 3)
    assert traced == ["a", "b"] * 3
    assert {name: set(clocks) for name, clocks in times.items()} == dict.fromkeys(
        "ab", {"cpu", "wall"}
    )
    assert all(len(samples) == 3 and min(samples) > 0 for samples in times["a"].values())


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
    assert networks.main([*options, "--compiles", "1", "--output", str(tmp_path)]) == 0
    saved = json.loads((tmp_path / "networks.json").read_text())["networks"]
    assert [one["norms"] for one in saved] == list(networks.NORMS)
    assert [len(one["compile_seconds"]) for one in saved] == [1, 1]
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
