"""Two real processes, joined by gloo: one saliency, one unlearned model, and an end for both when one fails."""

import json
import os
import subprocess
import time
from datetime import timedelta

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn
from torch.distributed import TCPStore
from torch.nn.functional import cross_entropy

from salun_core.data import ImageSet
from salun_core.diffusion.conditions import ConditionTable
from salun_core.diffusion.denoiser import Denoiser
from salun_core.diffusion.examples import Examples
from salun_core.diffusion.process import Process
from salun_core.errors import IntegrityError, SalunError, UsageError
from salun_core.evaluation import Evidence
from salun_core.methods import distributed
from salun_core.methods.classification import FileCheckpoint, unlearn
from salun_core.methods.diffusion import ExampleSets, diffusion_config, unlearn_denoiser
from salun_core.methods.diffusion.saliency import denoising_scores
from salun_core.methods.distributed import SINGLE_PROCESS, ProcessGroup, joined
from salun_core.methods.recipe import Recipe
from salun_core.models import load_model
from salun_core.saliency import SaliencyMask, saliency_scores
from salun_core.saliency.scores import CHUNK, Slice, repeatable
from salun_core.steps.context import RunContext
from salun_core.steps.evaluation import evaluate, evaluate_together
from salun_core.steps.mask import compute_mask
from salun_core.steps.unlearning import run_unlearning
from tests.support.commands import _settings_restored, invoke  # noqa: F401 - a fixture
from tests.support.full_device import limited

pytestmark = pytest.mark.slow

SAMPLES = 3 * CHUNK + 40
SHARDED = {"sharded": {}, "sharded update": {"batch_norm": "update", "optimizer": "adamw", "learning_rate": 1e-3}}
SGD = {"epochs": 2, "batch_size": 16, "learning_rate": 0.05, "gradient_clip": 1.0, "device": "cpu"}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Conv2d(6, 5, 1), nn.ReLU(), nn.Conv2d(5, 6, 1)) for _ in "ab"))
        self.head = nn.Linear(6, 4)
        self.unused = nn.Linear(2, 2)

    def forward(self, images):
        return self.head(self.blocks(torch.relu(self.norm(self.conv(images)))).mean(dim=(2, 3)))


def network():
    torch.manual_seed(0)
    return Net()


def images(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return ImageSet(torch.randn(count, 1, 6, 6, generator=generator), torch.arange(count) % 4)


def mask_of(model):
    return SaliencyMask.random(dict(model.named_parameters()), 0.4, 7)


def scores_in(group):
    part, forget = Slice(group.rank, group.size), images(SAMPLES, 1)
    mine = forget.select(part.samples(SAMPLES)).batches(CHUNK)
    return saliency_scores(network(), mine, cross_entropy, samples=SAMPLES, part=part)


def unlearned_in(group, checkpoint=None, seed=2, limit=None, method="salun", **config):
    """17 images to forget: the last batch has one, fewer than there are processes."""
    model = network()
    if limit is not None:
        limited(model, limit)
    return unlearn(
        model,
        method,
        forget=images(17, seed),
        retain=images(30, 3),
        config=SGD | config,
        mask=mask_of(model),
        checkpoint=checkpoint,
        group=group,
    )


class UNet2DModel(nn.Module):
    """A denoiser; its name is that of the network of diffusers with the same arguments."""

    def __init__(self):
        super().__init__()
        self.embedding, self.first, self.last = nn.Embedding(3, 6), nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 1, 1)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(6, 5, 1), nn.SiLU(), nn.Conv2d(5, 6, 1)) for _ in "ab")

    def forward(self, noisy, times, class_labels, return_dict):
        hidden = self.first(noisy) + (self.embedding(class_labels) * times[:, None] / 100)[:, :, None, None]
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return (self.last(hidden),)


def denoiser():
    torch.manual_seed(0)
    kept = torch.linspace(0.99, 0.01, 100)
    return Denoiser(UNet2DModel(), Process("epsilon", kept.sqrt(), (1 - kept).sqrt()))


def denoiser_mask():
    return SaliencyMask.random(dict(denoiser().network.named_parameters()), 0.4, 7)


def denoiser_sets():
    pixels, rows = torch.randn(12, 1, 6, 6, generator=torch.Generator().manual_seed(1)), torch.arange(12) % 2
    forget, retain = Examples(pixels[:4], rows[:4] * 0, pseudo=rows[:4] * 0 + 1), Examples(pixels[4:], rows[4:] + 1)
    return ExampleSets(forget, retain, ConditionTable(["a", "b", "c"], {"class_labels": torch.arange(3)}), True)


def denoiser_scores(group, **config):
    settings = diffusion_config("salun", {"batch_size": 3, "device": "cpu", **config})
    return denoising_scores(denoiser(), denoiser_sets(), settings, group)


