"""How large the tensors are that operators return: a bound of memory that a CPU can show too."""

from __future__ import annotations

from typing import Any

from torch import is_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorSizes(TorchDispatchMode):
    """Shapes and sizes of everything that operators return."""

    def __init__(self) -> None:
        super().__init__()
        self.largest: dict[tuple[int, ...], int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if is_tensor(tensor):
                self.largest[tuple(tensor.shape)] = tensor.nbytes
        return result
