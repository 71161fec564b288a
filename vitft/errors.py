"""Every way vitft says no: one fault, one line of what, where and how much, one line of remedy.

A `Fault` is a value; a `VitftError` carries all faults found at once. The exit code belongs to the
class, so a door (`vitft.cli`) needs no table.

    VitftError            1   anything of ours without a closer class
    ├── RecipeError       2   recipe, override or command line
    ├── DataError         3   photographs, folders, CSV, split
    ├── WeightsError      4   pretrained weights, checkpoints, model files
    ├── MachineError      5   disk, device, permission, network, missing package
    ├── DivergedError     6   loss or weights are not finite
    └── BusyError         7   another run holds the folder
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

SHOWN = 10  # faults printed before the rest is only counted


def escape(text: object) -> str:
    """Makes text from a file name, label or file header safe for one terminal line.

    Control characters (newline, ANSI escape), bidirectional overrides and lone surrogates come out
    as backslash escapes; everything printable stays.
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong.

    Attributes:
        id: Stable name for programs and tests, such as `data.truncated`.
        place: File, `file:line:col: key`, or command-line argument.
        text: The rule and the value met, measured where it can be.
        fix: What the reader should do now.
    """

    id: str
    place: str
    text: str
    fix: str

    def __str__(self) -> str:
        return (
            f"error[{self.id}] {escape(self.place)}: {escape(self.text)}\nfix: {escape(self.fix)}"
        )


class VitftError(ValueError):
    """One or more faults, gathered before anything was raised."""

    exit_code: ClassVar[int] = 1

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.faults = tuple(faults)
        super().__init__(self._message())

    @classmethod
    def of(cls, id: str, place: object, text: str, fix: str) -> "VitftError":
        """The common case: a single fault."""
        return cls([Fault(id, str(place), text, fix)])

    def _message(self) -> str:
        lines = [str(fault) for fault in self.faults[:SHOWN]]
        if len(self.faults) > SHOWN:
            lines.append(f"... and {len(self.faults) - SHOWN:,} more")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[type["VitftError"], tuple[tuple[Fault, ...]]]:
        return type(self), (self.faults,)  # so that it travels whole out of a worker process


class RecipeError(VitftError):
    """The recipe, an override or the command line asks for something that cannot be."""

    exit_code = 2


class DataError(VitftError):
    """Photographs, folders, CSV or split cannot be used as they are."""

    exit_code = 3


class WeightsError(VitftError):
    """Weights do not belong to the model, or their file is not what it claims to be."""

    exit_code = 4


class MachineError(VitftError):
    """The machine cannot do it: disk, device, permission, network, missing package."""

    exit_code = 5


class DivergedError(VitftError):
    """Training left the finite numbers."""

    exit_code = 6


class BusyError(VitftError):
    """Another process holds the folder."""

    exit_code = 7
