"""Every tensor accounted for: a file's names and shapes against a model's, or a plain no.

In: two mappings of names to tensors, and the names that may be new or left out. Out: a `Match`;
else `WeightsError` with what is missing, unexpected and misshapen, and the likely cause.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from vitft import advice
from vitft.errors import Fault, WeightsError

SHOWN = 3  # names listed before the rest is only counted


@dataclass(frozen=True)
class Match:
    """Every tensor accounted for.

    Attributes:
        loaded: How many tensors the model takes from the file.
        dropped: The file's name -> why it is left out.
        new: The model's names that keep their fresh values.
    """

    loaded: int
    dropped: dict[str, str]
    new: tuple[str, ...]


def check(
    state: Mapping[str, Tensor],
    model_state: Mapping[str, Tensor],
    *,
    new: Sequence[str] = (),
    drop: Sequence[str] = (),
    place: object = "checkpoint",
) -> Match:
    """Matches a file's tensors with a model's by name and shape, all of them.

    Args:
        state: The file's name -> tensor.
        model_state: The model's name -> tensor.
        new: Names of the model that the file may lack, such as the head's.
        drop: Names of the file that may be left out where they do not fit, such as the head's.
        place: The file, for messages.

    Raises:
        WeightsError: Anything else is missing, unexpected, misshapen or of another kind.
    """
    dropped: dict[str, str] = {}
    unexpected, misshapen, kinds = [], [], []
    for name, tensor in state.items():
        own = model_state.get(name)
        if own is None:
            if name in drop:
                dropped[name] = "the model has no such tensor"
            else:
                unexpected.append(name)
        elif tensor.shape != own.shape:
            if name in drop:
                dropped[name] = _misfit(tensor, own)
            else:
                misshapen.append(name)
        elif tensor.is_floating_point() != own.is_floating_point():
            kinds.append(name)
    absent = [n for n in model_state if n not in state or n in dropped]
    missing = [n for n in absent if n not in new]
    if missing or unexpected or misshapen or kinds:
        wrong = _Mismatch(state, model_state, missing, unexpected, misshapen, kinds)
        raise WeightsError(wrong.faults(str(place)))
    return Match(len(model_state) - len(absent), dropped, tuple(absent))


def _misfit(tensor: Tensor, own: Tensor) -> str:
    empty = " (all zeros)" if not bool(tensor.any()) else ""
    rows = tensor.shape[0] if tensor.ndim else 1
    if tensor.shape[1:] == own.shape[1:]:
        return f"it is for {rows:,} classes{empty}, the model has {own.shape[0]:,}"
    return f"shape {_shape(tensor)}{empty}, the model has {_shape(own)}"


@dataclass(frozen=True)
class _Mismatch:
    state: Mapping[str, Tensor]
    model_state: Mapping[str, Tensor]
    missing: list[str]
    unexpected: list[str]
    misshapen: list[str]
    kinds: list[str]

    def faults(self, place: str) -> list[Fault]:
        """One fault per kind of mismatch; one in all where hardly anything matches."""
        cause = advice.advise(self.state, self.model_state, self.missing, self.unexpected)
        common = sum(name in self.model_state for name in self.state)
        if 2 * common < len(self.model_state):
            text = f"{common} of the model's {len(self.model_state)} tensors are in the file"
            text += f"; missing {listed(self.missing)}"
            text += f"; unexpected {listed(self.unexpected)}" if self.unexpected else ""
            fix = cause or "name the model that these weights belong to"
            return [Fault("ckpt.architecture", place, text, fix)]
        fix = cause or "use the file that belongs to this model, whole"
        return [
            Fault(id, place, text, fix)
            for id, names, text in (
                ("ckpt.missing_keys", self.missing, f"lacks {listed(self.missing)}"),
                ("ckpt.unexpected_keys", self.unexpected, f"also holds {listed(self.unexpected)}"),
                ("ckpt.shape", self.misshapen, self._shapes()),
                ("ckpt.dtype", self.kinds, self._types()),
            )
            if names
        ]

    def _shapes(self) -> str:
        rows = [
            f"{cut(n)} is {_shape(self.state[n])}, the model has {_shape(self.model_state[n])}"
            for n in self.misshapen
        ]
        return _more("; ".join(rows[:SHOWN]), len(rows))

    def _types(self) -> str:
        rows = [
            f"{cut(n)} is {self.state[n].dtype}, the model has {self.model_state[n].dtype}"
            for n in self.kinds
        ]
        return _more("; ".join(rows[:SHOWN]), len(rows))


def _shape(tensor: Tensor) -> str:
    return f"[{', '.join(str(n) for n in tensor.shape)}]"


# --- names in a line of words ---------------------------------------------------------------------


def cut(name: object) -> str:
    """A name of any length in at most 90 characters."""
    text = str(name)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text):,} characters)"


def listed(names: Iterable[str]) -> str:
    """Such as `5 tensors (a, b, c, and 2 more)`."""
    names = list(names)
    shown = ", ".join(cut(n) for n in names[:SHOWN])
    return _more(f"{len(names):,} tensor{'s' * (len(names) != 1)} ({shown}", len(names)) + ")"


def _more(text: str, count: int) -> str:
    return text if count <= SHOWN else f"{text}, and {count - SHOWN:,} more"