def unlearned_denoiser(group, **config):
    settings = {"steps": 4, "epochs": 2, "batch_size": 4, "learning_rate": 1e-3, "device": "cpu", **config}
    return unlearn_denoiser(denoiser(), denoiser_sets(), "salun", config=settings, mask=denoiser_mask(), group=group)


def plain(result):
    losses, parts = ([getattr(record, name) for record in result.history] for name in ("losses", "parts"))
    return {"state": result.model.state_dict(), "losses": losses, "parts": parts, "config": result.config.model_dump()}


def first_of(result):
    """The weights of the first process; the others have none."""
    return "none" if any(value.is_meta for value in result.model.parameters()) else plain(result)


def failure_of(act):
    try:
        act()
    except SalunError as error:
        return type(error).__name__, error.exit_code
    return None


def falls_out(group, failing, error):
    """One process raises while the other waits for it."""
    with joined(group, timedelta(seconds=30)):
        if group.rank == failing:
            raise error
        group.require_same("steps", "1")


def never_answers(group, folder):
    """The first process waits for one that does something else, until its time is over."""
    with joined(group, timedelta(seconds=1)):
        if group.main:
            try:
                group.require_same("steps", "1")
            finally:
                (folder / "given-up").touch()
        while not (folder / "given-up").exists():
            time.sleep(0.05)


def scenes(group, folder, work):
    with joined(group):
        yield "scores", scores_in(group)
        yield "freeze", plain(unlearned_in(group))
        yield "update", plain(unlearned_in(group, batch_norm="update"))
        adaptive = unlearned_in(group, method="salun_adaptive", epochs=1)
        yield "adaptive", plain(adaptive) | {"readings": [record.reading.model_dump() for record in adaptive.history]}
        yield "little room", plain(unlearned_in(group, limit=99 if group.main else 3))
        kept = FileCheckpoint(folder / f"checkpoint-{group.rank}")
        unlearned_in(group, kept, epochs=2)
        yield "checkpoints", (folder / f"checkpoint-{group.rank}").exists()
        yield "resumed", plain(unlearned_in(group, kept, epochs=2))
        for name, more in SHARDED.items():
            yield name, first_of(unlearned_in(group, sharding="fsdp", **more))
        sharded = FileCheckpoint(folder / f"sharded-{group.rank}")
        unlearned_in(group, sharded, sharding="fsdp")
        yield "sharded resumed", first_of(unlearned_in(group, sharded, sharding="fsdp"))
        yield "whole resumed", plain(unlearned_in(group, sharded))
        yield "sharded denoiser", first_of(unlearned_denoiser(group, sharding="fsdp"))
        yield "sharded denoiser scores", denoiser_scores(group, sharding="fsdp")
    context = RunContext(work / "model", str(work / "forget.json"))
    recipe = Recipe(method_config={"epochs": 1, "device": "cpu"})
    result = run_unlearning(context, recipe, work / "mask", work / f"after-{group.rank}")
    sharded = Recipe(method="salun", method_config={"sharding": "fsdp"})
    yield "sharded mask", (compute_mask(context, sharded, folder / f"mask-{group.rank}").digest)
    yield "step", (plain(result), (work / f"after-{group.rank}").exists())
    measured = evaluate_together(context, work / "model", folder / f"{group.rank}.json", folder / f"{group.rank}.html")
    yield "evidence", (measured.model_dump_json() if measured else None, (folder / f"{group.rank}.json").exists())
    yield "other data", failure_of(lambda: _joined_unlearning(group))
    yield "second fails", failure_of(lambda: falls_out(group, 1, IntegrityError("a file", "is damaged", "")))
    yield "no answer", failure_of(lambda: never_answers(group, folder))


def _joined_unlearning(group):
    with joined(group):
        unlearned_in(group, seed=2 + group.rank)


