"""Near relatives of ViT, told apart before a file is loaded: most by a name that ViT has not.

In: a file's names in the file's order, and what it says of itself. Out: what it is instead; None
where it is a ViT of ours. Some relatives write ViT's names and shapes and compute something else,
and such a file would load whole and answer wrongly. There its name or header has the word, and
where neither speaks, the file is refused: nothing is guessed.
"""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

OWN_MODEL = "use timm's own model of that name as model.name; its weights load there"


@dataclass(frozen=True)
class Kin:
    """A network that is no ViT of ours, though its file looks like one.

    Attributes:
        what: Shown to people, after "looks like".
        signs: Patterns of names that all occur, the first in a name that the model itself lacks.
        absent: Patterns of names of which none occurs.
        before: Two patterns; a name of the first stands before any of the second.
        word: Pattern in the file's name or header by which it is a ViT after all; "" for none.
        model: The same in the name of the timm model that will take it.
        fix: What to do.
    """

    what: str
    signs: tuple[str, ...]
    absent: tuple[str, ...] = ()
    before: tuple[str, str] | None = None
    word: str = ""
    model: str = ""
    fix: str = OWN_MODEL

    @property
    def told(self) -> str:
        """What a refusal says."""
        return f"looks like {self.what}" + ("" if self.word else ", which no vitflower model is")


_ROTARY = "a ViT with rotary positions"
_GAMMA = r".*blocks\.0\.gamma_1"
_POSITIONS = r".*pos_embed"

KIN = (
    Kin("DINOv3 (rotary positions)", (r".*rope_embed\..+|.*storage_tokens|.*\.qkv\.bias_mask",)),
    Kin("DINOv3 (rotary positions)", (r".*layer\.\d+\.mlp\.up_proj\.weight",)),
    Kin("DINOv2 giant (SwiGLU MLP)", (r".*mlp\.(w12|weights_in)\.weight",)),
    Kin(
        "EVA-02 or AIMv2 (SwiGLU MLP)",
        (r".*blocks\.\d+\.mlp\.w[123]\.weight|.*mlp\.fc1_[gx]\.weight",),
    ),
    Kin("BEiT or Swin (relative positions)", (r".*relative_position_bias_table",)),
    Kin("a ViT with relative positions", (r".*\.rel_pos(_[hw]|\..+)|.*shared_rel_pos\..+",)),
    Kin(_ROTARY, (r".*\brope\..+|(.*\.)?freqs(_t_[xy])?",)),
    Kin(
        "Perception Encoder (rotary positions)",
        (r".*attn_pool\.(latent|probe)", r".*(norm_pre|ln_pre)\..+"),
    ),
    Kin(
        "SigLIP or CoCa (attention pooling)",
        (r".*MAPHead_0/.+|.*attn_pool\..+|.*vision_model\.head\.probe",),
    ),
    Kin("a ViT with normalised queries and keys", (r".*attn\.q_norm\.weight",)),
    Kin("CaiT (talking heads, class attention)", (r".*attn\.proj_l\.weight",)),
    Kin("a ViT with differential attention", (r".*attn\.lambda_[qk]\d",)),
    Kin("BEiT 3 (norms inside attention and MLP)", (r".*blocks\.0\.attn\.norm\.weight",)),
    # EVA's names in timm, where rotation leaves no tensor
    Kin("DINOv3 (rotary positions)", (_GAMMA, r".*reg_token", r".*cls_token"), (_POSITIONS,)),
    Kin(_ROTARY, (_GAMMA,), (_POSITIONS,)),
    Kin("Perception Encoder (rotary positions)", (_GAMMA, r".*norm_pre\..+")),
    Kin("EVA (queries and values with biases, keys without)", (r".*blocks\.0\.attn\.q_bias",)),
    Kin(
        "DeiT-III or timm's rope_ape (rotary positions), which write the same names",
        (_GAMMA, _POSITIONS),
        word=r"deit_?3",
        model=r"deit_?3",
        fix="DeiT-III: give the file its published name, deit_3_....pth; rope_ape: use timm's own "
        "model of that name as model.name",
    ),
    Kin(
        "timm's rpn (norms after attention and MLP), or a ViT whose names were sorted",
        (r".*blocks\.0\.attn\.qkv\.weight", r".*fc_norm\.weight", _POSITIONS),
        (r".*cls_token", r".*reg_token", r".*qkv\.bias", r".*ls1\.gamma", _GAMMA),
        before=(r".*blocks\.0\.attn\.qkv\.weight", r".*blocks\.0\.norm1\.weight"),
        word="vitflower",
        model=r"_rpn_",
        fix="rpn: use timm's own model of that name as model.name; a ViT: save it as .pth, which "
        "keeps the order of its blocks",
    ),
)


def relative(
    names: Iterable[str], own: Collection[str] = (), *, says: str = "", model: str = ""
) -> Kin | None:
    """Which known relative of ViT the names belong to; None for none.

    Args:
        names: Of the file, in its order.
        own: Those of them that the model has itself, and which tell nothing.
        says: The file's name and header.
        model: timm's name of the model that will take them.
    """
    every = list(names)
    telling = set(every) - set(own)
    return next((kin for kin in KIN if _is(kin, every, telling, says, model)), None)


def _is(kin: Kin, every: list[str], telling: Collection[str], says: str, model: str) -> bool:
    if kin.before is None and not occurs(kin.signs[0], telling):
        return False
    if not all(occurs(sign, every) for sign in kin.signs) or any(
        occurs(a, every) for a in kin.absent
    ):
        return False
    if kin.before is not None and not _stands_before(*kin.before, every):
        return False
    cleared = (kin.word and re.search(kin.word, says)) or (
        kin.model and re.search(kin.model, model)
    )
    return not cleared


def _stands_before(first: str, second: str, names: list[str]) -> bool:
    places = [
        next((i for i, n in enumerate(names) if re.fullmatch(p, n)), -1) for p in (first, second)
    ]
    return 0 <= places[0] < places[1]


def occurs(pattern: str, names: Iterable[str]) -> bool:
    """Whether any name is of this form."""
    return any(re.fullmatch(pattern, name) for name in names)
