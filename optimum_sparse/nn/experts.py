"""Fused experts taken apart: a linear of its own for every matrix of every expert.

    gate_up_proj  [experts, 2 * intermediate, hidden]  ->  0.gate_up_proj, 1.gate_up_proj, ...
    down_proj     [experts, hidden, intermediate]      ->  0.down_proj, 1.down_proj, ...

Each is [out, in], also where the fused parameter is [experts, in, out]. Biases stay where they are.
"""

from typing import Any

import torch
from torch import Tensor, nn


class Expert(nn.Module):
    """The matrices of one expert: nn.Linear or SparseLinear, under the names of the fused parameters.

    Attributes:
        tokens: while it is called, int64: which rows of its layer's input it is given, in rising order.
        sees_all: give it all rows; its layer's output stays the same.
    """

    def __init__(self, matrices: dict[str, nn.Module]):
        super().__init__()
        self.tokens: Tensor | None = None
        self.sees_all = False
        for name, linear in matrices.items():
            self.add_module(name, linear)


class Experts(nn.Module):
    """In place of a fused module of transformers: the same function, through one linear per expert and matrix.

    The state dict is the disk format: "3.gate_up_proj.weight" and its companions. Under the fused parameter's own name
    are the numbers of the experts, int64 [experts], in another shape than a reader without this package accepts.

    Attributes:
        fused: the module that it stands for, with the parameters `matrices`: [experts, out, in], or [experts, in, out]
            if `fused.is_transposed`. No submodule: what it holds is held once.
        matrices: "gate_up_proj" ("up_proj" where there is no gate) and "down_proj".
    """

    fused: Any

    def __init__(self, fused: nn.Module):
        """The linears have no data yet: they are on the meta device."""
        super().__init__()
        self.__dict__["fused"] = fused
        self.matrices = matrix_names(fused)
        whole = {matrix: fused.get_parameter(matrix) for matrix in self.matrices}
        for number in range(len(whole["down_proj"])):
            self.add_module(str(number), Expert({name: _linear(part, self.fused) for name, part in whole.items()}))
        for matrix in self.matrices:
            self.register_buffer(matrix, torch.arange(len(whole[matrix])))
        self._share(fused, self)

    @property
    def members(self) -> list[Any]:
        """Each `Expert`, by number."""
        return [child for child in self.children() if isinstance(child, Expert)]

    def take(self) -> None:
        """Let the linears hold what the fused parameters hold: views of it."""
        self._share(self.fused, self)
        for matrix in self.matrices:
            whole = self.fused.get_parameter(matrix).detach()
            whole = whole.transpose(1, 2) if self.fused.is_transposed else whole
            for expert, weight in zip(self.members, whole, strict=True):
                expert.get_submodule(matrix).weight = nn.Parameter(weight, requires_grad=False)

    def give_back(self) -> nn.Module:
        """The fused module, with what the linears hold now, which is given up here.

        Its parameters stay; the memory of those that were changed is new, since the old may be a file mapped into
        memory.
        """
        self._share(self, self.fused)
        for matrix in self.matrices:
            parameter = self.fused.get_parameter(matrix)
            linears = [expert.get_submodule(matrix) for expert in self.members]
            weights = [linear.weight.data for linear in linears]
            if any(weight.data_ptr() != part.data_ptr() for weight, part in zip(weights, parameter, strict=True)):
                stacked = torch.stack([weight.T for weight in weights] if self.fused.is_transposed else weights)
                if parameter.is_meta:
                    setattr(self.fused, matrix, nn.Parameter(stacked))
                else:
                    parameter.data = stacked
            for linear in linears:
                linear.weight = nn.Parameter(linear.weight.to("meta"), requires_grad=False)
        return self.fused

    def keep(self) -> None:
        """Stay in the fused module's place, whose matrices are given up here."""
        for matrix in self.matrices:
            for expert in self.members:
                linear = expert.get_submodule(matrix)
                if isinstance(linear, nn.Linear):
                    linear.weight.data = linear.weight.data.clone(memory_format=torch.contiguous_format)
            whole = self.fused.get_parameter(matrix)
            setattr(self.fused, matrix, nn.Parameter(whole.to("meta"), requires_grad=False))

    def _share(self, source: nn.Module, target: nn.Module) -> None:
        """Everything but the matrices: biases, norms, activations."""
        for name, parameter in source.named_parameters(recurse=False):
            if name not in self.matrices:
                target.register_parameter(name, parameter)
        for name, child in source.named_children():
            if not isinstance(child, Expert):
                target.add_module(name, child)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[tokens, hidden] from [tokens, hidden], and the experts of each token [tokens, k] and their weights.

        The number after the last expert's stands for none, which adds nothing.
        """
        choices, members = top_k_index.flatten(), self.members
        by_expert = choices.argsort(stable=True)
        *counts, none = torch.bincount(choices, minlength=len(members) + 1).tolist()
        chosen = by_expert[: len(choices) - none]
        tokens = chosen // top_k_index.shape[-1]
        outputs = []
        for number, (expert, mine, x) in enumerate(
            zip(members, tokens.split(counts), hidden_states[tokens].split(counts), strict=True)
        ):
            if expert.sees_all:
                expert.tokens = torch.arange(len(hidden_states), device=mine.device)
                outputs.append(self._call(number, expert, hidden_states)[mine])
            elif len(x):
                expert.tokens = mine
                outputs.append(self._call(number, expert, x))
            expert.tokens = None
        # Back in the order of the tokens and summed over their experts: not added up in place, which CUDA does in any
        # order.
        output = torch.cat(outputs or [hidden_states[:0]]) * top_k_weights.flatten()[chosen, None]
        if none:
            output = nn.functional.pad(output, (0, 0, 0, none))
        output = output[by_expert.argsort()]
        return output.view(*top_k_index.shape, output.shape[-1]).sum(1).to(hidden_states.dtype)

    def _call(self, number: int, expert: Expert, x: Tensor) -> Tensor:
        for matrix in self.matrices:
            x = expert.get_submodule(matrix)(x)
            if self.fused.has_bias:
                x = x + getattr(self, f"{matrix}_bias")[number]
            if matrix == "down_proj":
                continue
            x = self.fused._apply_gate(x) if self.fused.has_gate else self.fused.act_fn(x)
        return self.get_submodule("post_expert_norm")(x) if getattr(self.fused, "has_post_expert_norm", False) else x


def matrix_names(fused: Any) -> tuple[str, str]:
    """The 3-D parameters of a fused module, in the order of their use."""
    return ("gate_up_proj" if fused.has_gate else "up_proj", "down_proj")


def _linear(whole: Tensor, fused: Any) -> nn.Linear:
    """For one expert of `whole`, without data."""
    _, rows, columns = whole.shape
    rows, columns = (columns, rows) if fused.is_transposed else (rows, columns)
    return nn.Linear(columns, rows, bias=False, device="meta", dtype=whole.dtype)
