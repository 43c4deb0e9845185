"""A model whose text encoder was trained: allowed by its card, saved, and measured with its own text encoder."""

import copy
import json
import shutil
from dataclasses import replace

import pytest

pytest.importorskip("diffusers", reason="the `diffusion` extra is not installed")
pytest.importorskip("transformers", reason="the `diffusion` extra is not installed")

import torch
from safetensors.torch import load_file, save_file

from salun_core.config import load
from salun_core.diffusion.sampling import images
from salun_core.errors import ModelError, UsageError
from salun_core.evaluation.evidence import Evidence, RunFacts
from salun_core.evaluation.generated_images import Evaluators
from salun_core.gate.levels import claimed
from salun_core.gate.policy import Policy
from salun_core.methods.diffusion import diffusion_config, unlearn_denoiser
from salun_core.methods.recipe import Recipe
from salun_core.models.card import DiffusionEvaluation
from salun_core.models.diffusers_folder import load_diffusion, save_diffusion
from salun_core.registry.lookup import read_version
from salun_core.registry.versions import fetch_version
from salun_core.steps.context import RunContext
from salun_core.steps.evaluation import evaluate
from salun_core.steps.mask import compute_mask
from salun_core.steps.run import run_all
from salun_core.steps.run_form import UnlearningForm
from salun_core.steps.unlearning import run_unlearning
from salun_core.tasks import open_inputs, register_model
from salun_core.tasks.diffusion.evaluation import measure, require_same_parts
from salun_core.tasks.diffusion.examples import build_example_sets
from salun_core.tasks.diffusion.importing import import_diffusion
from salun_core.tasks.task import Candidate
from tests.support.tiny_diffusion import CLASSES, PROMPTS, edit_json, save_model_folder, save_raw
from tests.support.tiny_diffusion_models import PERMISSIVE, target_file

pytestmark = pytest.mark.slow

