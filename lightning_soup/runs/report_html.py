"""A report as one HTML file: no script, no network, light and dark, every label escaped."""

import base64
import shlex
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import compress
from typing import TYPE_CHECKING, Any

from lightning_soup.runs.comparison import Row, signed
from lightning_soup.runs.figures import Picture
from lightning_soup.runs.report_json import trials, versions

if TYPE_CHECKING:
    from lightning_soup.runs.report import Entry, SoupReport

__all__ = ["render"]

# Longer histories (a learned soup's steps) are folded away, and cut: report.json has all of it.
FOLDED, CUT = 30, 400

STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --soft: #666; --line: #d8d8d8; --paper: #fff; --shade:
#f4f5f7;
  --good: #00704f; --bad: #a8480b; --mark: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --soft: #a2a2a2; --line: #3d4146; --paper:
#16181b;
  --shade: #212429; --good: #3fc79a; --bad: #f0935a; --mark: #62b4ea; } }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 60rem; background: var(--paper); color:
var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 1rem; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .25rem; }
.headline { border-left: 4px solid var(--mark); background: var(--shade); padding: .9rem 1.1rem; }
.headline p, .headline ul { margin: 0 0 .3rem; }
.soft, figcaption { color: var(--soft); font-size: .85rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .45rem .7rem .45rem 0; border-bottom: 1px solid
var(--line); } thead th { border-bottom: 2px solid var(--line); vertical-align: bottom; }
tr.best { background: var(--shade); }
td small { display: block; color: var(--soft); line-height: 1.35; }
td b { font-weight: 600; }
.range { white-space: nowrap; } b + .range { color: var(--soft); }
small .range { display: block; }
.better { color: var(--good); } .worse { color: var(--bad); }
.test { min-width: 8.5rem; }
.name { min-width: 9rem; max-width: 22rem; overflow-wrap: anywhere; }
figure { margin: 1.5rem 0; }
figure img { display: block; width: 100%; max-width: 45rem; height: auto; background: #fff; border-radius:
4px; } figcaption { max-width: 45rem; margin-top: .4rem; }
pre { background: var(--shade); padding: .8rem 1rem; overflow-x: auto; font-size: .85rem; }
code { font-size: .85em; overflow-wrap: anywhere; }
summary { cursor: pointer; }
"""


def render(report: "SoupReport") -> str:
    """The whole page; pictures are embedded."""
    body = [
        f"<h1>{escape(report.title)}</h1>",
        _headline(report),
        "<h2>Accuracy and gain</h2>",
        _comparison(report),
        _list(report.notes),
        "<h2>Pictures</h2>",
        *map(_figure, report.pictures),
        "<h2>Recipes</h2>",
        *(_recipe(report, entry) for entry in report.of_kind("soup")),
        "<h2>Ingredients</h2>",
        _ingredients(report),
        _reproduce(report),
        f'<p class="soft">Made with {escape(", ".join(f"{k} {v}" for k, v in versions().items()))}.</p>',
    ]
    # The policy makes the promise checkable: a browser refuses to load anything that is not in this file.
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(report.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in body if part)
        + "\n</body>\n</html>\n"
    )


def _headline(report: "SoupReport") -> str:
    findings = "".join(f"<li>{_text(finding)}</li>" for finding in report.findings)
    sizes = ", ".join(f"{n} ({len(o.targets):,} images)" for n, o in report.best_single.outcomes.items())
    return (
        f'<div class="headline"><p><b>{_text(report.claim)}:</b></p><ul>{findings}</ul></div>'
        f'<p class="soft">Chosen by {_text(report.metric)} on {_text(report.selection_split)}. Measured on '
        f"test sets that chose nothing: {_text(sizes)}.</p>"
    )


def _comparison(report: "SoupReport") -> str:
    mean = len(report.test_names) > 2
    tests = [f"{name}, %" for name in report.test_names] + (["mean of shifted sets, %"] if mean else [])
    head = _cells("th", ["model", f"{report.selection_split} {report.metric}", "passes per image", *tests])
    best = next(row for row in report.comparisons if row.kind == "best")
    rows = []
    for row in report.comparisons:
        cells = [f'<td class="name">{_text(row.label)}</td><td>{_score(row.selection_score)}</td>']
        cells.append(f"<td>{row.forward_passes}</td>")
        cells.extend(_test_cell(row, name) for name in report.test_names)
        if mean:
            gain = "" if row is best else f"<small>{signed(row.shifted - best.shifted)}</small>"
            cells.append(f"<td><b>{row.shifted:.1f}</b>{gain}</td>")
        rows.append(f"<tr{' class=best' if row is best else ''}>{''.join(cells)}</tr>")
    caption = (
        "Accuracy with Wilson's 95&nbsp;% interval; below it the gain over the best single ingredient in "
        "percentage points with the paired bootstrap's 95&nbsp;% interval. The intervals cover the choice of "
        "test images, not the randomness of training (other seeds show that), and are not corrected for the "
        "number of comparisons." + (" The mean over shifted sets weighs each set equally." if mean else "")
    )
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody>'
        f'</table></div><p class="soft">{caption}</p>'
    )


def _test_cell(row: Row, name: str) -> str:
    c = row.tests[name]
    mean, span = c.accuracy_text.split(" ", 1)
    cell = f'<b>{mean}</b> <span class="range">{span}</span>'
    if c.gain is not None:
        side = ("better" if c.gain.mean > 0 else "worse") if c.distinguishable else ""
        counts = f"right where the best single is wrong: {c.won}, the reverse: {c.lost}"
        text = f'<span class="range">{c.gain_text}</span> {_text(c.verdict)}'
        cell += f'<small class="{side}" title="{counts}">{text}</small>'
    return f'<td class="test">{cell}</td>'


def _figure(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode()
    return (
        f'<figure id="{picture.name}">'
        f'<img alt="{escape(picture.caption)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{_text(picture.caption)}</figcaption></figure>"
    )


def _recipe(report: "SoupReport", entry: "Entry") -> str:
    head = f"<h3>{_text(entry.label)}</h3>"
    if entry.soup is None:
        return head
    soup, tried = entry.soup, trials(entry.soup)
    facts = [f"<code>{escape(str(soup.recipe))}</code>"]
    if soup.score is not None:
        facts.append(f"{_text(soup.metric)} on {_text(report.selection_split)}: {_score(soup.natural_score)}")
    facts.append(f"{len(soup.ingredients)} ingredients")
    head += f"<p>{', '.join(facts)}.</p>{_list(soup.notes)}"
    if not tried:
        return head
    names = list(dict.fromkeys(name for trial in tried for name in trial["values"]))
    body = [
        [
            str(t["trial"]),
            t["label"],
            _score(t["score"]),
            {True: "kept", False: "refused", None: ""}[t["kept"]],
        ]
        + [_value(t["values"].get(name)) for name in names]
        + [t["reason"]]
        for t in tried[:CUT]
    ]
    table = _table(["", "tried", soup.metric, "", *names, "why"], body)
    if len(tried) > CUT:
        table += f'<p class="soft">{len(tried) - CUT} more in report.json.</p>'
    if len(tried) <= FOLDED:
        return head + table
    return f"{head}<details><summary>{len(tried)} trials</summary>{table}</details>"


def _ingredients(report: "SoupReport") -> str:
    entries = report.of_kind("ingredient")
    differing = _differing([_flat(entry.hparams) for entry in entries])
    rows = []
    for number, (entry, settings) in enumerate(zip(entries, differing, strict=True), 1):
        accuracies = [f"{100 * entry.outcomes[name].accuracy:.1f}" for name in report.test_names]
        label = entry.label + (" (best single)" if entry is report.best_single else "")
        score = _score(report.natural(entry.selection_score))
        rows.append([str(number), label, score, *accuracies, settings, entry.digest or ""])
    score = f"{report.selection_split} {report.metric}"
    tests = [f"{name}, %" for name in report.test_names]
    return _table(["", "ingredient", score, *tests, "what differs", "digest"], rows)


def _reproduce(report: "SoupReport") -> str:
    recook = [f"lightning-soup recook {shlex.quote(str(e.path))}" for e in report.of_kind("soup") if e.path]
    commands = [*report.commands, *recook]
    if not commands:
        return ""
    return (
        f"<h2>Reproduce</h2><pre>{escape(chr(10).join(commands))}</pre>"
        '<p class="soft"><code>recook</code> makes the same bytes again from the ingredients that the file '
        "of the soup names, or says which of them changed.</p>"
    )


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table without the columns in which nothing stands."""
    filled = [any(row[i] for row in rows) for i in range(len(heads))]
    body = "".join(f"<tr>{_cells('td', compress(row, filled))}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table><thead><tr>{_cells("th", compress(heads, filled))}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _cells(tag: str, texts: Iterable[str]) -> str:
    """Table cells; long ones may break anywhere, for labels are often paths."""
    return "".join(f"<{tag}{' class=name' if len(text) > 24 else ''}>{_text(text)}</{tag}>" for text in texts)


def _text(text: str) -> str:
    """Text as HTML, with percent signs kept beside their number."""
    return escape(text).replace(" %", "&nbsp;%")


def _list(texts: Sequence[str]) -> str:
    return f"<ul class=soft>{''.join(f'<li>{_text(text)}</li>' for text in texts)}</ul>" if texts else ""


def _score(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if 0.001 <= abs(value) < 1000 or value == 0 else f"{value:.3g}"


def _value(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names, as they are written on a command line."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """For each run the settings in which the runs are not all alike."""
    names = list(dict.fromkeys(name for each in settings for name in each))
    varied = [n for n in names if len({repr(each.get(n)) for each in settings}) > 1]
    return [", ".join(f"{n}={_value(each[n])}" for n in varied if n in each) for each in settings]
