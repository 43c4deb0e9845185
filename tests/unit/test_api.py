"""The public functions: what they read, that they compute what the steps compute, and what they refuse."""

import ast
import doctest
import inspect
import io
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import salun_core as salun
from salun_core import api
from salun_core.data.images import ImageSet
from salun_core.data.targets import parse_target
from salun_core.errors import ConflictError, DataError, GateRefusedError, ModelError, UsageError
from salun_core.gate import decide, load_policy
from salun_core.methods.classification import method_config
from salun_core.models import build_classifier, load_model
from salun_core.models.checkpoint import model_digest
from salun_core.registry.lookup import require_head
from salun_core.saliency import SaliencyMask, saliency_scores
from salun_core.saliency.scores import CHUNK, repeatable
from salun_core.tasks import TASKS, inputs_of
from salun_core.tasks.masks import make_mask

CLASSES, SIDE = 3, 4
QUIET = {"progress": False}


def images_of(count, classes=range(CLASSES), seed=0):
    """Images of whose quarters one is bright, by class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor(list(classes)).repeat(-(-count // len(classes)))[:count]
    images = 0.3 * torch.rand(count, 1, SIDE, SIDE, generator=generator)
    images[torch.arange(count), 0, labels] += 0.7
    return images, labels


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, 16), nn.ReLU(), nn.Linear(16, CLASSES))
    optimizer, (images, labels) = torch.optim.Adam(model.parameters(), 0.01), images_of(120)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model


@pytest.fixture(scope="module")
def forget():
    return images_of(2 * CHUNK + 9, classes=[1], seed=1)


@pytest.fixture(scope="module")
def retain():
    return images_of(60, classes=[0, 2], seed=2)


@pytest.fixture(scope="module")
def erased(net, forget, retain):
    chosen = salun.mask(net, forget, **QUIET)
    config = {"epochs": 2, "learning_rate": 0.1, "batch_size": 32}
    return chosen, salun.unlearn(net, "salun", forget=forget, retain=retain, mask=chosen, config=config, **QUIET)


ROOT = Path(__file__).parents[2]


def blocks_of(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL)


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md", "docs/how-to/python.md"])
def test_the_calls_on_the_pages_fit_the_functions(page):
    calls = [
        node
        for block in blocks_of(page)
        for node in ast.walk(ast.parse(block))
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("salun.")
    ]
    for call in calls:
        signature = inspect.signature(getattr(salun, call.func.attr))
        signature.bind(*call.args, **{word.arg: word.value for word in call.keywords})

    assert {call.func.attr for call in calls} >= {"mask", "unlearn"}


def test_the_lines_of_the_page_run(net, forget, retain):
    names = {"model": net, "forget": forget, "retain": TensorDataset(*retain), "test": images_of(30)}
    names["held_out"] = images_of(20)
    for block in blocks_of("docs/how-to/python.md")[:2]:
        exec(block, names)

    assert names["evidence"].integrity.frozen_changed == 0


class Counted(Dataset):
    """Notes which samples are read."""

    def __init__(self, pair):
        self.pair, self.read = pair, []

    def __len__(self):
        return len(self.pair[1])

    def __getitem__(self, index):
        self.read.append(index)
        return self.pair[0][index], int(self.pair[1][index])


def test_the_package_is_imported_without_torch():
    code = "import salun_core, sys; assert 'torch' not in sys.modules; print(*salun_core.__all__)"
    names = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()

    assert {"load", "mask", "unlearn", "evaluate", "publish"} <= set(names)
    assert all(getattr(salun, name) is getattr(api, name) for name in names)


def test_the_examples_in_docstrings_run():
    assert doctest.testmod(api).attempted > 0
    assert doctest.testmod(api).failed == 0


class Halves(BatchSampler):
    """A batch sampler of the user's own."""