TEXT, UNET = "text_encoder/model.safetensors", "unet/diffusion_pytorch_model.safetensors"
CPU = torch.device("cpu")
SETTINGS = {
    "selection": "text",
    "steps": 2,
    "epochs": 1,
    "batch_size": 2,
    "start_steps": 2,
    "attack_steps": 1,
    "learning_rate": 0.01,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def allowing(tmp_path_factory):
    base = tmp_path_factory.mktemp("allowing")
    evaluation = DiffusionEvaluation(images_per_class=2, steps=2, relearn_steps=4, attack_steps=1)
    return save_model_folder("sd1", base / "model", base, evaluation=evaluation, trainable_text_encoder=True)


@pytest.fixture
def forget(tmp_path):
    return target_file(tmp_path, kind="concept", prompts=PROMPTS[:1], anchor_prompt=PROMPTS[1], images=2)


def with_another_encoder(folder, to):
    """Copy a model folder and change the weights of its text encoder, as if a method had trained them."""
    shutil.copytree(folder, to)
    tensors = load_file(to / TEXT)
    generator = torch.Generator().manual_seed(3)
    new = {name: tensor + 0.5 * torch.randn(tensor.shape, generator=generator) for name, tensor in tensors.items()}
    save_file(new, to / TEXT, metadata={"format": "pt"})
    return to


def candidate(folder):
    return Candidate(load_diffusion(folder), RunFacts(method="adv_unlearn"), None)


class Recorder:
    """Stands for an image classifier; keeps the images that it is shown."""

    classes, digest = CLASSES, "0" * 64

    def __init__(self):
        self.seen = []

    def predict(self, images):
        self.seen.append(images)
        return torch.zeros(len(images), dtype=torch.int64)


def test_a_change_of_the_text_encoder_alone_changes_the_images(allowing, forget, tmp_path):
    inputs = open_inputs(allowing, forget)
    changed = with_another_encoder(allowing, tmp_path / "changed")
    grids = {
        name: measure(inputs, candidate(folder), Evaluators(), CPU).generation.grids[0]
        for name, folder in {"same": allowing, "changed": changed}.items()
    }
    assert grids["same"].before == grids["same"].after == grids["changed"].before
    assert grids["changed"].after != grids["changed"].before


def test_relearning_and_attack_use_the_text_encoder_of_the_model_after(allowing, forget, tmp_path):
    inputs = open_inputs(allowing, forget)
    changed = load_diffusion(with_another_encoder(allowing, tmp_path / "changed"))
    recorder = Recorder()
    evidence = measure(inputs, candidate(changed.components.folder), Evaluators(classifier=recorder), CPU)
    assert {"UA_relearned", "attack_success"} <= evidence.metrics.keys()
    untrained, relearned, *_ = recorder.seen[:5]
    before, before_attacked, after, after_attacked, *_, restored = recorder.seen[5:]
    assert torch.equal(untrained, after)
    assert not torch.equal(before, after)
    assert torch.equal(restored, before)  # the denoiser is the same
    assert evidence.metrics["restored"].n == 2
    assert not torch.equal(before_attacked, after_attacked)
    family = replace(inputs, original=changed).family(CPU)
    config = diffusion_config("finetune", {"steps": 1, "epochs": 1, "schedule": "constant", "device": "cpu", "seed": 1})
    sets = replace(build_example_sets(inputs, config, CPU), table=family.conditions(inputs.rows.names))
    taught = family.denoiser.of(unlearn_denoiser(family.denoiser, sets, "finetune", config=config).model)
    sampler = family.sampler(inputs.card.evaluation)
    drawn = torch.cat(list(images(taught, sets.table, sampler, [0, 0], [0, 1], family.decode)))
    assert torch.equal(relearned, drawn)


def test_a_text_encoder_that_the_card_forbids_to_train_is_refused(allowing, forget, tmp_path):
    forbidding = shutil.copytree(allowing, tmp_path / "forbidding")
    edit_json(forbidding / "model.json", trainable_text_encoder=False)
    changed = with_another_encoder(forbidding, tmp_path / "changed")
    context = RunContext(forbidding, forget, device="cpu")
    paths = tmp_path / "evidence.json", tmp_path / "report.html"
    with pytest.raises(ModelError, match=f"more than the denoiser: {TEXT}"):
        evaluate(context, changed, *paths)
    edit_json(changed / "model.json", trainable_text_encoder=True)  # its parent decides
    with pytest.raises(ModelError, match="differ in trainable_text_encoder: the original's is False"):
        evaluate(context, changed, *paths)
    assert not any(path.exists() for path in paths)
    recipe = Recipe(method="adv_unlearn", method_config=SETTINGS)
    with pytest.raises(UsageError, match="card does not allow a trained text encoder"):
        run_unlearning(context, recipe, None, tmp_path / "after")
    model = load_diffusion(forbidding)
    with pytest.raises(ModelError, match="the card of the original does not allow it"):
        save_diffusion(
            tmp_path / "after",
            model,
            model.network,
            model.card,
            model.split,
            None,
            model.components.parts["text_encoder"],
        )
    assert not (tmp_path / "after").exists()


def test_a_method_that_trains_it_gets_a_mask_that_restricts_nothing(allowing, forget, tmp_path):
    recipe, context = Recipe(method="adv_unlearn", method_config=SETTINGS), RunContext(allowing, forget, device="cpu")
    assert compute_mask(context, recipe, tmp_path / "mask").density == 1


def test_only_the_weights_of_the_text_encoder_may_differ(allowing, tmp_path):
    changed = with_another_encoder(allowing, tmp_path / "changed")
    require_same_parts(load_diffusion(allowing), load_diffusion(changed))
    edit_json(changed / "text_encoder" / "config.json", layer_norm_eps=0.1)
    with pytest.raises(ModelError, match=r"more than the denoiser: text_encoder/config.json"):
        require_same_parts(load_diffusion(allowing), load_diffusion(changed))


def test_a_trained_text_encoder_is_no_retraining(allowing, forget, tmp_path):
    changed = candidate(with_another_encoder(allowing, tmp_path / "changed"))
    run = replace(changed, facts=RunFacts(method="retrain"))
    evidence = measure(open_inputs(allowing, forget), run, Evaluators(), CPU)
    verdicts = claimed(Policy(**PERMISSIVE), evidence)
    assert not verdicts[0].passed
    assert verdicts[0].reason.endswith("distance unknown")


def test_a_text_encoder_that_an_older_library_stored_keeps_its_layout(allowing, tmp_path):
    old = shutil.copytree(allowing, tmp_path / "old")
    stored = {f"text_model.{name}": tensor.half() for name, tensor in load_file(old / TEXT).items()}
    positions = {"text_model.embeddings.position_ids": torch.arange(12)[None]}
    save_file({**stored, **positions}, old / TEXT, metadata={"format": "pt"})
    model = load_diffusion(old)
    encoder = copy.deepcopy(model.components.parts["text_encoder"]).float()
    digest = save_diffusion(tmp_path / "new", model, model.network, model.card, model.split, None, encoder)
    assert digest == model.digest  # the same bytes
    encoder.final_layer_norm.bias.data += 1
    save_diffusion(tmp_path / "new", model, model.network, model.card, model.split, None, encoder)
    new = load_file(tmp_path / "new" / TEXT)
    assert {name for name, tensor in load_file(old / TEXT).items() if not torch.equal(tensor, new[name])} == {
        "text_model.final_layer_norm.bias"
    }


def test_only_a_single_clip_text_encoder_can_be_trained(tmp_path):
    for name in ("sdxl", "ddpm"):
        raw = save_raw(name, tmp_path / name)
        with pytest.raises(UsageError, match="text encoder of this model cannot be trained"):
            import_diffusion(str(raw), None, tmp_path / "model", classes=CLASSES, trainable_text_encoder=True)
    assert not (tmp_path / "model").exists()


@pytest.mark.s3
def test_a_published_version_has_the_trained_text_encoder(store, digits_model, tmp_path):
    names, evaluation = list("0123456789"), DiffusionEvaluation(judge=str(digits_model), images_per_class=1, steps=2)
    options = {"classes": names, "evaluation": evaluation, "trainable_text_encoder": True}
    import_diffusion(str(save_raw("sd1", tmp_path / "raw")), None, tmp_path / "model", **options)
    parent = register_model(store, "sd", tmp_path / "model", "import", 0)
    store.put_new("policy.json", json.dumps(PERMISSIVE).encode())
    form = UnlearningForm(
        model_line="sd",
        store_uri=store.uri,
        forget_manifest_uri=target_file(
            tmp_path, kind="concept", prompts=["an image of a 3"], anchor_prompt="an image of a 4", images=2
        ),
        method="adv_unlearn",
        method_config=SETTINGS,
        policy_uri=f"{store.uri}/policy.json",
    )
    version = run_all(form, tmp_path / "run", run="run-1").published.version
    old, new = (read_version(store, "sd", digest).files for digest in (parent, version))
    assert {name for name, entry in old.items() if entry != new[name]} == {"model.json", TEXT}
    fetch_version(store, "sd", version, tmp_path / "fetched")
    before, after = load_diffusion(tmp_path / "model"), load_diffusion(tmp_path / "fetched")
    require_same_parts(before, after)
    assert after.card.trainable_text_encoder
    parts = [before.components.parts[name].parameters() for name in ("unet", "text_encoder")]
    found = load(Evidence, tmp_path / "run" / "evidence.json").integrity
    assert found.weights == sum(weight.numel() for part in parts for weight in part)
    assert 0 < found.weights_changed < found.weights
    assert (found.frozen_changed, found.non_finite, found.distance) == (None, 0, None)
