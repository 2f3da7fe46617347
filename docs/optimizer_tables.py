"""Write the tables of docs/optimizers.md from the code: `python docs/optimizer_tables.py`.

A test compares the page with the code.
"""

from __future__ import annotations

from pathlib import Path

from hfmpi.optim.presets import BASES, PRESETS
from hfmpi.settings import Setting, table

PAGE = Path(__file__).parent / "optimizers.md"
START, END = "<!-- tables: python docs/optimizer_tables.py -->\n", "<!-- end of the tables -->\n"


def written() -> str:
    """Return the page with the tables of this version of the code."""
    before, _, rest = PAGE.read_text().partition(START)
    _, _, after = rest.partition(END)
    sections = [presets(), *(of_class(kind, base) for kind, base in BASES.items())]
    return before + START + "\n" + "\n".join(sections) + "\n" + END + after


def presets() -> str:
    """Return the table of the presets."""
    head = ["preset", "class", "gradient batch", "curvature batch", "for"]
    rows = [
        [
            f"`{name}`",
            f"[`{type(preset.optimizer).__name__}`](#{type(preset.optimizer).__name__.lower()})",
            f"{preset.gradient_batch:,}",
            f"{preset.curvature_batch:,}" if preset.curvature_batch else "",
            preset.purpose,
        ]
        for name, preset in PRESETS.items()
    ]
    return "## Presets\n\n" + _table(head, rows)


def of_class(kind: type, base: str) -> str:
    """Return the section of a class, with the defaults of its presets."""
    names = [name for name, preset in PRESETS.items() if type(preset.optimizer) is kind]
    head = ["setting", "meaning", "default", "in presets", "unit", "torch.optim", "optax"]
    rows = [
        [
            f"`{setting.name}`",
            _plain(setting.meaning.text),
            f"`{_value(setting.default)}`",
            _others(setting, names),
            setting.meaning.unit,
            _code(setting.meaning.torch),
            _code(setting.meaning.optax),
        ]
        for setting in table(kind)
    ]
    said = f"`hfmpi.{kind.__name__}(...)`; its batch sizes are those of the preset `{base}`.\n\n"
    return f"## {kind.__name__}\n\n{said}" + _table(head, rows)


def _others(setting: Setting, names: list[str]) -> str:
    """Return the values of the presets that differ from the default of the class."""
    values = {name: getattr(PRESETS[name].optimizer, setting.name) for name in names}
    different = [f"{name}: `{_value(value)}`" for name, value in values.items() if value != setting.default]
    return ", ".join(different)


def _value(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _code(word: str) -> str:
    return f"`{word}`" if word else ""


def _plain(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*")


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    PAGE.write_text(written())