class TestReading:
    def test_a_data_set_is_read_once_and_in_order(self, net, forget):
        rows = Counted(forget)
        salun.mask(net, rows, **QUIET)

        assert rows.read == list(range(len(rows)))

    def test_the_loader_has_no_influence_on_the_mask(self, net, forget):
        rows, of_tensors = TensorDataset(*forget), salun.mask(net, forget, **QUIET)
        loaders = [
            rows,
            DataLoader(rows, batch_size=7, shuffle=True, drop_last=True),
            DataLoader(rows, batch_size=500, sampler=SubsetRandomSampler(range(len(rows)))),
            DataLoader(rows, batch_size=64, collate_fn=lambda pairs: [torch.stack(one) for one in zip(*pairs)]),  # noqa: B905
        ]

        assert [salun.mask(net, data, **QUIET) for data in loaders] == [of_tensors] * len(loaders)

    def test_a_subset_of_a_loader_is_kept(self):
        rows = TensorDataset(*images_of(9))
        loader = DataLoader(rows, batch_size=2, sampler=SubsetRandomSampler([7, 1, 4]))

        assert ImageSet.of(loader).labels.tolist() == [rows[index][1].item() for index in (1, 4, 7)]

    def test_a_stream_is_read_as_it_comes(self):
        class Stream(IterableDataset):
            def __iter__(self):
                yield from zip(*images_of(5), strict=True)

        assert ImageSet.of(DataLoader(Stream(), batch_size=2)).labels.tolist() == [0, 1, 2, 0, 1]

    def test_the_random_state_stays(self, net, forget):
        before = torch.get_rng_state()
        salun.mask(net, DataLoader(TensorDataset(*forget), batch_size=32, shuffle=True), **QUIET)

        assert torch.equal(torch.get_rng_state(), before)

    @pytest.mark.parametrize(
        "options",
        [
            {"sampler": WeightedRandomSampler([1.0] * 6, 6)},
            {"sampler": RandomSampler(range(6), replacement=True)},
            {"sampler": RandomSampler(range(6), num_samples=3)},
            {"batch_sampler": Halves(SequentialSampler(range(6)), 2, drop_last=False)},
        ],
    )
    def test_a_sampler_that_may_repeat_samples_or_leave_some_out_is_refused(self, options):
        with pytest.raises(UsageError, match="may repeat samples or leave some out"):
            ImageSet.of(DataLoader(TensorDataset(*images_of(6)), **options))


class Dicts(Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return {"image": torch.zeros(1, SIDE, SIDE), "label": 0}


class Detached(nn.Linear):
    def forward(self, images):
        return super().forward(images.flatten(1)).detach()


class TestRefusals:
    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (images_of(0), "forget set is empty"),
            (TensorDataset(*images_of(0)), "forget set is empty"),
            (DataLoader(Dicts()), r"does not yield \(images, labels\): it yields dict"),
            (TensorDataset(images_of(3)[0]), "it yields 1 items"),
            ((images_of(3)[0], torch.tensor([0, 1, 3])), "out of range: they are from 0 to 3, .* 3 classes"),
            ((images_of(3)[0], torch.tensor([0, 1, -1])), "out of range"),
            ((images_of(3)[0], torch.tensor([0, 1])), "differ in number"),
            ((images_of(3)[0], torch.eye(3)), "not class ids"),
            (((255 * images_of(3)[0]).byte(), torch.tensor([0, 1, 2])), "are uint8"),
            ([(torch.zeros(1, 4, 4), 0), (torch.zeros(1, 5, 4), 0)], "differ in size"),
        ],
    )
    def test_data_that_do_not_fit(self, net, data, message):
        with pytest.raises(DataError, match=message):
            salun.mask(net, data, **QUIET)

    @pytest.mark.parametrize(
        ("model", "message"),
        [
            (nn.Sequential(nn.Flatten(), nn.LazyLinear(3)), "has no shape yet"),
            (nn.Sequential(nn.Flatten(), nn.Linear(16, 3, device="meta")), "on meta"),
            (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3, device="meta")), "on cpu and meta"),
            (nn.Flatten(), "no parameters"),
            (nn.Sequential(nn.Flatten(), nn.Linear(9, 3)), r"does not take the images: \[1, 1, 4, 4\]"),
            (nn.Linear(4, 3), r"does not return logits"),
            (Detached(16, 3), "no gradient"),
            (nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).requires_grad_(False), "no weight may change"),
        ],
    )
    def test_a_module_that_does_not_fit(self, model, message):
        with pytest.raises(ModelError, match=message):
            salun.mask(model, images_of(6), **QUIET)

    def test_a_loss_that_reaches_no_weight(self, net):
        with pytest.raises(ModelError, match="every saliency score is 0"):
            salun.mask(net, images_of(6), loss=lambda logits, labels: 0 * logits.sum(), **QUIET)

    def test_what_is_no_model(self):
        with pytest.raises(UsageError, match="dict is not a model"):
            salun.mask({}, images_of(3), **QUIET)

    def test_a_mask_that_the_method_needs(self, net, forget, retain, erased):
        with pytest.raises(UsageError, match="needs a mask"):
            salun.unlearn(net, forget=forget, retain=retain, **QUIET)
        with pytest.raises(UsageError, match="needs a mask"):
            salun.evaluate(net, erased[1], forget=forget, retain=retain, test=images_of(30))

    def test_only_a_model_with_a_card_is_published(self, net, erased):
        with pytest.raises(UsageError, match="write the module with `save`"):
            salun.publish(net, erased[1], forget={"kind": "class", "class_index": 1}, line="x", store="s3://salun")


