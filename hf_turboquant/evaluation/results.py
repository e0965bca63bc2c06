"""The results so far, in one json file from which an interrupted run resumes."""

import json
import os
from collections.abc import Callable
from pathlib import Path


class Results:
    """
    Results by name, saved after each new one.

    Args:
        folder (`Path`): holds `results.json`; made if it is missing.
        conditions (`dict`): everything that the results depend on, as json represents it.

    Raises:
        `ValueError`: the folder holds results under other conditions, or a file that is not of this command.
    """

    def __init__(self, folder: Path, conditions: dict):
        self.path = Path(folder) / "results.json"
        self.conditions, self.units = json.loads(json.dumps(conditions)), {}
        if not self.path.exists():
            return
        advice = f"Give another --out, or remove {self.path}."
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            before, self.units = dict(found["conditions"]), dict(found["results"])
        except (OSError, ValueError, KeyError, TypeError):
            raise ValueError(f"{self.path} must hold results of this command, and cannot be read. {advice}") from None
        for name, now in self.conditions.items():
            # Without results, there is nothing that must have the same conditions.
            if self.units and before.get(name) != now:
                other = f"{name} {before.get(name)}, now {now}"
                raise ValueError(f"{self.path} holds results of other conditions: {other}. {advice}")

    def get(self, name: str, compute: Callable[..., dict], *arguments) -> dict:
        """Returns the saved result of that name, or computes it from `arguments` and saves it."""
        if name not in self.units:
            # Through json, so that a resumed run sees the same as this one.
            self.units[name] = json.loads(json.dumps(compute(*arguments)))
            self.save()
        return self.units[name]

    def save(self) -> None:
        """Writes everything; a `ValueError` if the folder cannot be written to."""
        new, content = self.path.with_suffix(".new"), {"conditions": self.conditions, "results": self.units}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            new.write_text(json.dumps(content, indent=1), encoding="utf-8")
            # Renamed only when complete: a run that dies here leaves the previous file.
            os.replace(new, self.path)
        except OSError as error:
            folder = f"got {self.path.parent}: {error.strerror}."
            raise ValueError(f"--out must be a folder that can be written to, {folder}") from None