def worker(rank, folder, work, port):
    """As torchrun starts it: the processes meet at a store that their parent keeps open, and that no scene closes."""
    torch.set_num_threads(1)
    distributed._PEER = timedelta(seconds=1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
    os.environ.update(MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
    found = dict(scenes(ProcessGroup.from_environment(), folder, work))
    torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def work(tmp_path_factory, digits_model):
    folder = tmp_path_factory.mktemp("work")
    (folder / "model").symlink_to(digits_model)
    train = load_model(digits_model).split.train
    ids = sorted(train)[: 2 * CHUNK + 100]
    (folder / "forget.json").write_text(json.dumps({"kind": "samples", "ids": ids}))
    context = RunContext(digits_model, str(folder / "forget.json"), device="cpu")
    compute_mask(context, Recipe(), folder / "mask")
    return folder


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, work, forked_processes):
    folder = tmp_path_factory.mktemp("ranks")
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # it chooses its port while it binds it
    mp.spawn(worker, args=(folder, work, store.port), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def assert_same_bits(found, expected):
    assert list(found) == list(expected)
    for name, value in found.items():
        kind = torch.int32 if value.is_floating_point() else value.dtype
        assert torch.equal(value.contiguous().view(kind), expected[name].contiguous().view(kind)), name


def test_two_processes_score_the_same_bits_as_one(ranks):
    alone = scores_in(SINGLE_PROCESS)
    for rank in ranks:
        assert_same_bits(rank["scores"], alone)
        assert SaliencyMask.from_scores(rank["scores"], 0.5).digest == SaliencyMask.from_scores(alone, 0.5).digest


def test_two_processes_take_the_same_decisions(ranks):
    first, second = (rank["adaptive"] for rank in ranks)
    assert first["readings"] == second["readings"]
    assert first["readings"]
    assert_same_bits(first["state"], second["state"])


@pytest.mark.parametrize("name", ["freeze", "update", "resumed", "little room"])
def test_all_processes_end_with_the_same_model_and_frozen_weights_keep_their_bits(ranks, name):
    first, second = (rank[name] for rank in ranks)
    assert_same_bits(first["state"], second["state"])
    assert first["losses"] == second["losses"]
    mask, before = mask_of(network()), network()
    for parameter, value in before.named_parameters():
        salient, now = mask.tensor(parameter), first["state"][parameter].view(torch.int32)
        assert torch.equal(now[~salient], value.detach().view(torch.int32)[~salient]), parameter
    assert not torch.equal(first["state"]["conv.weight"], before.conv.weight)


def test_two_processes_take_the_steps_of_one(ranks):
    """Other sums, so other last bits; but no other steps: both clip, and both weigh each image alike."""
    alone = plain(unlearned_in(SINGLE_PROCESS))
    torch.testing.assert_close(ranks[0]["freeze"]["state"], alone["state"], rtol=1e-4, atol=1e-6)
    for together, single in zip(ranks[0]["freeze"]["losses"], alone["losses"], strict=True):
        assert together == pytest.approx(single, rel=1e-4)


@pytest.mark.parametrize("name", [*SHARDED, "sharded denoiser"])
def test_sharded_weights_take_the_steps_of_one_process_and_keep_frozen_bits(ranks, name):
    """Only the first process has the model; the other one holds no weights any more."""
    together, second = (rank[name] for rank in ranks)
    assert second == "none"
    if name in SHARDED:
        alone, mask, before = plain(unlearned_in(SINGLE_PROCESS, **SHARDED[name])), mask_of(network()), network()
    else:
        alone, mask, before = plain(unlearned_denoiser(SINGLE_PROCESS)), denoiser_mask(), denoiser().network
    # Batch norm that is updated normalises each process's share by its own statistics.
    tolerance = {"rtol": 0.1, "atol": 0.05} if name == "sharded update" else {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(together["state"], alone["state"], **tolerance)
    for parameter, value in before.named_parameters():
        salient, now = mask.tensor(parameter), together["state"][parameter].contiguous().view(torch.int32)
        assert torch.equal(now[~salient], value.detach().view(torch.int32)[~salient]), parameter
        if salient.any() and "unused" not in parameter:
            assert not torch.equal(now, value.detach().view(torch.int32)), parameter


def test_scores_of_sharded_weights_have_the_bits_of_one_process(ranks, work):
    alone = denoiser_scores(SINGLE_PROCESS)
    for rank in ranks:
        assert_same_bits(rank["sharded denoiser scores"], alone)
        assert rank["sharded mask"] == SaliencyMask.load(work / "mask").digest


def test_a_checkpoint_of_sharded_weights_is_resumed_with_and_without_sharding(ranks):
    expected = ranks[0]["sharded"]["state"]
    assert_same_bits(ranks[0]["sharded resumed"]["state"], expected)
    for rank in ranks:
        torch.testing.assert_close(rank["whole resumed"]["state"], expected, rtol=0, atol=0)


def test_a_process_whose_device_is_full_divides_its_own_share(ranks):
    """Its share of a batch has eight images, its device room for three; every process records the parts."""
    torch.testing.assert_close(ranks[0]["little room"]["state"], ranks[0]["freeze"]["state"], rtol=1e-4, atol=1e-6)
    assert [rank["little room"]["parts"] for rank in ranks] == [[4, 4], [4, 4]]
    assert [rank["freeze"]["parts"] for rank in ranks] == [[1, 1], [1, 1]]


def test_statistics_of_batch_norm_come_from_all_images(ranks):
    alone = plain(unlearned_in(SINGLE_PROCESS, batch_norm="update"))["state"]
    assert int(ranks[0]["update"]["state"]["norm.num_batches_tracked"]) == int(alone["norm.num_batches_tracked"])
    together = ranks[0]["update"]["state"]["norm.running_mean"]
    torch.testing.assert_close(together, alone["norm.running_mean"], rtol=0.1, atol=0.05)


def test_the_first_process_keeps_the_checkpoint_and_both_resume_from_it(ranks):
    assert [rank["checkpoints"] for rank in ranks] == [True, False]
    assert_same_bits(ranks[1]["resumed"]["state"], ranks[0]["freeze"]["state"])


def test_processes_with_different_data_are_refused(ranks):
    assert [rank["other data"] for rank in ranks] == [("IntegrityError", 5)] * 2


def test_when_one_process_fails_the_other_ends_with_its_exit_code(ranks):
    assert [rank["second fails"] for rank in ranks] == [("PeerError", 5), ("IntegrityError", 5)]


def test_waiting_for_a_silent_process_ends_after_a_timeout(ranks):
    assert ranks[0]["no answer"] == ("PeerError", 1)


@pytest.mark.parametrize(("rank", "size"), [("1", "1"), ("a", "2"), ("0", ""), ("-1", "2")])
def test_an_environment_that_contradicts_itself_is_refused(monkeypatch, rank, size):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(UsageError, match="torchrun"):
        ProcessGroup.from_environment()


def test_the_weight_of_a_share_is_its_number_of_images():
    pixels, labels = torch.arange(5.0), torch.arange(5)
    shares = [ProcessGroup(rank, 3).share(pixels, labels) for rank in range(3)]
    assert torch.cat([share.images for share in shares]).tolist() == pixels.tolist()
    mean = sum(share.images.mean() * share.weight for share in shares)
    assert float(mean) == pytest.approx(float(pixels.mean()))
    assert [(ProcessGroup(rank, 3).share(pixels[:2], labels[:2]).count) for rank in range(3)] == [1, 1, 0]
    assert ProcessGroup(2, 3).share(pixels[:2], labels[:2]).weight == 0


def salun(program, folder, *args):
    """Run the command as a user would, on one thread a process; its joined processes are new interpreters."""
    hidden = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "PUSHGATEWAY_URL", "SALUN_STORE_URI"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden} | {"OMP_NUM_THREADS": "1"}
    command = [program, "--json", *map(str, args)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def test_the_step_in_two_processes_is_written_by_the_first(ranks, work):
    (first, written), (second, also) = (rank["step"] for rank in ranks)
    assert (written, also) == (True, False)
    before, after = (load_model(work / name).model for name in ("model", "after-0"))
    assert_same_bits(first["state"], second["state"])
    assert_same_bits(after.state_dict(), first["state"])
    mask = SaliencyMask.load(work / "mask")
    for name, value in after.named_parameters():
        changed = value.view(torch.int32) != before.get_parameter(name).view(torch.int32)
        assert not bool(changed[~mask.tensor(name)].any()), name
        assert bool(changed.any()), name
    assert json.loads((work / "after-0" / "run.json").read_text())["environment"]["processes"] == "2"


def test_the_evaluation_in_two_processes_is_that_of_one(ranks, work, tmp_path):
    """The first process writes the evidence; the other one ends when the outputs are computed."""
    (first, written), second = (rank["evidence"] for rank in ranks)
    assert written
    assert second == (None, False)
    found = Evidence.model_validate_json(first)
    context = RunContext(work / "model", str(work / "forget.json"))
    with repeatable():
        alone = evaluate(context, work / "model", tmp_path / "evidence.json", tmp_path / "report.html")
    assert found == alone.model_copy(update={"created_at": found.created_at})


@pytest.mark.e2e
def test_the_command_in_two_processes_makes_the_same_mask_and_prints_once(work, digits_model, salun_path):
    words = ["--model", digits_model, "--forget", "forget.json", "--out", "two", "--processes", 2]
    done = salun(salun_path, work, "mask", *words)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["digest"] == SaliencyMask.load(work / "mask").digest
    assert SaliencyMask.load(work / "two").digest == SaliencyMask.load(work / "mask").digest


def test_the_command_ends_with_the_exit_code_of_the_process_that_failed(work, digits_model, monkeypatch, capfd):
    (work / "damaged").write_bytes((work / "mask").read_bytes()[:-1])
    inputs = ["--model", digits_model, "--forget", work / "forget.json", "--mask", work / "damaged"]
    command = [str(word) for word in ("salun", "unlearn", *inputs, "--out", work / "never", "--processes", 2)]
    monkeypatch.setattr("sys.argv", command)  # what it starts twice
    assert invoke(*command[1:]).exit_code == 5
    printed = capfd.readouterr()
    assert (printed.out, "damaged" in printed.err) == ("", True)
    assert not (work / "never").exists()
