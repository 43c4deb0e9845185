from salun_core.registry.history import history
from salun_core.registry.holds import VersionDisposal, record_disposal
from salun_core.registry.versions import publish, publish_head, stage_version
from salun_core.storage.keys import blob_key, delta_key
from salun_core.times import utc_now
from tests.support.folder_model import TEXT, UNET, VAE, write_folder


def kept(store):
    return [version.kept for version in history(store, "sd", lambda run: None)]


def test_the_storage_form_of_a_folder_covers_all_its_weights(store, tmp_path):
    before, after = write_folder(tmp_path / "before"), write_folder(tmp_path / "after", 4000)
    head, parent = publish(store, {"line": "sd", "method": "train"}, before)
    child = {"line": "sd", "method": "salun", "parent": head.version, "run": "run-1"}
    digest, manifest = stage_version(store, child, after, {name: before[name] for name in (UNET, VAE, TEXT)})
    publish_head(store, "sd", digest, head.version, "run-1")
    assert kept(store) == ["sparse", "whole"]
    store.upload(after[UNET], blob_key(manifest.files[UNET].sha256))
    assert kept(store) == ["whole", "whole"]
    store.delete(delta_key(manifest.files[UNET].sha256))
    store.delete(blob_key(parent.files[UNET].sha256))  # the VAE is still there: both versions need it
    assert kept(store) == ["whole", "missing"]
    fields = {"line": "sd", "version": head.version, "files": [UNET], "size": 1, "by": "purge", "reason": "superseded"}
    record_disposal(store, VersionDisposal(**fields, at=utc_now()))
    assert kept(store) == ["whole", "purged"]
