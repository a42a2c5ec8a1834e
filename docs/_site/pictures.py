"""The sets of the rows of the table, drawn by `jaxnorm.drawing`, for light and dark pages alike."""

import functools
import io
import re

SIZES = (4, 2, 2, 6)
CALLS = (
    "batch_norm()",
    "ghost_batch_norm(2)",
    "batch_group_norm(3)",
    "batch_and_group_norm(2, 3)",
    "instance_norm()",
    "group_norm(3)",
    "layer_norm()",
    "token_layer_norm()",
    "positional_norm()",
    "rms_norm()",
    "instance_rms_norm()",
)


@functools.cache
def picture(call):
    """SVG of a method's block, whose ink and paper are those of the page."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    from jaxnorm import drawing, methods

    name, _, arguments = call.partition("(")
    row = getattr(methods, name)(*(int(n) for n in re.findall(r"\d+", arguments)))
    with matplotlib.rc_context():
        drawing.style()
        matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": call})
        of_page = {
            matplotlib.colors.to_hex(matplotlib.rcParams[key]): f"var(--color-{name})"
            for key, name in (
                ("text.color", "foreground-primary"),
                ("axes.edgecolor", "foreground-border"),
                ("figure.facecolor", "background-primary"),
            )
        }
        figure, ax = plt.subplots(figsize=(2.6, 2.7))
        drawing.draw_row(ax, row, SIZES)
        file = io.StringIO()
        figure.savefig(
            file, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None}
        )
        plt.close(figure)
    svg = file.getvalue()[file.getvalue().index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', "", svg, count=1)
    for colour, variable in of_page.items():
        svg = svg.replace(colour, variable)
    # ids are of the page, which has several pictures; nothing but clip paths is referred to
    svg = re.sub(r' id="(?!p[0-9a-f]{10})[^"]*"', "", svg)
    label = f"The sets of {name} in a block of 4 examples, 2 x 2 positions and 6 channels"
    return re.sub(r"\s*\n\s*", " ", svg).replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def figure(call):
    name = call.partition("(")[0]
    link = f"api/methods.html#jaxnorm.methods.{name}"
    return (
        f'<figure>{picture(call)}<figcaption><a href="{link}"><code>{call}</code></a></figcaption>'
        "</figure>"
    )


def gallery():
    return f'<div class="rows">{"".join(map(figure, CALLS))}</div>'
