"""The figures and their numbers as one self-contained web page, and the tables as Markdown."""

import base64
import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from wwwserve.eval.paper.experiment import Experiment, Table, Tree

TITLE = "WWW.Serve's experiments, reproduced"
Files = Mapping[str, Sequence[Path]]
"""Images by experiment."""
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #111; background: #fff; max-width: 72rem; margin: 2rem auto;
  padding: 0 1rem; }
h2 { margin-top: 2.5rem; border-top: 1px solid #ccc; padding-top: 1.5rem; }
img { max-width: 100%; height: auto; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
th, td { border: 1px solid #ccc; padding: 0.25rem 0.6rem; text-align: left; white-space: nowrap; }
th { background: #f2f2f2; font-weight: 600; white-space: normal; }
code { background: #f2f2f2; padding: 0 0.2em; }
"""


def made(experiments: Sequence[Experiment], options: Tree) -> Table:
    """How the numbers came to be: the command gives the same ones every time."""
    return Table(
        ["command", "seeds", "first seed", "SHA-256 of the policy's weights"],
        [
            [
                f"`{command(experiments, options)}`",
                str(options["seeds"]),
                str(options["first_seed"]),
                f"`{options['policy']}`",
            ]
        ],
    )


def summary(experiments: Sequence[Experiment], data: Mapping[str, Tree]) -> Table:
    """Every figure's numbers beside the published ones."""
    rows = [(each.title, *line) for each in experiments for line in each.lines(data[each.data])]
    return Table(["figure", "what", "published", "here, `www_serve`"], rows)


def command(experiments: Sequence[Experiment], options: Tree) -> str:
    """The command that makes this report again."""
    names = [] if options["all"] else [each.name for each in experiments]
    docs = [f"--docs {options['docs']}"] if options["docs"] else []
    return " ".join(["wwwserve paper", *names, f"--seeds {options['seeds']}", *docs])


def as_html(experiments: Sequence[Experiment], data: Mapping[str, Tree], options: Tree, files: Files) -> str:
    """One page with all images in it, that asks for nothing from anywhere."""
    parts = [f"<h1>{TITLE}</h1>", _table_html(made(experiments, options)), _table_html(summary(experiments, data))]
    for each in experiments:
        parts.append(f'<h2 id="{each.name}">{html.escape(each.title)}</h2>')
        parts.append(f"<p>{_inline(_scenarios(each))}</p>")
        for file in _images(files[each.name]):
            image = base64.b64encode(file.read_bytes()).decode("ascii")
            parts.append(f'<img alt="{html.escape(each.title)}" src="data:image/png;base64,{image}">')
        parts += [_table_html(table) for table in each.tables(data[each.data])]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{TITLE}</title><style>{_STYLE}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def as_markdown(experiments: Sequence[Experiment], data: Mapping[str, Tree], options: Tree) -> str:
    """All tables as Markdown."""
    parts = [f"# {TITLE}: tables", _table_markdown(made(experiments, options))]
    parts.append(_table_markdown(summary(experiments, data)))
    for each in experiments:
        parts += [f"## {each.title}", _scenarios(each)]
        parts += [_table_markdown(table) for table in each.tables(data[each.data])]
    return "\n\n".join(parts) + "\n"


def _scenarios(experiment: Experiment) -> str:
    return ", ".join(f"`{name}`" for name in experiment.scenarios)


def _images(files: Sequence[Path]) -> list[Path]:
    return [file for file in files if file.suffix == ".png"]


def _inline(text: str) -> str:
    """Text with `code` marked, as HTML."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(text, quote=False))


def _table_html(table: Table) -> str:
    head = "".join(f"<th>{_inline(cell)}</th>" for cell in table.head)
    rows = "".join("<tr>" + "".join(f"<td>{_inline(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _table_markdown(table: Table) -> str:
    lines = [table.head, ["---"] * len(table.head), *table.rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
