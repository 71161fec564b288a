"""What to do about a wrong key or value: the nearest known word, the rule, an example.

In: a key or value as it was written. Out: words for the end of a fault. The keys and their rules
are read from the declarations in `schema`, so that a new key needs nothing here.
"""

import difflib
import re
from collections.abc import Iterable
from typing import get_args, get_origin

from vitft import strict_yaml
from vitft.kinds import rule, section_of
from vitft.schema import all_keys, section_at
from vitft.strict_yaml import KeyPath, dotted, write

ELSEWHERE = {  # what other trainers call our keys and values
    "learning_rate": "train.lr",
    "optimizer": "train.opt",
    "scheduler": "train.sched",
    "num_epochs": "train.epochs",
    "dropout": "model.drop_rate",
    "drop_path": "model.drop_path_rate",
    "arch": "model.name",
    "pretrained": "model.weights",
    "checkpoint": "model.weights",
    "dataset": "data.root",
    "data_dir": "data.root",
    "img_size": "data.image_size",
    "num_workers": "train.workers",
    "output_dir": "output",
    "gpu": "device",
}


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word most like `word`, or None when none is near."""
    found = difflib.get_close_matches(word[:100].lower(), list(known), 1, 0.6)
    return found[0] if found else None


def nearest_sizes(size: int, patch: int) -> tuple[int, int]:
    """The multiples of the patch size on both sides of an image size, at least one patch."""
    low = max(size // patch, 1) * patch
    return low, low if low >= size else low + patch


def suggest_key(key: KeyPath, *, whole: bool = False) -> str:
    """The key that was meant: here first, then anywhere, then what other trainers call it."""
    word, section = str(key[-1]), section_at(key[:-1])
    here = list(section.model_fields) if section else []
    known = ELSEWHERE | {k.rpartition(".")[2]: k for k in reversed(all_keys())}
    if word in known:
        return f"did you mean {known[word]}?"
    near = nearest(word, here)
    if near is not None:
        return f"did you mean {dotted((*key[:-1], near)) if whole else near}?"
    near = nearest(word, known)
    if near is not None:
        return f"did you mean {known[near]}?"
    return f"remove it; keys here are {', '.join(here)}"


def is_value(key: KeyPath) -> bool:
    """Whether the key is known and holds no keys of its own."""
    section = section_at(key[:-1])
    info = section.model_fields.get(str(key[-1])) if section else None
    return info is not None and not section_of(info.annotation) and key[-1] != "options"


def rule_at(key: KeyPath) -> tuple[str, str]:
    """The rule for a key (or for an item of its list) and its default, both in words."""
    for n in range(len(key), 0, -1):
        section = section_at(key[: n - 1])
        info = section.model_fields.get(str(key[n - 1])) if section else None
        if info is None:
            continue
        if n == len(key):
            default = "{}" if section_of(info.annotation) else write(info.default)
            return rule(info.annotation, info.metadata), default
        item = get_args(info.annotation)[1 if get_origin(info.annotation) is dict else 0]
        return rule(item), ""
    return "a mapping of keys", ""


def fault_id(kinds: set[str]) -> str:
    """`range`, `choice` or `type`, from what the validator calls its errors."""
    text = " ".join(kinds)
    if any(word in text for word in ("than", "finite", "too_short", "too_long")):
        return "range"
    if any(word in text for word in ("literal", "pattern", "value_error")):
        return "choice"
    return "type"


def remedy(raw: str, allowed: str, default: str, *, typed: bool) -> str:
    """What to write instead: the nearest choice, other quotes, or the default as an example.

    Args:
        raw: As it was written.
        allowed: The rule, see `rule_at`.
        default: Such as `0.1`, or "".
        typed: On the command line, where a shell takes quotes away.
    """
    word = raw.strip('"')
    value = _scalar_or_text(word)
    if raw.startswith('"') and not isinstance(value, str):
        return f"take the quotes away: {word}"
    if allowed.startswith("text") and not isinstance(value, str):
        shell = "; in a shell inside single quotes" if typed else ""
        return f'put it in quotes: "{word}"{shell}'
    near = nearest("cuda" if word == "gpu" else word, _choices(allowed))
    if near is not None:
        return f"did you mean {near}?"
    if default == "null":
        return "correct the value, or write null"
    return f"write a value such as {default}" if 0 < len(default) < 60 else "correct the value"


def _choices(allowed: str) -> list[str]:
    """The words to choose from in a rule such as `one of cosine, poly` or `auto, cpu or cuda`."""
    if "one of" not in allowed and "auto" not in allowed and "tutorial" not in allowed:
        return []
    return re.findall(r"[a-z_0-9]+", allowed.replace("one of", ""))


def _scalar_or_text(word: str) -> object:
    try:
        return strict_yaml.scalar(word)
    except ValueError:
        return word
