"""One rank's stage of Megatron's pipeline: its modules, by Megatron's names and by ours."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import distribute_tensor

from parallel.engines.megatron_masters import Held, placements
from parallel.engines.megatron_names import EMBEDDING, Piece, pieces
from parallel.layout import Layout


class Stage:
    """This rank's part of the model.

    Args:
        layout: sizes of the mesh axes.
        modules: its GPTModels, one for each of its pipeline chunks.
        architecture: a DecoderConfig, or what has its fields.
        vocabulary: number of token ids.
        device: where it is.

    Attributes:
        mesh: axes (tp, dp) of the ranks of this pipeline stage; dp holds the context-parallel ranks, too.
        first, last: whether this is the pipeline's first stage, or its last.
        pieces: canonical parameters in each of its parameters.
        rows: how many of this rank's rows of the vocabulary stand for a token.
    """

    def __init__(
        self, layout: Layout, modules: Sequence[Any], architecture: Any, vocabulary: int, device: torch.device
    ):
        from megatron.core import parallel_state

        self.modules = modules
        number = parallel_state.get_pipeline_model_parallel_rank()
        self.first, self.last = number == 0, number == layout.pp - 1
        data = parallel_state.get_data_parallel_group(with_context_parallel=True)
        groups = [parallel_state.get_tensor_model_parallel_group(), data]
        ranks = torch.arange(layout.world_size).view(layout.pp, -1, layout.tp)[number].t().contiguous()
        self.mesh = DeviceMesh.from_group(groups, device.type, mesh=ranks, mesh_dim_names=("tp", "dp"))
        each = -(-vocabulary // layout.tp)
        self.rows = max(0, min(each, vocabulary - self.mesh.get_local_rank("tp") * each))
        self.pieces: dict[nn.Parameter, list[Piece]] = {}
        for module in modules:
            first_layer = module.decoder.layers[0].layer_number - 1
            for name, parameter in module.named_parameters():
                self.pieces[parameter] = pieces(name, first_layer, architecture, self.rows)

    def held(self, copies: int) -> list[Held]:
        """Its parameters.

        Args:
            copies: data-parallel ranks that hold the same masters.
        """
        found = []
        for number, (parameter, parts) in enumerate(self.pieces.items()):
            times = copies if parts[0].dimension is not None else copies * self.mesh["tp"].size()
            copied = parts[0].name == EMBEDDING and not self.first
            found.append(Held(str(number), parameter, parts, 0 if copied else times))
        return found

    @torch.no_grad()
    def place(self, model: nn.Module, initialise: Callable[[nn.Module], None] | None) -> None:
        """Leave of a model what this stage has, shared among its tensor-parallel ranks, and fill it.

        Args:
            model: its parameters have canonical names.
            initialise: fills parameters that are on the meta device.
        """
        wanted = {piece.name: piece for parts in self.pieces.values() for piece in parts}
        on_meta = any(parameter.is_meta for parameter in model.parameters())
        for prefix, module in list(model.named_modules()):
            for name, parameter in list(module.named_parameters(recurse=False)):
                piece = wanted.get(f"{prefix}.{name}")
                module.register_parameter(name, None if piece is None else self._shared(parameter, piece))
        if on_meta and initialise is not None:
            model.to_empty(device=self.mesh.device_type)
            initialise(model)

    def _shared(self, parameter: Tensor, piece: Piece) -> nn.Parameter:
        placed = distribute_tensor(parameter.detach(), self.mesh, placements(piece), src_data_rank=None)
        return nn.Parameter(placed)
