"""Scores that were made while decoder layers were pruned one after the other hold for that pruning alone."""

from collections.abc import Sequence

from sparc3_pl.attribution.sequential import Sparsity
from sparc3_pl.errors import InputError
from sparc3_pl.scores.folder import ScoreFolder

__all__ = ["check_sequential"]


def check_sequential(
    folders: Sequence[ScoreFolder],
    *,
    scope: str,
    share: float | None,
    pattern: str | None,
    contrast: str,
    protect: float,
    other: bool = False,
    missing: Sequence[str] = (),
) -> None:
    """Refuses a choice that is not the one by which the layers were pruned while they were scored.

    Args:
        folders: Folders of the general set.
        scope: Name of the scope.
        share: Share of each row, if that is how many are chosen.
        pattern: n:m, if that is.
        contrast: Name of the contrast.
        protect: Share of the strongest that is left alone.
        other: Whether anything else decides how many are chosen, such as a budget for each layer.
        missing: Scored layers of the transformer blocks that nothing is chosen from.

    Raises:
        InputError: naming the folder, and what must be given.
    """
    sparsities = {folder.manifest.sequential for folder in folders}
    if sparsities <= {None}:
        return
    folder = next(folder for folder in folders if folder.manifest.sequential is not None)
    sparsity = Sparsity.of(folder.manifest.sequential)
    if len(sparsities) > 1:
        raise InputError(
            f"{folder.path}: was scored with model.sequential={sparsity.text}, another folder was not; score all alike"
        )
    if missing:
        raise InputError(
            f"{folder.path}: was scored with model.sequential={sparsity.text}: each layer was measured on what the "
            f"pruned ones before it make, so all of them must be pruned, and layers leaves out {missing[0]}; leave "
            "layers out, or score with other model.targets"
        )
    same = not other and contrast == "general" and protect == 0
    if sparsity.pattern is not None:
        same, how = same and scope == "pattern" and pattern == sparsity.text, f"pattern {sparsity.text}"
    else:
        same, how = same and scope == "row" and share == sparsity.share, f"scope row --share {sparsity.text}"
    if not same:
        raise InputError(
            f"{folder.path}: was scored with model.sequential={sparsity.text}: its layers were pruned so before the "
            f"next were measured, and the scores hold for that alone; give --contrast general --{how}, or score "
            "without it"
        )
