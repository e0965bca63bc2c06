"""What was measured so far, in one json file that an interrupted run goes on from."""

import json
import os
from collections.abc import Callable
from pathlib import Path


class Results:
    """
    Results by name, saved after each of them.

    Args:
        folder (`Path`): holds `results.json`; made if it is missing.
        conditions (`dict`): all that the results depend on, as json has it.

    Raises:
        `ValueError`: the folder cannot be written to, or holds results of other conditions.
    """

    def __init__(self, folder: Path, conditions: dict):
        self.path = Path(folder) / "results.json"
        self.conditions = json.loads(json.dumps(conditions))
        self.units: dict[str, dict] = {}
        if self.path.exists():
            self._resume(f"Give another --out, or remove {self.path}.")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._save()
        except OSError as error:
            raise ValueError(
                f"--out must be a folder that can be written to, got {folder}: {error.strerror}."
            ) from None

    def _resume(self, advice: str) -> None:
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            conditions, self.units = dict(found["conditions"]), dict(found["results"])
        except (OSError, ValueError, KeyError, TypeError):
            raise ValueError(f"{self.path} must hold results of this command, and cannot be read. {advice}") from None
        for name in sorted(conditions.keys() | self.conditions.keys()):
            before, now = conditions.get(name), self.conditions.get(name)
            # a run that was over before it had any results leaves nothing to agree with
            if self.units and before != now:
                raise ValueError(f"{self.path} holds results of other conditions: {name} {before}, now {now}. {advice}")

    def get(self, name: str, compute: Callable[[], dict]) -> dict:
        """The result of that name: the one that was saved, or what `compute` returns, which is saved."""
        if name not in self.units:
            # through json, so that a resumed run sees what this one does
            self.units[name] = json.loads(json.dumps(compute()))
            self._save()
        return self.units[name]

    def _save(self) -> None:
        # renamed in whole: a run that dies here leaves the last file
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps({"conditions": self.conditions, "results": self.units}, indent=1), encoding="utf-8")
        os.replace(new, self.path)