class TestMaskAndUnlearn:
    def test_the_mask_is_that_of_the_scores(self, net, forget):
        images = ImageSet.of(forget)
        with repeatable():
            scores = saliency_scores(net, images.batches(CHUNK), nn.functional.cross_entropy)

        assert salun.mask(net, forget, density=0.2, **QUIET) == SaliencyMask.from_scores(scores, 0.2)

    def test_frozen_layers_stay_outside_the_mask(self, forget, retain):
        model = nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, 8), nn.Linear(8, CLASSES))
        model[1].requires_grad_(False)
        chosen = salun.mask(model, forget, density=0.5, **QUIET)
        result = salun.unlearn(model, "salun", forget=forget, retain=retain, mask=chosen, config={"epochs": 1}, **QUIET)

        assert chosen.k == round(0.5 * (8 * CLASSES + CLASSES))
        assert not chosen.tensor("1.weight").any()
        assert torch.equal(result.model[1].weight, model[1].weight)
        assert not torch.equal(result.model[2].weight, model[2].weight)

    def test_weights_outside_the_mask_keep_their_bits_and_the_model_is_unchanged(self, net, erased, forget):
        before, (chosen, result) = model_digest(net), erased
        after = dict(result.model.named_parameters())

        assert all(
            torch.equal(after[name].detach()[~chosen.tensor(name)], weight.detach()[~chosen.tensor(name)])
            for name, weight in net.named_parameters()
        )
        assert (result.model(forget[0]).argmax(1) == 1).float().mean() < 0.5
        assert model_digest(net) == before

    def test_the_seed_decides(self, net, forget, retain):
        def digest(**given):
            result = salun.unlearn(net, "random_label", forget=forget, retain=retain, **given, **QUIET)
            return model_digest(result.model)

        one = digest(seed=1, config={"epochs": 1})
        assert one == digest(config={"epochs": 1, "seed": 1})
        assert one != digest(seed=2, config={"epochs": 1})


class TestEvaluate:
    def test_the_evidence_is_what_the_gate_takes(self, net, erased, forget, retain):
        chosen, result = erased
        loader = DataLoader(TensorDataset(*images_of(90, seed=3)), batch_size=8, shuffle=True)
        evidence = salun.evaluate(net, result, forget=forget, retain=retain, test=loader, mask=chosen)

        assert evidence.integrity.frozen_changed == 0
        assert (evidence.forgotten.kinds, evidence.forgotten.classes) == (["class"], [1])
        assert evidence.forgotten.train_count == len(forget[1]) + len(retain[1])
        assert evidence.metrics["UA"].after > evidence.metrics["UA"].before
        assert evidence.metrics["TA"].n == 60
        assert (evidence.run.method, evidence.run.density) == ("salun", chosen.density)
        verdicts = {item.rule: item.passed for item in decide(evidence, load_policy("classifier")).verdicts}
        assert verdicts["frozen weights"]
        assert verdicts["forget set"]

    def test_a_model_that_changed_outside_the_mask_is_found(self, net, erased, forget, retain):
        chosen, result = erased
        other = SaliencyMask.random({name: tuple(one.shape) for name, one in net.named_parameters()}, 0.1, seed=0)
        evidence = salun.evaluate(net, result, forget=forget, retain=retain, test=images_of(30), mask=other)

        assert evidence.integrity.frozen_changed > 0
        assert not decide(evidence, load_policy("classifier")).passed

    def test_the_digests_are_of_the_tensors(self, net, forget, retain):
        def measured(forget=forget, retain=retain):
            return salun.evaluate(net, net, forget=forget, retain=retain, test=images_of(30)).measured

        assert measured() == measured(forget=TensorDataset(*forget))
        assert measured().split != measured(retain=(1 - retain[0], retain[1])).split
        assert measured().forget_set != measured(forget=(forget[0][:9], forget[1][:9])).forget_set

    def test_samples_of_a_class_that_stays_are_samples(self, net):
        evidence = salun.evaluate(net, net, forget=images_of(6), retain=images_of(60), test=images_of(30))

        assert (evidence.forgotten.kinds, evidence.forgotten.classes) == (["samples"], [])


class Terminal(io.StringIO):
    def isatty(self):
        return True


class TestProgress:
    def test_nothing_is_shown_in_a_pipe(self, net, forget, capfd):
        salun.mask(net, forget)

        assert capfd.readouterr() == ("", "")

    @pytest.mark.parametrize("progress", [True, False])
    def test_a_terminal_gets_a_bar(self, net, forget, retain, monkeypatch, progress):
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setenv("TERM", "xterm")
        salun.unlearn(net, "finetune", forget=forget, retain=retain, config={"epochs": 1}, progress=progress)

        assert ("finetune: loss retain" in terminal.getvalue()) is progress


CLASS = {"kind": "class", "class_name": "3"}
RECIPE = {"epochs": 2, "learning_rate": 0.01, "batch_size": 64}


