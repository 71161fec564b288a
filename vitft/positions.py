"""Where a patch lies: the tables that tell a token its place, and their change to another grid.

In: a grid of patches. Out: a table [1, T or P, D] to be added to the tokens; prefix tokens come
first. The learned numbers belong to the model (`vit`), whose checkpoint names them. Shapes: see
`vit`.
"""

import torch
import torch.nn.functional as F
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor

from vitft.errors import RecipeError

Grid = tuple[int, int]  # patches along height and width

KINDS = {  # timm says "learn"; both spellings build the same model
    "learned": "learned",
    "learn": "learned",
    "learned2d": "learned2d",
    "sincos2d": "sincos2d",
    "none": "none",
    "": "none",
}


def sincos2d(grid: Grid, width: int) -> Tensor:
    """The fixed two-dimensional sine-cosine position table.

    Args:
        grid: Patches along height and width.
        width: D, a multiple of 4, at least 8.

    Returns:
        [1, P, D] float32: sin x, cos x, sin y, cos y, a quarter of the width each.

    Raises:
        RecipeError: The width does not split into quarters.

    Source: big_vision models/vit.py, `posemb_sincos_2d`, temperature 10,000.
    """
    if width % 4 or width < 8:
        rule = f"sincos2d needs a width that is a multiple of 4 and at least 8, got {width}"
        raise RecipeError.of("model.pos_embed", "model.embed_dim", rule, "use pos_embed: learned")
    y, x = torch.meshgrid(
        torch.arange(grid[0], dtype=torch.float64),
        torch.arange(grid[1], dtype=torch.float64),
        indexing="ij",
    )
    steps = torch.arange(width // 4, dtype=torch.float64)
    omega = 10_000.0 ** (-steps / (width // 4 - 1))
    x_angle, y_angle = x.reshape(-1, 1) * omega, y.reshape(-1, 1) * omega  # [P, D / 4]
    table = torch.cat([x_angle.sin(), x_angle.cos(), y_angle.sin(), y_angle.cos()], dim=1)
    return table.float().unsqueeze(0)


def crossed(y: Tensor, x: Tensor, grid: Grid, prefix: int) -> Tensor:
    """A table from one row of numbers per row of patches and one per column; prefix tokens get 0.

    Args:
        y: [1, rows, D / 2], of any number of rows.
        x: [1, columns, D / 2].
        grid: To which both are stretched.
        prefix: Tokens before the patches that have a place in the table.

    Returns:
        [1, prefix + P, D]: half of the width says the row, half the column.
    """
    y = stretched(y, grid[0])[:, :, None].expand(-1, -1, grid[1], -1)
    x = stretched(x, grid[1])[:, None].expand(-1, grid[0], -1, -1)
    table = torch.cat([y, x], dim=-1).flatten(1, 2)  # [1, P, D]
    return F.pad(table, (0, 0, prefix, 0))


def stretched(axis: Tensor, count: int) -> Tensor:
    """Positions along one axis, [1, n, D / 2] -> [1, count, D / 2]."""
    if axis.shape[1] == count:
        return axis
    longer = F.interpolate(axis.transpose(1, 2), count, mode="linear", align_corners=False)
    return longer.transpose(1, 2)


def resampled(table: Tensor, old: Grid, new: Grid, prefix: int) -> Tensor:
    """A table of another grid, bicubic; the rows of prefix tokens stay."""
    out: Tensor = resample_abs_pos_embed(table, list(new), list(old), num_prefix_tokens=prefix)
    return out
