"""The memory buffer: the rows of a mixer's projection that make Δ, B and C, and with them what the state remembers.

On Mamba-1 they are all of x_proj, so that LoRA there gives ΔW = [U_Δ; U_B; U_C] V: one shared V ties the three
updates (Halloran et al. 2025). Untied, each has a V of its own. On Mamba-2 they are the last rows of in_proj.
"""

from torch import nn

from lyapft.errors import InputError
from lyapft.peft.mixers import is_selective_scan
from lyapft.peft.views import SplitRows

REST = "rest"  # the block of rows that are not of the memory buffer


def memory_layer(name: str, mixer: nn.Module) -> str:
    """Which layer of a mixer holds the rows.

    Raises:
        InputError: a mixer that has them in no layer.
    """
    leaf = "x_proj" if is_selective_scan(mixer) else "in_proj"
    if not isinstance(getattr(mixer, leaf, None), nn.Linear):
        raise InputError(
            f"peft.targets=memory_buffer: {name} ({type(mixer).__name__}) makes Δ, B and C without a layer that an "
            "adapter could go on: choose peft.targets=sll"
        )
    return leaf


def blocks(mixer: nn.Module, tied: bool) -> dict[str, int]:
    """Rows of each block of the memory layer, in their order; one block where nothing has to be split."""
    if is_selective_scan(mixer):
        rank, states = int(mixer.time_step_rank), int(mixer.ssm_state_size)  # type: ignore[arg-type]
        return {"memory": rank + 2 * states} if tied else {"dt": rank, "B": states, "C": states}
    states, heads = int(mixer.n_groups) * int(mixer.ssm_state_size), int(mixer.num_heads)  # type: ignore[arg-type]
    rest = {REST: int(mixer.in_proj.out_features) - 2 * states - heads}  # type: ignore[arg-type,union-attr]
    return rest | ({"memory": 2 * states + heads} if tied else {"B": states, "C": states, "dt": heads})


def split_memory(model: nn.Module, names: list[str], tied: bool) -> list[str]:
    """Take the rows of each memory layer apart where they have to be; returns the names of what is to be adapted."""
    adapted = []
    for name in names:
        parent, _, leaf = name.rpartition(".")
        mixer = model.get_submodule(parent)
        rows = blocks(mixer, tied)
        if len(rows) == 1:
            adapted.append(name)
            continue
        setattr(mixer, leaf, SplitRows(getattr(mixer, leaf), rows))
        adapted += [f"{name}.{block}" for block in rows if block != REST]
    return adapted