@pytest.fixture(scope="module")
def saved(digits_model):
    """The digits' classifier with a class unlearned: (model, mask, result)."""
    model = salun.load(digits_model)
    images = salun.sets(model, CLASS)
    chosen = salun.mask(model, images.forget, density=0.5, **QUIET)
    result = salun.unlearn(
        model, "salun", forget=images.forget, retain=images.retain, mask=chosen, config=RECIPE, seed=3, **QUIET
    )
    return model, chosen, result


def test_the_default_compares_with_held_out_images(net, forget, retain):
    chosen, few = salun.mask(net, forget, **QUIET), images_of(20, seed=4)
    made = salun.unlearn(net, forget=forget, retain=retain, mask=chosen, held_out=few, **QUIET)
    kept = int((few[1] != 1).sum())  # class 1 is forgotten as a whole

    assert made.method == "salun_adaptive"
    assert made.ended.endswith(f"compared with {kept} images of the validation split")


class TestModelsWithACard:
    def test_mask_and_model_are_those_of_the_steps(self, saved, digits_model):
        model, chosen, result = saved
        inputs = inputs_of(TASKS["classification"], load_model(digits_model), [parse_target(CLASS, "")])
        config, device = method_config("salun", {**RECIPE, "seed": 3, "device": "cpu"}), torch.device("cpu")
        of_steps = make_mask(TASKS["classification"], inputs, "salun", config, 0.5, device)
        same = TASKS["classification"].unlearn(inputs, "salun", config, of_steps)

        assert chosen == of_steps
        assert model_digest(result.model) == model_digest(same.model)
        assert salun.load(digits_model).digest == model.digest == model_digest(model.model)

    def test_pixels_are_normalised_by_the_card(self, saved):
        model, chosen, _ = saved
        forget, held_out = salun.sets(model, CLASS).forget, salun.sets(model, CLASS).held_out

        assert held_out.ids == model.split.ids("validation")
        assert salun.mask(model, (forget.images, forget.labels), **QUIET) == chosen

    def test_a_result_is_published_through_the_gate(self, saved, digits_line, store, tmp_path):
        _, chosen, _ = saved
        before = salun.load(digits_line, store.uri)
        sets = salun.sets(before, CLASS)
        # The default, which undoes what costs a point: a rate by hand keeps the retained images or not, by the seed.
        images = {"forget": sets.forget, "retain": sets.retain, "held_out": sets.held_out}
        result = salun.unlearn(before, **images, mask=chosen, **QUIET)
        done = salun.publish(
            before, result, forget=CLASS, line=digits_line, store=store.uri, mask=chosen, folder=tmp_path, **QUIET
        )
        after = salun.load(f"{digits_line}@HEAD", store.uri)

        assert done.decision.passed
        assert require_head(store, digits_line).version == done.version
        assert after.digest == model_digest(result.model)
        assert len(after.split.train) < len(before.split.train)
        assert (tmp_path / "evidence.json").is_file()
        assert next(result.model.parameters()).device == next(before.model.parameters()).device
        with pytest.raises(ConflictError, match="HEAD of digits is another model"):
            salun.publish(before, result, forget=CLASS, line=digits_line, store=store.uri, mask=chosen, **QUIET)

    def test_a_refusal_leaves_the_line_as_it_was(self, saved, digits_line, store):
        model, chosen, result = saved
        before, handlers = require_head(store, digits_line), [*logging.getLogger().handlers]
        other = SaliencyMask.random(chosen.shapes, 0.5, seed=1)
        with pytest.raises(GateRefusedError, match="weights outside the mask changed"):
            salun.publish(model, result, forget=CLASS, line=digits_line, store=store.uri, mask=other, **QUIET)

        assert require_head(store, digits_line) == before
        assert logging.getLogger().handlers == handlers  # the program's own logs go on


class TestSave:
    def test_a_module_begins_a_line(self, digits_model, store, tmp_path):
        model, module = salun.load(digits_model), build_classifier("resnet8", 10, 1, 8).eval()
        module.load_state_dict(model.model.state_dict())
        scale = {"mean": model.card.mean, "std": model.card.std}
        made = salun.save(module, tmp_path / "m", arch="resnet8", data="digits", **scale, line="own", store=store.uri)

        assert made.digest == model.digest == salun.load("own", store.uri).digest
        with pytest.raises(ConflictError, match="own exists"):
            salun.save(module, tmp_path / "n", arch="resnet8", data="digits", line="own", store=store.uri)

    def test_a_module_that_computes_something_else_is_refused(self, digits_model, tmp_path):
        class Doubled(type(salun.load(digits_model).model)):
            def forward(self, images):
                return 2 * super().forward(images)

        module = salun.load(digits_model).model
        module.__class__ = Doubled
        with pytest.raises(ModelError, match="computes something else"):
            salun.save(module, tmp_path / "m", arch="resnet8", data="digits")

        assert not (tmp_path / "m").exists()
