"""Data parallelism: two processes, gloo, each with its own share of the data."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from salun_core.saliency import SaliencyMask, masked_optimizer

pytestmark = pytest.mark.slow


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))


def shapes_of(model):
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for views in (False, True):
        torch.save(trained(rank, views), f"{folder}/{rank}-{views}.pt")
    dist.barrier()
    dist.destroy_process_group()


def trained(rank, views):
    model = network()
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=views)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    masked_optimizer(optimizer, model, SaliencyMask.random(shapes_of(model), 0.3, 7))
    generator = torch.Generator().manual_seed(100 + rank)
    for _ in range(4):
        optimizer.zero_grad(set_to_none=not views)
        outputs = parallel(torch.randn(5, 1, 8, 8, generator=generator))
        nn.functional.cross_entropy(outputs, torch.arange(5) % 3).backward()
        optimizer.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, forked_processes):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, args=(str(folder),), nprocs=2)
    return folder


@pytest.mark.parametrize("views", [False, True])
def test_frozen_weights_keep_their_bits_on_every_rank(folder, views):
    before, mask = network(), SaliencyMask.random(shapes_of(network()), 0.3, 7)
    ranks = [torch.load(folder / f"{rank}-{views}.pt", weights_only=True) for rank in range(2)]
    for name, parameter in before.named_parameters():
        first, second = (rank[name].view(torch.int32) for rank in ranks)
        original, salient = parameter.detach().view(torch.int32), mask.tensor(name)
        assert torch.equal(first, second), name
        assert torch.equal(first[~salient], original[~salient]), name
        assert not torch.equal(first[salient], original[salient]), name
