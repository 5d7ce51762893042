"""Results as one HTML file that opens from disk and asks nobody for anything.

    write_html("report.html", collect(["out/base", "out/small", "sweep"]))

Models in tables with error bars and paired tests, curves over training steps and over bits a
weight, and the examples with what each model said. Plots are SVG drawn here; the page's script only
filters and shows examples, and puts every text of a model in as text.
"""

from evals.report.contents import Contents, Model, Series, collect
from evals.report.page import render, write_html

__all__ = ["Contents", "Model", "Series", "collect", "render", "write_html"]
