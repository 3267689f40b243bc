"""Address tables that are first made while inductor's graph trees warm up, in a pool of their own.

A table that lived in that pool would be found by later calls after its memory went to others.
"""

import torch
from torch import Tensor

from talos_kernels import Index, TensorIndex, gather_grad_
from tests.cases import MANY, assert_bit_equal

DEVICE = torch.device("cuda")


def test_a_table_made_while_graphs_warm_up_stays_whole() -> None:
    from talos_kernels.triton import launch

    case = MANY[0]
    index = Index.pack([TensorIndex.encode(mask) for mask in case.masks()], DEVICE)
    masks = [mask.to(DEVICE) for mask in case.masks()]
    grads = [tensor.to(DEVICE) for tensor in case.tensors()]
    launch._tables.clear()

    @torch.compile(mode="reduce-overhead")
    def gathered(grads: list[Tensor], scale: Tensor) -> Tensor:
        out = grads[0].new_zeros(index.nnz)
        torch.ops.talos.gather_grad_(out, grads, index.buffers, False)
        return out * scale

    def wanted() -> Tensor:
        return torch.cat([grad[mask] for grad, mask in zip(grads, masks, strict=True)])

    scale = torch.tensor(2.0, device=DEVICE)
    for _ in range(4):  # warms up, records, replays
        torch.compiler.cudagraph_mark_step_begin()
        for grad in grads:
            grad.normal_()
        assert_bit_equal(gathered(grads, scale).clone(), wanted() * 2)
    fillers = [torch.full((2 * len(grads),), -1, device=DEVICE) for _ in range(1000)]
    out = torch.empty(index.nnz, device=DEVICE)
    gather_grad_(out, grads, index)  # finds a table by the addresses
    assert_bit_equal(out, wanted())
    del fillers
