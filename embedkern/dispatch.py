"""Which backend runs a call: the first in a fixed order that has no reason not to. Traces under `fullgraph`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

Call = Mapping[str, Any]  # a public function's arguments by name, checked

NAMES = ("cuda", "triton", "cpu", "reference")


class Rule(NamedTuple):
    """A reason why a backend can't take a call; the text is formatted with the call only when somebody asks."""

    refuses: Callable[[Call], bool]
    reason: str


@dataclass(frozen=True)
class Backend:
    """What runs one family's calls on one kind of device."""

    name: str
    rules: tuple[Rule, ...] = ()
    forward: Any = None  # operators; None in the reference, which is plain differentiable PyTorch
    backward: Any = None
    form: str = ""  # tells backends of one name apart: ways to compute the same

    @property
    def label(self) -> str:
        return f"{self.name} ({self.form})" if self.form else self.name

    def refuses(self, call: Call) -> bool:
        return any(rule.refuses(call) for rule in self.rules)

    def reasons(self, call: Call) -> list[str]:
        return [rule.reason.format(**call) for rule in self.rules if rule.refuses(call)]


class Explanation(NamedTuple):
    """The backend that runs a call, and for each other one, or other form of it, why it doesn't."""

    choice: str
    refused: dict[str, list[str]]


def select(family: str, backends: Sequence[Backend], wanted: str | None, call: Call) -> Backend:
    """The backend for a call: the one `wanted`, or the first that can."""
    if wanted is not None and wanted not in NAMES:
        raise ValueError(f"backend must be one of {NAMES} or None, got {wanted!r}")
    refused = None
    for backend in backends:
        if wanted is not None and wanted != backend.name:
            continue
        if not backend.refuses(call):
            if wanted is None and backend.name == "reference" and not torch.compiler.is_compiling():
                _warn_of_fallback(family, backends, call)
            return backend
        refused = backend
    if wanted is not None and refused is not None:
        reasons = "; ".join(refused.reasons(call))
        raise NotImplementedError(f"{family}: backend {wanted!r} can't run this: {reasons}")
    raise NotImplementedError(f"{family}: there is no {wanted!r} backend for it yet")


def explain(backends: Sequence[Backend], wanted: str | None, call: Call) -> Explanation:
    reasons = {backend.label: backend.reasons(call) for backend in backends}
    for name in NAMES:
        if all(backend.name != name for backend in backends):
            reasons[name] = ["not written yet"]
    able = [backend for backend in backends if not reasons[backend.label] and wanted in (None, backend.name)]
    choice, chosen = (able[0].name, able[0].label) if able else ("none", "none")
    refused = {label: why or [f"able, but {chosen} was chosen"] for label, why in reasons.items() if label != chosen}
    return Explanation(choice, refused)


_warned: set[str] = set()


def _warn_of_fallback(family: str, backends: Sequence[Backend], call: Call) -> None:
    if family in _warned:
        return
    _warned.add(family)
    why = "; ".join(f"{b.label}: {', '.join(b.reasons(call))}" for b in backends if b.name != "reference")
    warnings.warn(f"embedkern.{family} runs on the slow reference backend ({why})", stacklevel=4)
