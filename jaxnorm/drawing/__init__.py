"""Blocks of numbers, coloured by which of them share a statistic, and the look of all figures.

    style()  # or style(dark=True)
    figure, ax = plt.subplots()
    draw_row(ax, methods.group_norm(3), (4, 2, 2, 6), title="group norm")

draws 4 examples of 2 x 2 positions and 6 channels. In figures with curves a method has the colour
`colour_of(name)`, `label_lines` writes the names of lines beside them, and `plain_log` makes a log
axis with plain numbers. The notebooks draw with these functions, which need matplotlib: the extra
`notebooks` installs it.
"""

from jaxnorm.drawing._blocks import draw_block as draw_block
from jaxnorm.drawing._blocks import draw_key as draw_key
from jaxnorm.drawing._blocks import draw_row as draw_row
from jaxnorm.drawing._style import COLOURS as COLOURS
from jaxnorm.drawing._style import colour_of as colour_of
from jaxnorm.drawing._style import label_lines as label_lines
from jaxnorm.drawing._style import plain_log as plain_log
from jaxnorm.drawing._style import style as style
